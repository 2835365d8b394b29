"""Checks at sizes for which the small cases of the conformance suite do not suffice, by topic, from the tests of the backend `cupy`.

There pipelines go round, attention has several tiles of keys, rows take a whole block, and sums and sorts take several blocks.
"""

from typing import Any

import numpy as np
from grouped_products import SPLITS, check_rows, check_weights

from minimoe.reference.gating import Rule
from minimoe.testing.tolerances import KERNELS


def products(backend: Any, dtype: Any) -> None:
    for kind in SPLITS:
        for flag in (False, True):
            check_rows(backend, kind, flag, dtype)
            check_weights(backend, kind, flag, dtype)


def layers(backend: Any, dtype: Any) -> None:
    from backends.test_cupy_wgmma import OnWgmma, check_layer

    products_alone = OnWgmma(0, backend.tiling)  # the rest is the reference's, as in what it is compared with
    products_alone.loader = backend.loader
    check_layer(products_alone, "swiglu", 1.5, True)


def attention(backend: Any, dtype: Any) -> None:
    from backends.test_cupy_attention import Shape, call, check_close, check_own_keys, expected, forward_and_backward, normal

    name = str(dtype)
    for shape in (
        Shape(1, 33, 130, 1, 1, 96, 96),
        Shape(2, 65, 65, 3, 1, 64, 40, padding="left", sinks=True),
        Shape(1, 130, 130, 2, 1, 8, 8),
        Shape(1, 65, 130, 1, 1, 128, 128, causal=False),
        Shape(1, 200, 200, 1, 1, 4, 4, window=2),
        Shape(2, 33, 130, 2, 1, 8, 8, padding="holes"),
        Shape(1, 2, 2100, 1, 1, 4, 4, window=40),
    ):
        arrays, options = call(shape, name)
        dy = normal(5, shape.b, shape.tq, shape.queries, shape.cv).astype(dtype)
        for got, wanted in zip(forward_and_backward(backend, arrays, options, dy), expected(shape, name), strict=True):
            check_close(got, wanted, KERNELS[name])
    for before in range(0, 64, 8):
        check_own_keys(backend, 8, before, name)


def losses(backend: Any, dtype: Any) -> None:
    from backends.test_cupy_loss import WIDTHS, check_losses

    for width in WIDTHS:
        check_losses(backend, width, dtype)


def plans(backend: Any, dtype: Any) -> None:
    from backends.test_cupy_routing import REFERENCE, pairs_of, same_plan

    for tokens, experts in ((1000, 3), (5, 1024)):
        ids, weights = pairs_of(tokens, experts, 3, "an empty expert, and none")
        for capacity, priority in ((None, "position"), (tokens // 2, "probability")):
            options = {"n_experts": experts, "rows": ids.size, "capacity": capacity, "priority": priority}
            same_plan(backend.route(ids, weights, None, **options), REFERENCE.route(ids, weights, None, **options))


def gates(backend: Any, dtype: Any) -> None:
    from backends.test_cupy_routing import check_choice, check_gate, logits_of

    for rule in (Rule("softmax_topk", 2), Rule("topk_softmax", 2), Rule("sigmoid_bias", 2, n_groups=4, top_groups=2)):
        check_gate(backend, logits_of(1000, 8), None, None, rule)
        check_gate(backend, logits_of(5, 68), None, np.arange(5) % 3 != 1, rule)
    z = logits_of(1100, 3)
    z[366::2] = z[366]  # ties across all pieces of tokens
    check_choice(backend, z, None, Rule("expert_choice", 1))


def sorts(backend: Any, dtype: Any) -> None:
    from backends.test_cupy_rope_embedding import added, close, floats, ids_of

    for n, vocab, d in ((2048, 1, 8), (5000, 3, 40), (1500, 50_000, 4)):
        dy, ids = floats(3, n, d, dtype=dtype), ids_of(4, n, vocab)
        close(backend.embedding_backward(dy, ids, vocab), added(dy, ids, vocab), 2e-6)


def norms(backend: Any, dtype: Any) -> None:
    from backends.test_cupy_norm_activation import conforms, inputs
    from backends.test_cupy_norm_activation import norms as both

    for n, width in ((300, 129), (9, 1032), (2, 16384 + 7), (2, 16384 + 8)):
        conforms(both, inputs(both, n, width), str(dtype), backend)


def combinations(backend: Any, dtype: Any) -> None:
    from backends.test_cupy_combine import check_moves

    for width, n, d in ((3, 9, 7), (2, 5, 264), (17, 5, 264)):
        check_moves(backend, width, n, d, dtype)


def squares(backend: Any, dtype: Any) -> None:
    x = np.random.default_rng(0).standard_normal(70_001).astype(dtype)
    for part in (x, x[1:], x[:5000]):
        np.testing.assert_allclose(backend.sum_of_squares(part), np.sum(part.astype(np.float64) ** 2), rtol=1e-5)


DEEP = {
    "products": products, "layers": layers, "attention": attention, "losses": losses, "plans": plans, "gates": gates, "sorts": sorts,
    "norms": norms, "combinations": combinations, "squares": squares,
}  # fmt: skip
