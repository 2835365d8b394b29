"""The experts' forward for few rows, as in decoding. Reading the weights takes most of the time, so threads share out the weights.

There are two kernels, whose pieces are slices of one expert's weights: rows gathered -> up product -> activation, then the down product.
Both sum in the same order as `expert.py`, so the results have the same bits.
"""

import numpy as np

from minimoe_numba.activation import activate
from minimoe_numba.blocks import add_to, at, block_of, gather
from minimoe_numba.kernel import F2, F3, I1, kernel
from minimoe_numba.maths import ONE, ZERO
from minimoe_numba.native import PLAIN, TRANSPOSED, call_sgemm

PART = 128  # columns of the hidden layer that are computed, activated and multiplied again before the next
NEAR = 16  # rows of the down weights that are read together


@kernel
def hidden_slices(
    start: int, stop: int, sgemm: int, slices: int, x: F2, order: I1, slots: int, offsets: I1, up: F3, up_bias: F2, kind: int,
    limit: float, pre_activation: F2, hidden: F2,
) -> None:  # fmt: skip
    """Compute PART columns of pre_activation [R,O] and hidden [R,H] per unit; each expert that has rows takes `slices` units."""
    width, both, hidden_width = x.shape[1], pre_activation.shape[1], hidden.shape[1]
    rows = np.empty((len(order), width), np.float32)
    for unit in range(start, stop):
        e, first, last = block_of(unit // slices, offsets, len(order))
        m, column = last - first, unit % slices * PART
        if m == 0:
            continue
        count, other = min(PART, hidden_width - column), both - hidden_width + column
        gather(x, order, slots, first, rows[:m])
        for half in range(both // hidden_width):
            offset = half * hidden_width + column
            call_sgemm(
                sgemm, PLAIN, TRANSPOSED, m, count, width, rows.ctypes.data, width, at(up[e], offset), width, ZERO,
                at(pre_activation, first) + 4 * offset, both,
            )  # fmt: skip
        for r in range(first, last):
            gate, other_half = pre_activation[r, column : column + count], pre_activation[r, other : other + count]
            if up_bias.size:
                add_to(gate, up_bias[e, column : column + count])
                if both > hidden_width:
                    add_to(other_half, up_bias[e, other : other + count])
            activate(gate, other_half, hidden[r, column : column + count], kind, limit)
    rows[0, 0] = ZERO  # Numba frees an array after its last use, and does not see that a product has its address


@kernel
def output_slices(start: int, stop: int, sgemm: int, slices: int, offsets: I1, down: F3, down_bias: F2, hidden: F2, y_rows: F2) -> None:
    """Compute PART columns of y_rows [R,D] per unit, NEAR at a time; each expert that has rows takes `slices` units."""
    width, hidden_width = y_rows.shape[1], hidden.shape[1]
    for unit in range(start, stop):
        e, first, last = block_of(unit // slices, offsets, len(hidden))
        m, offset = last - first, unit % slices * PART
        if m == 0:
            continue
        end = min(offset + PART, width)
        for row in range(offset, end, NEAR):
            for column in range(0, hidden_width, PART):
                call_sgemm(
                    sgemm, PLAIN, TRANSPOSED, m, min(NEAR, end - row), min(PART, hidden_width - column), at(hidden, first) + 4 * column,
                    hidden_width, at(down[e], row) + 4 * column, hidden_width, ONE if column else ZERO, at(y_rows, first) + 4 * row, width,
                )  # fmt: skip
        if down_bias.size:
            for r in range(first, last):
                add_to(y_rows[r, offset:end], down_bias[e, offset:end])
