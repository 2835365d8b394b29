"""OLMoE (Muennighoff et al. 2024): many small experts, queries and keys normalised over all heads."""

from minimoe.config import ModelConfig
from minimoe.pretrained.families.decoder import (
    COPIES,
    DROPPED,
    FIXED,
    SILU,
    attention_names,
    ffn_names,
    keys,
    moe_names,
    norm_names,
    outer_names,
)
from minimoe.pretrained.families.family import Family, Json, Key, Tables
from minimoe.pretrained.families.layout import Names, experts
from minimoe.pretrained.families.rotary import read_rotary, write_rotary


def names(config: ModelConfig) -> Names:
    """Yield the names of an OLMoE, or of a Qwen3-MoE, some of whose layers may be dense."""
    yield from outer_names(config)
    routed = config.moe_layers()
    for layer in range(config.n_layers):
        yield from norm_names(layer)
        yield from attention_names(config, layer)
        mlp = f"model.layers.{layer}.mlp"
        if layer not in routed:
            yield from ffn_names(config, f"blocks.{layer}.ffn", mlp, config.d_hidden)
            continue
        one = f"{mlp}.experts.{{e}}"
        parts = (f"{one}.gate_proj.weight", f"{one}.up_proj.weight", f"{one}.down_proj.weight")
        yield from moe_names(layer, f"{mlp}.gate.weight", experts(*parts, config.expert_hidden, f"{mlp}.experts"))


def read(given: Json, tables: Tables) -> None:
    read_rotary(given, tables, 10000.0)


def write(config: ModelConfig, written: Json) -> None:
    write_rotary(config, written)
    written["pad_token_id"] = config.pad_token_id


FAMILY = Family(
    model_type="olmoe",
    architectures={"OlmoeForCausalLM": "lm"},
    keys={
        **keys(eps=1e-5, seq_len=4096, padding=1),
        "model.attention_bias": Key("attention_bias", False),
        "moe.d_hidden": Key("intermediate_size"),
        "moe.n_experts": Key("num_experts", 64, ("num_local_experts",)),
        "moe.top_k": Key("num_experts_per_tok", 8),
        "moe.norm_topk_prob": Key("norm_topk_prob", False),
        "moe.aux_loss_coef": Key("router_aux_loss_coef", 0.01),
    },
    fixed={**FIXED, "model.qk_norm": "full", "moe.router": "softmax_topk", "moe.aux_convention": "mixtral", "moe.z_loss_coef": 0.0},
    only={"hidden_act": SILU, "clip_qkv": (None,)},
    names=names,
    read=read,
    write=write,
    copies=COPIES,
    dropped=DROPPED,
)
