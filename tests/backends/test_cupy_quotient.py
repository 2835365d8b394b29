"""Kernels divide by a number of the host's without a division: exactly, and so that no division is left in a loop."""

import random

import pytest
from ptx_machine.assembled import compile_for

from minimoe_cupy.grouped import BF16_LARGE, BF16_ODD, BF16_SMALL, FLOAT_LARGE, FLOAT_ODD, FLOAT_SMALL, WGMMA_LARGE
from minimoe_cupy.launch import quotient

MOST = 2**31 - 1


def of(n, factor, shift):
    """`Quotient::of` of kernels/quotient.cuh, in the widths that it has there."""
    return (((2 * n % 2**32) * factor) >> 32) >> shift


@pytest.mark.parametrize("divisor", [*range(1, 70), 2**16 - 1, 2**16, 2**16 + 1, 2**30 - 1, 2**30, 2**30 + 1, MOST - 1, MOST])
def test_quotients_are_exact(divisor):
    factor, shift = quotient(divisor)
    assert 0 < factor < 2**32 and 0 <= shift < 32
    draw = random.Random(divisor)
    multiples = [k * divisor for k in (0, 1, 2, MOST // divisor, *(draw.randrange(MOST // divisor + 1) for _ in range(200)))]
    near = [n + d for n in multiples for d in (-1, 0, 1) if 0 <= n + d <= MOST]
    for n in [*near, *(draw.randrange(MOST) for _ in range(200)), MOST]:
        assert of(n, factor, shift) == n // divisor, n


@pytest.mark.parametrize("source", [FLOAT_LARGE, FLOAT_SMALL, FLOAT_ODD, BF16_LARGE, BF16_SMALL, BF16_ODD, WGMMA_LARGE], ids=str)
def test_a_weights_gradient_gathers_rows_without_dividing(source):
    """What divides is the number of the block, once: no more than where rows are not gathered."""
    gathered, plain = (next(n for n in source.names if "grouped_dw" in n and n.endswith(f"{end}>")) for end in ("true", "false"))
    made = compile_for(source.path, [gathered, plain], source.architecture or "sm_80")
    counts = [made[name].ptx.count("div.") + made[name].ptx.count("rem.") for name in (gathered, plain)]
    assert counts[0] == counts[1] > 0
