"""Attention, the routed layer and whole decoders against PyTorch's, live: forward and every gradient, in both precisions."""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from parity.peers import NUMPY, TOLERANCE, close, leaf

import minimoe as mm
from benchmarks.torch_models import TorchTransformer, load_arrays
from minimoe import ops

pytestmark = pytest.mark.parity
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE)


# ---- attention -------------------------------------------------------------------------------------------------------------------------


def attention_case(seed):
    """Random shapes: grouped heads, lengths, window, padding."""
    rng = np.random.default_rng(seed)
    groups, per_group = int(rng.integers(1, 4)), int(rng.integers(1, 4))
    b, tk, width, width_v = int(rng.integers(1, 4)), int(rng.integers(1, 40)), int(rng.integers(1, 17)), int(rng.integers(1, 17))
    tq = int(rng.integers(1, tk + 1))
    arrays = {"q": (b, tq, groups * per_group, width), "k": (b, tk, groups, width), "v": (b, tk, groups, width_v)}
    arrays = {name: rng.standard_normal(shape) for name, shape in arrays.items()}
    valid = np.arange(tk) < rng.integers(1, tk + 1, (b, 1)) if rng.random() < 0.5 else None
    return (
        arrays,
        rng.standard_normal((b, tq, groups * per_group, width_v)),
        valid,
        bool(rng.random() < 0.6),
        int(rng.choice([0, 0, 1, 3, 8])),
    )


@each_dtype
@pytest.mark.parametrize("seed", range(24))
def test_attention_agrees_with_scaled_dot_product_attention(seed, dtype):
    arrays, dy, valid, causal, window = attention_case(seed)
    ours, theirs = zip(*(leaf(array, dtype) for array in arrays.values()), strict=True)
    (tq, tk, width) = arrays["q"].shape[1], arrays["k"].shape[1], arrays["q"].shape[3]
    q_pos, k_pos = np.arange(tk - tq, tk, dtype=np.int32), np.arange(tk, dtype=np.int32)  # the queries are the newest positions
    distance = q_pos[:, None] - k_pos
    seen = ((distance >= 0) | (not causal)) & ((abs(distance) < window) | (window == 0))
    seen = np.broadcast_to(seen if valid is None else seen & valid[:, None, :], (len(dy), tq, tk))
    blind = ~seen.any(-1)  # PyTorch does not define such rows; in minimoe they are 0
    dy = np.where(blind[..., None, None], 0.0, dy)

    y = ops.attention(
        *ours, scale=1 / math.sqrt(width), causal=causal, window=window, q_pos=q_pos[None], k_pos=k_pos[None], k_valid=valid
    )  # fmt: skip
    (y * mm.tensor(dy, dtype=dtype, backend=NUMPY)).sum().backward()
    mask = torch.tensor(seen | blind[..., None])[:, None]
    expected = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in theirs), attn_mask=mask, enable_gqa=True).transpose(1, 2)
    (expected * torch.tensor(dy, dtype=expected.dtype)).sum().backward()

    assert not y.numpy()[blind].any()
    close(y, np.where(blind[..., None, None], 0.0, expected.detach().numpy()), TOLERANCE[dtype], "y")
    for name, mine, other in zip("qkv", ours, theirs, strict=True):
        close(mine.grad, other.grad, TOLERANCE[dtype], f"d{name}", floor=1.0)  # over a single key dq is 0


