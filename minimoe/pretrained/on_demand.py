"""Weights in a model folder, each read when it is first needed.

A dense parameter is read when a layer first asks for it: as a view of the file if the layer can use its bytes as they are, else as a copy
in the dtype of the computation. The experts of a layer have addresses reserved for all of them, [E, ...], and an expert's slice takes
memory only once a token was routed to it. If memory is bounded, the least recently used weights are evicted, and read again when they are
needed: the pages of views and slices go back to the system, copies are dropped.
"""

from __future__ import annotations

import math
import mmap
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


class WeightCache:
    """The weights in memory, least recently used first, and how many bytes they may take."""

    def __init__(self, budget: int | None = None) -> None:
        self.budget = budget  # bytes; None: no limit
        self.used = 0
        self.entries: OrderedDict[object, tuple[int, Callable[[], None]]] = OrderedDict()

    def insert(self, key: object, size: int, evict: Callable[[], None], keep: set[object] | None = None) -> None:
        """Add `size` bytes, evicting others than `keep` if they do not fit. Nothing is evicted while gradients are recorded."""
        while self.budget is not None and self.used + size > self.budget and not grad_enabled():
            oldest = next((key for key in self.entries if key not in (keep or ())), None)
            if oldest is None:
                break
            old_size, evict_oldest = self.entries.pop(oldest)
            self.used -= old_size
            evict_oldest()
        self.entries[key] = (size, evict)
        self.used += size

    def mark_used(self, key: object) -> None:
        """Make an entry the last to be evicted."""
        self.entries.move_to_end(key)


class DenseSource:
    """The source of one parameter that every token needs."""

    def __init__(self, location: Location, dtype: npt.DTypeLike, backend: Backend, cache: WeightCache) -> None:
        self.location, self.dtype, self.backend, self.cache = location, np.dtype(dtype), backend, cache
        self.array: Array | None = None

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
            self.cache.insert(self, self.size, self.evict)
            view = self.location.mapped(self.dtype)
            self.array = self.backend.adopt(self.read() if view is None else view)
        elif self.cache.budget is not None:
            self.cache.mark_used(self)
        return self.array

    def read(self, expert: int | None = None, exact: bool = False) -> Host:
        """Read the numbers into a new array; `exact`: as float64 if the file has float64."""
        out = np.empty(self.location.shape, _width(self, exact))
        self.location.read(out)
        return out

    def evict(self) -> None:
        """Free the memory."""
        self.array = None
        self.location.release()


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
        """Return the stack. While the experts run, only those that have rows are read; at other times all are."""
        assert self.owner is not None
        if self.array is not None:
            return self.array
        if not self.owner.running:
            self.owner.load(range(self.location.shape[0]))
        adopted = self.backend.adopt(self.reserved())
        seen = self.backend.host_view(adopted)
        if seen is None or not np.may_share_memory(seen, self.reserved()):  # a device's memory has no pages to leave untouched
            self.array, self.stack, self.memory = adopted, None, None
        return adopted

    def reserved(self) -> Host:
        """Return addresses for all experts; a page takes memory when it is first written."""
        if self.stack is None:
            size = math.prod(self.location.shape) * self.dtype.itemsize
            self.memory = mmap.mmap(-1, max(1, size))
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
        self.running = False
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
        self.load(np.flatnonzero(np.diff(np.asarray(bounds))))
        self.running = True
        try:
            yield
        finally:
            self.running = False

    def load(self, experts: Any) -> None:
        """Read those of these experts that are not in memory."""
        keep: set[object] = {(self, int(e)) for e in experts}
        for e in map(int, experts):
            if self.resident[e]:
                self.cache.mark_used((self, e))
                continue
            self.cache.insert((self, e), self.expert_size, lambda e=e: self.evict(e), keep)  # type: ignore[misc]
            for source in self.sources:
                source.load(e)
            self.resident[e] = True

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
                layer.load(range(layer.experts))

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
