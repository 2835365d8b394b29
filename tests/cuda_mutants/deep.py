"""What the cases of the conformance suite are too small for: pipelines that go round, several tiles of keys, rows for a whole block."""

from typing import Any

import numpy as np
from grouped_products import SPLITS, check_rows, check_weights

from minimoe.testing.tolerances import KERNELS
from minimoe_numpy import NumpyBackend


def products(backend: Any, dtype: Any) -> None:
    for kind in SPLITS:
        for flag in (False, True):
            check_rows(backend, kind, flag, dtype)
            check_weights(backend, kind, flag, dtype)


def attention(backend: Any, dtype: Any) -> None:
    from backends.test_cupy_attention import Shape, call, check_close, expected, forward_and_backward, normal

    name = str(dtype)
    for shape in (
        Shape(1, 33, 130, 1, 1, 96, 96),
        Shape(2, 65, 65, 3, 1, 64, 40, padding="left", sinks=True),
        Shape(1, 130, 130, 2, 1, 8, 8),
    ):
        arrays, options = call(shape, name)
        dy = normal(5, shape.b, shape.tq, shape.queries, shape.cv).astype(dtype)
        for got, wanted in zip(forward_and_backward(backend, arrays, options, dy), expected(shape, name), strict=True):
            check_close(got, wanted, KERNELS[name])


def losses(backend: Any, dtype: Any) -> None:
    draw = np.random.default_rng(0)
    logits, targets = draw.standard_normal((5, 3001)).astype(np.float32), np.array([0, 3000, 7, -100, 1500], np.int32)
    reference = NumpyBackend()
    got, wanted = backend.cross_entropy(logits, targets), reference.cross_entropy(logits, targets)
    for one, other in zip(got, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)
    dloss = np.asarray(0.5, np.float32)
    one, other = (b.cross_entropy_backward(dloss, logits, targets, wanted[2]) for b in (backend, reference))
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-7)
    x, weight = draw.standard_normal((5, 8)).astype(np.float32), draw.standard_normal((3001, 8)).astype(np.float32)
    (total, _), saved = backend.linear_cross_entropy(x, weight, targets)
    (expected, _), kept = reference.linear_cross_entropy(x, weight, targets)
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    pairs = zip(backend.linear_cross_entropy_backward(dloss, saved), reference.linear_cross_entropy_backward(dloss, kept), strict=True)
    for one, other in pairs:
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)


DEEP = {"products": products, "attention": attention, "losses": losses}
