"""Lists the cases that a conforming backend passes, by level; pytest and `minimoe backends check` run the same ones.

Each level has a file, or two:

    array layer     array_layer.py: what a port defines; array_behaviour.py: how its arrays behave (views, writes, copies, dtypes)
    kernels         kernels.py: each kernel beside its reference; outside.py: routers and optimizers of other packages
    gradients       op_cases.py: each operation through autograd
    host reads      host_reads.py: nothing in a training step is read on the host
    recording       recording.py: repeated steps beside plain ones
    curve           training.py: the losses of 20 steps
    repeatability   training.py: equal inputs give equal bytes

The inputs of kernels are in *_examples.py: by topic at small odd sizes (dense, routed, training), at large sizes (large), and with NaN and
infinity (not_finite); those of operations in op_examples.py. `quick.py` chooses among them, `tolerances.py` says what may differ, and
`conformance.py` compares. `results.py`, `watched.py` and `child.py` run cases for `minimoe backends check`, and `report.py` sums them up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from minimoe.backend import Backend
from minimoe.errors import UserError, nearest
from minimoe.testing.array_layer import array_layer_cases
from minimoe.testing.conformance import Case
from minimoe.testing.host_reads import host_read_cases
from minimoe.testing.kernels import kernel_cases
from minimoe.testing.op_cases import gradient_cases
from minimoe.testing.outside import optimizer_cases, router_cases
from minimoe.testing.recording import recording_cases
from minimoe.testing.training import curve_cases, repeatability_cases


def compared_cases(backend: Backend) -> Iterator[Case]:
    """Yield the cases of every kernel, with every known router; then those of other packages' routers and optimizers."""
    yield from kernel_cases(backend)
    yield from router_cases(backend)
    yield from optimizer_cases(backend)


LEVELS: dict[str, Callable[[Backend], Iterator[Case]]] = {
    "array layer": array_layer_cases,
    "kernels": compared_cases,
    "gradients": gradient_cases,
    "host reads": host_read_cases,
    "recording": recording_cases,
    "curve": curve_cases,
    "repeatability": repeatability_cases,
}
"""The levels from the bottom up: fix what fails at one level before you look at the next."""


def cases(backend: Backend, level: str | None = None, kernel: str | None = None, quick: bool = False) -> list[Case]:
    """Return the cases of a backend: all, or those of one level or kernel.

    `quick` leaves out cases that take long and dtypes other than the backend's first, and lets the rest run fewer examples (`quick.py`).

    Each has a name, a level, a kernel, and `run()`, which raises `ConformanceError` with the kernel, the first failing shape, the worst
    error, the tolerance and what to do. Raises `UserError` for a level or kernel that does not exist.
    """
    if level is not None and level not in LEVELS:
        raise UserError(f"no conformance level {level!r}{nearest(level, LEVELS)}")
    found = [case for name, make in LEVELS.items() if level in (None, name) for case in make(backend)]
    if quick:
        found = [replace(case, run=case.run_quick or case.run) for case in found if case.quick]
    if kernel is None:
        return found
    chosen = [case for case in found if case.kernel == kernel]
    if not chosen:
        raise UserError(f"no conformance case for {kernel!r}{nearest(kernel, {case.kernel for case in found})}")
    return chosen
