"""A problem: one kernel at one size, what it must move and compute, and how it is timed on every backend that has it."""

import math
import statistics
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from benchmarks.gpu.clocks import Call
from benchmarks.gpu.data import Data
from benchmarks.gpu.lab import COMPUTES, Lab
from minimoe.backend import Backend, kernel_kinds

SIZE = {"bfloat16": 2, "float32": 4, "float64": 8}  # bytes
FEWEST, SETS = 2, 24  # sets of inputs
CACHES = 3  # caches that the inputs together fill
ROUNDS = 2  # rounds in which contenders take turns
SECONDS = {"full": 0.12, "quick": 0.06, "tiny": 0.0}  # of one round of a contender
LEAST, MOST = 3, 40  # calls in a round
SLOW = 0.5  # seconds: one call that takes longer is a round

Row = dict[str, Any]
"""A figure in the JSON file: part, name, side, kind, ms, and sizes. A row without a figure has the reason: failed, left_out."""


@dataclass(frozen=True)
class Peer:
    """PyTorch's way to do the same: `make(device)` returns a call with its own inputs, of the same sizes as minimoe's."""

    name: str
    make: Callable[[str], Call]


@dataclass(frozen=True)
class Problem:
    """One kernel at one size: `make(backend, data)` returns a call of the kernel with its own inputs."""

    kernel: str
    sizes: dict[str, Any]
    dtype: str
    make: Callable[[Backend, Data], Call]
    bytes: int  # read and written once
    flops: int = 0
    goal: str = ""  # the target that it belongs to
    peer: Peer | None = None
    watched: str = field(default="")  # the kernel whose reference, if called, shows that this one is not the backend's own; default: kernel

    @property
    def label(self) -> str:
        return ", ".join([f"{name} {value}" for name, value in self.sizes.items()] + [self.dtype])

    def row(self, side: str) -> Row:
        """The row of this problem, without its figure."""
        shown = {"kernel": self.kernel, "side": side, "dtype": self.dtype, "sizes": self.sizes, "bytes": self.bytes}
        more = {"flops": self.flops} if self.flops else {}
        return {**shown, **more, **({"goal": self.goal} if self.goal else {})}


class Lost(Exception):
    """The device no longer answers."""

    def __init__(self, rows: list[Row]) -> None:
        super().__init__(rows)
        self.rows = rows  # of the sides that failed, the last of which took the device with it


@dataclass
class Contender:
    """A side of a problem: its calls, one for each set of inputs, and their times."""

    side: str
    kind: str
    calls: list[Call]
    times: list[float] = field(default_factory=list)


def measure(lab: Lab, problem: Problem, without: Collection[str] = (), at: Callable[[str], None] = lambda side: None) -> list[Row]:
    """A row for each backend and for the peer, except those in `without`. Raises Lost if a side took the device with it.

    `at` is called with the name of each side before its turn: for a side that never comes back nothing else is known.
    """
    contenders: list[Contender] = []
    rows: list[Row] = []
    for side, prepare in preparations(lab, problem, contenders):
        if side in without:
            continue
        at(side)
        try:
            contenders.append(prepare())
        except Exception as error:  # of any library: it becomes the row's text
            rows.append({**problem.row(side), "failed": said(error)})
            survive(lab, rows)
    for _ in range(ROUNDS):
        for contender in list(contenders):
            at(contender.side)
            try:
                contender.times += round_of(lab, contender)
            except Exception as error:
                contenders.remove(contender)
                rows.append({**problem.row(contender.side), "failed": said(error)})
                survive(lab, rows)
    return [{**problem.row(c.side), "kind": c.kind, **figures(c.times), "sets": len(c.calls)} for c in contenders] + rows


def preparations(lab: Lab, problem: Problem, before: list[Contender]) -> Iterator[tuple[str, Callable[[], Contender]]]:
    """The sides of a problem, each with the function that makes it ready. The peer gets as many sets of inputs as those `before` it."""
    for name, backend in lab.backends.items():
        if problem.dtype in COMPUTES[name]:
            yield name, partial(ready, lab, problem, name, backend)
    if problem.peer is not None and lab.torch:
        sets = max((len(contender.calls) for contender in before), default=sets_of(problem.bytes, lab.cache_bytes))
        yield problem.peer.name, partial(ready_peer, lab, problem.peer, sets)


def ready(lab: Lab, problem: Problem, name: str, backend: Backend) -> Contender:
    """The calls of a backend, each made once; `kind` says what ran."""
    data = Data(backend)
    calls = [problem.make(backend, data)]
    calls += [problem.make(backend, data) for _ in range(1, sets_of(data.bytes, lab.cache_bytes))]
    kernel = problem.watched or problem.kernel
    kind = kernel_kinds(backend).get(kernel, "")
    with reference_watched(kernel) as used:
        calls[0]()
    return warm(Contender(name, "reference" if used else kind, calls), lab)


def ready_peer(lab: Lab, peer: Peer, sets: int) -> Contender:
    """The peer's calls."""
    return warm(Contender(peer.name, "peer", [peer.make(lab.torch) for _ in range(sets)]), lab)


def warm(contender: Contender, lab: Lab) -> Contender:
    """Use every set of inputs once, so that nothing is compiled later."""
    for call in contender.calls:
        call()
    lab.check()
    return contender


def round_of(lab: Lab, contender: Contender) -> list[float]:
    """The number of calls that fill a round."""
    first = lab.clock.each(contender.calls, 1)
    if first[0] > SLOW:
        return first
    count = max(LEAST, min(MOST, int(SECONDS[lab.scale] / max(first[0], 1e-6))))
    return lab.clock.each(contender.calls, count)


def sets_of(inputs: int, cache_bytes: int) -> int:
    """The number of sets of inputs that fill three caches; at least two, so that none is used twice in a row."""
    return max(FEWEST, min(SETS, math.ceil(CACHES * cache_bytes / max(1, inputs))))


def survive(lab: Lab, rows: list[Row]) -> None:
    """Return after an error, unless the device is gone: then raise Lost."""
    try:
        lab.check()
    except Exception as error:
        raise Lost(rows) from error


def said(error: BaseException) -> str:
    """An error as a row's text."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def figures(times: list[float]) -> Row:
    """Median, fastest and slowest of calls, in ms."""
    milliseconds = {"ms": statistics.median(times), "fastest_ms": min(times), "slowest_ms": max(times)}
    return {**{name: seconds * 1e3 for name, seconds in milliseconds.items()}, "calls": len(times)}


@contextmanager
def reference_watched(kernel: str) -> Iterator[list[bool]]:
    """A list that is not empty if the reference of a kernel was called, as overrides do with what they do not cover."""
    used: list[bool] = []
    owner = next((base for base in Backend.__mro__ if kernel in vars(base)), None)
    if owner is None:
        yield used
        return
    reference = vars(owner)[kernel]

    def watched(*args: Any, **options: Any) -> Any:
        used.append(True)
        return reference(*args, **options)

    setattr(owner, kernel, watched)
    try:
        yield used
    finally:
        setattr(owner, kernel, reference)
