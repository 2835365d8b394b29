"""The oracles: routing, the routed layer and attention as loops over single tokens, in float64, with the formulas as a paper prints them.

Written to be obviously right and for nothing else: they know none of minimoe's code, no speed and no memory. N counts valid tokens only:
padding is neither routed nor counted. A tie goes to the lowest index, NaN ranks last.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class Routing(NamedTuple):
    """A router's decision, before capacity."""

    weights: Array  # [N, E] combine weights, 0 where not routed
    ids: list[list[int]]  # of each token its experts, best first (expert choice: in expert order); padding has none
    counts: Array  # [E] tokens per expert, before capacity
    probs: Array  # [N, E] the probabilities that the balance loss averages


# ---- parts ----------------------------------------------------------------------------------------------------------------------


def softmax(z: Array) -> Array:
    e = np.exp(z - np.max(z))
    return e / e.sum()  # type: ignore[no-any-return]


def logsumexp(z: Array) -> float:
    top = float(np.max(z))
    return top + math.log(sum(math.exp(float(value) - top) for value in z))


def sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))


def softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def normal_cdf(x: float) -> float:
    return 0.5 * (1.0 + math.erf(x / math.sqrt(2.0)))


def top_k(values: Sequence[float] | Array, k: int) -> list[int]:
    """The indices of the k largest, largest first; ties to the lowest index, NaN last."""

    def rank(index: int) -> tuple[bool, float, int]:
        value = float(values[index])
        return (True, 0.0, index) if math.isnan(value) else (False, -value, index)

    return sorted(range(len(values)), key=rank)[:k]


def collect(probs: Array, chosen: list[list[tuple[int, float]]]) -> Routing:
    """A Routing from each token's (expert, weight) pairs."""
    weights, counts = np.zeros_like(probs), np.zeros(probs.shape[1], dtype=np.int64)
    for token, pairs in enumerate(chosen):
        for expert, weight in pairs:
            weights[token, expert] = weight
            counts[expert] += 1
    return Routing(weights, [[expert for expert, _ in pairs] for pairs in chosen], counts, probs)


def route_each(z: Array, valid: Array, probs: Callable[[Array], Array], choose: Callable[[Array], list[tuple[int, float]]]) -> Routing:
    """Apply `choose`, which maps one token's logits to (expert, weight) pairs, to every valid token."""
    z = np.asarray(z, dtype=np.float64)
    return collect(
        np.array([probs(row) if ok else np.zeros_like(row) for row, ok in zip(z, valid, strict=True)]).reshape(z.shape),
        [choose(row) if ok else [] for row, ok in zip(z, valid, strict=True)],
    )


# ---- routers --------------------------------------------------------------------------------------------------------------------


def softmax_topk(z: Array, valid: Array, k: int, norm_topk_prob: bool = True) -> Routing:
    """The k largest of p = softmax(z), over their sum if `norm_topk_prob`   (Jiang et al. 2024).   z [N,E], valid [N]"""

    def choose(row: Array) -> list[tuple[int, float]]:
        p = softmax(row)
        best = top_k(p, k)
        total = sum(p[e] for e in best) if norm_topk_prob else 1.0
        return [(e, float(p[e] / total)) for e in best]

    return route_each(z, valid, softmax, choose)


def topk_softmax(z: Array, valid: Array, k: int) -> Routing:
    """The k largest logits, softmax over those k   (gpt-oss).   z [N,E], valid [N]"""

    def choose(row: Array) -> list[tuple[int, float]]:
        best = top_k(row, k)
        return list(zip(best, softmax(row[best]).tolist(), strict=True))

    return route_each(z, valid, softmax, choose)


def switch(z: Array, valid: Array) -> Routing:
    """The best of p = softmax(z), with weight p   (Fedus et al. 2021).   z [N,E], valid [N]"""
    return softmax_topk(z, valid, k=1, norm_topk_prob=False)


def noisy_logits(z: Array, noise_logits: Array, eps: Array) -> tuple[Array, Array]:
    """h = z + eps * sigma with sigma = softplus(x Wn) + 0.01   (Shazeer et al. 2017).   all [N,E] -> h, sigma"""
    sigma = np.array([[softplus(float(value)) + 0.01 for value in row] for row in noise_logits]).reshape(np.shape(z))
    return np.asarray(z, dtype=np.float64) + np.asarray(eps, dtype=np.float64) * sigma, sigma


