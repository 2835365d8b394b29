"""A product's weight with a low-rank adapter (Hu et al. 2021)."""

from __future__ import annotations

from minimoe.backend import Array
from minimoe.engine.tensor import Tensor


def low_rank(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """W + scale B A.   weight [O,I], a [r,I], b [O,r] -> [O,I]; experts: weight [E,O,I], a [E,r,I], b [E,O,r] -> [E,O,I]

    dA = scale B^T dY,   dB = scale dY A^T,   dW = dY.   B's rows of all experts lie below each other, O for each: so the products of all
    experts are one product with grouped rows.
    """
    k, xp, aa, ba, need_w = weight.backend, weight.backend.xp, a.data, b.data, weight.requires_grad
    shape = weight.shape
    if aa.shape[:-2] != shape[:-2] or ba.shape != (*shape[:-1], aa.shape[-2]) or aa.shape[-1] != shape[-1]:
        raise ValueError(f"low_rank: a {a.shape} and b {b.shape} do not fit weight {shape}, [...,r,I], [...,O,r] and [...,O,I]")
    rows = xp.reshape(ba, (-1, ba.shape[-1]))  # [E*O,r]
    grouped, offsets = len(shape) == 3, None
    if grouped:
        offsets = xp.arange(0, shape[0] * shape[1] + 1, shape[1], dtype=xp.int32)
        y = xp.reshape(k.grouped_matmul(rows, aa, offsets, transpose=True), shape)
    else:
        y = k.linear_dx(rows, aa)
    y = weight.data + scale * y

    def backward(dy: Array) -> tuple[Array | None, Array, Array]:
        drows = xp.reshape(dy, (-1, shape[-1])) * scale  # [E*O,I]
        if grouped:
            da, db = k.grouped_matmul_dw(rows, drows, offsets), k.grouped_matmul(drows, aa, offsets)
        else:
            da, db = k.linear_dw(rows, drows), k.linear(drows, aa)
        return dy if need_w else None, da, xp.reshape(db, ba.shape)

    return Tensor.from_op(y, (weight, a, b), backward, owned=False)
