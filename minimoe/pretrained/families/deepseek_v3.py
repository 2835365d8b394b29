"""DeepSeek-V3 (2024): latent attention; sigmoid scores, selected within groups and with a balance bias; a shared expert."""

from minimoe.config import ModelConfig
from minimoe.pretrained.families.decoder import COPIES, DROPPED, FIXED, SILU, ffn_names, keys, moe_names, norm_names, outer_names
from minimoe.pretrained.families.family import Family, Json, Key, Tables, whole_number
from minimoe.pretrained.families.layout import Names, experts, whole
from minimoe.pretrained.families.rotary import read_rotary, write_rotary

PRODUCTS = {"q_b_proj": "q_b_proj", "kv_a_proj": "kv_a_proj_with_mqa", "kv_b_proj": "kv_b_proj", "o_proj": "o_proj"}


def names(config: ModelConfig) -> Names:
    yield from outer_names(config)
    routed = config.moe_layers()
    for layer in range(config.n_layers):
        mm, hf = f"blocks.{layer}", f"model.layers.{layer}"
        yield from norm_names(layer)
        yield from latent_names(config, f"{mm}.attention", f"{hf}.self_attn")
        if layer not in routed:
            yield from ffn_names(config, f"{mm}.ffn", f"{hf}.mlp", config.d_hidden)
            continue
        one = f"{hf}.mlp.experts.{{e}}"
        parts = (f"{one}.gate_proj.weight", f"{one}.up_proj.weight", f"{one}.down_proj.weight")
        yield from moe_names(layer, f"{hf}.mlp.gate.weight", experts(*parts, config.expert_hidden, f"{hf}.mlp.experts"))
        yield f"{mm}.moe.router.balance_bias", whole(f"{hf}.mlp.gate.e_score_correction_bias")
        if config.moe is not None and config.moe.n_shared_experts:
            hidden = config.moe.n_shared_experts * config.expert_hidden
            yield from ffn_names(config, f"{mm}.moe.shared", f"{hf}.mlp.shared_experts", hidden)


def latent_names(config: ModelConfig, mm: str, hf: str) -> Names:
    products, norms = dict(PRODUCTS), {"kv_a_norm": "kv_a_layernorm"}
    if config.mla is not None and config.mla.q_rank:
        products["q_a_proj"], norms["q_a_norm"] = "q_a_proj", "q_a_layernorm"
    else:
        products["q_b_proj"] = "q_proj"
    for name, key in (products | norms).items():
        yield f"{mm}.{name}.weight", whole(f"{hf}.{key}.weight")
        if config.attention_bias and name in ("q_a_proj", "kv_a_proj", "o_proj"):
            yield f"{mm}.{name}.bias", whole(f"{hf}.{key}.bias")


def read(given: Json, tables: Tables) -> None:
    read_rotary(given, tables, 10000.0)
    model = tables["model"]
    model["n_kv_heads"] = model["n_heads"]  # no grouped heads
    dense = min(max(0, whole_number(given, "first_k_dense_replace", 3)), model["n_layers"])
    tables["moe"]["layers"] = list(range(dense, model["n_layers"]))


def write(config: ModelConfig, written: Json) -> None:
    write_rotary(config, written)
    routed = config.moe_layers()
    written["first_k_dense_replace"] = min(routed) if routed else config.n_layers
    written |= {"num_nextn_predict_layers": 0, "rope_interleave": config.interleaved}
    if written["q_lora_rank"] == 0:
        written["q_lora_rank"] = None


FAMILY = Family(
    model_type="deepseek_v3",
    architectures={"DeepseekV3ForCausalLM": "lm"},
    keys={
        **keys(eps=1e-6, seq_len=4096),
        "model.attention_bias": Key("attention_bias", False),
        "model.attention.interleaved": Key("rope_interleave", True),
        "model.mla.q_rank": Key("q_lora_rank", 1536),
        "model.mla.kv_rank": Key("kv_lora_rank", 512),
        "model.mla.nope_dim": Key("qk_nope_head_dim", 128),
        "model.mla.rope_dim": Key("qk_rope_head_dim", 64),
        "model.mla.v_dim": Key("v_head_dim", 128),
        "moe.d_hidden": Key("moe_intermediate_size", 2048),
        "moe.n_experts": Key("n_routed_experts", 256, ("num_local_experts",)),
        "moe.n_shared_experts": Key("n_shared_experts", 1),
        "moe.top_k": Key("num_experts_per_tok", 8),
        "moe.n_groups": Key("n_group", 8),
        "moe.top_groups": Key("topk_group", 4),
        "moe.route_scale": Key("routed_scaling_factor", 2.5),
        "moe.norm_topk_prob": Key("norm_topk_prob", True),
    },
    fixed={**FIXED, "moe.router": "sigmoid_bias", "moe.aux_loss_coef": 0.0, "moe.z_loss_coef": 0.0},
    only={"hidden_act": SILU, "scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",), "moe_layer_freq": (1,)},
    names=names,
    read=read,
    write=write,
    copies=COPIES,
    unused=(r"^model\.layers\.(?P<beyond>\d+)\.",),  # layers past the last predict further tokens in training
    further=Key("num_nextn_predict_layers", 1, ("num_mtp_layers",)),
    dropped=DROPPED,
    float32=(r"\.e_score_correction_bias$", r"\.gate\.weight$"),  # DeepseekV3PreTrainedModel._keep_in_fp32_modules_strict
)
