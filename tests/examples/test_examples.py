"""The examples run as they stand, in a process of their own."""

import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, *arguments: str, folder: Path) -> str:
    done = subprocess.run([sys.executable, str(EXAMPLES / name), *arguments], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_training_loop_learns_and_writes_text(tmp_path: Path) -> None:
    lines = run("train_loop.py", "30", folder=tmp_path).splitlines()
    losses = [float(line.split("loss ")[1].split()[0]) for line in lines if line.startswith("step")]
    assert losses[-1] < losses[0] - 1.0
    assert any(line.startswith("validation loss") for line in lines)


def test_minigrad_prints_how_its_loss_falls(tmp_path: Path) -> None:
    assert run("minigrad.py", folder=tmp_path).splitlines()[-1] == "100% of the points are classified correctly"
