"""Weights in a model folder, each read when it is first needed.

A dense parameter is read when a layer first asks for it, and stays: as a view of the file if the layer can use its bytes as they are, else
as a copy in the dtype of the computation. The experts of a layer have addresses reserved for all of them, [E, ...], and an expert's slice
takes memory only once a token was routed to it. If memory is bounded, the least recently used experts that nobody uses are evicted, and
read again when they are needed: the pages of their slices go back to the system.

Several threads may compute with one model. Whoever uses experts holds a `Lease` of them, and they stay until it is given back: when the
layer is done, and when no array of theirs is left, which a graph keeps for its gradients.
"""

from __future__ import annotations

import math
import mmap
import threading
import weakref
from collections import Counter, OrderedDict, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from minimoe.backend import Array, Backend
from minimoe.engine.grad_mode import grad_enabled
from minimoe.errors import ConfigError
from minimoe.layers.module import Parameter

if TYPE_CHECKING:
    from minimoe.pretrained.locating import Location

Host = npt.NDArray[Any]
SMALL = 1_000_000_000  # bytes, which are read in less than a second

# Python shares anonymous memory by default, and the system keeps shared pages although nobody wants them any longer.
PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}

running: ContextVar[Lease | None] = ContextVar("minimoe_running_experts", default=None)
"""What this thread's layer holds while its experts run."""


Key = tuple["ResidentExperts", int]


class Lease:
    """Experts of one layer that are in use: they stay in memory until every holder has released them."""

    def __init__(self, layer: ResidentExperts, experts: Sequence[int], runs: bool) -> None:
        self.layer, self.keys = layer, [(layer, e) for e in experts]
        self.runs = runs  # its layer computes: it ends without waiting for anything
        self.holders = 0


class WeightCache:
    """The experts in memory, least recently used first, and how many bytes all weights may take. One lock guards everything here."""

    def __init__(self, budget: int | None = None) -> None:
        self.budget = budget  # bytes; None: no limit
        self.used = 0  # bytes of all weights in memory
        self.unread = 0  # bytes of dense weights that are still to be read: there is always room for them
        self.entries: OrderedDict[Key, None] = OrderedDict()
        self.pins: Counter[Key] = Counter()  # leases of each expert
        self.running = 0  # leases whose layer computes at this moment
        self.changed = threading.Condition()  # notified when a layer has run
        self.queue: deque[object] = deque()  # leases that wait for room, first come, first served
        self.gone: deque[Lease] = deque()  # leases of which an array is gone; filled by the garbage collector, at any moment

    def add_dense(self, size: int) -> None:
        """Count a dense weight that is in memory from now on."""
        self.used += size
        self.unread -= size

    @contextmanager
    def lease(self, layer: ResidentExperts, experts: Sequence[int], runs: bool = False) -> Iterator[Lease]:
        """Have these experts of a layer in memory, and keep them there within the block.

        Waits for layers that run in other threads if memory is full of what they use; a thread that waits has none running, so they end.
        """
        lease = Lease(layer, experts, runs)
        try:
            with self.changed:
                self._begin(lease)
            yield lease
        finally:
            with self.changed:
                self._end(lease)

    def _begin(self, lease: Lease) -> None:
        if self.budget is not None:
            self._wait_for_room(lease)
        for key in lease.keys:
            layer, expert = key
            if not layer.resident[expert]:
                layer.read(expert)
                self.used += layer.expert_size
            if self.budget is not None:
                self.entries[key] = None
                self.entries.move_to_end(key)
        self.pins.update(lease.keys)
        self.running += lease.runs
        lease.holders = 1

    def _end(self, lease: Lease) -> None:
        if lease.holders:  # it has begun
            self.running -= lease.runs
            self._release(lease)
            self._release_collected()
            self.changed.notify_all()

    def hold_for(self, array: Any, lease: Lease) -> None:
        """Hold a lease's experts as long as an array of them is there."""
        lease.holders += 1
        weakref.finalize(array, self.gone.append, lease).atexit = False

    def _release(self, lease: Lease) -> None:
        lease.holders -= 1
        if not lease.holders:
            self.pins.subtract(lease.keys)
            self.pins = +self.pins

    def _release_collected(self) -> None:
        while self.gone:
            self._release(self.gone.popleft())

    def _wait_for_room(self, lease: Lease) -> None:
        """Return when those of these experts that are not in memory have room, or when waiting would not make any."""
        self.queue.append(lease)
        try:
            while self.queue[0] is not lease or not self._make_room(lease):
                self.changed.wait()
        finally:
            self.queue.remove(lease)
            self.changed.notify_all()

    def _make_room(self, lease: Lease) -> bool:
        """Evict experts that nobody uses until these fit.   -> False if layers that run hold too many

        Nothing is evicted while gradients are recorded, and what graphs hold stays: then the bound is exceeded.
        """
        assert self.budget is not None
        self._release_collected()
        size = lease.layer.expert_size
        excess = self.used + self.unread + size * sum(not layer.resident[e] for layer, e in lease.keys) - self.budget
        if excess <= 0 or grad_enabled():
            return True
        wanted = set(lease.keys)
        for key in [key for key in self.entries if key not in wanted and not self.pins[key]]:
            layer, expert = key
            del self.entries[key]
            layer.evict(expert)
            self.used -= layer.expert_size
            excess -= layer.expert_size
            if excess <= 0:
                return True
        return not self.running or running.get() is not None


