"""gpt-oss (OpenAI 2025): attention sinks, a sliding window in every other layer, biases everywhere, experts with a clipped gate.

Gate and up rows are interleaved in the file, and its stacked weights are [E, in, out]; packed as MXFP4 they are [E, out, in].
"""

from typing import Any

from minimoe.config import ModelConfig
from minimoe.errors import ConfigError
from minimoe.pretrained.families.decoder import COPIES, FIXED, SILU, attention_names, keys, norm_names, outer_names
from minimoe.pretrained.families.family import Family, Json, Key, Tables, of_kind
from minimoe.pretrained.families.layout import Array, Layout, Layouts, Names, StoredTensor, whole
from minimoe.pretrained.families.rotary import read_rotary, write_rotary

KINDS = {"sliding_attention": "sliding", "full_attention": "full"}


def gate_and_up(one: Array) -> Array:
    """View an expert's rows, all gate rows first [2H,...], as interleaved pairs [H,2,...]."""
    return one.reshape(2, -1, *one.shape[1:]).swapaxes(0, 1)


def names(config: ModelConfig) -> Names:
    yield from outer_names(config)
    for layer in range(config.n_layers):
        mm, hf = f"blocks.{layer}", f"model.layers.{layer}"
        yield from norm_names(layer)
        yield from attention_names(config, layer)
        yield f"{mm}.attention.sinks", whole(f"{hf}.self_attn.sinks")
        for x in ("weight", "bias"):
            yield f"{mm}.moe.router.{x}", whole(f"{hf}.mlp.router.{x}")
        for name, layouts in expert_names(f"{hf}.mlp.experts"):
            yield f"{mm}.moe.experts.{name}", layouts


def expert_names(prefix: str) -> list[tuple[str, Layouts]]:
    up, down = f"{prefix}.gate_up_proj", f"{prefix}.down_proj"

    def stacked(tensor: StoredTensor) -> Layout:
        return Layout((tensor,), "stacked")

    return [
        (
            "gate_up_proj",
            (
                stacked(StoredTensor(up, lambda one: gate_and_up(one).transpose(2, 0, 1), joined=(1, 3))),
                stacked(StoredTensor(up, gate_and_up, joined=(0, 2), packed="mxfp4")),
            ),
        ),
        ("down_proj", (stacked(StoredTensor(down, lambda one: one.T)), stacked(StoredTensor(down, packed="mxfp4")))),
        ("gate_up_bias", (stacked(StoredTensor(f"{up}_bias", gate_and_up, joined=(0, 2))),)),
        ("down_bias", (stacked(StoredTensor(f"{down}_bias")),)),
    ]


def read(given: Json, tables: Tables) -> None:
    stretch: dict[str, Any] = {"rope_type": "yarn", "factor": 32.0, "truncate": False, "original_max_position_embeddings": 4096}
    says_so = given.get("rope_parameters") or given.get("rope_scaling")
    read_rotary(given if says_so else {**given, "rope_parameters": stretch}, tables, 150000.0)
    model = tables["model"]
    kinds = of_kind(given, "layer_types", (list,), "a list of layer types")
    kinds = kinds or ["full_attention" if i % 2 else "sliding_attention" for i in range(model["n_layers"])]
    model["layer_types"] = [KINDS.get(kind, kind) if isinstance(kind, str) else kind for kind in kinds]
    if not model["activation_limit"]:
        raise ConfigError(f"swiglu_limit = {model['activation_limit']!r}: expected a limit above 0")


def write(config: ModelConfig, written: Json) -> None:
    write_rotary(config, written)
    hf = {mm: name for name, mm in KINDS.items()}
    written["layer_types"] = [hf["sliding" if config.window(layer) else "full"] for layer in range(config.n_layers)]


FAMILY = Family(
    model_type="gpt_oss",
    architectures={"GptOssForCausalLM": "lm"},
    keys={
        **keys(eps=1e-5, kv_heads=8, seq_len=131072),
        "model.head_dim": Key("head_dim", 64),
        "model.attention_bias": Key("attention_bias", True),
        "model.sliding_window": Key("sliding_window", 128),
        "model.activation_limit": Key("swiglu_limit", 7.0),
        "moe.d_hidden": Key("intermediate_size"),
        "moe.n_experts": Key("num_local_experts", 128, ("num_experts",)),
        "moe.top_k": Key("num_experts_per_tok", 4),
        "moe.aux_loss_coef": Key("router_aux_loss_coef", 0.001),
    },
    fixed={
        **FIXED, "model.bias": True, "model.attention.sinks": True, "moe.router": "topk_softmax", "moe.router_bias": True,
        "moe.aux_convention": "mixtral", "moe.z_loss_coef": 0.0,
    },
    only={"hidden_act": SILU, "swiglu_alpha": (1.702,)},
    names=names,
    read=read,
    write=write,
    copies=COPIES,
    float32_in_float16=(r"norm\.weight$",),  # GptOssPreTrainedModel._keep_in_fp32_modules
)
