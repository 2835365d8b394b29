"""config.json of each family: read, written, read again; an absent key means what it means in transformers; the family of a model."""

import json
from typing import Any

import msgspec
import pytest
from model_folders import Json, small

from minimoe.config import AttentionConfig, LatentConfig, ModelConfig, MoEConfig, RopeConfig, load_config
from minimoe.errors import ConfigError
from minimoe.model.transformer import Transformer
from minimoe.pretrained.families.family import built_in, essence
from minimoe.pretrained.families.table import FAMILIES, family, family_for

DECODERS = ("llama", "mistral", "mixtral", "olmoe", "qwen3_moe", "gpt_oss", "deepseek_v3")
each = pytest.mark.parametrize("name", FAMILIES)


def read(config: Json) -> ModelConfig:
    return family(config["model_type"]).model_config(config)


# ---- there and back -----------------------------------------------------------------------------------------------------------

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "beta_fast": 16.0, "beta_slow": 2.0}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
}  # fmt: skip
VARIANTS: list[tuple[str, Json]] = [
    *((name, {}) for name in FAMILIES),
    *((name, {"tie_word_embeddings": True}) for name in DECODERS),
    *((name, {"tie_word_embeddings": False}) for name in ("gpt2", "bert")),
    *((name, {"rope_scaling": rope}) for name in ("llama", "mixtral") for rope in (YARN, LLAMA3, {"type": "linear", "factor": 2.0})),
    ("gpt2", {"activation_function": "relu", "n_inner": 40, "resid_pdrop": 0.3, "attn_pdrop": 0.2}),
    ("bert", {"hidden_act": "gelu_new", "pad_token_id": None, "hidden_dropout_prob": 0.0, "initializer_range": 0.01}),
    ("bert", {"architectures": ["BertModel"]}),
    ("vit", {"image_size": [12, 12], "patch_size": [6, 6], "num_channels": 1, "id2label": {"0": "a", "1": "b", "2": "c"}}),
    ("llama", {"head_dim": 10, "attention_bias": True, "mlp_bias": True, "num_key_value_heads": None}),
    ("mistral", {"sliding_window": None, "head_dim": 8, "attention_dropout": 0.1}),
    ("mixtral", {"sliding_window": 8, "router_jitter_noise": 0.1, "num_experts_per_tok": 1}),
    ("olmoe", {"norm_topk_prob": True, "attention_bias": True}),
    ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 8, "mlp_only_layers": [], "decoder_sparse_step": 2}),
    ("qwen3_moe", {"mlp_only_layers": [0, 1, 2]}),
    ("gpt_oss", {"layer_types": ["full_attention", "full_attention"], "attention_bias": False, "rope_scaling": {"rope_type": "default"}}),
    ("deepseek_v3", {"q_lora_rank": None, "attention_bias": True, "rope_interleave": False, "n_shared_experts": 0}),
    ("deepseek_v3", {"rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7}, "first_k_dense_replace": 0}),
    ("deepseek_v3", {"first_k_dense_replace": 9, "n_group": 1, "topk_group": 1, "norm_topk_prob": False}),
]
variants = pytest.mark.parametrize("name, changes", VARIANTS, ids=lambda value: value if isinstance(value, str) else ",".join(value) or "-")


@variants
def test_a_config_that_is_written_is_read_back_equal(name: str, changes: Json) -> None:
    config = read(small(name, **changes))
    written = json.loads(json.dumps(family(name).config_json(config)))
    back = read(written)
    assert essence(back) == essence(config)
    assert family(name).config_json(back) == written
    same = ("dropout", "attention_dropout", "init_std", "pad_token_id")
    assert [getattr(back, key) for key in same] == [getattr(config, key) for key in same]
    if config.moe is not None and back.moe is not None:
        assert (back.moe.aux_loss_coef, back.moe.jitter) == (config.moe.aux_loss_coef, config.moe.jitter)


@variants
def test_a_family_names_each_parameter_once(name: str, changes: Json) -> None:
    config = read(small(name, **changes))
    named = [parameter for parameter, _ in family(name).names(config)]
    assert sorted(named) == sorted(parameter for parameter, _ in Transformer(config, seed=None).named_state())


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("scaling", [YARN, LLAMA3, {"rope_type": "linear", "factor": 2.0}], ids=["yarn", "llama3", "linear"])
def test_both_spellings_of_rotary_positions_mean_the_same(name: str, scaling: Json) -> None:
    bare = {key: value for key, value in small(name).items() if not key.startswith("rope")}
    older = {("type" if key == "rope_type" else key): value for key, value in scaling.items()}
    old = read({**bare, "rope_theta": 5e5, "rope_scaling": older})
    assert old == read({**bare, "rope_parameters": {**scaling, "rope_theta": 5e5}})
    assert old.rope is not None and (old.rope.type, old.rope.factor, old.rope_theta) == (scaling["rope_type"], scaling["factor"], 5e5)


# ---- what is absent -----------------------------------------------------------------------------------------------------------

# The defaults of transformers 5.24's configuration classes, for keys that decide what is computed.
_LLAMA = {
    "hidden_act": "silu", "tie_word_embeddings": False, "attention_dropout": 0.0, "initializer_range": 0.02, "rope_parameters": None,
    "pad_token_id": None,
}  # fmt: skip
DEFAULTS: dict[str, Json] = {
    "gpt2": {
        "vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_inner": None, "layer_norm_epsilon": 1e-5,
        "activation_function": "gelu_new", "resid_pdrop": 0.1, "attn_pdrop": 0.1, "initializer_range": 0.02, "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False, "tie_word_embeddings": True,
    },
    "bert": {
        "vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
        "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "max_position_embeddings": 512,
        "type_vocab_size": 2, "initializer_range": 0.02, "layer_norm_eps": 1e-12, "pad_token_id": 0, "is_decoder": False,
        "add_cross_attention": False, "tie_word_embeddings": True,
    },
    "vit": {
        "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072, "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.02, "layer_norm_eps": 1e-12,
        "image_size": 224, "patch_size": 16, "num_channels": 3, "qkv_bias": True,
    },
    "llama": {
        **_LLAMA, "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": None, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "attention_bias": False, "mlp_bias": False,
        "head_dim": None,
    },
    "mistral": {
        **_LLAMA, "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": None, "max_position_embeddings": 131072, "rms_norm_eps": 1e-6, "sliding_window": 4096,
    },
    "mixtral": {
        **_LLAMA, "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": None, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "sliding_window": None,
        "num_experts_per_tok": 2, "num_local_experts": 8, "router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0,
    },
    "olmoe": {
        **_LLAMA, "vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 16,
        "num_key_value_heads": None, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "attention_bias": False, "clip_qkv": None,
        "pad_token_id": 1, "num_experts_per_tok": 8, "num_experts": 64, "router_aux_loss_coef": 0.01, "norm_topk_prob": False,
    },
    "qwen3_moe": {
        **_LLAMA, "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 24, "num_attention_heads": 32,
        "num_key_value_heads": 4, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "attention_bias": False,
        "use_sliding_window": False, "sliding_window": 4096, "decoder_sparse_step": 1, "moe_intermediate_size": 768,
        "num_experts_per_tok": 8, "num_experts": 128, "norm_topk_prob": False, "router_aux_loss_coef": 0.001, "mlp_only_layers": None,
    },
    "gpt_oss": {
        **_LLAMA, "vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 36, "num_attention_heads": 64,
        "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "attention_bias": True,
        "sliding_window": 128, "num_experts_per_tok": 4, "num_local_experts": 128, "router_aux_loss_coef": 0.001, "swiglu_limit": 7.0,
        "swiglu_alpha": 1.702, "layer_types": None,
    },
    "deepseek_v3": {
        **_LLAMA, "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
        "num_hidden_layers": 61, "num_attention_heads": 128, "n_shared_experts": 1, "n_routed_experts": 256, "routed_scaling_factor": 2.5,
        "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64, "v_head_dim": 128, "qk_nope_head_dim": 128, "n_group": 8,
        "topk_group": 4, "num_experts_per_tok": 8, "first_k_dense_replace": 3, "norm_topk_prob": True, "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6, "attention_bias": False, "rope_interleave": True,
    },
}  # fmt: skip
# Sizes without which nothing can be said of a model: they are asked for.
SIZES = {
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "n_embd", "n_layer", "n_head",
    "max_position_embeddings",
}  # fmt: skip
THETA = {"mixtral": 1e6, "gpt_oss": 150000.0}  # of others 10000
UNREAD = {("qwen3_moe", "sliding_window"), ("deepseek_v3", "num_key_value_heads")}  # not while use_sliding_window is false; unused there
facts = pytest.mark.parametrize("name, key", [(name, key) for name in FAMILIES for key in DEFAULTS[name]])


@facts
def test_an_absent_key_has_its_default_in_transformers_or_is_required(name: str, key: str) -> None:
    config = {"model_type": name, **DEFAULTS[name]}
    without = {other: value for other, value in config.items() if other != key}
    try:
        assert read(without) == read(config)
    except ConfigError as error:
        assert key in SIZES and str(error) == f"{key} is missing: {name} needs it"


@facts
def test_a_key_with_another_value_means_another_model_or_is_refused(name: str, key: str) -> None:
    config = {"model_type": name, **DEFAULTS[name]}
    given = config[key]
    others: Json = {
        "head_dim": 32, "mlp_only_layers": [0], "layer_types": ["full_attention"] * 36, "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "linear", "factor": 2.0},
    }  # fmt: skip
    if isinstance(given, bool):
        other: Any = not given
    elif isinstance(given, int | float):
        other = 2 * given if given else 0.5 if isinstance(given, float) else 1
    else:
        other = others.get(key, "another" if isinstance(given, str) else 8)
    try:
        changed = read({**config, key: other})
    except ConfigError as error:
        assert key in str(error)
    else:
        assert (changed == read(config)) == ((name, key) in UNREAD)


@pytest.mark.parametrize("name", DECODERS)
def test_absent_rotary_settings_have_their_defaults_in_transformers(name: str) -> None:
    config = read({"model_type": name, **DEFAULTS[name]})
    assert config.rope_theta == THETA.get(name, 10000.0)
    yarn = RopeConfig(type="yarn", factor=32.0, original_max_seq_len=4096, beta_fast=32.0, beta_slow=1.0, truncate=False)
    assert config.rope == (yarn if name == "gpt_oss" else None)


def test_other_absent_keys_have_their_defaults_in_transformers() -> None:
    def default(name: str, **changes: Any) -> ModelConfig:
        return read({"model_type": name, **DEFAULTS[name], **changes})

    assert default("gpt2").d_hidden == 4 * 768
    assert default("vit").n_classes == 2
    assert [default("gpt_oss").window(layer) for layer in range(4)] == [128, 0, 128, 0]
    assert default("deepseek_v3").moe_layers() == tuple(range(3, 61))
    assert default("qwen3_moe").moe_layers() == tuple(range(24)) and default("qwen3_moe").window(0) == 0
    without = {key: value for key, value in DEFAULTS["qwen3_moe"].items() if key != "sliding_window"}
    assert read({"model_type": "qwen3_moe", **without, "use_sliding_window": True}).window(0) == 4096


# ---- the family of a model ----------------------------------------------------------------------------------------------------

DENSE = {"d_model": 16, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "d_hidden": 24, "max_seq_len": 16, "vocab_size": 61}
GPT2: Json = {"n_kv_heads": 2, "norm": "layer", "position": "learned", "activation": "gelu_tanh", "bias": True, "attention_bias": True}
ENCODER: Json = {**GPT2, "causal": False, "activation": "gelu"}
FOUR = {"n_experts": 4, "top_k": 2}
MLA: Json = {"n_kv_heads": 2, "mla": LatentConfig(kv_rank=8, nope_dim=8, rope_dim=4, v_dim=8)}
NOT_PREDICTING = {
    "jitter": 0.1, "noise_std": 0.5, "capacity_factor": 1.25, "drop_priority": "probability", "aux_loss_coef": 0.1, "z_loss_coef": 0.1,
    "aux_convention": "megablocks", "router_bias_std": 1.0,
}  # fmt: skip


def model(moe: Json | None = None, **keys: Any) -> ModelConfig:
    return ModelConfig(**{**DENSE, **keys}, moe=MoEConfig(**moe) if moe is not None else None)


@pytest.mark.parametrize("name, config", [
    ("gpt2", model(**GPT2)),
    ("gpt2", model(**GPT2, tie_embeddings=True, dropout=0.1)),
    ("bert", model(**ENCODER, norm_position="post", head="mlm", type_vocab_size=2, tie_embeddings=True)),
    ("vit", model(**ENCODER, head="classifier", image_size=8, patch_size=4, n_classes=3)),
    ("llama", model()),
    ("llama", model(tie_embeddings=True, attention_bias=True, bias=True, rope=RopeConfig(type="linear", factor=2.0), norm_eps=1e-3)),
    ("llama", model({**FOUR, "layers": ()})),
    ("mistral", model(sliding_window=8)),
    ("mistral", model(sliding_window=8, layer_types=("sliding", "sliding"))),
    ("mixtral", model(FOUR)),
    ("mixtral", model({**FOUR, "d_hidden": 8})),
    ("mixtral", model({**FOUR, "layers": (0, 1)}, sliding_window=8)),
    ("mixtral", model({**FOUR, "router": "topk_softmax"})),  # over the k largest logits: p over the sum of those k
    ("mixtral", model({**FOUR, **NOT_PREDICTING}, dropout=0.1)),
    ("olmoe", model({**FOUR, "norm_topk_prob": False}, qk_norm="full")),
    ("olmoe", model({"n_experts": 4, "router": "switch"}, qk_norm="full")),
    ("qwen3_moe", model(FOUR, qk_norm="head", head_dim=4)),
    ("qwen3_moe", model({**FOUR, "every": 2, "norm_topk_prob": False}, qk_norm="head")),
    ("qwen3_moe", model(qk_norm="head")),
    ("gpt_oss", model({**FOUR, "router": "topk_softmax", "router_bias": True}, bias=True, attention=AttentionConfig(sinks=True),
                      activation_limit=7.0, sliding_window=8, layer_types=("full", "sliding"))),
    ("deepseek_v3", model({**FOUR, "router": "sigmoid_bias", "n_shared_experts": 1, "layers": (1,)}, **MLA)),
    ("deepseek_v3", model({**FOUR, "router": "sigmoid_bias"}, **MLA, attention=AttentionConfig(interleaved=True))),
])  # fmt: skip
def test_a_model_finds_its_family(name: str, config: ModelConfig) -> None:
    found = family_for(config)
    assert found.model_type == name
    assert essence(found.model_config(found.config_json(config))) == essence(config)


@pytest.mark.parametrize("preset, name", [
    ("tiny-dense", "llama"), ("tiny-moe", "mixtral"), ("gpt2", "gpt2"), ("mixtral-8x7b", "mixtral"), ("bert-base", "bert"),
    ("vit-b16", "vit"),
])  # fmt: skip
def test_a_preset_finds_its_family(preset: str, name: str) -> None:
    config = load_config(preset).model
    assert family_for(msgspec.structs.replace(config, vocab_size=config.vocab_size or 256)).model_type == name


@each
def test_every_family_finds_itself(name: str) -> None:
    assert family_for(read(small(name))).model_type == name


@pytest.mark.parametrize("reason, config", [
    ("moe.router is 'softmax_topk' there, not 'expert_choice'", model({**FOUR, "router": "expert_choice"})),
    ("moe.router is 'softmax_topk' there, not 'noisy_topk'", model({**FOUR, "router": "noisy_topk"})),
    ("moe.router is 'softmax_topk' there, not 'sigmoid_bias'", model({**FOUR, "router": "sigmoid_bias"})),
    ("moe.norm_topk_prob is True there, not False", model({**FOUR, "norm_topk_prob": False})),
    ("moe.norm_topk_prob is True there, not False", model({"n_experts": 4, "router": "switch"})),
    ("moe.n_shared_experts is 0 there, not 1", model({**FOUR, "n_shared_experts": 1})),
    ("moe.router_bias is False there, not True", model({**FOUR, "router_bias": True})),
    ("model.activation is 'swiglu' there, not 'relu'", model(FOUR, activation="relu")),
    ("model.activation is 'swiglu' there, not 'gelu'", model(FOUR, activation="gelu")),
    ("model.activation_limit is 0.0 there, not 7.0", model(FOUR, activation_limit=7.0)),
    ("model.norm_position is 'pre' there, not 'post'", model(norm_position="post")),
    ("model.norm_position is 'pre' there, not 'post'", model(FOUR, norm_position="post")),
    ("model.norm is 'rms' there, not 'layer without bias'", model(norm="layer")),
    ("model.position is 'rope' there, not 'none'", model(position="none")),
    ("model.causal is True there, not False", model(causal=False)),
    ("model.windows is [0, 0] there, not [0, 8]", model(sliding_window=8, layer_types=("full", "sliding"))),
    ("model.n_kv_heads is 2 there, not 1", model(**{**GPT2, "n_kv_heads": 1})),
    ("model.head_dim is 8 there, not 16", model(**GPT2, head_dim=16)),
    ("model.routed_layers is [] there, not [0, 1]", model(FOUR, **ENCODER, head="classifier", image_size=8, patch_size=4, n_classes=3)),
    ("model.qk_norm is 'head' there, not 'none'", model({**FOUR, "every": 2})),
])  # fmt: skip
def test_a_model_that_no_family_expresses_is_refused_with_the_key_that_prevents_it(reason: str, config: ModelConfig) -> None:
    with pytest.raises(ConfigError) as caught:
        family_for(config)
    assert reason in str(caught.value) and str(caught.value).startswith("no family expresses this model; the nearest is ")


def test_equal_models_have_one_essence() -> None:
    """A model that is written in two ways has one essence; `built_in` derives the values of keys that are not set."""
    assert essence(model({**FOUR, "every": 1})) == essence(model({**FOUR, "layers": (0, 1)}, d_hidden=24))
    assert essence(model(sliding_window=8)) == essence(model(sliding_window=8, layer_types=("sliding", "sliding")))
    assert essence(model(FOUR)) != essence(model({**FOUR, "top_k": 1}))
    tables = built_in(model(FOUR))
    assert (tables["model"]["head_dim"], tables["moe"]["d_hidden"]) == (8, 24)
