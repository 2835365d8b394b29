"""Early stopping: when a run ends, what it leaves, how it goes on, and that no kill changes that."""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import tiny, train, untimed, weights_of, with_train, write_text

import minimoe as mm
from minimoe.config import Config
from minimoe.errors import CheckpointError, ConfigError, Interrupted
from minimoe.runs.checkpoint import load_checkpoint
from minimoe.runs.listing import list_runs
from minimoe.runs.metrics_file import MetricsFile
from minimoe.runs.run import Run
from minimoe.study.compare import compare
from minimoe.study.verify import verify
from minimoe.training import validation
from minimoe.training.listener import Listener
from minimoe.training.trained_run import TrainedRun


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def config(text: Path) -> Config:
    """Learns for a few steps, and then, at such a rate, no more."""
    rate = {"lr": 0.3, "schedule": "constant"}
    return tiny(text, steps=40, eval_every=2, eval_batches=1, checkpoint_every=3, patience=2, log_every=3, keep=9, **rate)


@pytest.fixture(scope="module")
def unbroken(config: Config, tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    return train(config, tmp_path_factory.mktemp("unbroken"))


def compared(run: TrainedRun) -> dict[int, float]:
    return {row["step"]: row.get("val_loss_sampled", row["val_loss"]) for row in run.metrics if "val_loss" in row}


def same_files(run: Path, other: Path) -> None:
    """Everything but times and processes is equal, and `best` names the same."""
    ours, theirs = Run.open(run), Run.open(other)
    assert untimed(ours.metrics()) == untimed(theirs.metrics())
    assert {**ours.status(), "pid": 0, "process": ""} == {**theirs.status(), "pid": 0, "process": ""}
    for folder in sorted((other / "checkpoints").iterdir()):
        if folder.is_dir():
            mine, its = load_checkpoint(run / "checkpoints" / folder.name), load_checkpoint(folder)
            assert {**mine.state, "elapsed_s": 0} == {**its.state, "elapsed_s": 0}
            assert (mine.folder / "model.safetensors").read_bytes() == (its.folder / "model.safetensors").read_bytes()
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == sorted(path.name for path in (other / "checkpoints").iterdir())
    assert (run / "checkpoints" / "best").read_text() == (other / "checkpoints" / "best").read_text()


# ---- the end ---------------------------------------------------------------------------------------------------------------------


def test_a_run_ends_after_so_many_evaluations_without_a_better_loss(unbroken: TrainedRun) -> None:
    losses = compared(unbroken)
    steps = list(losses)
    best = min(losses, key=losses.__getitem__)
    assert steps[-1] < 40 and steps[-1] == best + 4, "two evaluations after the best"
    for i, step in enumerate(steps[:-1]):  # and not before
        since = [s for s in steps[: i + 1] if s > min(steps[: i + 1], key=losses.__getitem__)]
        assert len(since) < 2, step
    status = unbroken.run.status()
    assert (status["state"], status["step"], status["steps"]) == ("finished", steps[-1], 40)
    assert status["reason"] == "no better validation loss in 2 evaluations (train.patience)"
    assert list_runs(unbroken.path.parent)[0]["reason"] == status["reason"]


def test_it_ends_as_a_run_of_so_many_steps_does(unbroken: TrainedRun, config: Config, tmp_path: Path) -> None:
    last = unbroken.metrics[-1]["step"]
    short = train(with_train(config, steps=last, patience=0), tmp_path)
    assert untimed(short.metrics) == untimed(unbroken.metrics) and "val_loss_sampled" in unbroken.metrics[-1]
    assert weights_of(short.path, last) == weights_of(unbroken.path, last)
    names = [sorted(path.name for path in run.run.checkpoint_folder.iterdir()) for run in (short, unbroken)]
    assert names[0] == names[1]
    assert (short.path / "checkpoints/best").read_text() == (unbroken.path / "checkpoints/best").read_text()
    assert all(check.state == "ok" for check in verify(unbroken.path).checks)


def test_without_patience_nothing_ends_and_no_state_is_kept(config: Config, tmp_path: Path) -> None:
    run = train(with_train(config, patience=0, steps=16), tmp_path)
    assert len(run.metrics) == 16 and "reason" not in run.run.status()
    assert "stale" not in json.loads((run.path / "checkpoints/step-000016/state.json").read_text())


def test_patience_needs_evaluations() -> None:
    with pytest.raises(ConfigError, match=r"train.patience \(2\) counts evaluations: train.eval_every must be above 0"):
        mm.TrainConfig(patience=2, eval_every=0)


# ---- kills -------------------------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Ends a run at once: nothing is saved, and the state stays `running`."""


class Ends(Listener):
    """Kills, or sends a signal, after a step, or at a batch of an evaluation after it."""

    def __init__(self, step: int, action: Callable[[], None], batch: int | None = None, evaluation: int = 1) -> None:
        self.at, self.action, self.batch, self.evaluation = step, action, batch, evaluation
        self.step = self.seen = 0

    def stepped(self, step: int) -> None:
        self.step, self.seen = step, 0
        if step == self.at and self.batch is None:
            self.action()

    def validating(self, done: int, batches: int) -> None:
        self.seen += done == 0
        if self.step == self.at and self.seen == self.evaluation and done == self.batch:
            self.action()


def kill() -> None:
    raise Killed


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


def stopped(config: Config, folder: Path, listener: Listener) -> Path:
    with pytest.raises((Killed, Interrupted)):
        train(config, folder, listener=listener)
    return folder / "tiny-001"


def test_a_run_that_was_killed_ends_early_at_the_same_step(config: Config, unbroken: TrainedRun, tmp_path: Path) -> None:
    for step in range(1, unbroken.metrics[-1]["step"] + 1):
        run = stopped(config, tmp_path / str(step), Ends(step, kill))
        mm.resume(run)
        same_files(run, unbroken.path)


@pytest.mark.parametrize("evaluation", [1, 2])
@pytest.mark.parametrize("action", [kill, interrupt])
def test_an_evaluation_that_ends_the_run_may_be_stopped_or_killed(
    config: Config, unbroken: TrainedRun, tmp_path: Path, action: Callable[[], None], evaluation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validation, "PATIENCE", 0.0)
    last, batch = unbroken.metrics[-1]["step"], 0 if evaluation == 1 else 2
    run = stopped(config, tmp_path, Ends(last, action, batch, evaluation))
    assert Run.open(run).status()["state"] != "finished"
    mm.resume(run)
    same_files(run, unbroken.path)
    assert not list(run.glob("*.damaged*"))


WRITES = [(MetricsFile, "append"), (Run, "save"), (MetricsFile, "replace_last"), (Run, "replace_state"), (Run, "write_status")]


@pytest.mark.parametrize("where", WRITES)
@pytest.mark.parametrize("after", [False, True])
def test_a_kill_between_the_last_writes_changes_nothing(
    config: Config, unbroken: TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: tuple[type, str], after: bool
) -> None:
    last, (kind, name) = unbroken.metrics[-1]["step"], where
    plain = getattr(kind, name)
    reached: list[int] = []

    def killed(self: Any, *args: Any, **options: Any) -> Any:
        if not reached or (name == "write_status" and args[0] != "finished"):
            return plain(self, *args, **options)
        if after:
            plain(self, *args, **options)
        raise Killed

    monkeypatch.setattr(kind, name, killed)
    run = stopped(config, tmp_path, Ends(last, lambda: reached.append(1)))
    monkeypatch.setattr(kind, name, plain)
    said: list[str] = []

    class Said(Listener):
        def said(self, text: str) -> None:
            said.append(text)

    if Run.open(run).status()["state"] != "finished":
        mm.resume(run, listener=Said())
    same_files(run, unbroken.path)
    assert not list(run.glob("*.damaged*")) and not said


# ---- going on ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"patience": 2}, {"patience": 1}, {"steps": 40}, {"steps": 30}])
def test_a_run_that_ended_early_says_so_instead_of_going_on(unbroken: TrainedRun, options: dict[str, int]) -> None:
    before = {path: path.read_bytes() for path in unbroken.path.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match="ended early at step") as error:
        mm.resume(unbroken.path, **options)  # type: ignore[arg-type]
    assert "--patience" in str(error.value) and "--steps" in str(error.value)
    assert before == {path: path.read_bytes() for path in unbroken.path.rglob("*") if path.is_file()}


def copy(run: TrainedRun, folder: Path) -> Path:
    shutil.copytree(run.path, folder / "tiny-001")
    return folder / "tiny-001"


def test_more_patience_goes_on_from_there(unbroken: TrainedRun, config: Config, tmp_path: Path) -> None:
    last = unbroken.metrics[-1]["step"]
    again = mm.resume(copy(unbroken, tmp_path), patience=3)
    steps = list(compared(again))
    assert steps[steps.index(last) + 1] == last + 2 and again.config.train.patience == 3
    patient = train(with_train(config, patience=3), tmp_path / "other")
    assert weights_of(again.path, steps[-1]) == weights_of(patient.path, patient.metrics[-1]["step"])


def test_no_patience_goes_on_to_the_end(unbroken: TrainedRun, tmp_path: Path) -> None:
    again = mm.resume(copy(unbroken, tmp_path), patience=0)
    assert len(again.metrics) == 40 and again.run.status()["state"] == "finished" and "reason" not in again.run.status()


def test_more_steps_wait_anew_also_after_a_kill(unbroken: TrainedRun, tmp_path: Path) -> None:
    last = unbroken.metrics[-1]["step"]
    whole = mm.resume(copy(unbroken, tmp_path / "whole"), steps=60)
    assert [row["step"] for row in whole.metrics if "val_loss" in row and row["step"] > last][:2] == [last + 2, last + 4]
    killed = copy(unbroken, tmp_path / "killed")
    with pytest.raises(Killed):
        mm.resume(killed, steps=60, listener=Ends(last + 1, kill))
    mm.resume(killed)
    same_files(killed, whole.path)


# ---- compared ----------------------------------------------------------------------------------------------------------------------


def test_a_run_that_ended_early_is_compared_with_a_note(unbroken: TrainedRun, config: Config, tmp_path: Path) -> None:
    other = train(with_train(config, patience=0, steps=6), tmp_path)
    found = compare([str(unbroken.path), str(other.path)])
    last = unbroken.metrics[-1]["step"]
    assert [row.steps for row in found.rows] == [last, 6] and found.rows[0].tokens == last * 64
    assert any(f"ended early at step {last} of 40" in note for note in found.notes)
