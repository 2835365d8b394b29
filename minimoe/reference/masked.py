"""The grouped kernels without reading the experts' row offsets on the host, for libraries that compile a step as one function.

Each expert works on all R rows, and a mask keeps its own: E times the arithmetic of the loop in expert.py, and shapes that never change.
`where` keeps what other rows hold out of every result, NaN included. Shapes and letters are those of expert.py.
"""

from collections.abc import Iterator

from minimoe.reference.arrays import Array, ArrayLayer


def own_rows(b: ArrayLayer, offsets: Array, rows: int) -> Iterator[Array]:
    """Yield, for each expert, which rows are its own.   offsets [E+1] -> E times bool [R,1]"""
    row = b.xp.arange(rows, dtype=b.xp.int32)
    for e in range(offsets.shape[0] - 1):
        own = (row >= offsets[e]) & (row < offsets[e + 1])
        yield own[:, None]


def grouped_matmul(b: ArrayLayer, x: Array, weight: Array, offsets: Array, transpose: bool) -> Array:
    """y[r] = W_e x[r], or W_e^T x[r] if `transpose`; zero in unused rows.   -> [R,O]  (transpose: [R,I])"""
    xp = b.xp
    y = xp.zeros((x.shape[0], weight.shape[2] if transpose else weight.shape[1]), dtype=x.dtype)
    for e, own in enumerate(own_rows(b, offsets, x.shape[0])):
        y = xp.where(own, xp.matmul(x, weight[e, :, :] if transpose else weight[e, :, :].T), y)
    return y


def grouped_matmul_dw(b: ArrayLayer, dy: Array, x: Array, offsets: Array) -> Array:
    """dW_e = dy_e^T x_e.   dy [R,O], x [R,I] -> [E,O,I]"""
    xp = b.xp
    dy0, x0 = xp.zeros_like(dy), xp.zeros_like(x)
    return xp.stack([xp.matmul(xp.where(own, dy, dy0).T, xp.where(own, x, x0)) for own in own_rows(b, offsets, x.shape[0])], axis=0)


def grouped_bias(b: ArrayLayer, bias: Array, offsets: Array, rows: int) -> Array:
    """Give each row its expert's bias, and unused rows zero.   bias [E,O] -> [R,O]"""
    full = b.xp.zeros((rows, bias.shape[1]), dtype=bias.dtype)
    for e, own in enumerate(own_rows(b, offsets, rows)):
        full = b.xp.where(own, bias[e, :], full)
    return full


def grouped_bias_backward(b: ArrayLayer, dy: Array, offsets: Array) -> Array:
    """db_e = sum(dy_e).   dy [R,O] -> [E,O]"""
    xp, wide = b.xp, b.wide(dy)
    zeros = xp.zeros_like(wide)
    db = xp.stack([xp.sum(xp.where(own, wide, zeros), axis=0) for own in own_rows(b, offsets, dy.shape[0])], axis=0)
    return b.narrowed(db, dy, None)
