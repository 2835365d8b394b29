"""Qwen3-MoE (2025): many small experts, queries and keys normalised head by head; some layers may be dense."""

from minimoe.config import ModelConfig
from minimoe.errors import ConfigError
from minimoe.pretrained.families.decoder import COPIES, DROPPED, FIXED, SILU, keys
from minimoe.pretrained.families.family import Family, Json, Key, Tables
from minimoe.pretrained.families.olmoe import names
from minimoe.pretrained.families.rotary import read_rotary, write_rotary
from minimoe.pretrained.header import shown


def read(given: Json, tables: Tables) -> None:
    read_rotary(given, tables, 10000.0)
    model, dense, step = tables["model"], given.get("mlp_only_layers"), given.get("decoder_sparse_step", 1)
    if not isinstance(dense, list | None):
        raise ConfigError(f"mlp_only_layers = {shown(dense)}: expected a list of layers")
    if not isinstance(step, int) or step < 1:
        raise ConfigError(f"decoder_sparse_step = {shown(step)}: expected a whole number above 0")
    if given.get("use_sliding_window"):
        model["sliding_window"] = given.get("sliding_window", 4096) or 0
    tables["moe"]["layers"] = [i for i in range(model["n_layers"]) if i not in (dense or ()) and (i + 1) % step == 0]


def write(config: ModelConfig, written: Json) -> None:
    write_rotary(config, written)
    written |= {"use_sliding_window": config.sliding_window > 0, "sliding_window": config.sliding_window or None}
    written |= {"decoder_sparse_step": 1, "mlp_only_layers": sorted(set(range(config.n_layers)) - set(config.moe_layers()))}


FAMILY = Family(
    model_type="qwen3_moe",
    architectures={"Qwen3MoeForCausalLM": "lm"},
    keys={
        **keys(eps=1e-6, kv_heads=4, seq_len=32768),
        "model.head_dim": Key("head_dim", None),
        "model.attention_bias": Key("attention_bias", False),
        "moe.d_hidden": Key("moe_intermediate_size", 768),
        "moe.n_experts": Key("num_experts", 128, ("num_local_experts",)),
        "moe.top_k": Key("num_experts_per_tok", 8),
        "moe.norm_topk_prob": Key("norm_topk_prob", False),
        "moe.aux_loss_coef": Key("router_aux_loss_coef", 0.001),
    },
    fixed={**FIXED, "model.qk_norm": "head", "moe.router": "softmax_topk", "moe.aux_convention": "mixtral", "moe.z_loss_coef": 0.0},
    only={"hidden_act": SILU},
    names=names,
    read=read,
    write=write,
    copies=COPIES,
    dropped=DROPPED,
)
