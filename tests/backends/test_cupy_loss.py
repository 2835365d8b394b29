"""Cross-entropy in CUDA C over vocabularies of many sizes: rows that end anywhere in a round, and rows that many warps share."""

import ml_dtypes
import numpy as np
import pytest
from ptx_machine.cupy_on_ptx import CupyOnPtx
from ptx_machine.schedules import EVERY_SCHEDULE

from minimoe_numpy import NumpyBackend

REFERENCE = NumpyBackend()
WIDTHS = [190, 330, 450, 3001, 20_000]  # in float32 a warp's second, third, fourth round ends; six warps; all 32
DTYPES = [np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)]
ROUNDING = {DTYPES[0]: 1e-5, DTYPES[1]: 2.0**-8}  # of the largest gradient


def wide(array):
    return np.asarray(array).astype(np.float64)


def check_losses(backend, width, dtype):
    """Losses and gradients of four rows, one of them ignored, are the reference's in float64; in float32 with the head's product too."""
    draw = np.random.default_rng(width)
    logits, dloss = (4.0 * draw.standard_normal((4, width))).astype(dtype), np.asarray(0.5, np.float32)
    targets = np.array([0, width - 1, -100, width // 2], np.int32)
    got, wanted = backend.cross_entropy(logits, targets), REFERENCE.cross_entropy(wide(logits), targets)
    for one, other in zip(got, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)
    gradient = backend.cross_entropy_backward(dloss, logits, targets, got[2])
    expected = REFERENCE.cross_entropy_backward(dloss, wide(logits), targets, wanted[2])
    assert np.abs(wide(gradient) - expected).max() <= ROUNDING[dtype] * np.abs(expected).max()
    if dtype == np.float32:
        x, weight = (draw.standard_normal((rows, 8)).astype(dtype) for rows in (4, width))
        (loss, _), saved = backend.linear_cross_entropy(x, weight, targets)
        (total, _), kept = REFERENCE.linear_cross_entropy(wide(x), wide(weight), targets)
        np.testing.assert_allclose(loss, total, rtol=1e-5)
        gradients, expected = (b.linear_cross_entropy_backward(dloss, s) for b, s in ((backend, saved), (REFERENCE, kept)))
        for one, other in zip(gradients, expected, strict=True):
            assert np.abs(one - other).max() <= 1e-5 * np.abs(other).max()


@pytest.mark.parametrize("seed", EVERY_SCHEDULE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_rows_of_any_length_have_the_references_loss(width, dtype, seed):
    check_losses(CupyOnPtx(seed), width, dtype)
