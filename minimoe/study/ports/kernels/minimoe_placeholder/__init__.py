"""The backend `placeholder` of minimoe: kernels of your own over the arrays of a backend that exists.

It works from the first minute, with one kernel. A kernel is a method with the reference's signature: to add yours, copy its signature
from `minimoe/reference/`, and run `minimoe backends check placeholder --kernel NAME`.
"""

import math

import numba

from minimoe.backend import Array, Backend
from minimoe_numpy import NumpyBackend  # replace by the backend whose arrays you compute on: from minimoe_numba import NumbaBackend


@numba.njit(nogil=True)
def swiglu_rows(gate_up, y):  # type: ignore[no-untyped-def]
    """y[n,h] = silu(gate[n,h]) up[n,h], silu(g) = g / (1 + exp(-g)).   gate_up [N,2H], the gate half first; y [N,H]"""
    hidden = y.shape[1]
    for n in range(y.shape[0]):
        for h in range(hidden):
            gate = gate_up[n, h]
            y[n, h] = gate / (1 + math.exp(-gate)) * gate_up[n, hidden + h]


class PlaceholderBackend(NumpyBackend):
    """NumPy's arrays with a kernel of its own: one pass over the memory, where the reference makes several."""

    name = "placeholder"
    library: frozenset[str] = frozenset()  # names of your kernels that call a library's function; the others are hand-written
    proven: dict[str, str] = {}  # kernel -> the device and the date on which you saw it agree with its reference

    # Replace this kernel by yours. A kernel passes what it does not cover to `super()`, which has the base's kernel or the reference; it
    # writes `out` if that is given, and never writes its inputs.

    def swiglu(self, gate_up: Array, limit: float = 0.0, out: Array | None = None) -> Array:
        if limit or gate_up.dtype not in (self.xp.float32, self.xp.float64):  # the clipped form of gpt-oss
            return super().swiglu(gate_up, limit, out)
        rows = self.contiguous(self.rows(gate_up))  # [..., 2H] -> [N, 2H]
        y = self.xp.empty((rows.shape[0], rows.shape[1] // 2), dtype=rows.dtype)
        swiglu_rows(rows, y)
        return self.store(self.xp.reshape(y, (*gate_up.shape[:-1], y.shape[1])), out)


def backend_class() -> type[Backend]:
    """Return the class, which needs no device: `minimoe backends` lists its kernels where `backend` fails."""
    return PlaceholderBackend


def backend() -> Backend:
    """Return the backend. If its device is absent, raise `minimoe.backend.BackendUnavailable` with the reason instead."""
    return PlaceholderBackend()
