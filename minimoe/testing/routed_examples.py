"""Inputs for comparing the kernels of gating, routing and experts with their references.

Ties, empty and overfull experts, padding, dropped slots, NaN logits; rows at or past offsets[E] hold NaN where a kernel must not read
them, and are cut off where it may leave anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from minimoe.backend import Backend
from minimoe.reference import routers
from minimoe.reference.expert import ExpertWeights
from minimoe.reference.gating import Gate, Rule
from minimoe.reference.routing import Plan
from minimoe.testing import unknown_router
from minimoe.testing.conformance import Wide
from minimoe.testing.dense_examples import Example, Examples, Floats, floats, generator, gradients_of, outputs_of, reference

Ints = npt.NDArray[np.int32]

# ---- gating -----------------------------------------------------------------------------------------------------------------------------

Rules = dict[str, Callable[[int, int], Rule | None]]


def rules() -> Rules:
    """Return the rules of every known router, of installed packages too: label, and (K, E) -> Rule, or None if there is none."""
    return {label: make for name in routers.names() for label, make in routers.find(name).conformance_rules()}


def bias_of(rule: Rule, e: int, spread: float) -> Floats | None:
    """Return a bias for a router that takes one.   -> [E] or None"""
    return None if routers.find(rule.router).state_for("bias") is None else np.linspace(-spread, spread, e)


def spaced(seed: int, n: int, e: int) -> Floats:
    """Return logits with gaps that rounding does not close: they differ within a row, and down a column where that is possible."""
    rng = generator(seed, n, e)
    rows = np.argsort(rng.random((n, e)), axis=1)
    return (rows - e / 2) * min(0.25, 10.0 / e) + 0.003 * rng.permutation(n)[:, None] * np.linspace(0.2, 1.0, e)


def gate_inputs() -> Iterator[tuple[str, Floats, Floats | None, npt.NDArray[np.bool_] | None, Rule]]:
    for name, make in rules().items():
        for n, e, k in [(1, 4, 1), (31, 8, 2), (33, 32, 4), (5, 33, 3), (3, 1, 1), (7, 4, 4), (9, 70, 3), (3, 132, 4)]:
            rule = make(k, e)
            if rule is None:
                continue
            bias = bias_of(rule, e, 0.3)
            label = f"{name}, logits [{n},{e}], K {k}"
            z = spaced(1, n, e)
            yield label, z, bias, None, rule
            yield f"{label}, padding", z, bias, np.arange(n) % 3 != 1, rule
            if bias is not None and n == 31:  # closed groups stay closed
                yield f"{label}, every choice below zero", z, bias - 2.0, None, rule
            if n not in (7, 31):
                continue
            yield f"{label}, nothing valid", z, bias, np.zeros(n, dtype=bool), rule
            yield f"{label}, equal logits", np.zeros((n, e)), None, None, rule
            one = np.where(np.arange(e) == e - 1, 9.0, -0.25 * np.arange(e))
            yield f"{label}, all on one expert", np.tile(one, (n, 1)), None, None, rule
        far = make(2, 8)
        if far is not None and not routers.find(far.router).by_expert:  # which orders the tokens of p = 0 too
            yield f"{name}, logits [7,8], K 2, far apart", far_apart(7, 8), bias_of(far, 8, 0.3), None, far


def far_apart(n: int, e: int) -> Floats:
    """Return logits with two of each row so far above the others that e^(their difference) overflows."""
    z = spaced(1, n, e)
    rows = np.arange(n)
    z[rows, rows % e], z[rows, (rows + 3) % e] = 1000.0, 999.5
    return z


def gate() -> Iterator[Example]:
    for label, z, bias, valid, rule in gate_inputs():
        yield Example(label, (Wide(z), None if bias is None else Wide(bias), valid), {"rule": rule})
    for name, make in rules().items():
        chosen = make(2, 8)
        if chosen is None:
            continue
        for bad in (np.nan, np.inf):
            z = spaced(2, 9, 8)
            z[4, :] = np.nan if np.isnan(bad) else z[4, :]
            z[6, 3] = bad
            call = partial(ids_in_range, experts=8)
            yield Example(f"{name}, logits [9,8] with {bad}", (Wide(z), None, None), {"rule": chosen}, call=call)
    sums = Rule("sigmoid_bias", 2)
    yield Example("sigmoid_bias, logits [9,8], sums as small as TINY", (Wide(spaced(3, 9, 8) - 48.0), None, None), {"rule": sums})
    yield from unknown_router.gate(spaced(3, 9, 8))


def ids_in_range(backend: Backend, z: Any, bias: Any, valid: Any, *, rule: Rule, experts: int) -> Any:
    """Run a gate on non-finite logits.

    -> whether every id names an expert (or none), whether the counts agree, the weights of the row whose logits are all NaN, and what the
    finite rows have
    """
    result = backend.gate(z, bias, valid, rule=rule)
    ids, counts = backend.to_host(result.ids), backend.to_host(result.counts)
    choice = routers.find(rule.router).by_expert
    in_range = bool(ids.min() >= (-1 if choice else 0) and ids.max() < experts)
    rows = () if choice else (result.weights[4, :], result.weights[:4, :], result.ids[:4, :])
    return in_range, int(counts.sum()) == int(np.sum(ids >= 0)), rows


def gate_backward() -> Iterator[Example]:
    for label, z, bias, valid, rule in gate_inputs():
        result = reference().gate(z, bias, valid, rule=rule)
        wide = Gate(*(Wide(a) if a.dtype.kind == "f" else a for a in result))
        dweights, dsum = Wide(floats(3, *result.weights.shape)), Wide(floats(4, z.shape[1]))
        yield Example(label, (dweights, dsum, wide, valid), {"rule": rule})
        if valid is not None:
            yield Example(f"{label}, weights alone", (dweights, None, wide, valid), {"rule": rule})
            yield Example(f"{label}, sums alone", (None, dsum, wide, valid), {"rule": rule})
    yield from unknown_router.gate_backward(spaced(3, 9, 8))


# ---- plans ------------------------------------------------------------------------------------------------------------------------------


def slot_ids(n: int, e: int, k: int, kind: str) -> Ints:
    rng = generator(n, e, k)
    ids = np.argsort(rng.random((n, e)), axis=1)[:, :k]
    if kind == "one expert":
        ids = np.tile(np.arange(e - k, e), (n, 1))
    if kind == "empty experts" and e > k:
        ids = np.where(ids == 0, e - 1, ids) if k == 1 else np.tile(np.arange(k), (n, 1))
    return ids.astype(np.int32)


def route_inputs() -> Iterator[tuple[str, tuple[Ints, Any, Any], dict[str, Any]]]:
    for n, e, k in [(1, 4, 1), (31, 8, 2), (33, 8, 8), (32, 32, 3), (64, 1, 1), (5, 33, 1)]:
        for kind in ("spread", "one expert", "empty experts"):
            ids = slot_ids(n, e, k, kind)
            weights = Wide(generator(n).permutation(n * k).reshape(n, k) / (n * k))
            base: dict[str, Any] = {"n_experts": e, "rows": n * k}
            label = f"ids [{n},{k}], {e} experts, {kind}"
            valid = np.arange(n) % 4 != 2
            yield label, (ids, weights, None), base
            yield f"{label}, padding", (ids, weights, valid), base
            for priority in ("position", "probability"):
                yield f"{label}, capacity 3 by {priority}", (ids, weights, valid), {**base, "capacity": 3, "priority": priority}
                device = {**base, "capacity": np.array(2, dtype=np.int64), "priority": priority}
                yield f"{label}, capacity on the device by {priority}", (ids, weights, None), device
            equal = Wide(np.full((n, k), 0.5))
            yield f"{label}, capacity 3 by equal probability", (ids, equal, None), {**base, "capacity": 3, "priority": "probability"}
            yield f"{label}, nothing valid", (ids, weights, np.zeros(n, dtype=bool)), base
    choice = np.where(np.arange(12).reshape(6, 2) % 3 == 0, np.array([0, 1]), -1).astype(np.int32)
    yield "ids [6,2], expert choice", (choice, Wide(np.ones((6, 2))), None), {"n_experts": 2, "rows": 4}


def trim_plan(plan: Plan) -> Plan:
    return Plan(plan.order[: plan.offsets[-1]], plan.inverse, plan.offsets)


def route() -> Iterator[Example]:
    for label, args, options in route_inputs():
        yield Example(label, args, options, trim=trim_plan)


def plans() -> Iterator[tuple[str, int, int, int, Plan]]:
    """-> label, N, E, W, plan"""
    for label, (ids, weights, valid), options in route_inputs():
        if "equal" in label or "device" in label:
            continue
        yield label, ids.shape[0], options["n_experts"], ids.shape[1], reference().route(ids, weights.array, valid, **options)


def poisoned(rows: Floats, plan: Plan) -> Floats:
    """Return the rows with NaN where nothing may read."""
    rows = rows.copy()
    rows[plan.offsets[-1] :] = np.nan
    return rows


def trim_rows(used: int, rows: Any) -> Any:
    return rows[:used]


def trim_first(used: int, gradients: Any) -> Any:
    return gradients[0][:used], gradients[1]


def dispatch() -> Iterator[Example]:
    for label, n, _, _, plan in plans():
        yield Example(f"x [{n},5], {label}", (floats(1, n, 5), plan), trim=partial(trim_rows, plan.offsets[-1]))


def dispatch_backward() -> Iterator[Example]:
    for label, _, _, _, plan in plans():
        yield Example(f"drows [R,33], {label}", (poisoned(floats(1, len(plan.order), 33), plan), plan))


def combine() -> Iterator[Example]:
    for label, n, _, w, plan in plans():
        yield Example(f"rows [R,33], {label}", (poisoned(floats(1, len(plan.order), 33), plan), Wide(floats(2, n, w)), plan))


def combine_backward() -> Iterator[Example]:
    for label, n, _, w, plan in plans():
        used = int(plan.offsets[-1])
        args = floats(1, n, 7), poisoned(floats(2, len(plan.order), 7), plan), Wide(floats(3, n, w)), plan
        yield Example(f"dy [{n},7], {label}", args, trim=partial(trim_first, used))


def noisy_inputs() -> Iterator[tuple[str, tuple[Floats, Floats, Floats], Any, int]]:
    for n, e, k in [(1, 4, 1), (31, 8, 2), (33, 5, 4)]:
        z = spaced(1, n, e)
        arrays = z, z + 0.05 * floats(2, n, e), 0.5 + np.abs(floats(3, n, e))
        yield f"[{n},{e}], K {k}", arrays, None, k
        yield f"[{n},{e}], K {k}, padding", arrays, np.arange(n) % 3 != 1, k


def noisy_load() -> Iterator[Example]:
    for label, arrays, valid, k in noisy_inputs():
        yield Example(label, (*map(Wide, arrays), valid), {"k": k})


def noisy_load_backward() -> Iterator[Example]:
    for label, arrays, valid, k in noisy_inputs():
        _, ids = reference().noisy_load(*arrays, valid, k=k)
        yield Example(label, (Wide(floats(4, arrays[0].shape[1])), *map(Wide, arrays), ids, valid), {"k": k})


# ---- experts ----------------------------------------------------------------------------------------------------------------------------

OFFSETS = {
    "even": [0, 8, 16, 24, 32],
    "odd": [0, 1, 32, 33, 33],
    "empty experts": [0, 0, 31, 31, 31],
    "all on one": [0, 0, 0, 33, 33],
    "no row": [0, 0, 0, 0, 0],
    "one expert": [0, 33],
}


def grouped_inputs() -> Iterator[tuple[str, int, int, Ints]]:
    """-> label, rows R (two of them unused), experts, offsets"""
    for kind, offsets in OFFSETS.items():
        yield f"{kind}, offsets {offsets}", offsets[-1] + 2, len(offsets) - 1, np.array(offsets, dtype=np.int32)


def unused_nan(rows: Floats, offsets: Ints) -> Floats:
    rows = rows.copy()
    rows[offsets[-1] :] = np.nan
    return rows


def grouped_matmul() -> Iterator[Example]:
    for label, r, e, offsets in grouped_inputs():
        for o, i in [(1, 1), (33, 5), (32, 31)]:
            weight = floats(2, e, o, i)
            for transpose in (False, True):
                x = unused_nan(floats(1, r, o if transpose else i), offsets)
                yield Example(f"x {list(x.shape)}, weight [{e},{o},{i}], transpose {transpose}, {label}", (x, weight, offsets, transpose))


def grouped_matmul_dw() -> Iterator[Example]:
    for label, r, _, offsets in grouped_inputs():
        for o, i in [(1, 1), (33, 5), (32, 31)]:
            dy, x = (unused_nan(floats(s, r, width), offsets) for s, width in ((1, o), (2, i)))
            yield Example(f"dy [{r},{o}], x [{r},{i}], {label}", (dy, x, offsets))


def grouped_bias() -> Iterator[Example]:
    for label, r, e, offsets in grouped_inputs():
        yield Example(f"bias [{e},33], {label}", (floats(1, e, 33), offsets, r))


def grouped_bias_backward() -> Iterator[Example]:
    for label, r, _, offsets in grouped_inputs():
        yield Example(f"dy [{r},33], {label}", (unused_nan(floats(1, r, 33), offsets), offsets))


def expert_weights(e: int, d: int, h: int, activation: str, bias: bool) -> ExpertWeights:
    o = 2 * h if activation == "swiglu" else h
    biases = (floats(3, e, o), floats(4, e, d)) if bias else (None, None)
    return ExpertWeights(0.5 * floats(1, e, o, d), 0.5 * floats(2, e, d, h), *biases)


def expert_kinds() -> Iterator[tuple[str, float, bool]]:
    yield from [("swiglu", 0.0, False), ("swiglu", 1.5, True), ("gelu", 0.0, True), ("gelu_tanh", 0.0, False), ("relu", 0.0, True)]


SWITCH_GAP = 0.03  # more than bfloat16 rounds off inputs of order one, their sum and its bias


def at_a_switch(before: Floats, activation: str, limit: float) -> npt.NDArray[np.bool_]:
    """Return True where a number is so near to a jump of the activation's slope that rounding may carry it over.   [N,W,O] -> [N]"""
    if activation == "relu":
        near = np.abs(before) < SWITCH_GAP
    elif activation == "swiglu" and limit:
        gate, up = np.split(before, 2, axis=-1)
        near = (np.abs(gate - limit) < SWITCH_GAP) | (np.abs(np.abs(up) - limit) < SWITCH_GAP)
    else:
        return np.zeros(len(before), dtype=bool)
    return np.any(near, axis=(1, 2))


