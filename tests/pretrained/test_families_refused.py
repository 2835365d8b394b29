"""config.json that is not supported, wrong or absurd: one line that names the key, and nothing else escapes."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_folders import SMALL, Json, small

from minimoe.errors import UserError
from minimoe.model.transformer import Transformer
from minimoe.pretrained.families.family import MOST_LAYERS
from minimoe.pretrained.families.table import FAMILIES, family

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}


def refusal(config: Json) -> str:
    with pytest.raises(UserError) as caught:
        family(config["model_type"]).model_config(config)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 400
    return message


@pytest.mark.parametrize("name, changes, said", [
    ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic' is not supported: expected one of "),
    ("llama", {"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "rope type 'longrope'"),
    ("llama", {"rope_parameters": {"rope_type": ["yarn"]}}, "rope type ['yarn']"),
    ("llama", {"rope_parameters": {"rope_type": "yarn"}}, "yarn needs a factor"),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "short_factor": [1.0]}}, "'short_factor' is not supported"),
    ("llama", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "'full_attention' is not supported"),
    ("llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
    ("llama", {"partial_rotary_factor": 0.25}, "partial_rotary_factor = 0.25"),
    ("llama", {"rope_theta": 0}, "rope_theta = 0: expected a number above 1"),
    ("llama", {"rope_scaling": {**YARN, "beta_slow": 0}}, "beta_slow = 0"),
    ("llama", {"rope_scaling": {**YARN, "factor": 0.5}}, "factor (0.5) must be 1 or more"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported: llama needs hidden_act = 'silu' or 'swish'"),
    ("gpt2", {"activation_function": "silu"}, "activation_function = 'silu'"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
    ("bert", {"hidden_act": "silu"}, "hidden_act = 'silu'"),
    ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type = 'relative_key'"),
    ("bert", {"is_decoder": True}, "is_decoder = True"),
    ("vit", {"qkv_bias": False}, "qkv_bias = False"),
    ("vit", {"image_size": [12, 16]}, "image_size = [12, 16] is not supported: images and patches must be square"),
    ("olmoe", {"clip_qkv": 8.0}, "clip_qkv = 8.0 is not supported: olmoe needs clip_qkv = None"),
    ("mistral", {"layer_types": ["full_attention"] * 2}, "layer_types = "),
    ("gpt_oss", {"swiglu_alpha": 1.0}, "swiglu_alpha = 1.0"),
    ("gpt_oss", {"layer_types": ["chunked_attention"] * 2}, "layer_types"),
    ("gpt_oss", {"layer_types": ["full_attention"]}, "names 1 layers"),
    ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func = 'softmax'"),
    ("deepseek_v3", {"topk_method": "greedy"}, "topk_method = 'greedy'"),
    ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq = 2"),
    ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step = 0: expected a whole number above 0"),
    ("qwen3_moe", {"mlp_only_layers": "all"}, "mlp_only_layers = 'all': expected a list of layers"),
    ("deepseek_v3", {"first_k_dense_replace": "x"}, "first_k_dense_replace = 'x': expected a whole number"),
    ("gpt_oss", {"layer_types": 7}, "layer_types = 7: expected a list of layer types"),
    ("gpt_oss", {"layer_types": [["full_attention"], 1]}, "model.layer_types"),
    ("vit", {"id2label": 7}, "id2label = 7: expected an object with a name for each class"),
    ("vit", {"num_labels": "7"}, "num_labels = '7': expected a whole number"),
    ("llama", {"architectures": ["LlamaForTokenClassification"]}, "ForTokenClassification'] is not supported: expected one of Llama"),
    ("bert", {"architectures": ["BertForQuestionAnswering"]}, "expected one of BertForMaskedLM, BertForPreTraining, BertModel"),
    ("llama", {"architectures": [["LlamaForCausalLM"]]}, "architectures = [['LlamaForCausalLM']]"),
    ("llama", {"hidden_size": None}, "hidden_size is null"),
    ("llama", {"rms_norm_eps": None}, "rms_norm_eps is null"),
    ("mixtral", {"num_experts_per_tok": 5}, "num_experts_per_tok (moe.top_k) (5) must not exceed num_local_experts (moe.n_experts) (4)"),
    ("llama", {"num_attention_heads": 5}, "hidden_size (model.d_model) (24) must be a multiple of num_attention_heads (model.n_heads) (5)"),
    ("llama", {"hidden_size": "24"}, "hidden_size (model.d_model): expected int"),
    ("llama", {"num_hidden_layers": 10**9}, f"num_hidden_layers = 1000000000: expected a number of layers, {MOST_LAYERS} at most"),
    ("llama", {"rms_norm_eps": 1e308}, "rms_norm_eps (model.norm_eps) is too large a number: 1e+308"),
    ("llama", {"rms_norm_eps": float("inf")}, "rms_norm_eps (model.norm_eps) is too large a number: inf"),
    ("llama", {"intermediate_size": 10**400}, "intermediate_size (model.d_hidden) is too large a number"),
])  # fmt: skip
def test_an_unsupported_setting_is_refused_by_its_key(name: str, changes: Json, said: str) -> None:
    assert said in refusal(small(name, **changes))


@pytest.mark.parametrize(
    "model_type", ["mamba", "mixtrall", "qwen3", None, "", ["llama"], {"a": 1}, 3, "os", "x" * 10**6], ids=lambda value: str(value)[:9]
)
def test_an_unknown_model_type_is_refused_with_those_that_are_known(model_type: Any) -> None:
    with pytest.raises(UserError) as caught:
        family(model_type)
    message = str(caught.value)
    assert message.startswith(f"model_type = {repr(model_type)[:40]}") and len(message) < 300
    assert message.endswith(f" is not known (known: {', '.join(FAMILIES)})")


BAD: list[Any] = [
    None, "x", "1", "é\n\x00" * 50, [], [1, 1, 1], [[1]], [None], ["x"], {"a": {"b": 1}}, True, 0, -1, 10**9, 2**64, 10**400, 1.5, -0.5,
    0.0, 1e-300, 1e308, float("nan"), float("inf"), {"rope_type": "yarn", "factor": "x"}, {"rope_type": "linear", "factor": 10**400},
    {"rope_type": "yarn", "factor": 2, "mscale": [1]},
]  # fmt: skip
BESIDE = {
    "rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor", "n_inner", "num_labels", "id2label", "layer_types",
    "mlp_only_layers", "decoder_sparse_step", "use_sliding_window", "sliding_window", "first_k_dense_replace", "architectures",
}  # fmt: skip


def keys_of(name: str) -> list[str]:
    """Every key of config.json that a family reads."""
    found = family(name)
    spelled = {key for one in found.keys.values() for key in (one.name, *one.others)}
    return sorted(spelled | found.only.keys() | set(SMALL[name]) | BESIDE)


def opens_or_is_refused(config: Json, build: bool = False) -> None:
    """The config.json is read as a model (which can be built without arrays), or refused in one printable line."""
    try:
        model = family(config["model_type"]).model_config(config)
    except UserError as error:
        assert str(error).isprintable() and len(str(error)) < 400
    else:
        assert 0 < model.n_layers <= MOST_LAYERS
        if build and model.n_layers < 100:
            Transformer(model, seed=None)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_absurd_value_of_any_key_is_one_line(name: str) -> None:
    for key in keys_of(name):
        for value in BAD:
            opens_or_is_refused(small(name, **{key: value}))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(-3, 40) | st.floats() | st.text(max_size=20) | st.sampled_from(BAD),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["rope_type", "type", "factor", "x"]), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@settings(max_examples=100)
@given(name=st.sampled_from(list(FAMILIES)), data=st.data())
def test_wrong_values_of_several_keys_are_one_line(name: str, data: st.DataObject) -> None:
    changes = data.draw(st.dictionaries(st.sampled_from(keys_of(name)), VALUES, max_size=4))
    opens_or_is_refused(small(name, **changes), build=True)
