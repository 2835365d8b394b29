"""Makes the golden vectors: the routed layer and attention, forward and backward, by PyTorch's autograd over plain tensor operations.

`python tests/golden/make_golden.py` writes one safetensors file a case beside itself. Each holds the inputs, drawn in float32 so that both
precisions start from the same numbers, and the results in float64 and in float32:

    moe-*:        input.{x, dy, valid, router.weight, experts.*, ...}  {float64,float32}.{y, aux_loss, z_loss, dx, d.NAME of each weight}
                  ids [N, K] int32, best first, -1 for padding
    attention-*:  input.{q, k, v, dy, q_pos, k_pos, k_valid, sinks}    {float64,float32}.{y, dq, dk, dv, dsinks}

The metadata's one key `case` is JSON: `kind` (moe or attention), `config` (the keys of the table [moe] and `activation`, or attention's
arguments) and `made_with`. The gradients are those of sum(y * dy), for the routed layer plus aux_loss_coef * aux_loss + z_loss_coef *
z_loss.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

HERE = Path(__file__).parent
N, D, H = 13, 8, 12
MIN_GAP = 1e-3  # between the last score chosen and the first not: far above float32's rounding

Tensors = dict[str, Tensor]

MOE_DEFAULTS = {"n_experts": 4, "top_k": 2, "activation": "swiglu", "norm_topk_prob": True, "aux_loss_coef": 0.5, "z_loss_coef": 0.25}
MOE_CASES: dict[str, dict[str, Any]] = {
    "moe-softmax-topk": {"router": "softmax_topk"},
    "moe-softmax-topk-unnormalised": {"router": "softmax_topk", "norm_topk_prob": False, "activation": "gelu", "padding": True},
    "moe-switch": {"router": "switch", "top_k": 1, "activation": "relu"},
    "moe-topk-softmax": {"router": "topk_softmax", "activation": "gelu_tanh", "bias": True, "router_bias": True},
    "moe-sigmoid-bias": {
        "router": "sigmoid_bias",
        "n_experts": 6,
        "n_groups": 3,
        "top_groups": 2,
        "route_scale": 2.5,
        "n_shared_experts": 1,
    },
}
ATTENTION_CASES: dict[str, dict[str, Any]] = {
    "attention-causal": {"causal": True, "window": 0},
    "attention-window": {"causal": True, "window": 3, "sinks": True},
    "attention-padding": {"causal": True, "window": 0, "padding": True},
    "attention-encoder": {"causal": False, "window": 2, "padding": True},
}


# ---- the routed layer -----------------------------------------------------------------------------------------------------------


def moe_inputs(config: dict[str, Any]) -> Tensors:
    """x, dy and the weights by the layer's parameter names, in float32."""
    e, up = config["n_experts"], "gate_up" if config["activation"] == "swiglu" else "up"
    rows = 2 * H if up == "gate_up" else H
    shapes: dict[str, tuple[int, ...]] = {"x": (N, D), "dy": (N, D), "router.weight": (e, D)}
    shapes |= {f"experts.{up}_proj": (e, rows, D), "experts.down_proj": (e, D, H)}
    if config.get("router_bias"):
        shapes["router.bias"] = (e,)
    if config.get("bias"):
        shapes |= {f"experts.{up}_bias": (e, rows), "experts.down_bias": (e, D)}
    if config["router"] == "sigmoid_bias":
        shapes["router.balance_bias"] = (e,)
    if config.get("n_shared_experts"):
        width = config["n_shared_experts"] * H
        shapes |= {f"shared.{up}_proj.weight": (2 * width if up == "gate_up" else width, D), "shared.down_proj.weight": (D, width)}
    inputs = {name: torch.randn(shape) * (1.0 if name in ("x", "dy") else 0.4) for name, shape in shapes.items()}
    if config.get("padding"):
        inputs["valid"] = torch.ones(N, dtype=torch.bool)
        inputs["valid"][[3, 12]] = False
    return inputs


def activate(name: str, up: Tensor) -> Tensor:
    if name == "swiglu":
        gate, value = up.chunk(2, dim=-1)
        return F.silu(gate) * value
    if name == "relu":
        return F.relu(up)
    return F.gelu(up, approximate="tanh" if name == "gelu_tanh" else "none")