class DenseSource:
    """The source of one parameter that every token needs."""

    def __init__(self, location: Location, dtype: npt.DTypeLike, backend: Backend, cache: WeightCache) -> None:
        self.location, self.dtype, self.backend, self.cache = location, np.dtype(dtype), backend, cache
        self.array: Array | None = None
        cache.unread += self.size

    @property
    def size(self) -> int:
        """Bytes in memory."""
        return math.prod(self.location.shape) * self.dtype.itemsize

    @property
    def complete(self) -> bool:
        """True if it has been read."""
        return self.array is not None

    def get(self) -> Array:
        if self.array is None:
            with self.cache.changed:
                if self.array is None:
                    view = self.location.mapped(self.dtype)
                    self.array = self.backend.adopt(self.read() if view is None else view)
                    self.cache.add_dense(self.size)
        return self.array

    def read(self, expert: int | None = None, exact: bool = False) -> Host:
        """Read the numbers into a new array; `exact`: as float64 if the file has float64."""
        out = np.empty(self.location.shape, _width(self, exact))
        self.location.read(out)
        return out


class ExpertSource:
    """The source of one stacked parameter of a layer's experts [E,...]. `owner` knows which slices are in memory."""

    def __init__(self, location: Location, dtype: npt.DTypeLike, backend: Backend) -> None:
        self.location, self.dtype, self.backend = location, np.dtype(dtype), backend
        self.owner: ResidentExperts | None = None
        self.memory: mmap.mmap | None = None
        self.stack: Host | None = None
        self.array: Array | None = None  # on a device: all experts

    @property
    def slice_size(self) -> int:
        """Bytes of one expert's slice."""
        return math.prod(self.location.shape[1:]) * self.dtype.itemsize

    @property
    def complete(self) -> bool:
        """True if every expert's slice has been read."""
        return self.array is not None or (self.owner is not None and bool(self.owner.resident.all()))

    def get(self) -> Array:
        """Return the stack. While the experts run, only those that have rows need be in memory; at other times all are."""
        assert self.owner is not None
        if self.array is not None:
            return self.array
        lease = running.get()
        if lease is not None and lease.layer is self.owner:
            return self._adopted(lease)
        with self.owner.cache.lease(self.owner, range(self.location.shape[0])) as lease:
            return self._adopted(lease)

    def _adopted(self, lease: Lease) -> Array:
        """Return the stack as the backend's array. The lease is held as long as that array is there."""
        cache = lease.layer.cache
        with cache.changed:
            if self.array is not None:
                return self.array
            adopted = self.backend.adopt(self.reserved()[...])  # an array of its own, whose end is the end of this use
            seen = self.backend.host_view(adopted)
            if seen is None or not np.may_share_memory(seen, self.reserved()):  # a device's memory has no pages to leave untouched
                self.array, self.stack, self.memory = adopted, None, None
            elif cache.budget is not None:
                cache.hold_for(adopted, lease)
            return adopted

    def reserved(self) -> Host:
        """Return addresses for all experts; a page takes memory when it is first written."""
        if self.stack is None:
            size = math.prod(self.location.shape) * self.dtype.itemsize
            self.memory = mmap.mmap(-1, max(1, size), **PRIVATE)
            self.stack = np.frombuffer(self.memory, self.dtype, math.prod(self.location.shape)).reshape(self.location.shape)
        return self.stack

    def read(self, expert: int | None = None, exact: bool = False) -> Host:
        """Read all experts, or one expert's slice, into a new array; `exact` as in `DenseSource.read`."""
        out = np.empty(self.location.shape if expert is None else self.location.shape[1:], _width(self, exact))
        for e in range(len(out)) if expert is None else (expert,):
            self.location.read(out[e] if expert is None else out, e)
        return out

    def load(self, expert: int) -> None:
        """Read an expert's slice into the stack."""
        self.location.read(self.reserved()[expert], expert)

    def evict(self, expert: int) -> None:
        """Return the pages of an expert's slice to the system, except those that it shares with its neighbours."""
        start, stop = expert * self.slice_size, (expert + 1) * self.slice_size
        start, stop = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, stop // mmap.PAGESIZE * mmap.PAGESIZE
        if self.memory is not None and start < stop:
            self.memory.madvise(mmap.MADV_DONTNEED, start, stop - start)


