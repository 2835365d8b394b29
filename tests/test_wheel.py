"""The wheel: what is installed from it runs without the repository, and `python cli.py` runs from a clone without being installed."""

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"minimoe", "minimoe_numpy", "minimoe_numba", "minimoe_cupy", "minimoe_numba_cuda"}
TRAIN = ["train", "--set", "train.steps=2", "--set", "train.eval_every=0", "--set", "train.checkpoint_every=0"]


def done(*command: object, cwd: Path) -> str:
    """Run a command that must succeed.   -> its output"""
    result = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=900, cwd=cwd)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    done(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def programs(wheel: Path) -> Path:
    """The folder of a fresh environment's programs, with the wheel and what it depends on installed."""
    environment = wheel.parent / "environment"
    venv.create(environment, with_pip=True)
    done(environment / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-compile", wheel, cwd=wheel.parent)
    return environment / "bin"


def test_the_wheel_has_every_file_of_the_packages_and_nothing_else(wheel: Path) -> None:
    tracked = done("git", "ls-files", "minimoe", "backends", cwd=ROOT).splitlines()
    wanted = {path.removeprefix("backends/") for path in tracked if path != "backends/README.md"}
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert packed == wanted and {name.partition("/")[0] for name in packed} == PACKAGES
    assert "minimoe/config/presets/tiny-moe.toml" in packed and "minimoe_cupy/kernels/gate.cu" in packed


def test_the_installed_command_trains_far_from_the_repository(programs: Path, tmp_path: Path) -> None:
    assert "train" in done(programs / "minimoe", "--help", cwd=tmp_path)
    done(programs / "minimoe", *TRAIN, cwd=tmp_path)
    assert [path.name for path in (tmp_path / "runs").glob("tiny-moe-*")] == ["tiny-moe-001"]


def test_a_new_backend_is_installed_by_pip_and_conforms(programs: Path, tmp_path: Path) -> None:
    done(programs / "minimoe", "backends", "new", "mine", "--kind", "mutable", cwd=tmp_path)
    done(programs / "python", "-m", "pip", "install", "--quiet", "-e", "minimoe-mine", cwd=tmp_path)
    try:
        assert "mine: 1 passed, 0 failed" in done(programs / "minimoe", "backends", "check", "mine", "--kernel", "views", cwd=tmp_path)
    finally:
        done(programs / "python", "-m", "pip", "uninstall", "--quiet", "--yes", "minimoe-mine", cwd=tmp_path)


def test_the_clone_runs_without_being_installed(programs: Path) -> None:
    done(programs / "python", "-m", "pip", "uninstall", "--quiet", "--yes", "minimoe", cwd=programs)
    assert "train" in done(programs / "python", "cli.py", "--help", cwd=ROOT)
