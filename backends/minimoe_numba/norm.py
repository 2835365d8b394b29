"""Norms in one pass over a row, alone and with the residual addition before them. Formulas: minimoe/reference/norm.py."""


import numpy as np

from minimoe.backend import Array
from minimoe_numba.arrays import as_rows, by_width, result, singles
from minimoe_numba.kernel import F1, F2, kernel
from minimoe_numba.maths import ONE, ZERO
from minimoe_numpy import NumpyBackend


@kernel
def rms_rows(start: int, stop: int, x: F2, weight: F1, eps: float, y: F2, rstd: F1) -> None:
    width = x.shape[1]
    for n in range(start, stop):
        squares = ZERO
        for d in range(width):
            squares += x[n, d] * x[n, d]
        r = ONE / np.sqrt(squares / np.float32(width) + eps)
        rstd[n] = r
        for d in range(width):
            y[n, d] = x[n, d] * r * weight[d]


class FastNorm(NumpyBackend):
    def rms_norm(self, x: Array, weight: Array, eps: float, out: Array | None = None) -> tuple[Array, Array]:
        if not singles(x, weight):
            return super().rms_norm(x, weight, eps, out)
        rows = as_rows(x)
        y, rstd = result(out, x.shape), np.empty((*x.shape[:-1], 1), np.float32)
        rms_rows(len(rows), by_width(rows.shape[1]), rows, weight, eps, as_rows(y), rstd.reshape(-1))
        return (y if y is out else self.store(y, out)), rstd
