"""examples/backend_jax, loaded from its source: what every port is tested for (ports.py), its device, donation and compiled steps."""

import pytest
from parity.ports import Port, PortTests

from minimoe.backend import describe, kernel_kinds, load

pytestmark = pytest.mark.parity
PORT = Port("jax")
JAX = PORT.backend


class TestJax(PortTests):
    port = PORT
    one_in = 32


def test_its_entry_point_makes_the_backend_on_the_cpu(installed):
    found = load("jax")
    assert (found.name, found.device.platform, found.dtypes) == ("jax", "cpu", ("float32", "float64"))
    assert {kernel: kind for kernel, kind in kernel_kinds(found).items() if kind != "reference"} == {"grouped_matmul": "library"}


def test_without_the_device_that_is_asked_for_it_says_so_and_its_kernels_are_known(installed, monkeypatch):
    monkeypatch.setenv("MINIMOE_JAX_DEVICE", "tpu")
    described = describe("jax")
    assert not described.available and described.why_not.startswith("backend jax: no tpu here for JAX ")
    assert described.kernels["grouped_matmul"] == "library"
