"""Mistral (Jiang et al. 2023): Llama with a sliding window over all layers."""

from minimoe.config import ModelConfig
from minimoe.pretrained.families import llama
from minimoe.pretrained.families.decoder import COPIES, DROPPED, FIXED, SILU, keys
from minimoe.pretrained.families.family import Family, Json, Key, Tables
from minimoe.pretrained.families.rotary import read_rotary, write_rotary


def read(given: Json, tables: Tables) -> None:
    read_rotary(given, tables, 10000.0)


def write(config: ModelConfig, written: Json) -> None:
    write_rotary(config, written)
    written["sliding_window"] = config.sliding_window or None  # in transformers null means no window, and 0 a window that sees nothing


FAMILY = Family(
    model_type="mistral",
    architectures={"MistralForCausalLM": "lm"},
    keys={**keys(eps=1e-6, kv_heads=8), "model.head_dim": Key("head_dim", None), "model.sliding_window": Key("sliding_window", 4096)},
    fixed=FIXED,
    only={"hidden_act": SILU, "layer_types": (None,)},
    names=llama.names,
    read=read,
    write=write,
    copies=COPIES,
    dropped=DROPPED,
)
