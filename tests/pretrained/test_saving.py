"""What a saved folder has: tensors in the dtypes that transformers writes, and what a narrower dtype loses is said."""

import warnings
from pathlib import Path

import numpy as np
import pytest
from command_line import call
from model_folders import Arrays, small, tensors, write

from minimoe.errors import Notice
from minimoe.pretrained.folder import ModelFolder
from minimoe.pretrained.opening import open_folder
from minimoe.study.convert import convert


def dtypes(folder: Path) -> dict[str, str]:
    opened = ModelFolder(folder)
    names = opened.keys()
    return {name: opened.entry(name).dtype for name in names}


# ---- what stays in float32 ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, word", [("bfloat16", "BF16"), ("float16", "F16")])
@pytest.mark.parametrize("source", ["F32", "BF16", "F64"])
def test_deepseeks_router_stays_in_float32(tmp_path: Path, dtype: str, word: str, source: str) -> None:
    config = small("deepseek_v3")
    arrays = {name: array.astype(np.float64) for name, array in tensors(config).items()} if source == "F64" else None
    write(tmp_path / "m", config, arrays, dtype=source)
    convert(tmp_path / "m", tmp_path / "out", dtype)
    kept = {name for name, found in dtypes(tmp_path / "out").items() if found == "F32"}
    routed = {f"model.layers.{layer}.mlp.gate.{x}" for layer in (1, 2) for x in ("weight", "e_score_correction_bias")}
    assert kept == routed
    assert set(dtypes(tmp_path / "out").values()) == {"F32", word}


def test_a_balance_bias_that_stays_in_float32_keeps_its_numbers(tmp_path: Path) -> None:
    config = small("deepseek_v3")
    arrays = tensors(config)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    arrays[name] = np.float32(6.9) + np.linspace(0, 1e-3, 8, dtype=np.float32)
    write(tmp_path / "m", config, arrays)
    convert(tmp_path / "m", tmp_path / "out", "bfloat16")
    np.testing.assert_array_equal(ModelFolder(tmp_path / "out").raw(name), arrays[name])


@pytest.mark.parametrize("dtype, norms, others", [("float16", "F32", "F16"), ("bfloat16", "BF16", "BF16"), ("float32", "F32", "F32")])
def test_the_norms_of_gpt_oss_stay_in_float32_in_float16_alone(tmp_path: Path, dtype: str, norms: str, others: str) -> None:
    write(tmp_path / "m", small("gpt_oss"))
    convert(tmp_path / "m", tmp_path / "out", dtype)
    found = dtypes(tmp_path / "out")
    assert {found.pop(name) for name in sorted(found) if "norm" in name} == {norms}
    assert set(found.values()) == {others}


def test_config_json_names_the_dtype_that_was_asked_for_although_most_numbers_are_kept_as_they_are(tmp_path: Path) -> None:
    config = small("deepseek_v3", num_nextn_predict_layers=1)
    write(tmp_path / "m", config, tensors(config) | {"model.layers.3.eh_proj.weight": np.ones((500, 500), np.float32)})
    convert(tmp_path / "m", tmp_path / "out", "bfloat16")
    assert ModelFolder(tmp_path / "out").config["dtype"] == "bfloat16"


def notices(source: Path, target: Path, dtype: str | None = None) -> list[str]:
    """Convert, and return what is said of it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        convert(source, target, dtype)
    assert all(issubclass(one.category, Notice) for one in caught)
    return [str(one.message) for one in caught]


# ---- what a narrower dtype cannot hold -----------------------------------------------------------------------------------------


def changed(values: dict[int, float], scale: float = 1.0) -> Arrays:
    arrays = tensors(small("llama"))
    norm = arrays["model.norm.weight"] = arrays["model.norm.weight"].astype(np.float64) * scale
    for at, value in values.items():
        norm[at] = value
    return arrays


@pytest.mark.parametrize(
    "values, dtype, says",
    [
        ({3: 65520.0, 5: -1.5e5, 6: 65519.0}, "float16", "2 of 24 numbers are beyond float16 and become inf: the largest is 1.5e+05"),
        ({3: 3.4e38}, "bfloat16", "1 of 24 numbers are beyond bfloat16 and become inf: the largest is 3.4e+38"),
        ({3: 1e39}, "float32", "1 of 24 numbers are beyond float32 and become inf: the largest is 1e+39"),
        ({3: np.inf, 4: -np.inf, 5: np.nan, 6: 65504.0, 7: 1e-30}, "float16", ""),
        ({3: 3e38, 5: 1e-45}, "bfloat16", ""),
        ({3: 1e300}, "float64", ""),
    ],
)
def test_numbers_beyond_a_dtypes_range_are_said_with_their_tensor(tmp_path: Path, values: dict[int, float], dtype: str, says: str) -> None:
    write(tmp_path / "m", small("llama"), changed(values))
    said = notices(tmp_path / "m", tmp_path / "out", dtype)
    assert (len(said) == 1 and said[0].startswith(f"'model.norm.weight': {says}")) if says else not said


@pytest.mark.parametrize("scale, dtype, says", [(1e-9, "float16", True), (1e-9, "bfloat16", False), (1e-60, "float32", True)])
def test_a_tensor_that_becomes_zero_is_said(tmp_path: Path, scale: float, dtype: str, says: bool) -> None:
    write(tmp_path / "m", small("llama"), changed({}, scale))
    said = notices(tmp_path / "m", tmp_path / "out", dtype)
    assert said == ([f"'model.norm.weight': 24 of 24 numbers are too small for {dtype} and become 0"] if says else [])


def test_the_command_says_it_on_standard_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "m", small("llama"), changed({0: 1e6}))
    code, out, err = call(capsys, "convert", str(tmp_path / "m"), str(tmp_path / "out"), "--dtype", "float16")
    assert code == 0 and "LlamaForCausalLM" in out
    assert err == (
        "minimoe: 'model.norm.weight': 1 of 24 numbers are beyond float16 and become inf: the largest is 1e+06, and float16 ends at "
        "65,504: bfloat16 has float32's range\n"
    )


def test_saving_in_python_warns_of_it(tmp_path: Path) -> None:
    model = open_folder(write(tmp_path / "m", small("llama"), changed({0: 1e6})))
    with pytest.warns(Notice, match=r"model\.norm\.weight.* become inf") as caught:
        model.save_pretrained(tmp_path / "out", "float16")
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path / "narrow", "bfloat16")
