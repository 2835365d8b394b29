"""Where the time of a training step goes: whole steps first, then as many with a clock around every kernel.

Kernels that a composite calls are indented below it, and their time is part of its time. The time outside kernels is that of autograd,
small array operations and Python. A kernel with matrix products is compared with the machine's best product, any other with its best copy.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from threading import get_ident
from typing import Any

import numpy as np

from minimoe.backend import Backend, kernel_kinds, load
from minimoe.config import Config
from minimoe.config.cost import cost
from minimoe.study.bench.step import TrainingStep, seconds_of, step_seconds, watched
from minimoe.study.bench.work import Work, bind, work
from minimoe.study.tables import Rows, timings_table
from minimoe.training.surroundings import training_backend

KernelPath = tuple[str, ...]  # a kernel, after the kernels that called it

CEILING_PRODUCT = 1024  # rows, columns and depth
CEILING_COPY = 64 * 2**20  # bytes


@dataclass(frozen=True)
class Ceilings:
    """What this machine reached in the same process, best of several: a product of 1024 x 1024 float32 matrices, a copy of 64 MB."""

    gflops: float
    gb_per_s: float  # bytes read plus bytes written


def measure_ceilings(backend: Backend, tries: int = 5) -> Ceilings:
    """Measure both on this backend, with the current number of threads."""
    xp, n = backend.xp, CEILING_PRODUCT
    a = backend.from_host(np.sin(np.arange(n * n, dtype=np.float32)).reshape(n, n))
    source = xp.ones(CEILING_COPY // 4, dtype=xp.float32)
    target = xp.zeros_like(source)

    def product() -> None:
        xp.matmul(a, a)
        backend.synchronize()

    def copy_over() -> None:
        target[...] = source
        backend.synchronize()

    fastest = [min(seconds_of(call) for _ in range(tries + 1)) for call in (product, copy_over)]
    return Ceilings(2 * n**3 / fastest[0] / 1e9, 2 * CEILING_COPY / fastest[1] / 1e9)


@dataclass(frozen=True)
class KernelUse:
    """One kernel, as called by the kernels before it in `path`. Its milliseconds contain those of the kernels that it calls."""

    path: KernelPath  # ("moe_ffn", "expert_ffn", "swiglu"): swiglu, called by expert_ffn, called by moe_ffn
    kind: str  # hand-written, library or reference
    calls: int  # per step
    ms: float  # per step
    share: float  # fraction of the step
    gflops: float | None  # GFLOP/s of a kernel with matrix products
    gb_per_s: float | None  # GB/s of one without
    of_ceiling: float | None  # that rate over the machine's

    @property
    def kernel(self) -> str:
        return self.path[-1]


@dataclass(frozen=True)
class StepProfile:
    """The time of a training step, in total and kernel by kernel."""

    name: str
    backend: str
    tokens: int  # per step
    step_ms: float  # median of whole steps, nothing watched
    fastest_ms: float
    slowest_ms: float
    watched_ms: float  # median of steps with a clock around every kernel; shares are fractions of it
    outside_ms: float  # the part of watched_ms that is outside kernels
    flops: int  # matrix products of a step, counted by minimoe.config.cost
    ceilings: Ceilings
    kernels: list[KernelUse]  # callers before what they call, longest first

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.step_ms * 1e3

    @property
    def gflops(self) -> float:
        """GFLOP/s over the whole step."""
        return self.flops / self.step_ms / 1e6

    def to_dict(self) -> dict[str, Any]:
        """Return the figures by name, as `--json` prints them."""
        rest = {"ms": self.outside_ms, "share": self.outside_ms / self.watched_ms}
        kernels = [{"kernel": use.kernel, **asdict(use), "path": list(use.path)} for use in self.kernels]
        whole = {"tokens_per_s": self.tokens_per_s, "gflops": self.gflops}
        return {**asdict(self), **whole, "kernels": kernels, "outside_kernels": rest}

    def table(self) -> Rows:
        """Return a table with a row for each kernel, and one for the time outside kernels."""
        c = self.ceilings
        table = timings_table(
            f"{self.name} on {self.backend}: {self.tokens_per_s:,.0f} tokens/s, {self.gflops:.1f} GFLOP/s\n"
            f"a step of {self.tokens:,} tokens takes {self.step_ms:.1f} ms ({self.fastest_ms:.1f} to {self.slowest_ms:.1f})",
            f"Indented kernels run inside the one above, and their time is part of its time. Shares are of a step with a clock around "
            f"every kernel ({self.watched_ms:.1f} ms), run without a recording. Ceilings in this run: {c.gflops:.0f} GFLOP/s (product of "
            f"1024 x 1024 float32), {c.gb_per_s:.1f} GB/s (copy of 64 MB). GB/s counts each array, in or out, once; arrays that fit in a "
            f"cache can exceed the ceiling.",
            ("kernel", "kind", "calls", "ms", "share", "GFLOP/s", "GB/s", "of ceiling"),
        )
        for use in self.kernels:
            rates = (_rate(use.gflops), _rate(use.gb_per_s), "" if use.of_ceiling is None else f"{use.of_ceiling:.0%}")
            row = (f"{'  ' * (len(use.path) - 1)}{use.kernel}", use.kind, str(use.calls), f"{use.ms:.2f}", f"{use.share:.1%}", *rates)
            table.add(*row, style="dim" if len(use.path) > 1 else "", section=use is self.kernels[-1])
        table.add("outside kernels", "", "", f"{self.outside_ms:.2f}", f"{self.outside_ms / self.watched_ms:.1%}", "", "", "")
        return table


@dataclass
class Profiler:
    """A watch that adds up each kernel's time by its path. Calls on other threads count for the kernel that started them."""

    backend: Backend
    top_k: int
    counting: bool = False  # count calls and work, in a step that is not timed because counting takes time
    seconds: dict[KernelPath, float] = field(default_factory=lambda: defaultdict(float))
    calls: dict[KernelPath, int] = field(default_factory=lambda: defaultdict(int))
    work: dict[KernelPath, Work] = field(default_factory=lambda: defaultdict(lambda: Work(0, 0)))
    path: KernelPath = ()
    thread: int = field(default_factory=get_ident)

    def __call__(self, name: str, kernel: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if get_ident() != self.thread:
            return kernel(*args, **options)
        outer = self.path
        self.path = path = (*outer, name)
        self.backend.synchronize()
        began = time.perf_counter()
        try:
            result = kernel(*args, **options)
            self.backend.synchronize()
        finally:
            self.path = outer
        self.seconds[path] += time.perf_counter() - began
        if self.counting:
            self.calls[path] += 1
            done, new = self.work[path], work(name, bind(name, args, options).arguments, result, self.top_k)
            self.work[path] = Work(done.flops + new.flops, done.bytes + new.bytes)
        return result

    def middle_step(self, step: Callable[[], None], steps: int) -> float:
        """Run `steps` steps and keep the times of the one with the median time, so that they add up.   -> its seconds"""
        measured: list[tuple[float, dict[KernelPath, float]]] = []
        for _ in range(steps):
            self.seconds = defaultdict(float)
            measured.append((seconds_of(step), self.seconds))
        measured.sort(key=lambda one: one[0])
        whole, self.seconds = measured[(steps - 1) // 2]
        return whole

    def outermost(self) -> float:
        return sum(seconds for path, seconds in self.seconds.items() if len(path) == 1)


def profile_step(config: Config, backend: str | Backend = "auto", steps: int = 5, warmup: int = 2) -> StepProfile:
    """Time `steps` whole training steps after `warmup` untimed ones, then as many with a clock around every kernel.

    Raises `ConfigError` for what cannot be trained, `UserError` for a backend that does not exist.
    """
    chosen = load(backend) if isinstance(backend, str) else backend
    whole = step_seconds(config, chosen, steps, warmup)
    moe = config.model.moe
    profiler = Profiler(chosen, moe.k if moe is not None else 1)
    with training_backend(twin := watched(chosen, profiler), config.train.threads):
        step = TrainingStep(config, twin)
        profiler.counting = True
        step()
        profiler.counting = False
        under_watch = profiler.middle_step(step, steps)
        ceilings = measure_ceilings(chosen)
    t = step.config.train
    flops = cost(step.config.model, t.seq_len, recompute=t.recompute).training_flops_per_token * step.tokens_per_step
    return StepProfile(
        config.name, chosen.name, step.tokens_per_step,
        statistics.median(whole) * 1e3, min(whole) * 1e3, max(whole) * 1e3, under_watch * 1e3,
        (under_watch - profiler.outermost()) * 1e3, flops, ceilings, list(_uses(profiler, under_watch, ceilings)),
    )  # fmt: skip


def _uses(profiler: Profiler, whole: float, ceilings: Ceilings, outer: KernelPath = ()) -> Iterator[KernelUse]:
    """Yield the kernels called from `outer`, longest first, each followed by those that it calls."""
    inside = [path for path in profiler.calls if path[:-1] == outer and profiler.seconds[path] > 0.0]
    kinds = kernel_kinds(profiler.backend)
    for path in sorted(inside, key=lambda path: -profiler.seconds[path]):
        seconds, done = profiler.seconds[path], profiler.work[path]
        gflops = done.flops / seconds / 1e9 if done.flops else None
        gb_per_s = None if done.flops else done.bytes / seconds / 1e9
        part = done.flops / seconds / 1e9 / ceilings.gflops if done.flops else done.bytes / seconds / 1e9 / ceilings.gb_per_s
        yield KernelUse(path, kinds[path[-1]], profiler.calls[path], seconds * 1e3, seconds / whole, gflops, gb_per_s, part)
        yield from _uses(profiler, whole, ceilings, path)


def _rate(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
