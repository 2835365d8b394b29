"""Where parameters lie in a folder: every layout read and written, quantised ones by their formulas, errors named, memory bounded."""

import json
import math
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_folders import FP8, MXFP4, Arrays, Json, fp8, mxfp4, small, tensors, write

from minimoe.errors import UserError
from minimoe.model.transformer import Transformer
from minimoe.pretrained.families.layout import Layout, StoredTensor
from minimoe.pretrained.families.table import FAMILIES, family
from minimoe.pretrained.file import write_tensor_file
from minimoe.pretrained.folder import ModelFolder
from minimoe.pretrained.locating import Keys, Location
from minimoe.pretrained.opening import open_folder

FORMS = [
    *((name, {}) for name in FAMILIES),
    ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 10}),
    ("bert", {"tie_word_embeddings": False}),
    ("deepseek_v3", {"q_lora_rank": None, "attention_bias": True}),
]
forms = pytest.mark.parametrize("name, changes", FORMS, ids=lambda value: value if isinstance(value, str) else ",".join(value) or "-")


def parameters(config: Json) -> dict[str, npt.NDArray[Any]]:
    """A random array for each parameter of the model."""
    generator = np.random.default_rng(0)
    state = Transformer(family(config["model_type"]).model_config(config), seed=None).named_state()
    return {name: generator.standard_normal(parameter.shape) for name, parameter in state}


def layouts(config: Json, choice: int) -> dict[str, Layout]:
    """One layout of each parameter: its `choice`th, or the last that is not packed."""
    found = family(config["model_type"])
    plain = {name: [one for one in forms if not one.tensors[0].packed] for name, forms in found.names(found.model_config(config))}
    return {name: forms[min(choice, len(forms) - 1)] for name, forms in plain.items()}


