"""A step that is recorded once and repeated from then on, where the backend can: on a GPU as a CUDA graph of all its kernels, on the
backend `numba` as a tape of them that is played without Python.

Launching a kernel costs the host some microseconds, and a training step of a toy model has hundreds: its time is the host's. What is
recorded repeats the same work on the same addresses, so all that changes from step to step must come in arrays: what is given to a
`Recorded` function is copied into places of its own, and what it returns is copied out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from minimoe.backend import Array, Backend


class Recorded:
    """`function(*arrays) -> array`, repeated from a recording when arrays of the same shapes come again.

    It must leave everything that it keeps in arrays that stay where they are, and read nothing on the host. The first calls
    (`Backend.warm_up`) run as they are: kernels are compiled, and what is made once stands where it will. Arrays of another shape, and a
    backend that cannot record, are computed as they come; `say` hears of it once.
    """

    def __init__(self, function: Callable[..., Array], backend: Backend, say: Callable[[str], None]) -> None:
        self.function, self.backend, self.say = function, backend, say
        self.calls = 0
        self.places: list[Array] = []  # where the recorded work reads its inputs
        self.shapes: list[Any] = []
        self.result: Array = None  # where it leaves its result
        self.again: Callable[[], None] | None = None
        self.possible = True

    def __call__(self, *arrays: Array) -> Array:
        """function(*arrays)"""
        shapes = [(tuple(a.shape), a.dtype) for a in arrays]
        if self.again is not None and shapes != self.shapes:
            self._give_up(f"the step has inputs of {_shown(shapes)} now, it was recorded with {_shown(self.shapes)}")
        if not self.possible:
            return self.function(*arrays)
        if self.again is None:
            self.calls = self.calls + 1 if shapes == self.shapes else 1
            self.shapes = shapes
            if self.calls <= self.backend.warm_up:
                return self.function(*arrays)
            self._record(arrays)
        else:
            for place, array in zip(self.places, arrays, strict=True):
                place[...] = array
            self.again()
        return self.backend.xp.asarray(self.result, copy=True)

    def _record(self, arrays: tuple[Array, ...]) -> None:
        """Run it and record it."""
        xp = self.backend.xp
        self.places = [xp.asarray(array, copy=True) for array in arrays]

        def work() -> None:
            self.result = self.function(*self.places)

        self.again = self.backend.record(work, self._give_up)
        self.possible = self.again is not None

    def _give_up(self, why: str) -> None:
        self.again, self.possible = None, False
        self.say(f"the step is not repeated from a recording: {why}")


def _shown(shapes: list[Any]) -> str:
    return ", ".join(f"{dtype}{list(shape)}" for shape, dtype in shapes)
