"""Checks the README's list of what minimoe does not do against the code: if one of these fails, change the section."""

import ast
import re
from pathlib import Path

import numpy as np
import pytest

import minimoe as mm
from minimoe.backend import BUILT_IN, describe, load
from minimoe.config.cost import cost
from minimoe.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SECTION = README.split("\n## What minimoe does not do\n")[1].split("\n## ")[0]
NETWORK = {"urllib", "http", "socket", "ssl", "ftplib", "requests", "httpx", "aiohttp", "huggingface_hub", "datasets"}
RANKS = {"mpi4py", "multiprocessing", "torch", "jax", "tensorflow"}


def imported_packages() -> set[str]:
    """The top packages that minimoe and its backends import, anywhere in a file."""
    found = set()
    for path in [*(ROOT / "minimoe").rglob("*.py"), *(ROOT / "backends").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module == "urllib.parse":
                continue  # takes addresses apart, and opens none
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module.split(".")[0])
    return found


def test_the_presets_to_train_have_the_sizes_that_the_section_gives() -> None:
    sizes = []
    presets = (
        "tiny-moe", "tiny-dense", "collapse", "shakespeare-moe", "bert-tiny", "bert-tiny-moe", "bert-tiny-post", "vit-tiny", "vit-tiny-moe",
        "vit-folder",
    )  # fmt: skip
    for preset in presets:
        assert f"`{preset}`" in README
        model = mm.load_config(preset).model
        if model.vocab_size is None and not model.image_size:
            model = mm.load_config(preset, ["model.vocab_size=257"]).model
        sizes.append(cost(model).total / 1e6)
    assert f"have {min(sizes):.1f} to {max(sizes):.1f} million parameters" in SECTION


def test_nothing_reaches_the_network_and_nothing_runs_on_ranks() -> None:
    packages = imported_packages()
    assert "numpy" in packages and not packages & NETWORK and not packages & RANKS


def test_the_backends_are_for_cpus_and_nvidia_cards_and_no_gpu_kernel_is_proven() -> None:
    assert set(BUILT_IN) == {"cupy", "numba-cuda", "numba", "numpy"}
    assert not describe("cupy").proven and not describe("numba-cuda").proven


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_a_cpu_computes_in_float32_and_float64_and_training_in_float16_is_refused(backend: str, tmp_path: Path) -> None:
    assert set(load(backend).dtypes) == {"float32", "float64"}
    for dtype in ("float16", "bfloat16"):
        with pytest.raises(UserError, match=dtype):
            mm.train("tiny-moe", steps=1, backend=backend, out=tmp_path / dtype, overrides=[f"train.dtype={dtype}"])


def test_no_preset_offers_float16() -> None:
    for preset in (ROOT / "minimoe" / "config" / "presets").glob("*.toml"):
        assert re.search(r"(?<!b)float16", preset.read_text(encoding="utf-8")) is None, preset.name


def test_a_gradient_has_no_history() -> None:
    x = mm.tensor(np.array(3.0), requires_grad=True)
    y = x * x
    y.backward()
    assert isinstance(x.grad, np.ndarray | np.generic)
    with pytest.raises(ValueError, match="no double backward"):
        y.backward()


def test_what_the_section_says_is_absent_is_not_in_the_code() -> None:
    code = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "minimoe").rglob("*.py")).lower()
    for words in (r"beam.search", r"speculative", r"cross_attention(?!\")"):
        assert re.search(words, code) is None, words