def noisy_topk(z: Array, valid: Array, k: int, noise_logits: Array | None = None, eps: Array | None = None) -> Routing:
    """Softmax over the k largest of h (in evaluation, without `eps`, of z); probs are of the clean z.   z, noise_logits, eps [N,E]"""
    h = z if eps is None or noise_logits is None else noisy_logits(z, noise_logits, eps)[0]
    clean = route_each(z, valid, softmax, lambda row: [])
    return topk_softmax(h, valid, k)._replace(probs=clean.probs)


def sigmoid_bias(
    z: Array, valid: Array, k: int, bias: Array | None = None, norm_topk_prob: bool = True, route_scale: float = 1.0,
    n_groups: int = 1, top_groups: int = 1,
) -> Routing:  # fmt: skip
    """Choose by s + b with s = sigmoid(z), weigh by s   (DeepSeek-AI 2024).   z [N,E], valid [N], bias [E]

    With groups, only the experts of the best `top_groups` are open; a group's score is the sum of its two best s + b.
    probs are s over its row's sum.
    """
    b = np.zeros(z.shape[1]) if bias is None else np.asarray(bias, dtype=np.float64)
    size = z.shape[1] // n_groups

    def scores(row: Array) -> Array:
        return np.array([sigmoid(float(value)) for value in row])

    def choose(row: Array) -> list[tuple[int, float]]:
        s = scores(row)
        biased = s + b
        if n_groups > 1:
            group_scores = [sum(sorted(biased[g * size : (g + 1) * size])[-2:]) for g in range(n_groups)]
            open_groups = top_k(group_scores, top_groups)
            biased = np.array([biased[e] if e // size in open_groups else -np.inf for e in range(len(row))])
        best = top_k(biased, k)
        total = sum(s[e] for e in best) + 1e-20 if norm_topk_prob else 1.0
        return [(e, float(s[e] / total * route_scale)) for e in best]

    return route_each(z, valid, lambda row: scores(row) / scores(row).sum(), choose)


def expert_choice(z: Array, valid: Array, k: int) -> Routing:
    """Each expert takes its best c = min(N, max(1, ceil(N k / E))) tokens by p = softmax(z), weight p   (Zhou et al. 2022)."""
    n_experts = z.shape[1]
    probs = route_each(z, valid, softmax, lambda row: []).probs
    tokens = [n for n in range(len(z)) if valid[n]]
    c = min(len(tokens), max(1, math.ceil(Fraction(len(tokens) * k, n_experts))))
    chosen: list[list[tuple[int, float]]] = [[] for _ in z]
    for expert in range(n_experts):
        for place in top_k([probs[n, expert] for n in tokens], c):
            chosen[tokens[place]].append((expert, float(probs[tokens[place], expert])))
    return collect(probs, chosen)


# ---- capacity -------------------------------------------------------------------------------------------------------------------


def capacity(n_tokens: int, k: int, n_experts: int, factor: float) -> int:
    """Rows an expert may take: min(N, ceil(N k f / E)), f as the decimal that it prints as (1.1 is 11/10)."""
    return min(n_tokens, math.ceil(Fraction(n_tokens * k, n_experts) * Fraction(str(factor))))


def drop(routing: Routing, limit: int, priority: str = "position") -> tuple[Array, list[tuple[int, int]]]:
    """Keep at most `limit` slots per expert: by `position` (token by token, then slot) or `probability` (the larger combine weight first).

    -> weights [N, E] with 0 for what was dropped, and the dropped slots as (token, slot)
    """
    slots = [(n, j) for n, experts in enumerate(routing.ids) for j in range(len(experts))]
    if priority == "probability":
        slots.sort(key=lambda slot: -routing.weights[slot[0], routing.ids[slot[0]][slot[1]]])  # stable: ties stay in position order
    weights, filled, dropped = routing.weights.copy(), [0] * routing.weights.shape[1], []
    for n, j in slots:
        expert = routing.ids[n][j]
        if filled[expert] < limit:
            filled[expert] += 1
        else:
            weights[n, expert] = 0.0
            dropped.append((n, j))
    return weights, sorted(dropped)


# ---- losses ---------------------------------------------------------------------------------------------------------------------


def balance_loss(probs: Array, counts: Array, valid: Array, k: int) -> float:
    """The balance loss of one layer: E * sum_i f_i P_i, f_i = count_i / (N k), P_i = mean p_i over valid tokens; 1 when uniform."""
    n = int(np.sum(valid))
    n_experts = probs.shape[1]
    total = 0.0
    for i in range(n_experts):
        mean_p = sum(probs[t, i] for t in range(len(probs)) if valid[t]) / n
        total += counts[i] / (n * k) * mean_p
    return float(n_experts * total)


def aux_loss(layers: Sequence[Routing], valid: Array, k: int, convention: str) -> float:
    """Over layers: "switch" sums (uniform: the number of layers), "megablocks" averages (1), "mixtral" is transformers' formula (k)."""
    if convention == "mixtral":
        return mixtral_aux_loss(layers, valid, k)
    each = [balance_loss(layer.probs, layer.counts, valid, k) for layer in layers]
    return sum(each) if convention == "switch" else sum(each) / len(each)


def mixtral_aux_loss(layers: Sequence[Routing], valid: Array, k: int) -> float:
    """transformers' load_balancing_loss_func: tokens of all layers in one pool; E * sum_i (share of tokens that chose i) (mean p_i).

    The share adds over the k slots, so it sums to k over experts.
    """
    rows = [(layer, n) for layer in layers for n in range(len(valid)) if valid[n]]
    n_experts = layers[0].probs.shape[1]
    total = 0.0
    for i in range(n_experts):
        share = sum(i in layer.ids[n] for layer, n in rows) / len(rows)
        total += share * sum(layer.probs[n, i] for layer, n in rows) / len(rows)
    return float(n_experts * total)


def z_loss(z: Array, valid: Array) -> float:
    """The z-loss of one layer: the mean over valid tokens of logsumexp(z)^2; a model's is the mean over layers   (Zoph et al. 2022)."""
    values = [logsumexp(row) ** 2 for row, ok in zip(np.asarray(z, dtype=np.float64), valid, strict=True) if ok]
    return sum(values) / len(values)


def cv_squared(values: Sequence[float] | Array) -> float:
    """Population variance over mean squared, 1e-10 in the denominator."""
    mean = sum(values) / len(values)
    return float(sum((value - mean) ** 2 for value in values) / len(values) / (mean**2 + 1e-10))


def noisy_topk_load(z: Array, valid: Array, k: int, noise_logits: Array | None = None, eps: Array | None = None) -> list[float]:
    """load_i = sum_n P(i stays among the top k when its own noise is drawn anew)   (Shazeer et al. 2017, appendix A).

    = sum_n Phi((z_ni - t) / sigma_ni), t the (k+1)-th value of h if i is among the top k, else the k-th.
    The counts themselves for k = E and in evaluation.
    """
    n_experts = z.shape[1]
    if eps is None or noise_logits is None or k == n_experts:
        return [float(count) for count in noisy_topk(z, valid, k, noise_logits, eps).counts]
    h, sigma = noisy_logits(z, noise_logits, eps)
    load = [0.0] * n_experts
    for n in range(len(z)):
        if not valid[n]:
            continue
        order = top_k(h[n], k + 1)
        for i in range(n_experts):
            threshold = h[n, order[k]] if i in order[:k] else h[n, order[k - 1]]
            load[i] += normal_cdf((z[n, i] - threshold) / sigma[n, i])
    return load


def noisy_topk_losses(z: Array, valid: Array, k: int, noise_logits: Array | None = None, eps: Array | None = None) -> tuple[float, float]:
    """CV^2 of importance (the sum over tokens of the combine weights) and CV^2 of load   (Shazeer et al. 2017)."""
    weights = noisy_topk(z, valid, k, noise_logits, eps).weights
    importance = [sum(weights[n, i] for n in range(len(z))) for i in range(z.shape[1])]
    return cv_squared(importance), cv_squared(noisy_topk_load(z, valid, k, noise_logits, eps))


def bias_update(bias: Array, counts: Array, rate: float) -> Array:
    """sigmoid_bias after an optimizer step: b_i += rate * sign(mean(count) - count_i), counts of the whole step."""
    mean = sum(counts) / len(counts)
    return np.array([b + rate * np.sign(mean - count) for b, count in zip(bias, counts, strict=True)])


# ---- the routed layer -----------------------------------------------------------------------------------------------------------


def activate(name: str, up: Array) -> Array:
    """One token's hidden values; swiglu takes [2H], gate first, the others [H]."""
    if name == "swiglu":
        half = len(up) // 2
        return np.array([g * sigmoid(g) * u for g, u in zip(up[:half].tolist(), up[half:].tolist(), strict=True)])
    if name == "relu":
        return np.array([max(u, 0.0) for u in up.tolist()])
    if name == "gelu":
        return np.array([u * normal_cdf(u) for u in up.tolist()])
    if name == "gelu_tanh":
        return np.array([0.5 * u * (1.0 + math.tanh(math.sqrt(2.0 / math.pi) * (u + 0.044715 * u**3))) for u in up.tolist()])
    raise ValueError(f"no activation {name!r}")


def ffn(x: Array, up: Array, down: Array, activation: str, up_bias: Array | None = None, down_bias: Array | None = None) -> Array:
    """One token through one FFN.   x [D], up [H or 2H, D], down [D, H] -> [D]"""
    hidden = up @ x if up_bias is None else up @ x + up_bias
    y = down @ activate(activation, hidden)
    return y if down_bias is None else y + down_bias


def route(
    z: Array, valid: Array, config: Mapping[str, Any], weights: Mapping[str, Array], noise_logits: Array | None, eps: Array | None
) -> Routing:
    """The router that config["router"] names."""
    router, k = config["router"], config["top_k"]
    norm = config.get("norm_topk_prob", True)
    if router == "softmax_topk":
        return softmax_topk(z, valid, k, norm)
    if router == "topk_softmax":
        return topk_softmax(z, valid, k)
    if router == "switch":
        return switch(z, valid)
    if router == "noisy_topk":
        return noisy_topk(z, valid, k, noise_logits, eps)
    if router == "expert_choice":
        return expert_choice(z, valid, k)
    if router == "sigmoid_bias":
        groups = config.get("n_groups", 1), config.get("top_groups", 1)
        return sigmoid_bias(z, valid, k, weights.get("router.balance_bias"), norm, config.get("route_scale", 1.0), *groups)
    raise ValueError(f"no router {router!r}")


def moe_layer(
    x: Array, weights: Mapping[str, Array], config: Mapping[str, Any], valid: Array | None = None, *,
    training: bool = False, router_x: Array | None = None, noise: Array | None = None,
) -> tuple[Array, dict[str, Any]]:  # fmt: skip
    """The whole routed layer, token by token, in float64.   x [N, D] -> y [N, D], stats

    `weights` by the layer's parameter names ("router.weight", "experts.gate_up_proj", ..., buffer "router.balance_bias"); `config` holds
    the keys of the table [moe] and "activation". Padding gives y = 0 from the experts; the shared experts see every token. Capacity
    acts in training alone. `router_x` is the router's own input (jitter); `noise` [N, E] standard normals (noisy_topk, or times noise_std).
    stats: logits, weights [N,E] after capacity, ids, counts, load, dropped (fraction), aux_loss (this layer's; noisy_topk: its two
    CV^2 losses), z_loss, entropy (mean over tokens of that of p, nats).
    """
    w = {name: np.asarray(array, dtype=np.float64) for name, array in weights.items()}
    x = np.asarray(x, dtype=np.float64)
    valid = np.ones(len(x), dtype=bool) if valid is None else np.asarray(valid, dtype=bool)
    seen = x if router_x is None else np.asarray(router_x, dtype=np.float64)
    z = np.array([w["router.weight"] @ row + w.get("router.bias", 0.0) for row in seen])
    noisy = config["router"] == "noisy_topk"
    if training and noise is not None and not noisy:
        z = z + config.get("noise_std", 0.0) * noise
    noise_logits = np.array([w["router.noise_weight"] @ row for row in seen]) if noisy else None
    eps = noise if training and noisy else None

    routing = route(z, valid, config, w, noise_logits, eps)
    n, k, n_experts = int(valid.sum()), config["top_k"], z.shape[1]
    kept, dropped = routing.weights, list[tuple[int, int]]()
    factor = config.get("capacity_factor", 0.0)
    if training and factor:
        kept, dropped = drop(routing, capacity(n, k, n_experts, factor), config.get("drop_priority", "position"))
    y = np.zeros_like(x)
    for token in range(len(x)):
        for slot, expert in enumerate(routing.ids[token]):
            if (token, slot) not in dropped:
                y[token] += kept[token, expert] * expert_ffn(x[token], w, expert, config["activation"])
        y[token] += shared_ffn(x[token], w, config["activation"])

    slots = int(routing.counts.sum())
    aux = sum(noisy_topk_losses(z, valid, k, noise_logits, eps)) if noisy else balance_loss(routing.probs, routing.counts, valid, k)
    return y, {
        "logits": z, "weights": kept, "ids": routing.ids, "counts": routing.counts, "load": routing.counts / slots,
        "dropped": len(dropped) / slots, "aux_loss": aux, "z_loss": z_loss(z, valid), "entropy": entropy(routing.probs, valid),
    }  # fmt: skip


def expert_ffn(x: Array, w: Mapping[str, Array], expert: int, activation: str) -> Array:
    name = "gate_up" if activation == "swiglu" else "up"
    biases = [w[key][expert] if key in w else None for key in (f"experts.{name}_bias", "experts.down_bias")]
    return ffn(x, w[f"experts.{name}_proj"][expert], w["experts.down_proj"][expert], activation, *biases)


def shared_ffn(x: Array, w: Mapping[str, Array], activation: str) -> Array:
    """0 where the layer has no shared experts."""
    name = "gate_up" if activation == "swiglu" else "up"
    if f"shared.{name}_proj.weight" not in w:
        return np.zeros_like(x)
    biases = w.get(f"shared.{name}_proj.bias"), w.get("shared.down_proj.bias")
    return ffn(x, w[f"shared.{name}_proj.weight"], w["shared.down_proj.weight"], activation, *biases)


def entropy(probs: Array, valid: Array) -> float:
    """Mean over valid tokens of -sum p log p, in nats."""
    each = [-sum(p * math.log(p) for p in row.tolist() if p > 0) for row, ok in zip(probs, valid, strict=True) if ok]
    return float(sum(each) / len(each))


# ---- attention ------------------------------------------------------------------------------------------------------------------


def attention(
    q: Array, k: Array, v: Array, *, scale: float, causal: bool, window: int = 0, q_pos: Array | None = None, k_pos: Array | None = None,
    k_valid: Array | None = None, sinks: Array | None = None,
) -> tuple[Array, Array]:  # fmt: skip
    """Row by row: y = sum_j softmax(scale <q, k_j>) v_j over the keys that a query may see.

    q [B,Tq,Q,C], k [B,Tk,G,C], v [B,Tk,G,Cv], positions [B or 1, T] (default: 0, 1, ...), k_valid [B or 1, Tk], sinks [Q]
    -> y [B,Tq,Q,Cv], logsumexp [B,Q,Tq]. Query head i reads key/value head i // (Q/G). A key is seen if it is valid, not later (causal),
    and less than `window` positions away (window > 0). A sink is one more score, with no value. A row that sees nothing gives y = 0.
    """
    q, k, v = (np.asarray(t, dtype=np.float64) for t in (q, k, v))
    (n_batch, tq, heads, _), (tk, groups) = q.shape, k.shape[1:3]
    q_pos = np.broadcast_to(np.arange(tq) if q_pos is None else q_pos, (n_batch, tq))
    k_pos = np.broadcast_to(np.arange(tk) if k_pos is None else k_pos, (n_batch, tk))
    k_valid = np.broadcast_to(True if k_valid is None else k_valid, (n_batch, tk))
    y, lse = np.zeros((n_batch, tq, heads, v.shape[3])), np.full((n_batch, heads, tq), -np.inf)
    for b in range(n_batch):
        for i in range(tq):
            distance = [int(q_pos[b, i]) - int(k_pos[b, j]) for j in range(tk)]
            seen = [
                j for j in range(tk)
                if k_valid[b, j] and (not causal or distance[j] >= 0) and (not window or abs(distance[j]) < window)
            ]  # fmt: skip
            for head in range(heads):
                group = head // (heads // groups)
                scores = [scale * float(q[b, i, head] @ k[b, j, group]) for j in seen]
                everything = scores if sinks is None else [*scores, float(sinks[head])]
                if everything:
                    lse[b, head, i] = logsumexp(np.array(everything))
                for j, score in zip(seen, scores, strict=True):
                    y[b, i, head] += math.exp(score - lse[b, head, i]) * v[b, j, group]
    return y, lse
