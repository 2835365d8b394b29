"""Runs, checkpoints and exports that minimoe 0.1.0 wrote before its modules were moved into folders are read, and go on as they would have.

`tests/golden/run-0.1/run` was trained for 4 steps on the text below (NumPy backend, one thread). The losses are those that the same version
gave when it resumed the run up to step 8.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest

import minimoe as mm

OLD = Path(__file__).parents[1] / "golden" / "run-0.1"
TEXT = "the router sends every token to two experts and the gate weighs what they say\n" * 120
LOSSES = [2.991064, 2.958137, 2.850015, 2.790599, 2.819105, 2.707127, 2.712421, 2.686484]
VAL_LOSS = 2.644352


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A copy of the old run whose text lies beside it."""
    shutil.copytree(OLD / "run", tmp_path / "run")
    (tmp_path / "text.txt").write_text(TEXT)
    config = tmp_path / "run" / "config.toml"
    config.write_text(config.read_text().replace("/tmp/text.txt", str(tmp_path / "text.txt")))
    return tmp_path / "run"


def test_an_old_run_is_resumed_and_its_losses_go_on(run: Path) -> None:
    trained = mm.resume(run, steps=8)
    assert np.allclose([row["loss"] for row in trained.metrics], LOSSES, atol=1e-5)
    assert abs(trained.val_loss - VAL_LOSS) < 1e-5


def test_an_old_export_holds_the_numbers_of_the_old_checkpoint(run: Path) -> None:
    tokens = np.arange(16, dtype=np.int32)[None, :]
    from_run, from_folder = (mm.load(path)(tokens).numpy() for path in (run, OLD / "exported"))
    assert np.array_equal(from_run, from_folder) and np.ptp(from_run) > 0
