"""Grouped products at sizes that go round every stage of a tile's pipeline, against the reference: which the conformance suite's do not."""

import ml_dtypes
import numpy as np

from minimoe_numpy import NumpyBackend

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
TOLERANCE = {np.dtype(np.float32): 1e-5, BFLOAT16: 2.0**-7}  # of the largest value; bfloat16: sums in float32, results rounded
SPLITS = {  # of rows among experts; the last number is how many there are
    "ragged": ([0, 70, 133, 134, 140], 140),
    "empty and overfull experts, unused rows": ([0, 0, 129, 129, 129], 137),
    "nothing used": ([0, 0, 0, 0, 0], 5),
}


def draw(seed, *shape, dtype=BFLOAT16):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32).astype(dtype)


def split(kind):
    offsets, rows = SPLITS[kind]
    return np.array(offsets, np.int32), rows


def poisoned(x, offsets):
    """Rows that belong to no expert must not be read."""
    x[offsets[-1] :] = np.nan
    return x


def wide(x):
    return None if x is None else x.astype(np.float32) if x.dtype == BFLOAT16 else x


def close(got, wanted):
    tolerance = TOLERANCE[got.dtype]
    got, wanted = wide(got), wide(wanted)
    assert got.shape == wanted.shape
    np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance * max(1.0, float(np.abs(wanted).max(initial=0))))


def check_rows(backend, kind, transpose, dtype=BFLOAT16):
    """y[r] = x[r] w[e]^T for the rows of each expert; zero for the others."""
    offsets, rows = split(kind)
    inner, outer = (72, 264) if kind == "ragged" else (328, 136)  # within a stage, and round all of them
    x = poisoned(draw(1, rows, inner, dtype=dtype), offsets)
    weight = draw(2, 4, *((inner, outer) if transpose else (outer, inner)), dtype=dtype)
    y = backend.grouped_matmul(x, weight, offsets, transpose)
    close(y, NumpyBackend().grouped_matmul(wide(x), wide(weight), offsets, transpose))
    assert not np.any(wide(y)[offsets[-1] :])


def check_weights(backend, kind, accumulate, dtype=BFLOAT16):
    """The gradient of the weights of each expert, alone or added to what is there."""
    offsets, rows = split(kind)
    dy, x = (poisoned(draw(seed, rows, width, dtype=dtype), offsets) for seed, width in ((1, 136), (2, 264)))
    before = draw(3, 4, 136, 264, dtype=dtype)
    out = before.copy()
    backend.grouped_matmul_dw(dy, x, offsets, out, accumulate)
    wanted = NumpyBackend().grouped_matmul_dw(wide(dy), wide(x), offsets)
    close(out, wanted + wide(before) if accumulate else wanted)