def off_switches(x: Floats, weights: ExpertWeights, experts: Ints, activation: str, limit: float) -> Floats:
    """Return x, with new numbers in rows that are near a jump of the activation's slope: rounding would change their gradients.

    x [N,D], experts [N,W] that its rows visit
    """
    for seed in range(1000):
        before = np.einsum("nd,nwod->nwo", x, weights.up[experts])
        near = at_a_switch(before if weights.up_bias is None else before + weights.up_bias[experts], activation, limit)
        if not near.any():
            return x
        x = np.where(near[:, None], floats(100 + seed, *x.shape), x)
    raise AssertionError("no rows were found whose activations keep off their switches")


def expert_inputs() -> Iterator[tuple[str, Floats, ExpertWeights, Ints, str, float]]:
    for label, r, e, offsets in grouped_inputs():
        for activation, limit, bias in expert_kinds():
            weights, experts = expert_weights(e, 9, 11, activation, bias), experts_of(np.arange(r)[:, None], offsets)
            rows = unused_nan(off_switches(floats(1, r, 9), weights, experts, activation, limit), offsets)
            yield f"rows [{r},9], H 11, {activation}, limit {limit}, bias {bias}, {label}", rows, weights, offsets, activation, limit


def experts_of(rows: npt.NDArray[np.integer[Any]], offsets: Ints) -> Ints:
    """Return the expert of each row; any expert for an unused row."""
    return np.clip(np.searchsorted(offsets, rows, side="right") - 1, 0, len(offsets) - 2).astype(np.int32)


