"""Each kernel against its reference, on the arrays that it meets in a training step."""

from __future__ import annotations

import copy
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from threading import get_ident
from typing import Any

from minimoe.backend import Backend, kernel_kinds, kernel_names, load, overridden
from minimoe.config import Config
from minimoe.study.bench.step import TrainingStep, seconds_of, step_seconds, watched
from minimoe.study.bench.work import arrays_of, bind, is_array, signature
from minimoe.study.tables import Rows, timings_table
from minimoe.training.surroundings import training_backend

COMPOSITES = {name.removesuffix("_backward") for name in kernel_names() if "saved" in signature(name).parameters}
"""The kernels that pass an opaque `saved` to their backward."""


@dataclass(frozen=True)
class KernelTiming:
    """One kernel over all its calls in a training step, including those made by other kernels."""

    kernel: str
    backend: str
    kind: str  # hand-written, library or reference
    calls: int  # per step
    ms: float  # per step: medians, each times its number of calls
    share: float  # fraction of a whole step; a composite contains others, so shares overlap
    reference_ms: float | None  # of the reference on the same arrays; None if the kernel is the reference
    shapes: list[list[int]]  # arrays of its costliest call

    @property
    def speedup(self) -> float | None:
        """The reference's time over the kernel's."""
        return None if self.reference_ms is None else self.reference_ms / self.ms

    def to_dict(self) -> dict[str, Any]:
        """Return the figures by name, as `--json` prints them."""
        return {**asdict(self), "speedup": self.speedup}


@dataclass
class KernelCall:
    """A call of a kernel, kept so that it can be repeated and timed."""

    kernel: str
    args: tuple[Any, ...]
    options: dict[str, Any]
    count: int = 1  # calls with these shapes in the step
    forward: KernelCall | None = None  # for a composite's backward: the forward call that gave its `saved`

    def on(self, backend: Backend) -> Callable[[], Any]:
        """Return the call as a function without arguments, on this backend."""
        return lambda: getattr(backend, self.kernel)(*self.args, **self.options)

    def for_reference(self, reference: Backend) -> KernelCall:
        """Return the same call for the reference: its backward gets the `saved` of the reference's own forward."""
        if self.forward is None:
            return self
        bound = bind(self.kernel, self.args, self.options)
        bound.arguments["saved"] = self.forward.on(reference)()[1]
        return KernelCall(self.kernel, bound.args, bound.kwargs)


