"""micromoe: a Mixture-of-Experts Transformer and its training, forward and backward by hand, in one file of NumPy.

`python examples/micromoe.py` learns CPython's documentation byte by byte, and prints the loss and where the routers send tokens. Read it
from top to bottom. An operation is a pair: `op` returns its result and what it saved; `op_backward` takes the gradient of the loss with
respect to that result (`dy`, of the shape of `y`), and returns the gradients with respect to the operation's inputs. `backward`, at the end
of the model, calls them in reverse order. minimoe computes the same for this model, and adds the engine that finds the order
(docs/from-micromoe.md has each function of this file beside its counterpart in the library).

Dimensions: B batch, T sequence, N = B*T tokens, D model width, H hidden width of an expert, E experts, K experts per token, R_e rows of
expert e, Q query heads, G key/value heads, M = Q/G query heads per key/value head, C = D/Q head width, V vocabulary, L layers.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Params = dict[str, Array]
Saved = tuple[Any, ...]  # what a forward keeps for its backward
NORM_EPS, ROPE_THETA = 1e-5, 10000.0
BETA1, BETA2, ADAM_EPS, WEIGHT_DECAY, CLIP = 0.9, 0.99, 1e-8, 0.1, 1.0


@dataclass(frozen=True)
class Config:
    """The model and its training. The defaults: bytes as tokens, three layers of eight experts, two of them for each token."""

    vocab_size: int = 256
    d_model: int = 64
    n_layers: int = 3
    n_heads: int = 4
    n_kv_heads: int = 2
    d_hidden: int = 64
    n_experts: int = 8
    top_k: int = 2
    aux_coef: float = 0.01  # coefficient of the load-balancing loss; try 0
    z_coef: float = 0.001  # coefficient of the loss that keeps router logits small
    steps: int = 300
    warmup: int = 20
    lr: float = 4e-3
    min_lr: float = 4e-4


def init(config: Config, rng: np.random.Generator) -> Params:
    """Weights [out, in] by name, normal with std 0.02, less for the 2L that write to the residual stream, since they add up."""
    D, H, E, V, Q, G = config.d_model, config.d_hidden, config.n_experts, config.vocab_size, config.n_heads, config.n_kv_heads
    residual = 1 / math.sqrt(2 * config.n_layers)
    params = {"embed.weight": 0.02 * rng.standard_normal((V, D))}
    for i in range(config.n_layers):
        params |= {
            f"blocks.{i}.attention_norm.weight": np.ones(D),
            f"blocks.{i}.attention.qkv_proj.weight": 0.02 * rng.standard_normal(((Q + 2 * G) * D // Q, D)),  # rows: q, k, v heads
            f"blocks.{i}.attention.o_proj.weight": 0.02 * residual * rng.standard_normal((D, D)),
            f"blocks.{i}.ffn_norm.weight": np.ones(D),
            f"blocks.{i}.moe.router.weight": 0.02 * rng.standard_normal((E, D)),
            f"blocks.{i}.moe.experts.gate_up_proj": 0.02 * rng.standard_normal((E, 2 * H, D)),  # rows: gate, then up
            f"blocks.{i}.moe.experts.down_proj": 0.02 * residual * rng.standard_normal((E, D, H)),
        }
    return params | {"norm.weight": np.ones(D), "head.weight": 0.02 * rng.standard_normal((V, D))}


def linear_backward(dy: Array, x: Array, w: Array) -> tuple[Array, Array]:
    """y = x w^T: dx = dy w, and dw sums over the tokens, since all of them used the same w.   dy [...,O], x [...,I], w [O,I]"""
    return dy @ w, dy.reshape(-1, dy.shape[-1]).T @ x.reshape(-1, x.shape[-1])  # [...,I], [O,N] @ [N,I] -> [O,I]


def softmax(z: Array) -> tuple[Array, Array]:
    """exp(z - lse) and lse = log sum exp(z), over the last axis; the maximum is subtracted first, so that exp cannot overflow."""
    top = z.max(-1, keepdims=True)
    lse = top + np.log(np.exp(z - top).sum(-1, keepdims=True))
    return np.exp(z - lse), lse  # [...,E], [...,1]


def softmax_backward(dp: Array, p: Array) -> Array:
    """dp_i/dz_j = p_i (1[i=j] - p_j), hence dz = p * (dp - sum(dp * p)).   [...,E] -> [...,E]"""
    dz: Array = p * (dp - (dp * p).sum(-1, keepdims=True))
    return dz


def rms_norm(x: Array, w: Array) -> tuple[Array, Saved]:
    """y = x r w with r = 1 / rms(x).   x [B,T,D], w [D] -> [B,T,D]   (Zhang & Sennrich 2019)"""
    r = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + NORM_EPS)  # [B,T,1]
    return x * r * w, (x * r, r, w)


def rms_norm_backward(dy: Array, saved: Saved) -> tuple[Array, Array]:
    """With x^ = x r and dx^ = dy w: dr/dx = -r^3 x / D, hence dx = r (dx^ - x^ mean(dx^ x^))."""
    x_hat, r, w = saved
    dx_hat = dy * w  # [B,T,D]
    return r * (dx_hat - x_hat * (dx_hat * x_hat).mean(-1, keepdims=True)), (dy * x_hat).sum((0, 1))  # [B,T,D], [D]


def rope(x: Array, direction: int = 1) -> Array:
    """Turn each pair (x[i], x[i + C/2]) by position * theta^(-2i/C).   x [B,heads,T,C] -> the same   (Su et al. 2021)"""
    T, C = x.shape[-2:]
    # A rotation's transpose is the rotation back, so rope with direction -1 is the backward of rope.
    angle = direction * np.arange(T)[:, None] * ROPE_THETA ** (-2 * np.arange(C // 2) / C)  # [T,C/2]
    cos, sin = np.cos(angle).astype(x.dtype), np.sin(angle).astype(x.dtype)
    x1, x2 = np.split(x, 2, axis=-1)  # [B,heads,T,C/2] both
    return np.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1)


def attention(h: Array, w_qkv: Array, w_o: Array, config: Config) -> tuple[Array, Saved]:
    """softmax(q k^T / sqrt(C)) v, causal; query head i reads key/value head i // M.   h [B,T,D] -> [B,T,D]   (Ainslie et al. 2023)"""
    (B, T, D), Q, G = h.shape, config.n_heads, config.n_kv_heads
    qkv = (h @ w_qkv.T).reshape(B, T, Q + 2 * G, D // Q).transpose(0, 2, 1, 3)  # [B,Q+2G,T,C]
    q, k, v = np.split(qkv, [Q, Q + G], axis=1)
    q, k, v = rope(q).reshape(B, G, Q // G, T, -1), rope(k)[:, :, None], v[:, :, None]  # [B,G,M,T,C], [B,G,1,T,C] both
    scores = q @ k.swapaxes(-1, -2) / math.sqrt(D // Q)  # [B,G,M,T,T]: query, key
    p, _ = softmax(np.where(np.tri(T, dtype=bool), scores, -np.inf))  # a query attends to the keys up to its own position
    y = (p @ v).transpose(0, 3, 1, 2, 4).reshape(B, T, D)  # the heads side by side
    return y @ w_o.T, (h, w_qkv, w_o, q, k, v, p, y)


def attention_backward(dout: Array, saved: Saved) -> tuple[Array, Array, Array]:
    h, w_qkv, w_o, q, k, v, p, y = saved
    B, G, M, T, C = q.shape
    dy, dw_o = linear_backward(dout, y, w_o)  # [B,T,D], [D,D]
    dy = dy.reshape(B, T, G, M, C).transpose(0, 2, 3, 1, 4)  # [B,G,M,T,C]
    dscores = softmax_backward(dy @ v.swapaxes(-1, -2), p) / math.sqrt(C)  # [B,G,M,T,T]; 0 where masked, since p is 0 there
    dq = (dscores @ k).reshape(B, G * M, T, C)  # [B,Q,T,C]
    dk = (dscores.swapaxes(-1, -2) @ q).sum(2)  # [B,G,T,C]: the M query heads that read a key add up
    dv = (p.swapaxes(-1, -2) @ dy).sum(2)  # [B,G,T,C]
    dqkv = np.concatenate([rope(dq, -1), rope(dk, -1), dv], 1).transpose(0, 2, 1, 3).reshape(B, T, -1)  # [B,T,(Q+2G)*C]
    return *linear_backward(dqkv, h, w_qkv), dw_o  # [B,T,D], [(Q+2G)*C,D], [D,D]


def gate(z: Array, config: Config) -> tuple[Array, Array, float, Saved]:
    """p = softmax(z); keep the K largest, divided by their sum.   z [N,E] -> weights [N,K], ids [N,K], router loss   (Jiang et al. 2024)"""
    (N, E), K, (p, lse) = z.shape, config.top_k, softmax(z)  # [N,E], [N,1]
    ids = np.argsort(-p, axis=-1, kind="stable")[:, :K]  # [N,K]; stable: ties go to the lowest index
    weights = np.take_along_axis(p, ids, -1)  # [N,K]
    total = weights.sum(-1, keepdims=True)  # [N,1]
    f = (np.bincount(ids.ravel(), minlength=E) / (N * K)).astype(z.dtype)  # [E]: shares of the slots; counts have no gradient
    # Even load: E sum_i f_i P_i with P the mean p (Fedus et al. 2021); small logits: mean lse^2 (Zoph et al. 2022), averaged over layers.
    loss = config.aux_coef * E * (f * p.mean(0)).sum() + config.z_coef / config.n_layers * (lse * lse).mean()
    return weights / total, ids, float(loss), (p, lse, ids, weights / total, total, f)


def gate_backward(dweights: Array, saved: Saved, config: Config) -> Array:
    """Adds two gradients: the one that comes back through the weights, and that of the router loss."""
    p, lse, ids, weights, total, f = saved
    (N, E), dp = p.shape, np.zeros_like(p)  # [N,E]
    np.put_along_axis(dp, ids, (dweights - (dweights * weights).sum(-1, keepdims=True)) / total, -1)  # of a / sum(a)   [N,K]
    dp += config.aux_coef * E * f / N  # d aux / dp[n,i] = E f_i / N
    dz: Array = softmax_backward(dp, p) + config.z_coef / config.n_layers * 2 / N * lse * p  # [N,E]: d lse / dz = p
    return dz


def expert(x: Array, gate_up: Array, down: Array) -> tuple[Array, Saved]:
    """(silu(g) * u) down^T with [g | u] = x gate_up^T, silu(g) = g sigmoid(g).   x [R_e,D] -> [R_e,D]   (SwiGLU: Shazeer 2020)"""
    g, u = np.split(x @ gate_up.T, 2, axis=-1)  # [R_e,H] both
    sigmoid = 0.5 * (1 + np.tanh(0.5 * g))  # [R_e,H]: 1 / (1 + exp(-g)), which could overflow
    a = g * sigmoid * u  # [R_e,H]
    return a @ down.T, (x, gate_up, down, g, u, sigmoid, a)


def expert_backward(dy: Array, saved: Saved) -> tuple[Array, Array, Array]:
    x, gate_up, down, g, u, sigmoid, a = saved
    da, ddown = linear_backward(dy, a, down)  # [R_e,H], [D,H]
    dg = da * u * sigmoid * (1 + g * (1 - sigmoid))  # [R_e,H]: silu'(g) = sigmoid + g sigmoid (1 - sigmoid)
    du = da * g * sigmoid  # [R_e,H]
    return *linear_backward(np.concatenate([dg, du], -1), x, gate_up), ddown  # [R_e,D], [2H,D], [D,H]


def moe(h: Array, router: Array, gate_up: Array, down: Array, config: Config) -> tuple[Array, float, Saved]:
    """y = sum over a token's K experts of weight_k expert_k(h).   h [B,T,D] -> y [B,T,D], router loss   (Shazeer et al. 2017)"""
    x = h.reshape(-1, h.shape[-1])  # [N,D]
    weights, ids, loss, saved_gate = gate(x @ router.T, config)
    y, groups = np.zeros_like(x), []
    for e in range(config.n_experts):  # loops over experts, not over tokens: a few large matrix products
        token, slot = np.nonzero(ids == e)  # [R_e] both: the tokens that chose e, and as which of their K
        out, saved_expert = expert(x[token], gate_up[e], down[e])  # [R_e,D]
        y[token] += weights[token, slot, None] * out  # no token occurs twice in `token`, so += loses nothing
        groups.append((token, slot, out, saved_expert))
    return y.reshape(h.shape), loss, (x, router, gate_up, down, weights, saved_gate, groups)


def moe_backward(dy: Array, saved: Saved, config: Config) -> tuple[Array, Array, Array, Array]:
    x, router, gate_up, down, weights, saved_gate, groups = saved
    dout, dx, dweights = dy.reshape(x.shape), np.zeros_like(x), np.empty_like(weights)  # [N,D], [N,D], [N,K]
    dgate_up, ddown = np.empty_like(gate_up), np.empty_like(down)  # [E,2H,D], [E,D,H]
    for e, (token, slot, out, saved_expert) in enumerate(groups):
        dweights[token, slot] = (dout[token] * out).sum(-1)  # [R_e]: d (weight * out) / d weight = out
        dx_expert, dgate_up[e], ddown[e] = expert_backward(weights[token, slot, None] * dout[token], saved_expert)
        dx[token] += dx_expert  # [R_e,D]
    dx_router, drouter = linear_backward(gate_backward(dweights, saved_gate, config), x, router)  # [N,D], [E,D]
    return (dx + dx_router).reshape(dy.shape), drouter, dgate_up, ddown


def forward(params: Params, tokens: Array, config: Config) -> tuple[Array, float, Saved]:
    """Each block adds the results of attention, and then of the experts, to the stream x.   tokens [B,T] -> logits [B,T,V], router loss"""
    x, saved, router_loss = params["embed.weight"][tokens], [], 0.0  # [B,T,D]
    for b in (f"blocks.{i}." for i in range(config.n_layers)):
        h, norm1 = rms_norm(x, params[b + "attention_norm.weight"])
        y, att = attention(h, params[b + "attention.qkv_proj.weight"], params[b + "attention.o_proj.weight"], config)
        x = x + y
        h, norm2 = rms_norm(x, params[b + "ffn_norm.weight"])
        experts = params[b + "moe.experts.gate_up_proj"], params[b + "moe.experts.down_proj"]
        y, loss, routed = moe(h, params[b + "moe.router.weight"], *experts, config)
        x, router_loss = x + y, router_loss + loss
        saved.append((norm1, att, norm2, routed))
    h, norm = rms_norm(x, params["norm.weight"])
    return h @ params["head.weight"].T, router_loss, (saved, norm, h)


def backward(dlogits: Array, saved: Saved, params: Params, tokens: Array, config: Config) -> Params:
    """The lines of `forward` in reverse. x = x + f(x) passes dx on twice: unchanged, and through f."""
    (blocks, norm, h), g = saved, {"embed.weight": np.zeros_like(params["embed.weight"])}  # g: the gradients by name
    dh, g["head.weight"] = linear_backward(dlogits, h, params["head.weight"])  # [B,T,D], [V,D]
    dx, g["norm.weight"] = rms_norm_backward(dh, norm)  # [B,T,D], [D]
    for i, (norm1, att, norm2, routed) in reversed(list(enumerate(blocks))):
        b, m = f"blocks.{i}.", f"blocks.{i}.moe."
        dh, g[m + "router.weight"], g[m + "experts.gate_up_proj"], g[m + "experts.down_proj"] = moe_backward(dx, routed, config)
        dh, g[b + "ffn_norm.weight"] = rms_norm_backward(dh, norm2)
        dx = dx + dh  # [B,T,D]
        dh, g[b + "attention.qkv_proj.weight"], g[b + "attention.o_proj.weight"] = attention_backward(dx, att)
        dh, g[b + "attention_norm.weight"] = rms_norm_backward(dh, norm1)
        dx = dx + dh  # [B,T,D]
    np.add.at(g["embed.weight"], tokens, dx)  # [V,D]: a row adds up the gradients of all positions of its token
    return g


def loss_and_gradients(params: Params, tokens: Array, targets: Array, config: Config) -> tuple[float, float, Params]:
    """The mean cross-entropy of targets [B,T] in nats, with and without the router loss, and the gradients of the former."""
    logits, router_loss, saved = forward(params, tokens, config)
    p, lse = softmax(logits)  # [B,T,V], [B,T,1]
    cross_entropy = float((lse - np.take_along_axis(logits, targets[..., None], -1)).mean())
    dlogits = (p - (targets[..., None] == np.arange(config.vocab_size))) / targets.size  # [B,T,V]: softmax - onehot
    return cross_entropy + router_loss, cross_entropy, backward(dlogits, saved, params, tokens, config)


def train(params: Params, batches: Iterable[tuple[Array, Array]], config: Config) -> Iterator[float]:
    """AdamW (Loshchilov & Hutter 2019); yields the cross-entropy of each step. `params` gets new arrays; the old ones are not changed."""
    m, v = ({name: np.zeros_like(w) for name, w in params.items()} for _ in range(2))
    for step, (tokens, targets) in enumerate(batches):
        _, cross_entropy, grads = loss_and_gradients(params, tokens, targets, config)
        clip = min(1.0, CLIP / (math.sqrt(sum(float((g * g).sum()) for g in grads.values())) + 1e-6))  # by the norm over all of them
        t = (step - config.warmup) / max(1, config.steps - config.warmup)
        cosine = config.min_lr + 0.5 * (config.lr - config.min_lr) * (1 + math.cos(math.pi * t))
        lr = config.lr * (step + 1) / config.warmup if step < config.warmup else cosine
        for name, w in params.items():
            m[name] = BETA1 * m[name] + (1 - BETA1) * clip * grads[name]
            v[name] = BETA2 * v[name] + (1 - BETA2) * (clip * grads[name]) ** 2
            m_hat, v_hat = m[name] / (1 - BETA1 ** (step + 1)), v[name] / (1 - BETA2 ** (step + 1))  # m, v began at 0
            decay = 0.0 if "norm" in name or name == "embed.weight" else WEIGHT_DECAY
            params[name] = w - lr * (m_hat / (np.sqrt(v_hat) + ADAM_EPS) + decay * w)
        yield cross_entropy


if __name__ == "__main__":
    config, rng, B, T = Config(), np.random.default_rng(0), 16, 64
    params = {name: w.astype(np.float32) for name, w in init(config, rng).items()}
    text = np.frombuffer("\n".join(topics.values()).encode(), np.uint8)
    windows = (text[rng.integers(len(text) - T, size=(B, 1)) + np.arange(T + 1)] for _ in range(config.steps))  # [B,T+1]
    for step, loss in enumerate(train(params, ((w[:, :-1], w[:, 1:]) for w in windows), config), start=1):
        if step % 20 == 0:
            blocks = forward(params, text[: B * T].reshape(B, T), config)[2][0]
            loads = [[100 * len(token) / (B * T * config.top_k) for token, *_ in block[3][-1]] for block in blocks]  # [L,E]
            print(f"step {step:4}  loss {loss:.3f}  load in %:", " | ".join(" ".join(f"{x:2.0f}" for x in load) for load in loads))
    sample = b"The statement "
    for _ in range(200):
        logits = forward(params, np.frombuffer(sample[-T:], np.uint8)[None], config)[0]  # [1,T,V]
        p = softmax(logits[0, -1].astype(np.float64) / 0.7)[0]  # [V]: a temperature below 1 prefers likely bytes
        sample += bytes([rng.choice(config.vocab_size, p=p)])
    print(sample.decode(errors="replace"))