def expert_ffn() -> Iterator[Example]:
    for label, rows, weights, offsets, *options in expert_inputs():
        trim = partial(trim_rows, int(offsets[-1]))
        yield Example(label, (rows, weights, offsets), call=outputs_of("expert_ffn", *options), trim=trim)


def expert_ffn_backward() -> Iterator[Example]:
    for label, rows, weights, offsets, *options in expert_inputs():
        used = int(offsets[-1])
        trim = partial(trim_first, used)
        dy = unused_nan(floats(5, *rows.shape), offsets)
        yield Example(label, (rows, weights, offsets, dy), call=gradients_of("expert_ffn", 3, *options), trim=trim)


def ffn_inputs() -> Iterator[tuple[str, Floats, ExpertWeights, str, float]]:
    for lead in ((1,), (2, 31), (300,), (0,)):
        for activation, limit, bias in expert_kinds():
            experts = expert_weights(1, 9, 11, activation, bias)
            x = floats(1, *lead, 9)
            x = off_switches(x.reshape(-1, 9), experts, np.zeros((x.size // 9, 1), dtype=np.int32), activation, limit).reshape(x.shape)
            weights = ExpertWeights(*(None if w is None else w[0] for w in experts))
            yield f"x {[*lead, 9]}, H 11, {activation}, limit {limit}, bias {bias}", x, weights, activation, limit


def ffn() -> Iterator[Example]:
    for label, x, weights, *options in ffn_inputs():
        yield Example(label, (x, weights), call=outputs_of("ffn", *options))


def ffn_backward() -> Iterator[Example]:
    for label, x, weights, *options in ffn_inputs():
        yield Example(label, (x, weights, floats(5, *x.shape)), call=gradients_of("ffn", 2, *options))


def moe_inputs() -> Iterator[tuple[str, tuple[Any, ...], tuple[str, float], int]]:
    for label, n, e, w, plan in plans():
        for activation, limit, bias in expert_kinds():
            plain = activation == "swiglu" and not bias
            if (n == 31 and plain) or (n == 5 and (plain or label.endswith("spread"))):
                weights = expert_weights(e, 6, 5, activation, bias)
                x = off_switches(floats(1, n, 6), weights, experts_of(plan.inverse, plan.offsets), activation, limit)
                args = x, Wide(floats(2, n, w)), plan, weights
                yield f"x [{n},6], H 5, {activation}, limit {limit}, bias {bias}, {label}", args, (activation, limit), n


def moe_ffn() -> Iterator[Example]:
    for label, args, options, _ in moe_inputs():
        yield Example(label, args, call=outputs_of("moe_ffn", *options))


def moe_ffn_backward() -> Iterator[Example]:
    for label, args, options, n in moe_inputs():
        yield Example(label, (*args, floats(3, n, 6)), call=gradients_of("moe_ffn", 4, *options))


ROUTED: dict[str, Examples] = {
    "gate": gate, "gate_backward": gate_backward, "route": route, "dispatch": dispatch, "dispatch_backward": dispatch_backward,
    "combine": combine, "combine_backward": combine_backward, "noisy_load": noisy_load, "noisy_load_backward": noisy_load_backward,
    "grouped_matmul": grouped_matmul, "grouped_matmul_dw": grouped_matmul_dw, "grouped_bias": grouped_bias,
    "grouped_bias_backward": grouped_bias_backward, "ffn": ffn, "ffn_backward": ffn_backward,
    "expert_ffn": expert_ffn, "expert_ffn_backward": expert_ffn_backward,
    "moe_ffn": moe_ffn, "moe_ffn_backward": moe_ffn_backward,
}  # fmt: skip
