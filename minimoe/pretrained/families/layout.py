"""How a parameter lies in a checkpoint's tensors: which part of it each tensor holds, said once for reading and writing.

A `Part` names a tensor and gives, as a NumPy view, the piece of the parameter that it holds: `view(parameter)[...] = tensor` reads it,
`tensor = view(parameter)` writes it. Where the tensor joins axes that the view keeps apart, `joined` says from which up to which. A
transpose is part of the view; none is guessed. The parameters of experts, stacked here, lie in a file expert by expert ("{e}" in the key)
or stacked; parts then speak of one expert's slice.
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
    """The view of a tensor that holds the whole parameter as it is."""
    return whole


class Part(NamedTuple):
    """One tensor, and the piece of a parameter (or of one expert's slice) that it holds."""

    key: str
    view: View = all_of_it
    joined: tuple[int, int] | None = None
    packed: Literal["", "mxfp4"] = ""  # lies in the file as `key`_blocks and `key`_scales

    def shape(self, whole: Shape) -> Shape:
        """Of the tensor, for a parameter of this shape; nothing is allocated."""
        shape = self.view(np.broadcast_to(np.zeros((), np.int8), whole)).shape
        if self.joined is None:
            return shape
        start, stop = self.joined
        return (*shape[:start], math.prod(shape[start:stop]), *shape[stop:])


class Layout(NamedTuple):
    """All the tensors of one parameter."""

    parts: tuple[Part, ...]
    kind: Literal["whole", "each", "stacked"] = "whole"  # of experts: each in tensors of its own, or all in one


Layouts = tuple[Layout, ...]  # the forms in which a parameter is found; the first is the one that is written
Names = Iterator[tuple[str, Layouts]]  # each parameter of a model


def whole(key: str, view: View = all_of_it) -> Layouts:
    """One tensor."""
    return (Layout((Part(key, view),)),)


def transposed(key: str) -> Layouts:
    """One tensor [in, out]."""
    return whole(key, lambda weight: weight.T)


def rows(*pieces: tuple[str, int]) -> Layouts:
    """Tensors stacked along the first axis: keys, and how many rows each has."""
    return (Layout(tuple(stacked_rows(pieces))),)


def stacked_rows(pieces: Iterable[tuple[str, int]]) -> Iterator[Part]:
    """A part for each key, one after the other along the first axis."""
    start = 0
    for key, count in pieces:
        yield Part(key, lambda weight, rows=slice(start, start + count): weight[rows])  # type: ignore[misc]
        start += count


def pair(ours: str, theirs: str) -> Names:
    """A module's weight and bias."""
    return ((f"{ours}.{x}", whole(f"{theirs}.{x}")) for x in ("weight", "bias"))


def experts(gate: str, up: str, down: str, hidden: int, prefix: str) -> Iterator[tuple[str, Layouts]]:
    """Gated experts, one by one under keys with {e}; or stacked, as `prefix`.gate_up_proj and .down_proj."""
    each = Layout(tuple(stacked_rows(((gate, hidden), (up, hidden)))), "each")
    yield "gate_up_proj", (each, Layout((Part(f"{prefix}.gate_up_proj"),), "stacked"))
    yield "down_proj", (Layout((Part(down),), "each"), Layout((Part(f"{prefix}.down_proj"),), "stacked"))
