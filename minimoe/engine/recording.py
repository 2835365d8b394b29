"""Records a step once and then repeats it, if the backend can: on a GPU as a CUDA graph of all its kernels, on the backend `numba`
as a tape of them that is played without Python.

Launching a kernel costs the host some microseconds, and a training step of a small model has hundreds of them, so that the host decides
how long it takes. A recording repeats the same work on the same addresses. Everything that changes from step to step must therefore be in
arrays: a `Recorded` function copies its arguments into its own arrays, and copies its result out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from minimoe.backend import Array, Backend, Work


class Recorded:
    """`function(*arrays) -> array`, repeated from a recording when arrays of the same shapes come again.

    The function must keep its state in arrays whose addresses do not change, and read nothing on the host. The first calls
    (`Backend.warm_up`) are not recorded: they compile kernels and allocate permanent buffers. With arrays of another shape, or a
    backend that cannot record, the function is called each time; `say` is called once with the reason.
    """

    def __init__(
        self, function: Callable[..., Array], backend: Backend, say: Callable[[str], None], state: Callable[[], list[Array]] = list
    ) -> None:
        """`state` returns the arrays that the function keeps: those it updates in place, and those it reads at every call."""
        self.function, self.backend, self.say, self.state = function, backend, say, state
        self.calls = 0
        self.shapes: list[Any] = []
        self.work: Work  # what was recorded, with the arrays of its arguments and its result
        self.again: Callable[[], None] | None = None
        self.possible = True

    def __call__(self, *arrays: Array) -> Array:
        """function(*arrays)"""
        shapes = [(tuple(a.shape), a.dtype) for a in arrays]
        if self.again is not None and shapes != self.shapes:
            self._give_up(f"the step now has inputs of {_shown(shapes)}, but was recorded with {_shown(self.shapes)}")
        if not self.possible:
            return self.function(*arrays)
        if self.again is None:
            self.calls = self.calls + 1 if shapes == self.shapes else 1
            self.shapes = shapes
            if self.calls <= self.backend.warm_up:
                return self.function(*arrays)
            self._record(arrays)
        else:
            for own, array in zip(self.work.inputs, arrays, strict=True):
                own[...] = array
            self.again()
        return self.backend.xp.asarray(self.work.result, copy=True)

    def _record(self, arrays: tuple[Array, ...]) -> None:
        """Run the function and record it."""
        xp = self.backend.xp
        self.work = Work(self.function, [xp.asarray(array, copy=True) for array in arrays], self.state())
        self.again = self.backend.record(self.work, self._give_up)
        self.possible = self.again is not None

    def _give_up(self, why: str) -> None:
        self.again, self.possible = None, False
        self.say(f"the step is not repeated from a recording: {why}")


def _shown(shapes: list[Any]) -> str:
    return ", ".join(f"{dtype}{list(shape)}" for shape, dtype in shapes)
