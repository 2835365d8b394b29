"""examples/backend_torch, loaded from its source: it conforms on the CPU, is found by its entry point, trains, and stays short."""

import importlib.util
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from command_line import TINY, call
from tiny_runs import write_text

import minimoe as mm
from minimoe import backend as backends
from minimoe.backend import check_overrides, describe, kernel_kinds, load, made_once
from minimoe.runs.run import Run
from minimoe.testing import LEVELS, cases

pytestmark = pytest.mark.parity
FOLDER = Path(__file__).parents[2] / "examples" / "backend_torch"
SOURCE = FOLDER / "minimoe_torch" / "__init__.py"


def load_example():
    spec = importlib.util.spec_from_file_location("minimoe_torch", SOURCE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


EXAMPLE = load_example()
TORCH = EXAMPLE.TorchBackend("cpu")
ALL = cases(TORCH)


@pytest.mark.parametrize("case", [pytest.param(case, id=str(case)) for case in ALL])
def test_it_conforms(case):
    case.run()


def test_the_cases_are_of_every_level_and_of_both_dtypes():
    assert {case.level for case in ALL} == set(LEVELS)
    assert TORCH.dtypes == ("float32", "float64")
    check_overrides(TORCH)


def test_it_is_one_file_of_less_than_150_lines():
    assert [path.relative_to(FOLDER) for path in FOLDER.rglob("*.py")] == [SOURCE.relative_to(FOLDER)]
    assert len(SOURCE.read_text(encoding="utf-8").splitlines()) < 150


# ---- found by its entry point -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def installed(monkeypatch):
    """Install the example as `pip install examples/backend_torch` does."""
    project = tomllib.loads((FOLDER / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    group = project["entry-points"]["minimoe.backends"]
    entries = [EntryPoint(name, value, "minimoe.backends") for name, value in group.items()]
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.delenv("MINIMOE_TORCH_DEVICE", raising=False)
    monkeypatch.setattr(backends, "entry_points", lambda group: entries)
    made_once.cache_clear()
    yield
    made_once.cache_clear()


def test_its_entry_point_makes_the_backend_on_the_cpu(installed):
    found = load("torch")
    assert (found.name, found.device) == ("torch", torch.device("cpu"))
    assert {kernel: kind for kernel, kind in kernel_kinds(found).items() if kind != "reference"} == {"swiglu": "library"}


def test_without_the_device_that_is_asked_for_it_says_so_and_its_kernels_are_known(installed, monkeypatch):
    monkeypatch.setenv("MINIMOE_TORCH_DEVICE", "xpu")
    monkeypatch.setattr(torch.xpu, "is_available", lambda: False)
    described = describe("torch")
    assert not described.available and described.why_not.startswith("backend torch: no xpu here for PyTorch ")
    assert described.kernels["swiglu"] == "library"


def test_it_trains_saves_and_writes_text(installed, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path)
    for backend in ("torch", "numpy"):
        code, _, _ = call(capsys, "train", "tiny-moe", *TINY, "--backend", backend, "--data", "text.txt", "--steps", "3", "--out", backend)
        assert code == 0
    losses = {name: [row["loss"] for row in Run.open(name).metrics()] for name in ("torch", "numpy")}
    assert len(losses["torch"]) == 3 and np.allclose(losses["torch"], losses["numpy"], rtol=1e-4)
    tokens = np.arange(12, dtype=np.int32)[None]
    logits = {}
    for backend in ("torch", "numpy"):  # the same checkpoint, read by both
        with mm.use_backend(backend):
            model = mm.load("torch")
            logits[backend] = model(mm.tensor(tokens).data).numpy()
            assert type(model(mm.tensor(tokens).data).data) is (torch.Tensor if backend == "torch" else np.ndarray)
    assert np.abs(logits["torch"] - logits["numpy"]).max() < 1e-4
    monkeypatch.setenv("MINIMOE_BACKEND", "torch")
    code, out, err = call(capsys, "generate", "torch", "--tokens", "5", "--prompt", "a")
    assert (code, err) == (0, "") and out.startswith("a")


# ---- other devices than the CPU, as far as the CPU can tell ------------------------------------------------------------------------------


def test_a_device_without_float64_has_only_float32(monkeypatch):
    def refuse(*args, dtype=None, **options):
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64.")

    monkeypatch.setattr(torch, "ones", refuse)
    assert EXAMPLE.TorchBackend().dtypes == ("float32",)


def test_the_gpus_way_to_add_rows_adds_them_all():
    rng = np.random.default_rng(0)
    expected, index, values = rng.standard_normal((5, 3)), rng.integers(0, 5, 33).astype(np.int32), rng.standard_normal((33, 3))
    target, *given = (TORCH.from_host(array) for array in (expected, index, values))
    np.add.at(expected, index, values)
    elsewhere = EXAMPLE.TorchBackend()
    elsewhere.device = SimpleNamespace(type="cuda")
    elsewhere.scatter_add(target, *given)
    assert np.abs(target.numpy() - expected).max() < 1e-12


def test_a_row_named_from_either_end_gets_both_addends():
    target = TORCH.from_host(np.zeros((3, 1)))
    TORCH.scatter_add(target, TORCH.from_host(np.array([-1, 2], np.int32)), TORCH.from_host(np.ones((2, 1))))
    assert target.tolist() == [[0.0], [0.0], [2.0]]


def test_a_tensor_of_torchs_own_autograd_comes_in_as_numbers():
    weight = torch.ones(3, requires_grad=True)
    ours = mm.tensor(weight, backend=TORCH, requires_grad=True)
    (ours * 2.0).sum().backward()
    assert not ours.data.requires_grad and ours.grad.tolist() == [2.0] * 3 and weight.grad is None
