"""examples/backend_mlx, loaded from its source: what every port is tested for (ports.py), its device, empty sums and lazy graphs."""

import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest
from parity.ports import Port, PortTests

from minimoe.backend import describe, load

pytestmark = pytest.mark.parity
PORT = Port("mlx")
MLX = PORT.backend


class TestMlx(PortTests):
    port = PORT
    one_in = 8


def test_its_entry_point_makes_the_backend_on_the_device_that_is_named(installed, monkeypatch):
    monkeypatch.setenv("MINIMOE_MLX_DEVICE", "cpu")
    assert (load("mlx").name, mx.default_device()) == ("mlx", mx.Device(mx.cpu))


@pytest.mark.parametrize("device", ["gpu", "tpu"])
def test_without_the_device_that_is_asked_for_it_says_so_and_its_kernels_are_known(installed, monkeypatch, device):
    monkeypatch.setenv("MINIMOE_MLX_DEVICE", device)
    monkeypatch.setattr(mx, "is_available", lambda device: False)
    described = describe("mlx")
    assert not described.available and described.why_not.startswith(f"backend mlx: no {device} here for MLX ")
    assert described.kernels["grouped_matmul"] == "library"


EMPTY = """
import sys
import numpy as np
sys.path.insert(0, sys.argv[1])
import minimoe_mlx
mlx = minimoe_mlx.MlxBackend("cpu")
x, ones = mlx.from_host(np.zeros((0, 8), np.float32)), mlx.from_host(np.ones(8, np.float32))
for y in (x, mlx.xp.permute_dims(mlx.from_host(np.zeros((8, 0), np.float32)), (1, 0))):
    mlx.to_host(ones * ones + y)  # leaves numbers on the stack of MLX's thread
    print(*(mlx.to_host(reduce(y, axis=0)).tolist() for reduce in (mlx.xp.sum, mlx.xp.any, mlx.xp.mean)))
"""


def test_sums_over_no_rows_end():
    """MLX's own read memory that nobody set, and go on for as long as it says: in about half of the runs, so this is run several times."""
    for _ in range(5):
        run = subprocess.run([sys.executable, "-c", EMPTY, str(PORT.folder)], capture_output=True, text=True, timeout=60)
        assert run.stdout.splitlines() == [f"{[0.0] * 8} {[False] * 8} {[float('nan')] * 8}"] * 2, run.stderr


def test_writes_that_nobody_reads_are_computed():
    x, ones = MLX.xp.zeros((256, 256)), MLX.xp.ones((256, 256))
    MLX.synchronize()
    before = MLX.memory()["used"]
    for _ in range(1000):
        x += ones
    assert MLX.memory()["used"] > before + x.size  # computed, in part, before anything asks for it
    MLX.synchronize()
    assert np.array_equal(MLX.to_host(x), np.full((256, 256), 1000.0))
