"""Weights of transformers' models under minimoe's names, and helpers of all parity tests."""

import numpy as np
import torch

import minimoe as mm
from minimoe.backend import load

NUMPY = load("numpy")
torch.set_num_threads(1)  # everything here is tiny: a second thread only waits
TOLERANCE = {"float64": 1e-10, "float32": 1e-5}


def close(ours, theirs, tolerance, what="", floor=1e-6):
    """Compare relative to the largest number of the array, or to `floor` for arrays that are zero up to rounding."""
    if isinstance(theirs, torch.Tensor):
        theirs = theirs.detach().numpy()
    ours = ours.numpy() if isinstance(ours, mm.Tensor) else np.asarray(ours)
    assert ours.shape == theirs.shape, f"{what}: {ours.shape} and {theirs.shape}"
    error = np.abs(ours - theirs).max() / max(np.abs(theirs).max(), floor)
    assert error <= tolerance, f"{what}: off by {error:.2e}"


def leaf(array, dtype, requires_grad=True):
    """One array as a leaf of each library."""
    ours = mm.tensor(array, requires_grad=requires_grad, dtype=dtype, backend=NUMPY)
    return ours, torch.tensor(array, dtype=getattr(torch, dtype), requires_grad=requires_grad)


def random_state(model, seed=0, std=0.2):
    """Give every parameter of a torch module random numbers, norms around 1: fresh biases of 0 would hide a wrong mapping."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            centre = 1.0 if "norm" in name.lower() or ".ln_" in name else 0.0
            p.copy_(centre * name.endswith("weight") + std * torch.randn(p.shape, generator=generator))
    return {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}


def mixtral(s, n_layers):
    """MixtralForCausalLM -> minimoe: both stack the experts as [E, 2H, D], gate first."""
    state = {"embed.weight": s["model.embed_tokens.weight"], "norm.weight": s["model.norm.weight"], "head.weight": s["lm_head.weight"]}
    for i in range(n_layers):
        a, b = f"model.layers.{i}.", f"blocks.{i}."
        state |= {
            b + "attention_norm.weight": s[a + "input_layernorm.weight"],
            b + "attention.qkv_proj.weight": np.concatenate([s[f"{a}self_attn.{x}_proj.weight"] for x in "qkv"]),
            b + "attention.o_proj.weight": s[a + "self_attn.o_proj.weight"],
            b + "ffn_norm.weight": s[a + "post_attention_layernorm.weight"],
            b + "moe.router.weight": s[a + "mlp.gate.weight"],
            b + "moe.experts.gate_up_proj": s[a + "mlp.experts.gate_up_proj"],
            b + "moe.experts.down_proj": s[a + "mlp.experts.down_proj"],
        }
    return state


def gpt2(s, n_layers):
    """GPT2LMHeadModel -> minimoe: its Conv1D keeps weights as [in, out]."""
    state = {"embed.weight": s["transformer.wte.weight"], "positions.weight": s["transformer.wpe.weight"]}
    state |= {f"norm.{x}": s[f"transformer.ln_f.{x}"] for x in ("weight", "bias")}
    modules = {
        "attention_norm": "ln_1", "ffn_norm": "ln_2", "attention.qkv_proj": "attn.c_attn", "attention.o_proj": "attn.c_proj",
        "ffn.up_proj": "mlp.c_fc", "ffn.down_proj": "mlp.c_proj",
    }  # fmt: skip
    for i in range(n_layers):
        for ours, theirs in modules.items():
            weight = s[f"transformer.h.{i}.{theirs}.weight"]
            state |= {f"blocks.{i}.{ours}.weight": weight.T, f"blocks.{i}.{ours}.bias": s[f"transformer.h.{i}.{theirs}.bias"]}
    return state


def bert(s, n_layers):
    """BertForMaskedLM -> minimoe: post-norm, so its output norms are the norms of the blocks."""
    state = {
        "embed.weight": s["bert.embeddings.word_embeddings.weight"],
        "positions.weight": s["bert.embeddings.position_embeddings.weight"],
        "token_types.weight": s["bert.embeddings.token_type_embeddings.weight"],
        "head.bias": s["cls.predictions.bias"],
    }
    modules = {"embed_norm": "bert.embeddings.LayerNorm", "head.dense": "cls.predictions.transform.dense"}
    modules["head.norm"] = "cls.predictions.transform.LayerNorm"
    for i in range(n_layers):
        a, b = f"bert.encoder.layer.{i}.", f"blocks.{i}."
        modules |= {
            b + "attention.o_proj": a + "attention.output.dense", b + "attention_norm": a + "attention.output.LayerNorm",
            b + "ffn.up_proj": a + "intermediate.dense", b + "ffn.down_proj": a + "output.dense", b + "ffn_norm": a + "output.LayerNorm",
        }  # fmt: skip
        for x in ("weight", "bias"):
            parts = [s[f"{a}attention.self.{name}.{x}"] for name in ("query", "key", "value")]
            state[f"{b}attention.qkv_proj.{x}"] = np.concatenate(parts)
    return state | {f"{ours}.{x}": s[f"{theirs}.{x}"] for ours, theirs in modules.items() for x in ("weight", "bias")}


def vit(s, n_layers):
    """ViTForImageClassification -> minimoe: a convolution of the patch's own stride is a linear layer over its pixels."""
    kernel = s["vit.embeddings.patch_embeddings.projection.weight"]
    state = {
        "patch_embed.weight": kernel.reshape(len(kernel), -1),
        "patch_embed.bias": s["vit.embeddings.patch_embeddings.projection.bias"],
        "class_token": s["vit.embeddings.cls_token"].reshape(-1),
        "positions.weight": s["vit.embeddings.position_embeddings"][0],
    }
    modules = {"norm": "vit.layernorm", "head": "classifier"}
    for i in range(n_layers):
        a, b = f"vit.layers.{i}.", f"blocks.{i}."
        modules |= {
            b + "attention_norm": a + "layernorm_before", b + "attention.o_proj": a + "attention.o_proj",
            b + "ffn_norm": a + "layernorm_after", b + "ffn.up_proj": a + "mlp.fc1", b + "ffn.down_proj": a + "mlp.fc2",
        }  # fmt: skip
        for x in ("weight", "bias"):
            state[f"{b}attention.qkv_proj.{x}"] = np.concatenate([s[f"{a}attention.{name}_proj.{x}"] for name in "qkv"])
    return state | {f"{ours}.{x}": s[f"{theirs}.{x}"] for ours, theirs in modules.items() for x in ("weight", "bias")}
