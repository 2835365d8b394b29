"""Weights that lie in a model folder, each read when it is first needed.

A dense parameter is read when a layer first asks for it: as a view of the file where it lies there as it is used, else as a copy in the
dtype that is computed in. The experts of a layer have one stretch of addresses reserved, [E, ...], of which an expert's slice takes memory
only once a token was routed to it. Where memory is bounded, what was not used for longest is let go, and read again if need be: a view's
pages and a slice's are given back to the system, a copy is dropped.
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
from minimoe.engine.tensor import grad_enabled
from minimoe.errors import ConfigError
from minimoe.layers.module import Parameter

if TYPE_CHECKING:
    from minimoe.pretrained.locating import Location

Host = npt.NDArray[Any]
LITTLE = 1_000_000_000  # bytes: less than a second's reading


class Store:
    """What was read, least recently used first, and how much of it may stay."""

    def __init__(self, budget: int | None = None) -> None:
        self.budget = budget  # bytes
        self.used = 0
        self.held: OrderedDict[object, tuple[int, Callable[[], None]]] = OrderedDict()

    def admit(self, what: object, size: int, let_go: Callable[[], None], keep: set[object] | None = None) -> None:
        """Take up something of `size` bytes, letting go of others than `keep` where it does not fit; gradients need all that was read."""
        while self.budget is not None and self.used + size > self.budget and not grad_enabled():
            oldest = next((key for key in self.held if key not in (keep or ())), None)
            if oldest is None:
                break
            old_size, old_let_go = self.held.pop(oldest)
            self.used -= old_size
            old_let_go()
        self.held[what] = (size, let_go)
        self.used += size

    def use(self, what: object) -> None:
        """Note that something is in use: it is now the last to go."""
        self.held.move_to_end(what)


class DenseSource:
    """The source of one parameter that a token always needs."""

    def __init__(self, location: Location, dtype: npt.DTypeLike, backend: Backend, store: Store) -> None:
        self.location, self.dtype, self.backend, self.store = location, np.dtype(dtype), backend, store
        self.array: Array | None = None

    @property
    def size(self) -> int:
        """Bytes that it takes."""
        return math.prod(self.location.shape) * self.dtype.itemsize

    @property
    def complete(self) -> bool:
        """Has it been read?"""
        return self.array is not None

    def get(self) -> Array:
        if self.array is None:
            self.store.admit(self, self.size, self.let_go)
            view = self.location.as_it_lies(self.dtype)
            self.array = self.backend.adopt(self.read() if view is None else view)
        elif self.store.budget is not None:
            self.store.use(self)
        return self.array

    def read(self, expert: int | None = None, exact: bool = False) -> Host:
        """The numbers, read into an array of their own; `exact`: in float64 where the file has that."""
        out = np.empty(self.location.shape, _width(self, exact))
        self.location.read(out)
        return out

    def let_go(self) -> None:
        """Give the memory back."""
        self.array = None
        self.location.release()


class ExpertSource:
    """The source of one stacked parameter of a layer's experts [E,...]; whose slices are there, its `Shelf` knows."""

    def __init__(self, location: Location, dtype: npt.DTypeLike, backend: Backend) -> None:
        self.location, self.dtype, self.backend = location, np.dtype(dtype), backend
        self.shelf: Shelf | None = None
        self.memory: mmap.mmap | None = None
        self.stack: Host | None = None
        self.array: Array | None = None  # on a device: all of them

    @property
    def slice_size(self) -> int:
        """Bytes of one expert's."""
        return math.prod(self.location.shape[1:]) * self.dtype.itemsize

    @property
    def complete(self) -> bool:
        """Is every expert's slice there?"""
        return self.array is not None or (self.shelf is not None and bool(self.shelf.here.all()))

    def get(self) -> Array:
        """The stack: within a call of the experts with those that it needs, else with all."""
        assert self.shelf is not None
        if self.array is not None:
            return self.array
        if not self.shelf.open:
            self.shelf.need(range(self.location.shape[0]))
        adopted = self.backend.adopt(self.reserved())
        seen = self.backend.at_hand(adopted)
        if seen is None or not np.may_share_memory(seen, self.reserved()):  # a device's memory has no pages to leave untouched
            self.array, self.stack, self.memory = adopted, None, None
        return adopted

    def reserved(self) -> Host:
        """Addresses for all experts; memory comes with what is written."""
        if self.stack is None:
            size = math.prod(self.location.shape) * self.dtype.itemsize
            self.memory = mmap.mmap(-1, max(1, size))
            self.stack = np.frombuffer(self.memory, self.dtype, math.prod(self.location.shape)).reshape(self.location.shape)
        return self.stack

    def read(self, expert: int | None = None, exact: bool = False) -> Host:
        """All experts, or one's slice, in an array of its own; `exact` as above."""
        out = np.empty(self.location.shape if expert is None else self.location.shape[1:], _width(self, exact))
        for e in range(len(out)) if expert is None else (expert,):
            self.location.read(out[e] if expert is None else out, e)
        return out

    def load(self, expert: int) -> None:
        """Read an expert's slice to its place."""
        self.location.read(self.reserved()[expert], expert)

    def let_go(self, expert: int) -> None:
        """Give the pages of an expert's slice back to the system, but for those that it shares with its neighbours."""
        start, stop = expert * self.slice_size, (expert + 1) * self.slice_size
        start, stop = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, stop // mmap.PAGESIZE * mmap.PAGESIZE
        if self.memory is not None and start < stop:
            self.memory.madvise(mmap.MADV_DONTNEED, start, stop - start)


