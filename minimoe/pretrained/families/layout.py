"""How a parameter is laid out in a checkpoint's tensors: which slice of it each tensor holds, written once for reading and writing.

A `StoredTensor` names a tensor and gives, as a NumPy view, the slice of the parameter that it holds: `view(parameter)[...] = tensor` reads
it, `tensor = view(parameter)` writes it. If the tensor joins axes that the view keeps apart, `joined` says which. A transpose is written in
the view; none is guessed. The parameters of experts, stacked in minimoe, lie in a file expert by expert ("{e}" in the key) or stacked; a
`StoredTensor` then describes one expert's slice.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
View = Callable[[Array], Array]
Shape = tuple[int, ...]


def all_of_it(whole: Array) -> Array:
    """Return the parameter itself: the view of a tensor that holds all of it unchanged."""
    return whole


class StoredTensor(NamedTuple):
    """One tensor of a file, and the slice of a parameter (or of one expert's slice) that it holds."""

    key: str
    view: View = all_of_it
    joined: tuple[int, int] | None = None
    packed: Literal["", "mxfp4"] = ""  # mxfp4: the file has `key`_blocks and `key`_scales

    def shape(self, whole: Shape) -> Shape:
        """Return the tensor's shape for a parameter of shape `whole`; nothing is allocated."""
        shape = self.view(np.broadcast_to(np.zeros((), np.int8), whole)).shape
        if self.joined is None:
            return shape
        start, stop = self.joined
        return (*shape[:start], math.prod(shape[start:stop]), *shape[stop:])


class Layout(NamedTuple):
    """All tensors of one parameter."""

    tensors: tuple[StoredTensor, ...]
    kind: Literal["whole", "each", "stacked"] = "whole"  # each: tensors per expert; stacked: all experts in one


Layouts = tuple[Layout, ...]  # the layouts in which a parameter is found; the first is written
Names = Iterator[tuple[str, Layouts]]  # each parameter of a model


def whole(key: str, view: View = all_of_it) -> Layouts:
    """Return the layout of a parameter that is one tensor."""
    return (Layout((StoredTensor(key, view),)),)


def transposed(key: str) -> Layouts:
    """Return the layout of a matrix that is one tensor [in, out]."""
    return whole(key, lambda weight: weight.T)


def rows(*pieces: tuple[str, int]) -> Layouts:
    """Return the layout of tensors stacked along the first axis; `pieces`: keys, and how many rows each has."""
    return (Layout(tuple(stacked_rows(pieces))),)


def stacked_rows(pieces: Iterable[tuple[str, int]]) -> Iterator[StoredTensor]:
    """Yield a tensor for each key, one after the other along the first axis."""
    start = 0
    for key, count in pieces:
        yield StoredTensor(key, lambda weight, rows=slice(start, start + count): weight[rows])  # type: ignore[misc]
        start += count


def pair(mm: str, hf: str) -> Names:
    """Yield the weight and the bias of a module."""
    return ((f"{mm}.{x}", whole(f"{hf}.{x}")) for x in ("weight", "bias"))


def experts(gate: str, up: str, down: str, hidden: int, prefix: str) -> Iterator[tuple[str, Layouts]]:
    """Yield the parameters of gated experts: one by one under keys with {e}, or stacked as `prefix`.gate_up_proj and .down_proj."""
    each = Layout(tuple(stacked_rows(((gate, hidden), (up, hidden)))), "each")
    yield "gate_up_proj", (each, Layout((StoredTensor(f"{prefix}.gate_up_proj"),), "stacked"))
    yield "down_proj", (Layout((StoredTensor(down),), "each"), Layout((StoredTensor(f"{prefix}.down_proj"),), "stacked"))
