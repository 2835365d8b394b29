"""The level "host reads": a training step runs without reading an array on the host, since each read waits for the device.

What counts as a read: `to_host`; `offsets_on_host`, unless the backend says `reads_offsets`; and whatever makes Python or NumPy take
numbers out of an array (`bool(x)`, `float(x)`, iteration, `np.asarray(x)`, `x.item()`, ...), where the type of the backend's arrays can
be changed. Types in C cannot: reads of NumPy's own arrays are noted only in the methods of the backend. A backend whose arrays can be read
without waiting (`host_view`) may take numbers out of them in its own code.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import FrameType
from typing import Any

import numpy as np

from minimoe.backend import Backend, kernel_names
from minimoe.reference import routers
from minimoe.testing.conformance import Case, require
from minimoe.testing.small_models import micro_batches, small_step

READS = (
    "__bool__", "__int__", "__float__", "__index__", "__complex__", "__array__", "__iter__", "__buffer__", "__dlpack__", "item", "tolist",
    "tobytes", "numpy",
)  # fmt: skip
"""Methods of an array with which numbers come to the host."""

TODO = "Compute on the device: a step waits for each read, and cannot be recorded"


class Reads:
    """The reads that were noted within a block of `note_reads`."""

    def __init__(self, without_waiting: bool) -> None:
        self.without_waiting = without_waiting
        self.found: list[tuple[str, str, str]] = []  # by which kernel, through what, where in the sources
        self.offsets = 0  # reads of offsets that are allowed
        self.allowed = False

    def note(self, backend: Backend, through: str) -> None:
        """Add a read, unless it is part of one that is allowed."""
        frame = sys._getframe(2)
        own = not frame.f_globals["__name__"].startswith("minimoe.")
        if not (self.allowed or (own and self.without_waiting and through in READS)):
            place = f"{frame.f_code.co_filename.rpartition('/')[2]}, line {frame.f_lineno}"
            self.found.append((innermost_kernel(backend, frame), through, place))


def innermost_kernel(backend: Backend, frame: FrameType | None) -> str:
    """Return the kernel of the contract that is running nearest to this frame, or "training": none is."""
    known = set(kernel_names())
    while frame is not None:
        if frame.f_code.co_name in known and frame.f_locals.get("self") is backend:
            return frame.f_code.co_name
        frame = frame.f_back
    return "training"


@contextmanager
def note_reads(backend: Backend) -> Iterator[Reads]:
    """Note what is read on the host within the block. The backend and the type of its arrays are as before afterwards."""
    example = backend.xp.zeros(())
    reads, kind = Reads(backend.host_view(example) is not None), type(example)
    with ExitStack() as stack:
        replace(stack, backend, "to_host", partial(host_copy, backend, reads, backend.to_host))
        replace(stack, backend, "offsets_on_host", partial(offsets, backend, reads, backend.offsets_on_host))
        for name in READS:
            original = getattr(kind, name, None)
            if original is not None:
                try:
                    replace(stack, kind, name, reading(backend, reads, name, original))
                except TypeError:  # a type in C
                    break
        yield reads


def replace(stack: ExitStack, owner: Any, name: str, value: Any) -> None:
    """Set an attribute of an object or class until the stack is closed."""
    own = vars(owner)
    undo = partial(setattr, owner, name, own[name]) if name in own else partial(delattr, owner, name)
    setattr(owner, name, value)
    stack.callback(undo)


def host_copy(backend: Backend, reads: Reads, original: Callable[[Any], Any], array: Any) -> Any:
    reads.note(backend, "to_host")
    return permitted(reads, original, array)


def offsets(backend: Backend, reads: Reads, original: Callable[[Any], Any], array: Any) -> Any:
    if backend.reads_offsets:
        reads.offsets += 1
    else:
        reads.note(backend, "offsets_on_host, though the backend says reads_offsets = False")
    return permitted(reads, original, array)


def reading(backend: Backend, reads: Reads, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    def read(array: Any, *args: Any, **options: Any) -> Any:
        reads.note(backend, name)
        return permitted(reads, original, array, *args, **options)

    return read


def permitted(reads: Reads, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Call a function whose own reads are not noted."""
    before, reads.allowed = reads.allowed, True
    try:
        return function(*args, **options)
    finally:
        reads.allowed = before


# ---- the cases -----------------------------------------------------------------------------------------------------------------------


def host_read_cases(backend: Backend) -> Iterator[Case]:
    """Yield a case for a dense model, and one for each router with capacity, jitter, noise and dropout."""
    yield Case("a dense model", "host reads", "training", partial(check_reads, backend, None), quick=False)
    for name in routers.names():
        case = partial(check_reads, backend, name)
        yield Case(f"router {name}, with capacity, jitter, noise and dropout", "host reads", "training", case, quick=name == "softmax_topk")


def check_reads(backend: Backend, router: str | None) -> None:
    """Run two steps, which may compile in the first, and look at what the second reads."""
    table: dict[str, Any] = {}
    if router is not None:
        table = {"router": router, "jitter": 0.1, "noise_std": 0.1, "n_shared_experts": 1}
        if not routers.find(router).by_expert:
            table |= {"capacity_factor": 1.1, "drop_priority": "probability"}
    step = small_step(backend, moe=table, routed=router is not None, dropout=0.1, attention_dropout=0.1, sliding_window=4)
    where = "a dense model" if router is None else f"router {router}"
    for number in range(2):
        arrays = step.arrays(number, 1e-2, *micro_batches(number))
        with np.errstate(all="ignore"), note_reads(backend) as reads:
            packed = step(*arrays)
    if reads.found:
        kernel, through, place = reads.found[0]
        also = sorted({name for name, *_ in reads.found} - {kernel})
        others = f"; so did {', '.join(also)}" if also else ""
        require(False, kernel, where, f"it read an array on the host through {through} ({place}){others}", TODO)
    require(bool(np.isfinite(backend.to_host(packed)).all()), "training", where, "the figures of a step are not finite", TODO)