def _width(source: DenseSource | ExpertSource, exact: bool) -> np.dtype[Any]:
    return np.dtype(np.float64) if exact and source.location.dtype == "F64" else source.dtype


class Shelf:
    """The experts of one layer, and which of them are in memory."""

    def __init__(self, sources: list[ExpertSource], store: Store) -> None:
        self.sources, self.store = sources, store
        self.experts = sources[0].location.shape[0]
        self.here = np.zeros(self.experts, dtype=bool)
        self.open = False
        for source in sources:
            source.shelf = self

    @property
    def expert_size(self) -> int:
        """Bytes of one expert."""
        return sum(source.slice_size for source in self.sources)

    @contextmanager
    def on_demand(self, offsets: Array) -> Iterator[None]:
        """While the experts run on rows with these offsets [E+1]: read those that have any. (`Experts.on_demand`)"""
        bounds = self.sources[0].backend.at_hand(offsets)
        if bounds is None or self.sources[0].array is not None:
            yield
            return
        self.need(np.flatnonzero(np.diff(np.asarray(bounds))))
        self.open = True
        try:
            yield
        finally:
            self.open = False

    def need(self, experts: Any) -> None:
        """Have these experts in memory."""
        keep: set[object] = {(self, int(e)) for e in experts}
        for e in map(int, experts):
            if self.here[e]:
                self.store.use((self, e))
                continue
            self.store.admit((self, e), self.expert_size, lambda e=e: self.let_go(e), keep)  # type: ignore[misc]
            for source in self.sources:
                source.load(e)
            self.here[e] = True

    def let_go(self, expert: int) -> None:
        """Give an expert's memory back."""
        self.here[expert] = False
        for source in self.sources:
            source.let_go(expert)


class FileWeights:
    """All that a model reads from its folder: `Transformer.weights`."""

    def __init__(self, store: Store, dense: list[DenseSource], shelves: list[Shelf]) -> None:
        self.store, self.dense, self.shelves = store, dense, shelves
        self._check_budget()

    def _check_budget(self) -> None:
        """A token needs the dense weights, and a prompt may need all experts of a layer at once."""
        budget = self.store.budget
        if budget is None:
            return
        if not hasattr(mmap, "MADV_DONTNEED"):
            raise ConfigError("max_memory: this system does not take single pages back, which letting experts go needs: leave it out")
        least = sum(source.size for source in self.dense) + max((s.expert_size * s.experts for s in self.shelves), default=0)
        if budget < least:
            raise ConfigError(
                f"max_memory = {budget / 1e6:,.1f} MB is too little: the dense weights and one layer's experts need {least / 1e6:,.1f} MB"
            )

    @property
    def complete(self) -> bool:
        """Is everything in memory, to stay?"""
        return self.store.budget is None and all(s.complete for s in self.dense) and all(shelf.here.all() for shelf in self.shelves)

    def settle(self) -> None:
        """Read the rest where all of it takes little: then nothing is looked up any more, and a step can be recorded."""
        if self.size <= LITTLE:
            self.read_all()

    def read_all(self) -> None:
        """Read what has not been read, unless memory is bounded."""
        if self.store.budget is None:
            for source in self.dense:
                source.get()
            for shelf in self.shelves:
                shelf.need(range(shelf.experts))

    @property
    def size(self) -> int:
        """Bytes that all of it takes."""
        return sum(source.size for source in self.dense) + sum(shelf.expert_size * shelf.experts for shelf in self.shelves)


def attach(
    parameters: dict[str, Parameter], locations: dict[str, Location], experts: dict[str, list[str]], backend: Backend, dtype: str,
    budget: int | None,
) -> tuple[FileWeights, dict[str, Shelf]]:  # fmt: skip
    """Give every parameter its source. `experts`: path of each layer's experts -> the names of its parameters.   -> also its shelf"""
    kept = np.float64 if dtype == "float64" else np.float32
    store, dense, shelves = Store(budget), [], {}
    stacked = {name: path for path, names in experts.items() for name in names}
    found: dict[str, list[ExpertSource]] = {path: [] for path in experts}
    for name, parameter in parameters.items():
        location = locations[name]
        if name in stacked:
            source: Any = ExpertSource(location, kept, backend)
            found[stacked[name]].append(source)
        else:
            source = DenseSource(location, kept, backend, store)
            dense.append(source)
        parameter.read_from(source, backend)
    for path, sources in found.items():
        shelves[path] = Shelf(sources, store)
    return FileWeights(store, dense, list(shelves.values())), shelves
