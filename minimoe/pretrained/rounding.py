"""Says what rounding a tensor to a narrower dtype has lost: numbers that became infinite, or a tensor whose numbers became zero."""

import numpy as np

from minimoe.pretrained.file import Array
from minimoe.pretrained.header import STORED, shown
from minimoe.pretrained.quantised import pieces

# For each dtype that numbers are rounded to: its name, the bits of inf, those of all but the sign, and where its range ends.
NARROW = {
    "F16": ("float16", 0x7C00, 0x7FFF, "65,504: bfloat16 has float32's range"),
    "BF16": ("bfloat16", 0x7F80, 0x7FFF, "3.39e+38"),
    "F32": ("float32", 0x7F800000, 0x7FFFFFFF, "3.40e+38"),
}


def losses(name: str, values: Array, packed: Array, dtype: str) -> list[str]:
    """Return a line for each loss between float `values` and the same `packed` as `dtype` (F16, F32, or BF16 as uint16).   [...], [...]

    A number beyond the dtype's range is always reported. Numbers that become 0 are reported if they are more than half of those that were
    not 0: a few tiny ones among others change nothing.
    """
    if dtype not in NARROW or values.dtype.itemsize <= STORED[dtype].itemsize:
        return []
    word, infinite, unsigned, end = NARROW[dtype]
    bits = packed.view(f"<u{packed.dtype.itemsize}")
    beyond, vanished, present, most = 0, 0, 0, 0.0
    for at in pieces(values.shape):
        magnitude, given = bits[at] & unsigned, values[at]
        over = (magnitude == infinite) & np.isfinite(given)
        if over.any():
            beyond += int(over.sum())
            most = max(most, float(np.abs(given[over]).max()))
        present += int(np.count_nonzero(given))
        vanished += int(np.count_nonzero((magnitude == 0) & (given != 0)))
    lines = []
    if beyond:
        lines.append(
            f"{shown(name)}: {beyond:,} of {values.size:,} numbers are beyond {word} and become inf: the largest is {most:.4g}, and "
            f"{word} ends at {end}"
        )
    if 2 * vanished > present:
        lines.append(f"{shown(name)}: {vanished:,} of {values.size:,} numbers are too small for {word} and become 0")
    return lines
