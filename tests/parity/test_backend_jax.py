"""examples/backend_jax, loaded from its source: what every port is tested for (ports.py), its device, donation and compiled steps."""

import jax
import numpy as np
import pytest
from parity.ports import Port, PortTests

from minimoe.backend import describe, kernel_kinds, load
from minimoe.engine.recording import Recorded

pytestmark = pytest.mark.parity
PORT = Port("jax")
JAX = PORT.backend


class TestJax(PortTests):
    port = PORT
    one_in = 3


def test_its_entry_point_makes_the_backend_on_the_cpu(installed):
    found = load("jax")
    assert (found.name, found.device.platform, found.dtypes) == ("jax", "cpu", ("float32", "float64"))
    assert {kernel: kind for kernel, kind in kernel_kinds(found).items() if kind != "reference"} == {"grouped_matmul": "library"}


def test_without_the_device_that_is_asked_for_it_says_so_and_its_kernels_are_known(installed, monkeypatch):
    monkeypatch.setenv("MINIMOE_JAX_DEVICE", "tpu")
    described = describe("jax")
    assert not described.available and described.why_not.startswith("backend jax: no tpu here for JAX ")
    assert described.kernels["grouped_matmul"] == "library"


def test_a_recorded_step_writes_its_state_where_it_was():
    state, one = JAX.from_host(np.zeros(1000)), JAX.from_host(np.ones(()))

    def work(x):
        state[...] = state + x
        return JAX.xp.sum(state)

    recorded = Recorded(work, JAX, pytest.fail, lambda: [state])
    recorded(one)
    before, address = state.value, state.value.unsafe_buffer_pointer()
    assert recorded(one).item() == 2000.0
    assert before.is_deleted() and state.value.unsafe_buffer_pointer() == address


def test_rows_past_the_last_offset_may_hold_anything():
    x = np.array([[1.0], [2.0], [np.nan]], np.float32)
    weight, offsets = np.array([[[3.0]], [[5.0]]], np.float32), np.array([0, 1, 2], np.int32)
    y = JAX.grouped_matmul(*(JAX.from_host(array) for array in (x, weight, offsets)))
    assert y.tolist() == [[3.0], [10.0], [0.0]]


def test_compiled_steps_are_kept_in_a_folder_of_the_users_own(tmp_path, monkeypatch):
    folder = jax.config.jax_compilation_cache_dir
    monkeypatch.setattr(PORT.module, "private_folder", lambda name: tmp_path / name)
    try:
        for given, expected in ((None, str(tmp_path / "jax")), ("/elsewhere", "/elsewhere")):
            jax.config.update("jax_compilation_cache_dir", given)
            PORT.module.backend()
            assert jax.config.jax_compilation_cache_dir == expected
    finally:
        jax.config.update("jax_compilation_cache_dir", folder)