def _width(source: DenseSource | ExpertSource, exact: bool) -> np.dtype[Any]:
    return np.dtype(np.float64) if exact and source.location.dtype == "F64" else source.dtype


class ResidentExperts:
    """The experts of one layer, and which of them are in memory."""

    def __init__(self, sources: list[ExpertSource], cache: WeightCache) -> None:
        self.sources, self.cache = sources, cache
        self.experts = sources[0].location.shape[0]
        self.resident = np.zeros(self.experts, dtype=bool)
        for source in sources:
            source.owner = self

    @property
    def expert_size(self) -> int:
        """Bytes of one expert."""
        return sum(source.slice_size for source in self.sources)

    @contextmanager
    def on_demand(self, offsets: Array) -> Iterator[None]:
        """Enter while the experts run on rows with these offsets [E+1]; reads the experts that have rows. (`Experts.on_demand`)"""
        bounds = self.sources[0].backend.host_view(offsets)
        if bounds is None or self.sources[0].array is not None:
            yield
            return
        experts = np.flatnonzero(np.diff(np.asarray(bounds)))
        stay = self.cache.budget is None and self.resident[experts].all()
        with nullcontext(Lease(self, (), True)) if stay else self.cache.lease(self, experts.tolist(), runs=True) as lease:
            token = running.set(lease)
            try:
                yield
            finally:
                running.reset(token)

    def read_all(self) -> None:
        """Read those of the experts that are not in memory."""
        with self.cache.lease(self, range(self.experts)):
            pass

    def read(self, expert: int) -> None:
        """Read one expert."""
        for source in self.sources:
            source.load(expert)
        self.resident[expert] = True

    def evict(self, expert: int) -> None:
        """Free an expert's memory."""
        self.resident[expert] = False
        for source in self.sources:
            source.evict(expert)


class FileWeights:
    """All weights that a model reads from its folder."""

    def __init__(self, cache: WeightCache, dense: list[DenseSource], experts: list[ResidentExperts]) -> None:
        self.cache, self.dense, self.experts = cache, dense, experts
        self._check_budget()

    def _check_budget(self) -> None:
        """Raise ConfigError unless the dense weights and all experts of a layer fit: a prompt may need them at once."""
        budget = self.cache.budget
        if budget is None:
            return
        if not hasattr(mmap, "MADV_DONTNEED"):
            raise ConfigError("max_memory: this system cannot free single pages, which evicting experts needs: leave max_memory out")
        least = sum(source.size for source in self.dense) + max((layer.expert_size * layer.experts for layer in self.experts), default=0)
        if budget < least:
            raise ConfigError(
                f"max_memory = {budget / 1e6:,.1f} MB is too little: the dense weights and one layer's experts need {least / 1e6:,.1f} MB"
            )

    @property
    def complete(self) -> bool:
        """True if everything is in memory and nothing will be evicted."""
        return self.cache.budget is None and all(s.complete for s in self.dense) and all(layer.resident.all() for layer in self.experts)

    def read_if_small(self) -> None:
        """Read the rest if all weights take less than `SMALL` bytes: then decoding steps can be recorded."""
        if self.size <= SMALL:
            self.read_all()

    def read_all(self) -> None:
        """Read everything that has not been read, unless memory is bounded."""
        if self.cache.budget is None:
            for source in self.dense:
                source.get()
            for layer in self.experts:
                layer.read_all()

    @property
    def size(self) -> int:
        """Bytes of all weights in memory."""
        return sum(source.size for source in self.dense) + sum(layer.expert_size * layer.experts for layer in self.experts)


def attach(
    parameters: dict[str, Parameter], locations: dict[str, Location], experts: dict[str, list[str]], backend: Backend, dtype: str,
    budget: int | None,
) -> tuple[FileWeights, dict[str, ResidentExperts]]:  # fmt: skip
    """Give every parameter its source.   experts {path: names of a layer's expert parameters} -> all weights, {path: resident experts}"""
    computed = np.float64 if dtype == "float64" else np.float32
    cache, dense = WeightCache(budget), []
    stacked = {name: path for path, names in experts.items() for name in names}
    found: dict[str, list[ExpertSource]] = {path: [] for path in experts}
    for name, parameter in parameters.items():
        location = locations[name]
        if name in stacked:
            source: Any = ExpertSource(location, computed, backend)
            found[stacked[name]].append(source)
        else:
            source = DenseSource(location, computed, backend, cache)
            dense.append(source)
        parameter.read_from(source, backend)
    by_layer = {path: ResidentExperts(sources, cache) for path, sources in found.items()}
    return FileWeights(cache, dense, list(by_layer.values())), by_layer
