"""examples/backend_torch, loaded from its source: what every port is tested for (ports.py), its devices and its one kernel."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from parity.ports import Port, PortTests

import minimoe as mm
from minimoe.backend import describe, kernel_kinds, load

pytestmark = pytest.mark.parity
PORT = Port("torch")
EXAMPLE, TORCH = PORT.module, PORT.backend


class TestTorch(PortTests):
    port = PORT


# ---- found by its entry point -----------------------------------------------------------------------------------------------------------


def test_its_entry_point_makes_the_backend_on_the_cpu(installed):
    found = load("torch")
    assert (found.name, found.device, found.dtypes) == ("torch", torch.device("cpu"), ("float32", "float64"))
    assert {kernel: kind for kernel, kind in kernel_kinds(found).items() if kind != "reference"} == {"swiglu": "library"}


def test_without_the_device_that_is_asked_for_it_says_so_and_its_kernels_are_known(installed, monkeypatch):
    monkeypatch.setenv("MINIMOE_TORCH_DEVICE", "xpu")
    monkeypatch.setattr(torch.xpu, "is_available", lambda: False)
    described = describe("torch")
    assert not described.available and described.why_not.startswith("backend torch: no xpu here for PyTorch ")
    assert described.kernels["swiglu"] == "library"


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
