"""A functional library for tests: NumPy's functions over arrays that are never written, and a compiler that poisons donated buffers."""

from typing import Any

import numpy as np

from minimoe.backend import load
from minimoe.functional import FunctionalBackend, on_library_arrays
from minimoe_numpy.erf import erf


def frozen(array: Any) -> Any:
    """Return an array that refuses writes."""
    array = np.asarray(array)
    array.flags.writeable = False
    return array


class FrozenBackend(FunctionalBackend):
    """The port: what a functional library must supply."""

    name = "frozen"
    dtypes = ("float32", "float64")
    plain = np

    def from_numpy(self, array):
        return frozen(np.array(array, order="C"))

    def to_numpy(self, x):
        return x

    def with_part(self, x, index, part):
        changed = np.array(x)
        changed[index] = part
        return frozen(changed)

    def with_added(self, x, index, rows):
        changed = np.array(x)
        np.add.at(changed, index, rows)
        return frozen(changed)

    @on_library_arrays
    def erf(self, x):
        return erf(x)

    def synchronize(self):
        """Nothing is asynchronous here."""

    def memory(self):
        return load("numpy").memory()


class CompilingBackend(FrozenBackend):
    """Repeats a step by calling it, and overwrites the buffers that were donated."""

    exact_recording = True

    def __init__(self):
        super().__init__()
        self.compiled = 0

    def copied(self, x):
        return frozen(np.array(x))

    def compile(self, function):
        self.compiled += 1

        def step(state, arguments):
            new, result = function(state, arguments)
            mine = [np.array(value) for value in (*new, result)]
            for old in state:
                old.flags.writeable = True
                old[...] = -99
            return [frozen(value) for value in mine[:-1]], frozen(mine[-1])

        return step