# ---- the routed layer ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden():
    """The script of the golden vectors: every expert on every token, differentiated by PyTorch."""
    path = Path(__file__).parents[1] / "golden" / "make_golden.py"
    spec = importlib.util.spec_from_file_location("make_golden", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ROUTERS = {
    "softmax_topk": {"router": "softmax_topk"},
    "unnormalised": {"router": "softmax_topk", "norm_topk_prob": False, "padding": True, "activation": "gelu"},
    "switch": {"router": "switch", "top_k": 1, "bias": True, "activation": "relu", "padding": True},
    "topk_softmax": {"router": "topk_softmax", "top_k": 3, "bias": True, "router_bias": True, "activation": "gelu_tanh"},
    "sigmoid_bias": {
        "router": "sigmoid_bias",
        "n_experts": 8,
        "n_groups": 4,
        "top_groups": 2,
        "top_k": 3,
        "n_shared_experts": 2,
        "route_scale": 1.5,
    },
}
SIZES = [(14, 3, 5), (33, 17, 7), (64, 24, 40)]  # N, D, H


@each_dtype
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", ROUTERS)
def test_the_routed_layer_agrees_with_pytorch(name, size, dtype, golden, monkeypatch):
    n, d, h = size
    for key, value in {"N": n, "D": d, "H": h, "MIN_GAP": 1e-6}.items():
        monkeypatch.setattr(golden, key, value)
    config = {**golden.MOE_DEFAULTS, "n_experts": 6, **ROUTERS[name]}
    torch.manual_seed(n)
    case = golden.moe_case(config)
    inputs = {key.removeprefix("input."): value.numpy() for key, value in case.items() if key.startswith("input.")}
    moe = {key: value for key, value in config.items() if key not in ("activation", "bias", "padding")}
    layer = mm.MoE(d, h, config["activation"], mm.MoEConfig(**moe), bias=config.get("bias", False), dtype=dtype, backend=NUMPY)
    layer.load_state_dict({key: value for key, value in inputs.items() if key not in ("x", "dy", "valid")})
    x = mm.tensor(inputs["x"], requires_grad=True, dtype=dtype, backend=NUMPY)
    y, stats = layer(x, inputs.get("valid"))
    ((y * mm.tensor(inputs["dy"], dtype=dtype, backend=NUMPY)).sum() + stats.loss).backward()
    results = {"y": y, "aux_loss": stats.aux_loss, "z_loss": stats.z_loss, "dx": x.grad}
    results |= {f"d.{key}": p.grad for key, p in layer.named_parameters()}
    assert len(results) == sum(key.startswith(dtype) for key in case)
    for key, ours in results.items():
        close(ours, case[f"{dtype}.{key}"], TOLERANCE[dtype], key)


# ---- whole decoders --------------------------------------------------------------------------------------------------------------------

DECODERS = {
    "routed, grouped heads": {"n_kv_heads": 2, "moe": {"n_experts": 5, "top_k": 2}},
    "routed every other layer, shared expert": {"n_layers": 4, "moe": {"n_experts": 4, "every": 2, "n_shared_experts": 1}},
    "switch, layer norm, biases, learned positions, tied": {
        "norm": "layer", "bias": True, "attention_bias": True, "position": "learned", "activation": "gelu", "tie_embeddings": True,
        "moe": {"n_experts": 3, "router": "switch", "d_hidden": 9},
    },
    "dense, window, norm of each head": {"sliding_window": 4, "layer_types": ("sliding", "full"), "qk_norm": "head", "n_kv_heads": 1},
    "dense, norm of all heads, wide heads": {"qk_norm": "full", "head_dim": 10, "activation": "gelu_tanh", "rope_theta": 500.0},
}  # fmt: skip


@each_dtype
@pytest.mark.parametrize("style", ["sorted", "loop"])
@pytest.mark.parametrize("name", DECODERS)
def test_a_whole_decoder_agrees_with_pytorch(name, style, dtype):
    options = dict(DECODERS[name])
    moe = mm.MoEConfig(**options.pop("moe")) if "moe" in options else None
    sizes = {"d_model": 24, "n_layers": 2, "n_heads": 4, "d_hidden": 20, "max_seq_len": 13, "vocab_size": 31, "init_std": 0.2}
    config = mm.ModelConfig(**{**sizes, **options}, moe=moe)
    ours = mm.Transformer(config, seed=1, dtype=dtype, backend=NUMPY)
    theirs = TorchTransformer(config, style).to(getattr(torch, dtype))
    load_arrays(theirs, ours.state_dict())
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 31, (3, 14))
    tokens, targets = ids[:, :-1], np.where(rng.random((3, 13)) < 0.2, -100, ids[:, 1:])
    parts = ours.loss(tokens, targets)
    parts.total.backward()
    cross_entropy, router_loss = theirs(torch.tensor(tokens), torch.tensor(targets))
    (cross_entropy + router_loss).backward()
    close(ours(tokens), theirs.logits(torch.tensor(tokens)), TOLERANCE[dtype], "logits")
    close(parts.cross_entropy, cross_entropy, TOLERANCE[dtype], "cross-entropy")
    if moe is not None:
        close(parts.router_loss, router_loss, TOLERANCE[dtype], "router loss")
    expected = dict(theirs.named_parameters())
    assert expected.keys() == dict(ours.named_parameters()).keys()
    for key, p in ours.named_parameters():
        close(p.grad, expected[key].grad, TOLERANCE[dtype], key)