def laid_out(layout: Layout, parameter: npt.NDArray[Any]) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """The tensors that hold a parameter."""

    def tensor(part: StoredTensor, whole: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return part.view(whole).reshape(part.shape(whole.shape))

    for part in layout.tensors:
        if layout.kind == "each":
            yield from ((part.key.replace("{e}", str(e)), tensor(part, one)) for e, one in enumerate(parameter))
        elif layout.kind == "stacked":
            yield part.key, np.stack([tensor(part, one) for one in parameter])
        else:
            yield part.key, tensor(part, parameter)


# ---- layouts ------------------------------------------------------------------------------------------------------------------


@forms
@pytest.mark.parametrize("choice", [0, 1], ids=["as written", "the other form"])
def test_every_layout_is_read_back_to_the_bit(tmp_path: Path, name: str, changes: Json, choice: int) -> None:
    config = small(name, **changes)
    ours, chosen = parameters(config), layouts(config, choice)
    arrays = {key: array for parameter, layout in chosen.items() for key, array in laid_out(layout, ours[parameter])}
    with ModelFolder(write(tmp_path / "m", config, arrays)) as folder:
        keys = Keys(folder, family(name))
        for parameter, layout in chosen.items():
            location, expected = Location(layout, ours[parameter].shape, keys), ours[parameter]
            read = np.full(expected.shape, np.nan)
            if location.of_experts:
                for e, one in enumerate(read):
                    location.read(one, e)
            else:
                location.read(read)
            assert np.array_equal(read, expected), parameter
        assert keys.used == arrays.keys()


@forms
def test_a_stored_tensor_is_a_view_of_the_parameter(name: str, changes: Json) -> None:
    config = small(name, **changes)
    found = family(name)
    for parameter, shape in ((key, array.shape) for key, array in parameters(config).items()):
        for layout in dict(found.names(found.model_config(config)))[parameter]:
            whole = np.zeros(shape if layout.kind == "whole" else shape[1:])
            for part in layout.tensors:
                assert np.shares_memory(part.view(whole), whole)
                part.view(whole)[...] += 1
            assert np.all(whole == 1), f"{parameter}: not each number lies in one part"


@forms
def test_the_shape_of_a_stored_tensor_is_found_without_an_array(name: str, changes: Json) -> None:
    config_json, widths = small(name, **changes), ("hidden_size", "n_embd", "intermediate_size", "moe_intermediate_size")
    wide: Json = {key: config_json[key] * 100_000 for key in widths if key in config_json}
    found, config = family(name), family(name).model_config({**config_json, **wide})
    shapes = {key: parameter.shape for key, parameter in Transformer(config, seed=None).named_state()}
    tracemalloc.start()
    for parameter, forms in found.names(config):
        for layout in forms:
            own = shapes[parameter] if layout.kind == "whole" else shapes[parameter][1:]
            assert sum(math.prod(part.shape(own)) for part in layout.tensors) == math.prod(own)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert max(map(math.prod, shapes.values())) > 10**10 and peak < 1_000_000


# ---- quantised ----------------------------------------------------------------------------------------------------------------

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def unpacked(arrays: Arrays, key: str) -> npt.NDArray[Any]:
    """[E,out,in]: 32 numbers per block, two per byte, low half first, times 2^(scale - 127)."""
    blocks, scales = arrays[f"{key}_blocks"].astype(int), arrays[f"{key}_scales"].astype(int)
    numbers = np.stack([E2M1[blocks % 16], E2M1[blocks // 16]], axis=-1).reshape(*scales.shape, 32) * 2.0 ** (scales[..., None] - 127)
    return numbers.reshape(*scales.shape[:-1], -1)


def test_mxfp4_experts_are_read_with_gate_and_up_rows_apart(tmp_path: Path) -> None:
    config = small("gpt_oss") | MXFP4
    arrays = mxfp4(tensors(config))
    state = dict(open_folder(write(tmp_path / "m", config, arrays)).named_state())
    for layer in range(2):
        experts = f"model.layers.{layer}.mlp.experts"
        rows = unpacked(arrays, f"{experts}.gate_up_proj")
        read = np.asarray(state[f"blocks.{layer}.moe.experts.gate_up_proj"].data)
        assert np.array_equal(read, np.concatenate([rows[:, ::2], rows[:, 1::2]], axis=1))
        assert np.array_equal(np.asarray(state[f"blocks.{layer}.moe.experts.down_proj"].data), unpacked(arrays, f"{experts}.down_proj"))


def scaled(arrays: Arrays, key: str) -> npt.NDArray[Any]:
    raw, scale = arrays[key], arrays[f"{key}_scale_inv"]
    factors = np.kron(scale, np.ones((128, 128), np.float32))[: raw.shape[0], : raw.shape[1]]
    return raw.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * factors


def test_float8_weights_are_multiplied_by_the_scale_of_their_block(tmp_path: Path) -> None:
    config = small("deepseek_v3", hidden_size=200, intermediate_size=136) | FP8
    arrays = fp8(tensors(config))
    state = dict(open_folder(write(tmp_path / "m", config, arrays)).named_state())
    first, second = "model.layers.0", "model.layers.1"
    rows = [scaled(arrays, f"{first}.mlp.{part}_proj.weight") for part in ("gate", "up")]
    assert np.array_equal(np.asarray(state["blocks.0.ffn.gate_up_proj.weight"].data), np.concatenate(rows))
    assert np.array_equal(np.asarray(state["blocks.0.attention.o_proj.weight"].data), scaled(arrays, f"{first}.self_attn.o_proj.weight"))
    down = np.stack([scaled(arrays, f"{second}.mlp.experts.{e}.down_proj.weight") for e in range(8)])
    assert np.array_equal(np.asarray(state["blocks.1.moe.experts.down_proj"].data), down)
    assert np.array_equal(np.asarray(state["blocks.1.moe.router.weight"].data), arrays[f"{second}.mlp.gate.weight"])


def refusal(path: Path, config: Json, arrays: Arrays, **options: Any) -> str:
    write(path, config, arrays, **options)
    with pytest.raises(UserError) as caught:
        open_folder(path)
    message = str(caught.value)
    assert message.isprintable() and message.startswith(str(path))
    return message


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "compressed-tensors", None, ["fp8"], {"fp8": 1}, 8])
def test_another_method_of_quantisation_is_refused_by_its_name(tmp_path: Path, method: Any) -> None:
    config = small("llama", quantization_config={"quant_method": method, "bits": 4})
    said = refusal(tmp_path / "m", config, tensors(small("llama")))
    assert f"weights quantised by {method!r} are not supported: expected fp8 (" in said and "mxfp4 (MXFP4)" in said


def test_float8_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    config = small("deepseek_v3", hidden_size=200) | FP8
    key = "model.layers.0.mlp.up_proj.weight"
    arrays = fp8(tensors(config))
    scale = arrays.pop(f"{key}_scale_inv")
    other_blocks = config | {"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}}
    assert "weight_block_size = [64, 64] is not supported: expected [128, 128]" in refusal(tmp_path / "a", other_blocks, arrays)
    assert f"{key}_scale_inv' has shape [2, 2], config.json says [1, 2]" in refusal(
        tmp_path / "b", config, arrays | {f"{key}_scale_inv": np.ones((2, 2), np.float32)}
    )
    assert f"{key!r} has dtype U8" in refusal(tmp_path / "c", config, arrays)  # `write` takes it for float8 where scales are
    norm = "model.norm.weight"
    vector: Arrays = {norm: np.zeros(200, np.uint8), f"{norm}_scale_inv": np.ones(2, np.float32), f"{key}_scale_inv": scale}
    assert f"{norm!r}: only E4M3 matrices with scales" in refusal(tmp_path / "d", config, arrays | vector)


@pytest.mark.parametrize("dtype", ["F8_E5M2", "F8_E8M0", "I8", "U8", "I64", "BOOL"])
def test_a_weight_of_another_kind_of_number_is_refused(tmp_path: Path, dtype: str) -> None:
    config, key = small("llama"), "model.layers.0.mlp.up_proj.weight"
    arrays = tensors(config)
    path = write(tmp_path / "m", config, arrays)
    stored = {"I64": np.int64, "BOOL": np.bool_, "I8": np.int8}.get(dtype, np.uint8)
    contents = arrays | {key: np.zeros(arrays[key].shape, stored)}
    plan = {name: (dtype if name == key else "F32", array.shape) for name, array in contents.items()}
    write_tensor_file(path / "model.safetensors", plan, lambda name: contents[name], {"format": "pt"})
    with pytest.raises(UserError, match=repr(key)):
        open_folder(path)


def test_mxfp4_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    config = small("gpt_oss") | MXFP4
    arrays, key = mxfp4(tensors(config)), "model.layers.1.mlp.experts.down_proj"
    short = {**arrays, f"{key}_scales": arrays[f"{key}_scales"][..., :1]}
    assert f"{key}_scales' has shape [4, 32, 1], config.json says [4, 32, 2]" in refusal(tmp_path / "a", config, short)
    halves = {**arrays, f"{key}_blocks": arrays[f"{key}_blocks"][..., :8]}
    assert f"{key}_blocks' has shape [4, 32, 2, 8], config.json says [4, 32, 2, 16]" in refusal(tmp_path / "b", config, halves)
    odd = config | {"intermediate_size": 40}
    packed = mxfp4(tensors(small("gpt_oss", intermediate_size=64)))
    plain = {name: array for name, array in tensors(odd).items() if not name.endswith(("gate_up_proj", "down_proj"))}
    first = {name: array for name, array in packed.items() if name.endswith(("_blocks", "_scales"))}
    for name in list(first):
        first[name] = first[name][:, :80] if "gate_up" in name else first[name]
    assert "MXFP4 packs 32 numbers, and its rows have 40" in refusal(tmp_path / "c", odd, plain | first)


# ---- config.json and weights that contradict each other ------------------------------------------------------------------------


@pytest.mark.parametrize("name, changes, said", [
    ("llama", {"num_hidden_layers": 3}, "model.layers.2.input_layernorm.weight' is missing"),
    ("llama", {"num_hidden_layers": 1}, "model.layers.1.input_layernorm.weight' is unexpected in this llama"),
    ("llama", {"vocab_size": 62}, "model.embed_tokens.weight' has shape [61, 24], config.json says [62, 24]"),
    ("llama", {"num_key_value_heads": 4}, "k_proj.weight' has shape [12, 24], config.json says [24, 24]"),
    ("llama", {"attention_bias": True}, "self_attn.q_proj.bias' is missing"),
    ("llama", {"intermediate_size": 10**6}, "gate_proj.weight' has shape [40, 24], config.json says [1000000, 24]"),
    ("mixtral", {"num_local_experts": 5}, "gate.weight' has shape [4, 24], config.json says [5, 24]"),
    ("mixtral", {"num_local_experts": 3}, "gate.weight' has shape [4, 24], config.json says [3, 24]"),
    ("qwen3_moe", {"mlp_only_layers": []}, "model.layers.1.mlp.gate.weight' is missing"),
    ("qwen3_moe", {"mlp_only_layers": [1, 2]}, "model.layers.2.mlp.gate_proj.weight' is missing"),
    ("gpt_oss", {"attention_bias": False}, "bias' is unexpected in this gpt_oss"),
    ("deepseek_v3", {"q_lora_rank": None}, "self_attn.q_proj.weight' is missing"),
    ("deepseek_v3", {"num_hidden_layers": 2, "num_nextn_predict_layers": 0}, "model.layers.2.input_layernorm.weight' is unexpected"),
    ("deepseek_v3", {"n_shared_experts": 2}, "shared_experts.gate_proj.weight' has shape [16, 24], config.json says [32, 24]"),
    ("gpt2", {"n_inner": 30}, "mlp.c_fc.weight' has shape [24, 96], config.json says [24, 30]"),
    ("gpt2", {"n_positions": 16}, "wpe.weight' has shape [32, 24], config.json says [16, 24]"),
    ("bert", {"type_vocab_size": 3}, "token_type_embeddings.weight' has shape [2, 24], config.json says [3, 24]"),
    ("bert", {"architectures": ["BertModel"]}, "cls.predictions.transform.LayerNorm.bias' is unexpected in this bert"),
    ("vit", {"image_size": 16}, "position_embeddings' has shape [1, 10, 24], config.json says [1, 17, 24]"),
    ("vit", {"id2label": {"0": "a"}}, "classifier.weight' has shape [7, 24], config.json says [1, 24]"),
    ("mixtral", {"model_type": "llama", "architectures": None}, "mlp.gate_proj.weight' is missing"),
    ("llama", {"num_hidden_layers": 10_000}, "config.json says 10000 layers, and there are 21 tensors"),
])  # fmt: skip
def test_a_config_that_contradicts_the_weights_is_refused_by_the_tensor(tmp_path: Path, name: str, changes: Json, said: str) -> None:
    assert said in refusal(tmp_path / "m", small(name, **changes), tensors(small(name)))


TIED = [
    ("gpt2", "lm_head.weight", "transformer.wte.weight"),
    ("bert", "cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
    *((name, "lm_head.weight", "model.embed_tokens.weight") for name in list(FAMILIES)[3:]),
]
tied = pytest.mark.parametrize("name, copy, original", TIED, ids=[name for name, *_ in TIED])


@tied
def test_a_tied_head_may_be_in_the_file_if_it_equals_the_embedding(tmp_path: Path, name: str, copy: str, original: str) -> None:
    config = small(name, tie_word_embeddings=True)
    arrays = tensors(config)
    model = open_folder(write(tmp_path / "m", config, arrays | {copy: arrays[original]}))
    assert model.config.tie_embeddings and "head.weight" not in dict(model.named_state())


@tied
def test_a_tied_head_that_differs_is_refused(tmp_path: Path, name: str, copy: str, original: str) -> None:
    config = small(name, tie_word_embeddings=True)
    arrays = tensors(config)
    other = arrays[original].copy()
    other[-1, -1] += 1
    said = refusal(tmp_path / "m", config, arrays | {copy: other})
    assert f"config.json ties {copy!r} to {original!r}, but they differ: set tie_word_embeddings = false" in said
    untied = open_folder(write(tmp_path / "n", config | {"tie_word_embeddings": False}, arrays | {copy: other}))
    assert np.array_equal(np.asarray(dict(untied.named_state())["head.weight"].data), other)


def test_both_spellings_of_one_tensor_in_a_file_are_refused(tmp_path: Path) -> None:
    for name, key, other in (
        ("gpt2", "transformer.wte.weight", "wte.weight"),
        ("bert", "bert.embeddings.LayerNorm.weight", "bert.embeddings.LayerNorm.gamma"),
        ("mixtral", "model.layers.0.block_sparse_moe.gate.weight", "model.layers.0.mlp.gate.weight"),
    ):
        arrays = tensors(small(name))
        said = refusal(tmp_path / name, small(name), arrays | {other: arrays[key]})
        assert repr(key) in said and repr(other) in said and f"have the same name in {name}" in said


def test_layers_past_the_last_are_kept_as_many_as_config_json_says(tmp_path: Path) -> None:
    config = small("deepseek_v3")
    arrays = tensors(config)
    further = {f"model.layers.3.{part}.weight": arrays["model.norm.weight"] for part in ("enorm", "hnorm", "self_attn.of.any.name")}
    assert sorted(open_folder(write(tmp_path / "m", config, arrays | further)).provenance.kept) == sorted(further)
    named = config | {"num_nextn_predict_layers": 2}
    assert len(open_folder(write(tmp_path / "n", named, arrays | further)).provenance.kept) == 3
    beyond = {"model.layers.4.enorm.weight": arrays["model.norm.weight"]}
    assert "model.layers.4.enorm.weight' is unexpected" in refusal(tmp_path / "o", config, arrays | further | beyond)
    assert "is unexpected" in refusal(tmp_path / "p", config | {"num_nextn_predict_layers": "many"}, arrays | further)


# ---- memory -------------------------------------------------------------------------------------------------------------------

HUGE: list[Any] = [10**6, 10**9, 10**12, 2**62, 2**63, 10**100, 10**400, 0, -1, 1, None, True, "x", [10**12], {"a": 1}, 1e308, float("nan")]
BESIDE = ("rope_theta", "rope_parameters", "quantization_config", "model_type", "architectures", "eos_token_id", "dtype")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("folders")
    for name in FAMILIES:
        write(root / name, small(name))
    return root


def opens_or_is_refused(folder: Path, config: Json) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    try:
        open_folder(folder)
    except UserError as error:
        assert str(error).isprintable() and len(str(error)) < 600


@pytest.mark.parametrize("name", FAMILIES)
def test_no_size_in_config_json_takes_memory_before_it_is_seen_in_the_weights(folders: Path, name: str) -> None:
    sizes = [key for key, value in small(name).items() if isinstance(value, int) and not isinstance(value, bool)]
    tracemalloc.start()
    for key in sizes:
        for value in (10**7, 10**12):
            opens_or_is_refused(folders / name, small(name, **{key: value}))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20_000_000  # config.json alone is read into 10 MB


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(list(FAMILIES)), data=st.data())
def test_a_folder_with_wrong_values_of_several_keys_opens_or_is_refused(folders: Path, name: str, data: st.DataObject) -> None:
    values = st.sampled_from(HUGE) | st.integers(-2, 70) | st.lists(st.integers(0, 3), max_size=3)
    changes = data.draw(st.dictionaries(st.sampled_from([*small(name), *BESIDE]), values, max_size=3))
    opens_or_is_refused(folders / name, {**small(name), **changes})
