"""Mixtral (Jiang et al. 2024): every layer is routed; top-k of the softmax over all experts, weights divided by their sum."""

from minimoe.config import ModelConfig
from minimoe.pretrained.families.decoder import COPIES, DROPPED, FIXED, SILU, attention_names, keys, moe_names, norm_names, outer_names
from minimoe.pretrained.families.family import Family, Json, Key, Tables
from minimoe.pretrained.families.layout import Names, experts
from minimoe.pretrained.families.mistral import write
from minimoe.pretrained.families.rotary import read_rotary


def names(config: ModelConfig) -> Names:
    yield from outer_names(config)
    for layer in range(config.n_layers):
        yield from norm_names(layer)
        yield from attention_names(config, layer)
        moe, stacked = f"model.layers.{layer}.block_sparse_moe", f"model.layers.{layer}.mlp.experts"
        one = f"{moe}.experts.{{e}}"
        gated = experts(f"{one}.w1.weight", f"{one}.w3.weight", f"{one}.w2.weight", config.expert_hidden, stacked)
        yield from moe_names(layer, f"{moe}.gate.weight", gated)


def read(given: Json, tables: Tables) -> None:
    read_rotary(given, tables, 1000000.0)


FAMILY = Family(
    model_type="mixtral",
    architectures={"MixtralForCausalLM": "lm"},
    keys={
        **keys(eps=1e-5, kv_heads=8),
        "model.head_dim": Key("head_dim", None),
        "model.sliding_window": Key("sliding_window", None),
        "moe.d_hidden": Key("intermediate_size"),
        "moe.n_experts": Key("num_local_experts", 8, ("num_experts",)),
        "moe.top_k": Key("num_experts_per_tok", 2),
        "moe.aux_loss_coef": Key("router_aux_loss_coef", 0.001),
        "moe.jitter": Key("router_jitter_noise", 0.0),
    },
    fixed={
        **FIXED, "moe.router": "softmax_topk", "moe.norm_topk_prob": True, "moe.aux_convention": "mixtral", "moe.z_loss_coef": 0.0,
        "moe.jitter_experts": True,
    },
    only={"hidden_act": SILU, "layer_types": (None,)},
    names=names,
    read=read,
    write=write,
    aliases=((r"^(model\.layers\.\d+)\.mlp\.gate\.weight$", r"\1.block_sparse_moe.gate.weight"),),
    copies=COPIES,
    dropped=DROPPED,
)
