"""Kernels on the card against NumPy in float64, on data that no run has seen before; MINIMOE_GPU_SEED repeats one."""

import os
import time

import pytest
from gpu.fresh import TOPICS, check

from benchmarks.gpu.lab import COMPUTES
from minimoe.reference.routing import Plan

SEED = int(os.environ.get("MINIMOE_GPU_SEED", time.time_ns() % 2**32))
PAST = 2**31  # elements: more than a 32-bit index counts


@pytest.mark.parametrize("topic", TOPICS)
def test_kernels_agree_with_their_references_on_fresh_data(backend, topic, guarded):
    print(f"MINIMOE_GPU_SEED={SEED}")
    for dtype in COMPUTES[backend.name]:
        assert check(backend, topic, dtype, SEED)


def test_arrays_of_more_elements_than_a_32_bit_index_counts(backend):
    """Slots are numbered from the end: y[n] = sum of 8 times x[N - 1 - n] / 8. Where memory is short there are as many rows as fit."""
    import cupy

    dtype, d, k = COMPUTES[backend.name][0], 4096, 8
    row = d * (2 if dtype == "bfloat16" else 4)
    free = cupy.cuda.runtime.memGetInfo()[0] + cupy.get_default_memory_pool().free_bytes()
    n = min(PAST // (k * d) + 33, int(0.8 * free) // (row * (k + 4)))
    xp = backend.xp
    x = xp.astype(xp.reshape(xp.arange(n, dtype=xp.int32) % 251, (n, 1)) + xp.zeros((1, d), dtype=xp.int32), backend.dtype(dtype))
    slots = xp.arange(n * k, dtype=xp.int32)
    offsets = xp.asarray([0, n * k], dtype=xp.int32)
    plan = Plan(slots, xp.reshape(slots[::-1], (n, k)).copy(), offsets)
    weights = xp.full((n, k), 1.0 / k, dtype=xp.float32)
    y = backend.combine(backend.dispatch(x, plan), weights, plan)
    assert bool((xp.astype(y, xp.float32) == xp.astype(x[::-1], xp.float32)).all())
