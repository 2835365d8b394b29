"""Examples of a router that a backend cannot know, like those of other packages: the backend must call the reference.

The router is in the table of routers only while an example runs. Its formulas are those of no other router: the k smallest logits, weighed
by their hyperbolic tangent.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

from minimoe.backend import Array, Backend
from minimoe.reference import routers
from minimoe.reference.arrays import ArrayLayer
from minimoe.reference.routers import Gate, Router, Rule
from minimoe.testing.conformance import Wide
from minimoe.testing.dense_examples import Example, Floats, floats, reference


def smallest(b: ArrayLayer, logits: Array, bias: Array | None, valid: Array | None, rule: Rule) -> Gate:
    """w = tanh(z) at the k smallest z; P = z"""
    values, ids = b.top_k(-logits, rule.top_k)
    return routers.token_choice(b, b.xp.tanh(-values), ids, logits, logits, valid)


def smallest_backward(
    b: ArrayLayer, dweights: Array | None, dprob_sum: Array | None, gate: Gate, valid: Array | None, rule: Rule
) -> Array:  # fmt: skip
    """dz = dw (1 - w^2) at the chosen experts, plus dP"""
    dlogits = b.xp.zeros_like(gate.scores)
    if dprob_sum is not None:
        dlogits += routers.sum_valid_backward(b, dprob_sum, valid, gate.scores)
    if dweights is not None:
        dlogits += routers.spread(b, dweights * (1.0 - gate.weights * gate.weights), gate.ids, gate.scores.shape[1])
    return dlogits


UNKNOWN = Router(
    name="of-another-package", chosen="the k smallest z", weight="tanh(z)", paper="none", forward=smallest, backward=smallest_backward
)


@contextmanager
def in_the_table(router: Router) -> Iterator[None]:
    routers.ROUTERS[router.name] = router
    try:
        yield
    finally:
        del routers.ROUTERS[router.name]


def call(kernel: str, backend: Backend, *args: Any, **options: Any) -> Any:
    with in_the_table(UNKNOWN):
        return getattr(backend, kernel)(*args, **options)


def gate_inputs(logits: Floats) -> Iterator[tuple[str, Floats, Any, Rule]]:
    n, e = logits.shape
    for what, valid in (("", None), (", padding", np.arange(n) % 3 != 1)):
        yield f"a router of another package, logits [{n},{e}], K 2{what}", logits, valid, Rule(UNKNOWN.name, 2)


def gate(logits: Floats) -> Iterator[Example]:
    """logits [N,E] with gaps that rounding does not close"""
    for label, z, valid, rule in gate_inputs(logits):
        yield Example(label, (Wide(z), None, valid), {"rule": rule}, call=partial(call, "gate"))


def gate_backward(logits: Floats) -> Iterator[Example]:
    for label, z, valid, rule in gate_inputs(logits):
        result = call("gate", reference(), z, None, valid, rule=rule)
        wide = Gate(*(Wide(a) if a.dtype.kind == "f" else a for a in result))
        args = Wide(floats(3, *result.weights.shape)), Wide(floats(4, z.shape[1])), wide, valid
        yield Example(label, args, {"rule": rule}, call=partial(call, "gate_backward"))
