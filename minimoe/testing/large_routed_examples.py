"""Inputs of routing and of experts at the sizes of `large_examples.py`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from minimoe.reference.gating import Gate, Rule
from minimoe.reference.routing import Plan
from minimoe.testing.conformance import Wide
from minimoe.testing.dense_examples import Example, Examples, Floats, floats, generator, gradients_of, outputs_of, reference
from minimoe.testing.large_examples import CHAIN, COLUMNS, EXPERTS, ROWS, blocked, terms
from minimoe.testing.routed_examples import Ints, bias_of, expert_weights, rules, spaced, trim_plan, trim_rows

# ---- gating and routing --------------------------------------------------------------------------------------------------------------


def two_logits(n: int) -> Floats:
    """Return logits of two experts with gaps that rounding does not close: within a row, and between any two rows.   -> [N,2]"""
    gap = generator(n).permutation(np.linspace(0.1, 3.0, n)) * np.where(np.arange(n) % 3 == 0, -1.0, 1.0)
    return np.stack((gap / 2, -gap / 2), axis=1)


def gate_inputs() -> Iterator[tuple[str, Floats, Floats | None, Any, Rule]]:
    for name, make in rules().items():
        for n, e, k in [(ROWS, 2, 1), (3, EXPERTS, 8)]:
            rule = make(k, e)
            if rule is not None:
                z = two_logits(n) if e == 2 else spaced(1, n, e)
                yield f"{name}, logits [{n},{e}], K {k}", z, bias_of(rule, e, 0.01), np.arange(n) % 5 != 3, rule


def gate() -> Iterator[Example]:
    for label, z, bias, valid, rule in gate_inputs():
        yield Example(label, (Wide(z), None if bias is None else Wide(bias), valid), {"rule": rule}, additions=blocked(len(z)))
        if z.shape[1] == EXPERTS:
            equal = Wide(np.zeros_like(z)), None, None
            yield Example(f"{label}, equal logits", equal, {"rule": rule}, additions=blocked(EXPERTS))
            many = Wide(np.zeros((EXPERTS, 2))), None, None
            yield Example(
                f"{rule.router}, logits [{EXPERTS},2], equal",
                many,
                {"rule": rule._replace(top_k=1, n_groups=1, top_groups=1)},
                additions=blocked(EXPERTS),
            )


def gate_backward() -> Iterator[Example]:
    for label, z, bias, valid, rule in gate_inputs():
        result = reference().gate(z, bias, valid, rule=rule)
        wide = Gate(*(Wide(a) if a.dtype.kind == "f" else a for a in result))
        gradients = Wide(floats(3, *result.weights.shape)), Wide(floats(4, z.shape[1]))
        yield Example(label, (*gradients, wide, valid), {"rule": rule}, additions=blocked(len(z)))


def route_inputs() -> Iterator[tuple[str, tuple[Ints, Any, Any], dict[str, Any]]]:
    for n, e, k in [(ROWS, 4, 2), (300, EXPERTS, 8)]:
        ids = (generator(n, e).integers(0, e, (n, 1)) + np.arange(k)).astype(np.int32) % e
        weights = Wide(generator(n).permutation(n * k).reshape(n, k) / (n * k))
        base: dict[str, Any] = {"n_experts": e, "rows": n * k}
        label = f"ids [{n},{k}], {e} experts"
        yield label, (ids, weights, np.arange(n) % 5 != 3), base
        for priority in ("position", "probability"):
            limited = {**base, "capacity": max(2, n * k // (2 * e)), "priority": priority}
            yield f"{label}, capacity by {priority}", (ids, weights, None), limited
            yield f"{label}, capacity by {priority}, equal weights", (ids, Wide(np.full((n, k), 0.5)), None), limited


def route() -> Iterator[Example]:
    for label, args, options in route_inputs():
        yield Example(label, args, options, trim=trim_plan)


def plans() -> Iterator[tuple[str, int, int, Plan]]:
    """-> label, N, W, plan"""
    for label, (ids, weights, valid), options in route_inputs():
        if valid is not None:
            yield label, *ids.shape, reference().route(ids, weights.array, valid, **options)


def dispatch() -> Iterator[Example]:
    for label, n, _, plan in plans():
        yield Example(f"x [{n},2], {label}", (floats(1, n, 2), plan), trim=partial(trim_rows, plan.offsets[-1]))


def dispatch_backward() -> Iterator[Example]:
    for label, _, _, plan in plans():
        yield Example(f"drows [{len(plan.order)},2], {label}", (floats(1, len(plan.order), 2), plan))
    wide = reference().route(np.array([[1], [0], [1]], dtype=np.int32), np.ones((3, 1)), None, n_experts=2, rows=3)
    yield Example(f"drows [3,{COLUMNS}]", (floats(1, 3, COLUMNS), wide))


def combine() -> Iterator[Example]:
    for label, n, w, plan in plans():
        yield Example(f"rows [{len(plan.order)},2], {label}", (floats(1, len(plan.order), 2), Wide(floats(2, n, w)), plan))


def combine_backward() -> Iterator[Example]:
    for label, n, w, plan in plans():
        args = floats(1, n, 2), floats(2, len(plan.order), 2), Wide(floats(3, n, w)), plan
        yield Example(f"dy [{n},2], {label}", args, trim=partial(used_first, int(plan.offsets[-1])))


def used_first(used: int, gradients: Any) -> Any:
    return gradients[0][:used], *gradients[1:]


def noisy_inputs() -> Iterator[tuple[str, tuple[Floats, Floats, Floats], int]]:
    for n, e, k in [(ROWS, 2, 1), (3, EXPERTS, 8)]:
        z = two_logits(n) if e == 2 else spaced(1, n, e)
        yield f"[{n},{e}], K {k}", (z + 0.05 * floats(2, n, e), z, 0.5 + np.abs(floats(3, n, e))), k


def noisy_load() -> Iterator[Example]:
    for label, arrays, k in noisy_inputs():
        yield Example(label, (*map(Wide, arrays), None), {"k": k}, additions=blocked(ROWS))


def noisy_load_backward() -> Iterator[Example]:
    for label, arrays, k in noisy_inputs():
        _, ids = reference().noisy_load(*arrays, None, k=k)
        yield Example(label, (Wide(floats(4, arrays[0].shape[1])), *map(Wide, arrays), ids, None), {"k": k})


# ---- experts -------------------------------------------------------------------------------------------------------------------------


def boundaries(rows: int, experts: int) -> Ints:
    """Return row offsets of experts of all sizes, some without a row.   -> [E+1]"""
    inside = np.sort(generator(rows, experts).integers(0, rows, experts - 1) // 7 * 7)
    return np.concatenate(([0], inside, [rows])).astype(np.int32)


def grouped_matmul() -> Iterator[Example]:
    for transpose in (False, True):
        offsets = boundaries(ROWS, EXPERTS)
        args = floats(1, ROWS, 2), floats(2, EXPERTS, *((2, 3) if transpose else (3, 2))), offsets, transpose
        yield Example(f"x [{ROWS},2], {EXPERTS} experts, transpose {transpose}", args)
    args = terms(3, CHAIN), np.full((2, 2, CHAIN), 0.01), np.array([0, 1, 3], dtype=np.int32), False
    yield Example(f"x [3,{CHAIN}], a long sum", args, additions=CHAIN)


def grouped_matmul_dw() -> Iterator[Example]:
    for experts in (2, EXPERTS):
        offsets = boundaries(ROWS, experts)
        yield Example(f"dy [{ROWS},2], {experts} experts", (floats(1, ROWS, 2), floats(2, ROWS, 3), offsets), additions=blocked(ROWS))
    offsets = np.array([0, 0, CHAIN], dtype=np.int32)
    yield Example(f"dy [{CHAIN},4], a long sum", (terms(4, CHAIN).T, np.full((CHAIN, 4), 0.01), offsets), additions=CHAIN)


def grouped_bias() -> Iterator[Example]:
    yield Example(f"bias [{EXPERTS},2], {ROWS} rows", (floats(1, EXPERTS, 2), boundaries(ROWS, EXPERTS), ROWS))


def grouped_bias_backward() -> Iterator[Example]:
    for experts in (2, EXPERTS):
        yield Example(f"dy [{ROWS},2], {experts} experts", (floats(1, ROWS, 2), boundaries(ROWS, experts)), additions=blocked(ROWS))


def ffn() -> Iterator[Example]:
    weights = type(expert_weights(1, 3, 2, "gelu", True))(*(w[0] for w in expert_weights(1, 3, 2, "gelu", True) if w is not None))
    yield Example(f"x [{ROWS},3], H 2", (floats(1, ROWS, 3), weights), call=outputs_of("ffn", "gelu"))


def ffn_backward() -> Iterator[Example]:
    for example in ffn():
        yield Example(example.label, (*example.args, floats(5, ROWS, 3)), call=gradients_of("ffn", 2, "gelu"), additions=blocked(ROWS))


def expert_ffn() -> Iterator[Example]:
    args = floats(1, ROWS, 3), expert_weights(EXPERTS, 3, 2, "gelu", True), boundaries(ROWS, EXPERTS)
    yield Example(f"rows [{ROWS},3], H 2, {EXPERTS} experts", args, call=outputs_of("expert_ffn", "gelu"))


def expert_ffn_backward() -> Iterator[Example]:
    for example in expert_ffn():
        yield Example(
            example.label, (*example.args, floats(5, ROWS, 3)), call=gradients_of("expert_ffn", 3, "gelu"), additions=blocked(ROWS)
        )


def moe_ffn() -> Iterator[Example]:
    for label, n, w, plan in plans():
        args = floats(1, n, 3), Wide(floats(2, n, w)), plan, expert_weights(len(plan.offsets) - 1, 3, 2, "gelu", True)
        yield Example(f"x [{n},3], H 2, {label}", args, call=outputs_of("moe_ffn", "gelu"))


def moe_ffn_backward() -> Iterator[Example]:
    for example in moe_ffn():
        args = *example.args, floats(5, *example.args[0].shape)
        yield Example(example.label, args, call=gradients_of("moe_ffn", 4, "gelu"), additions=blocked(ROWS))


LARGE_ROUTED: dict[str, Examples] = {
    "gate": gate, "gate_backward": gate_backward, "route": route, "dispatch": dispatch, "dispatch_backward": dispatch_backward,
    "combine": combine, "combine_backward": combine_backward, "noisy_load": noisy_load, "noisy_load_backward": noisy_load_backward,
    "grouped_matmul": grouped_matmul, "grouped_matmul_dw": grouped_matmul_dw, "grouped_bias": grouped_bias,
    "grouped_bias_backward": grouped_bias_backward, "ffn": ffn, "ffn_backward": ffn_backward, "expert_ffn": expert_ffn,
    "expert_ffn_backward": expert_ffn_backward, "moe_ffn": moe_ffn, "moe_ffn_backward": moe_ffn_backward,
}  # fmt: skip