class CallRecorder:
    """A watch that keeps one call for each kernel and each set of shapes, and counts the others."""

    def __init__(self, backend: Backend) -> None:
        self.backend, self.thread = backend, get_ident()
        self.calls: dict[tuple[Any, ...], KernelCall] = {}
        self.saved: dict[int, tuple[Any, KernelCall]] = {}  # by id(); the object is kept, so that its id is not reused

    def __call__(self, name: str, kernel: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if get_ident() != self.thread:
            return kernel(*args, **options)
        bound = bind(name, args, options)
        key = (name, *(_signature(value) for value in bound.arguments.values()))
        known = self.calls.get(key)
        if known is not None:
            known.count += 1
        written = [n for n, value in bound.arguments.items() if (n.startswith("inout_") or n == "out") and is_array(value)]
        bound.arguments.update({n: self.backend.xp.asarray(bound.arguments[n], copy=True) for n in written if known is None})
        _, forward = self.saved.get(id(bound.arguments.get("saved")), (None, None))
        call = known or self.calls.setdefault(key, KernelCall(name, bound.args, bound.kwargs, forward=forward))
        result = kernel(*args, **options)
        if name in COMPOSITES:
            self.saved[id(result[1])] = (result[1], call)
        return result


def _signature(value: Any) -> Any:
    """Return what two calls have in common if they cost the same: shapes, dtypes and options."""
    if is_array(value):
        return tuple(value.shape), str(value.dtype)
    if isinstance(value, tuple | list):
        return tuple(_signature(part) for part in value if not isinstance(part, int | float))
    return value if isinstance(value, bool | int | float | str | None) else type(value).__name__


def references_of(backend: Backend) -> Backend:
    """Return a copy of the backend with the same arrays and only reference kernels."""
    twin = copy.copy(backend)
    twin.__class__ = type("References", (type(backend),), {name: getattr(Backend, name) for name in kernel_names()})
    return twin


def bench_kernels(config: Config, backend: str | Backend = "auto", steps: int = 3) -> list[KernelTiming]:
    """Time each kernel of a training step of this configuration, and its reference; costliest first.

    Shares are of the median of `steps` whole steps. Raises as `profile_step` does.
    """
    chosen = load(backend) if isinstance(backend, str) else backend
    whole = statistics.median(step_seconds(config, chosen, steps))
    recorder = CallRecorder(chosen)
    with training_backend(twin := watched(chosen, recorder), config.train.threads):
        TrainingStep(config, twin)()
    by_kernel: dict[str, list[KernelCall]] = defaultdict(list)
    for call in recorder.calls.values():
        by_kernel[call.kernel].append(call)
    with training_backend(chosen, config.train.threads):
        timings = [_timing(chosen, kernel, calls, whole) for kernel, calls in by_kernel.items()]
    return sorted(timings, key=lambda timing: -timing.ms)


def _timing(backend: Backend, kernel: str, calls: list[KernelCall], whole: float) -> KernelTiming:
    timed = []
    for call in calls:
        sides = [call.on(backend)]
        if overridden(backend, kernel):
            reference = references_of(backend)
            sides.append(call.for_reference(reference).on(reference))
        timed.append([seconds * call.count for seconds in _medians(backend, sides)])
    own = sum(seconds[0] for seconds in timed)
    reference_ms = sum(seconds[1] for seconds in timed) * 1e3 if len(timed[0]) > 1 else None
    costliest = calls[max(range(len(calls)), key=lambda i: timed[i][0])]
    shapes = [list(array.shape) for array in arrays_of((*costliest.args, *costliest.options.values())) if array.shape]
    count = sum(call.count for call in calls)
    return KernelTiming(kernel, backend.name, kernel_kinds(backend)[kernel], count, own * 1e3, own / whole, reference_ms, shapes)


def _medians(backend: Backend, sides: Sequence[Callable[[], Any]], seconds: float = 0.1) -> list[float]:
    """Return the median time of each call. The calls alternate for 3 to 30 rounds, so that all find the machine in the same state."""

    def once(call: Callable[[], Any]) -> float:
        backend.synchronize()
        return seconds_of(lambda: (call(), backend.synchronize()))

    first = sum(once(call) for call in sides)
    rounds = int(min(30, max(3, seconds / max(first, 1e-9))))
    return [statistics.median(times) for times in zip(*([once(call) for call in sides] for _ in range(rounds)), strict=True)]


def kernels_table(timings: Sequence[KernelTiming]) -> Rows:
    """Return a table with a row for each kernel, costliest first."""
    names = sorted({timing.backend for timing in timings})
    table = timings_table(
        f"Kernels of a training step on {', '.join(names)}",
        "ms per step: the median of several calls on the step's own arrays, times the calls. Composites contain other kernels, so shares "
        "overlap. Speed-up: the reference's time over the kernel's, measured in turn on the same arrays. "
        "Mostly on: the first array of the costliest call.",
        ("kernel", "calls", "ms", "share", "reference", "speed-up", "mostly on"),
    )
    for t in timings:
        side = ("", "is the reference") if t.speedup is None else (f"{t.reference_ms:.2f}", f"{t.kind} {t.speedup:.1f} x")
        first = f"[{','.join(map(str, t.shapes[0]))}]" if t.shapes else ""
        table.add(t.kernel, str(t.calls), f"{t.ms:.2f}", f"{t.share:.1%}", *side, first)
    return table
