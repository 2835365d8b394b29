"""--quiet hides progress, and no warning: what is lost or changed is always said."""

from pathlib import Path

import pytest
from command_line import TINY, call, sets
from tiny_runs import write_text

TRAIN = ["train", *TINY, *sets("train.checkpoint_every=2"), "--steps", "4", "--quiet", "--out", "run", "--data"]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    """A finished run in the working directory."""
    monkeypatch.chdir(tmp_path)
    assert call(capsys, *TRAIN, str(write_text(tmp_path))) == (0, "run\n", "")
    return tmp_path / "run"


def test_steps_that_are_asked_for_are_no_warning(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "resume", "run", "--steps", "5", "--quiet") == (0, "run\n", "")


def test_a_damaged_checkpoint_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open(run / "checkpoints" / "step-000004" / "model.safetensors", "ab") as file:
        file.write(b"x")
    code, out, err = call(capsys, "resume", "run", "--quiet")
    assert (code, out) == (0, "run\n")
    assert err == "damaged: step-000004/model.safetensors: its SHA-256 does not match the manifest (damaged): going back to step 2\n"


def test_an_edited_rate_is_named_and_progress_is_not(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toml = (run / "config.toml").read_text()
    (run / "config.toml").write_text(toml.replace("grad_clip = 1.0", "grad_clip = 0.5"))
    assert call(capsys, "resume", "run", "--steps", "5", "--quiet") == (0, "run\n", "train.grad_clip 1.0 -> 0.5\n")


def test_a_doubtful_configuration_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    doubtful = sets("moe.router=expert_choice")
    code, out, err = call(capsys, *TRAIN, str(write_text(tmp_path)), *doubtful)
    assert (code, out) == (0, "run\n") and err.startswith("warning: ") and err.count("\n") == 1


@pytest.mark.parametrize("options", [[], ["--upcycle", "2"]])
def test_what_is_converted_from_an_older_checkpoint_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(capsys, *TRAIN, str(write_text(tmp_path)), *sets("moe=none"))[0] == 0
    (tmp_path / "run" / "checkpoints" / "step-000004" / "model.safetensors").unlink()
    code, _, err = call(capsys, "convert", "run", "out", *options)
    assert (code, err) == (0, "minimoe: damaged: step-000004/model.safetensors: is missing; using step 2\n")