def open_scores(s: Tensor, config: dict[str, Any]) -> Tensor:
    """-inf for the experts outside a token's best groups; a group's score is the sum of its two best.   s [N, E]"""
    groups = s.reshape(len(s), config["n_groups"], -1)
    group_scores = groups.topk(2, dim=-1).values.sum(-1)
    check_gap(group_scores, config["top_groups"])
    best = group_scores.topk(config["top_groups"], dim=-1).indices
    shut = torch.ones(groups.shape[:2], dtype=torch.bool).scatter(1, best, False)
    return groups.masked_fill(shut[..., None], -math.inf).reshape(s.shape)


def gate(z: Tensor, t: Tensors, config: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """z [N, E] -> combine weights [N, K], ids [N, K], probabilities of the balance loss [N, E]"""
    k, router = config["top_k"], config["router"]
    p = z.softmax(-1)
    if router == "topk_softmax":
        best = z.topk(k, dim=-1)
        check_gap(z, k)
        return best.values.softmax(-1), best.indices, p
    if router == "sigmoid_bias":
        s = z.sigmoid()
        choice = open_scores((s + t["router.balance_bias"]).detach(), config)
        check_gap(choice, k)
        ids = choice.topk(k, dim=-1).indices
        weights = s.gather(1, ids)
        return weights / (weights.sum(-1, keepdim=True) + 1e-20) * config["route_scale"], ids, s / s.sum(-1, keepdim=True)
    check_gap(p, k)
    weights, ids = p.topk(k, dim=-1)
    norm = config["norm_topk_prob"] and router != "switch"
    return (weights / weights.sum(-1, keepdim=True) if norm else weights), ids, p


def check_gap(scores: Tensor, k: int) -> None:
    ordered = scores.sort(dim=-1, descending=True).values
    gaps = ordered[:, :k] - ordered[:, 1 : k + 1]
    assert gaps.min() > MIN_GAP, f"draw other inputs: two scores lie {gaps.min().item():.1e} apart"


def moe_layer(t: Tensors, config: dict[str, Any]) -> tuple[Tensors, Tensor]:
    """Every expert on every token, weighted by a dense matrix that is 0 where not routed. -> y, aux_loss, z_loss; ids [N, K]"""
    x, name = t["x"], "gate_up" if config["activation"] == "swiglu" else "up"
    z = x @ t["router.weight"].T + t.get("router.bias", 0.0)
    weights, ids, p = gate(z, t, config)
    valid = t.get("valid", torch.ones(N, dtype=torch.bool))
    n = valid.sum()
    chosen = F.one_hot(ids, config["n_experts"]).sum(1) * valid[:, None]  # (N, E) of 0 and 1
    dense = torch.zeros_like(z).scatter(1, ids, weights) * valid[:, None]
    hidden = torch.einsum("nd,ehd->neh", x, t[f"experts.{name}_proj"]) + t.get(f"experts.{name}_bias", 0.0)
    out = torch.einsum("neh,edh->ned", activate(config["activation"], hidden), t["experts.down_proj"]) + t.get("experts.down_bias", 0.0)
    y = torch.einsum("ne,ned->nd", dense, out)
    if f"shared.{name}_proj.weight" in t:
        y = y + activate(config["activation"], x @ t[f"shared.{name}_proj.weight"].T) @ t["shared.down_proj.weight"].T
    fraction = chosen.sum(0).to(x.dtype) / (n * config["top_k"])
    aux = config["n_experts"] * (fraction * (p * valid[:, None]).sum(0) / n).sum()
    z_loss = (z.logsumexp(-1).square() * valid).sum() / n
    return {"y": y, "aux_loss": aux, "z_loss": z_loss}, torch.where(valid[:, None], ids, -1)


def moe_case(config: dict[str, Any]) -> Tensors:
    inputs = moe_inputs(config)
    file = {f"input.{name}": tensor for name, tensor in inputs.items()}
    for dtype in (torch.float64, torch.float32):
        frozen = {"valid", "dy", "router.balance_bias"}
        t = {name: v.to(dtype, copy=True) if v.is_floating_point() else v for name, v in inputs.items()}
        for name in t.keys() - frozen:
            t[name].requires_grad_()
        results, ids = moe_layer(t, config)
        loss = (results["y"] * t["dy"]).sum() + config["aux_loss_coef"] * results["aux_loss"] + config["z_loss_coef"] * results["z_loss"]
        torch.autograd.backward(loss)
        results |= {"dx" if name == "x" else f"d.{name}": v.grad for name, v in t.items() if v.grad is not None}
        file |= {f"{str(dtype).removeprefix('torch.')}.{name}": v.detach().contiguous() for name, v in results.items()}
        file["ids"] = ids.to(torch.int32).contiguous()
    return file


# ---- attention ------------------------------------------------------------------------------------------------------------------


def attention_inputs(config: dict[str, Any]) -> Tensors:
    """2 sequences, 4 query heads over 2 key/value heads. With padding, some rows see nothing; causal, 3 queries follow 4 keys."""
    batch, heads, groups, width, width_v, tk = 2, 4, 2, 6, 4, 7
    tq = 3 if config.get("padding") and config["causal"] else tk
    inputs = {"q": torch.randn(batch, tq, heads, width), "dy": torch.randn(batch, tq, heads, width_v)}
    inputs |= {"k": torch.randn(batch, tk, groups, width), "v": torch.randn(batch, tk, groups, width_v)}
    k_pos = torch.arange(tk, dtype=torch.int32).repeat(batch, 1)
    if config.get("padding"):
        inputs["k_valid"] = torch.ones(batch, tk, dtype=torch.bool)
        inputs["k_valid"][1, :5] = False  # left padding: positions start behind it
        k_pos[1] -= 5
    inputs |= {"q_pos": k_pos[:, tk - tq :].clone(), "k_pos": k_pos}
    if config.get("sinks"):
        inputs["sinks"] = torch.randn(heads)
    return inputs


def attention(t: Tensors, config: dict[str, Any]) -> Tensor:
    """y = softmax(scale q k^T) v over the keys a query may see; a row that sees nothing gives 0.   -> [B, Tq, Q, Cv]"""
    per_group = t["q"].shape[2] // t["k"].shape[2]
    k, v = (t[name].repeat_interleave(per_group, dim=2) for name in ("k", "v"))
    scores = config["scale"] * torch.einsum("bihc,bjhc->bhij", t["q"], k)
    distance = t["q_pos"][:, :, None] - t["k_pos"][:, None, :]
    seen = distance >= 0 if config["causal"] else torch.ones_like(distance, dtype=torch.bool)
    if config["window"]:
        seen = seen & (distance.abs() < config["window"])
    if "k_valid" in t:
        seen = seen & t["k_valid"][:, None, :]
    weights = scores.exp() * seen[:, None]  # the scores are small: no maximum to subtract
    total = weights.sum(-1, keepdim=True)
    if "sinks" in t:
        total = total + t["sinks"].exp()[None, :, None, None]
    return torch.einsum("bhij,bjhc->bihc", weights / torch.where(total > 0, total, 1.0), v)


def attention_case(config: dict[str, Any]) -> Tensors:
    inputs = attention_inputs(config)
    config["scale"] = 0.4
    file = {f"input.{name}": tensor for name, tensor in inputs.items()}
    for dtype in (torch.float64, torch.float32):
        t = {name: v.to(dtype, copy=True) if v.is_floating_point() else v for name, v in inputs.items()}
        leaves = {name: t[name].requires_grad_() for name in ("q", "k", "v", "sinks") if name in t}
        y = attention(t, config)
        torch.autograd.backward((y * t["dy"]).sum())
        results = {"y": y.detach()} | {f"d{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
        file |= {f"{str(dtype).removeprefix('torch.')}.{name}": v.contiguous() for name, v in results.items()}
    return file


def write(name: str, kind: str, config: dict[str, Any], make: Callable[[dict[str, Any]], Tensors], seed: int) -> None:
    torch.manual_seed(seed)
    tensors = make(config)
    case = {"kind": kind, "config": config, "made_with": f"torch {torch.__version__}"}
    path = HERE / f"{name}.safetensors"
    save_file(tensors, path, {"case": json.dumps(case, sort_keys=True)})  # one key: safetensors writes several in any order
    print(f"{path.name}: {len(tensors)} tensors, {path.stat().st_size / 1000:.1f} kB")


def main() -> None:
    torch.set_num_threads(1)
    for seed, (name, case) in enumerate(MOE_CASES.items()):
        write(name, "moe", {**MOE_DEFAULTS, "d_hidden": H, **case}, moe_case, seed)
    for seed, (name, case) in enumerate(ATTENTION_CASES.items(), start=100):
        write(name, "attention", dict(case), attention_case, seed)


if __name__ == "__main__":
    main()
