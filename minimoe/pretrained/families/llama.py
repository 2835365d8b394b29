"""Llama (Touvron et al. 2023; Llama 3, 2024): grouped heads, rotary positions, gated dense layers."""

from minimoe.config import ModelConfig
from minimoe.pretrained.families.decoder import COPIES, DROPPED, FIXED, SILU, attention_names, ffn_names, keys, norm_names, outer_names
from minimoe.pretrained.families.family import Family, Json, Key, Tables
from minimoe.pretrained.families.layout import Names
from minimoe.pretrained.families.rotary import read_rotary, write_rotary


def names(config: ModelConfig) -> Names:
    yield from outer_names(config)
    for layer in range(config.n_layers):
        yield from norm_names(layer)
        yield from attention_names(config, layer)
        yield from ffn_names(config, f"blocks.{layer}.ffn", f"model.layers.{layer}.mlp", config.d_hidden)


def read(given: Json, tables: Tables) -> None:
    read_rotary(given, tables, 10000.0)


FAMILY = Family(
    model_type="llama",
    architectures={"LlamaForCausalLM": "lm"},
    keys={
        **keys(eps=1e-6, seq_len=2048),
        "model.head_dim": Key("head_dim", None),
        "model.attention_bias": Key("attention_bias", False),
        "model.bias": Key("mlp_bias", False),
    },
    fixed=FIXED,
    only={"hidden_act": SILU},
    names=names,
    read=read,
    write=write_rotary,
    copies=COPIES,
    dropped=DROPPED,
)
