"""Stopping and going on: the same bytes as a run that was never stopped, whatever stopped it, and a clear refusal where that cannot be."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import contents, environment
from msgspec.structs import replace
from tiny_runs import sha256_of, tiny, train, untimed, with_train, write_text

import minimoe as mm
from minimoe.config import Config
from minimoe.errors import CheckpointError, Interrupted, UserError
from minimoe.runs.listing import list_runs
from minimoe.runs.metrics_file import MetricsFile
from minimoe.runs.run import Run
from minimoe.training.listener import Listener, Training
from minimoe.training.trained_run import TrainedRun

STEPS = 10


class Killed(BaseException):
    """Ends a run at once, as SIGKILL would: nothing is saved, and the state stays `running`."""


class At(Listener):
    """Does something after a step, and records the messages."""

    def __init__(self, step: int, action: Callable[[], None]) -> None:
        self.step, self.action = step, action
        self.heard: list[str] = []

    def stepped(self, step: int) -> None:
        if step == self.step:
            self.action()

    def said(self, text: str) -> None:
        self.heard.append(text)


def kill() -> None:
    raise Killed


def raise_signal(number: signal.Signals) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def config(text: Path) -> Config:
    """Everything that has a state: accumulation, dropout, jitter, a balance bias, moments, a best evaluation; and lists in the tables."""
    return tiny(
        text, model={"n_layers": 2, "dropout": 0.1, "sliding_window": 4, "layer_types": ("full", "sliding")},
        moe={"router": "sigmoid_bias", "jitter": 0.1, "layers": (0, 1)}, steps=STEPS, accumulate=2, checkpoint_every=3, eval_every=4,
        eval_batches=1, keep=3,
    )  # fmt: skip


@pytest.fixture(scope="module")
def unbroken(config: Config, tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    return train(config, tmp_path_factory.mktemp("unbroken"))


def stopped(config: Config, root: Path, step: int = 7, action: Callable[[], None] = kill) -> Run:
    """A run that ended after a step."""
    with pytest.raises((Killed, Interrupted)):
        train(config, root, listener=At(step, action))
    return Run.open(root=root)


def killed_before_its_first_checkpoint(config: Config, root: Path) -> Run:
    class AtTheStart(Listener):
        def started(self, trainer: Any) -> None:
            raise Killed

    with pytest.raises(Killed):
        train(config, root, listener=AtTheStart())
    return Run.open(root=root)


def assert_same(run: TrainedRun, unbroken: TrainedRun) -> None:
    assert sha256_of(run.path, STEPS) == sha256_of(unbroken.path, STEPS)
    assert untimed(run.metrics) == untimed(unbroken.metrics)
    for file in ("optimizer.safetensors", "config.json", "tokenizer.json"):
        one, other = (path / "checkpoints" / f"step-{STEPS:06d}" / file for path in (run.path, unbroken.path))
        assert one.read_bytes() == other.read_bytes(), file
    assert (run.path / "checkpoints" / "best").read_text() == (unbroken.path / "checkpoints" / "best").read_text()
    assert run.run.status()["state"] == "finished"


# ---- signals -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
@pytest.mark.parametrize("step", [1, 6])
def test_a_signal_saves_and_resuming_ends_with_the_same_bytes(
    config: Config, unbroken: TrainedRun, tmp_path: Path, number: signal.Signals, code: int, step: int
) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match="resume") as raised:
        train(config, tmp_path, listener=At(step, raise_signal(number)))
    assert raised.value.exit_code == code and signal.getsignal(number) is before
    run = Run.open(root=tmp_path)
    assert run.status()["state"] == "interrupted" and run.status()["step"] == step
    newest = run.newest_checkpoint()
    assert newest is not None and newest.name == f"step-{step:06d}"
    assert [row["step"] for row in run.metrics()] == list(range(1, step + 1))
    assert_same(mm.resume(root=tmp_path), unbroken)


def test_a_signal_at_the_last_step_lets_the_run_finish(config: Config, unbroken: TrainedRun, tmp_path: Path) -> None:
    assert_same(train(config, tmp_path, listener=At(STEPS, raise_signal(signal.SIGTERM))), unbroken)


def test_a_second_interrupt_ends_at_once(config: Config, unbroken: TrainedRun, tmp_path: Path) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path, listener=At(5, twice))
    assert_same(mm.resume(root=tmp_path), unbroken)


def test_a_run_may_be_interrupted_many_times(config: Config, unbroken: TrainedRun, tmp_path: Path) -> None:
    run = stopped(config, tmp_path, 1, raise_signal(signal.SIGTERM))
    for step in (2, 3, 5, 8):
        with pytest.raises(Interrupted):
            mm.resume(run.path, listener=At(step, raise_signal(signal.SIGINT)))
    assert_same(mm.resume(run.path), unbroken)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_was_ignored_from_the_start_stays_ignored(
    config: Config, unbroken: TrainedRun, tmp_path: Path, number: signal.Signals
) -> None:
    """`nohup`, or a job in the background of a script."""
    signal.signal(number, signal.SIG_IGN)
    assert_same(train(config, tmp_path, listener=At(5, raise_signal(number))), unbroken)
    assert signal.getsignal(number) is signal.SIG_IGN


def test_sigusr1_saves_and_training_goes_on(config: Config, unbroken: TrainedRun, tmp_path: Path) -> None:
    """What a batch system sends when the time is nearly up: the kill that may follow costs nothing."""

    class Asks(At):
        def stepped(self, step: int) -> None:
            super().stepped(step)
            if step == 6:
                kill()

    listener = Asks(5, raise_signal(signal.SIGUSR1))
    with pytest.raises(Killed):
        train(config, tmp_path, listener=listener)
    run = Run.open(root=tmp_path)
    newest = run.newest_checkpoint()
    assert newest is not None and newest.name == "step-000005" and len(run.metrics()) == 5
    assert listener.heard == ["SIGUSR1: the state of step 5 is saved"]
    assert_same(mm.resume(run.path, listener=At(7, raise_signal(signal.SIGUSR1))), unbroken)


def test_sigusr1_is_left_to_a_program_that_handles_it_itself(config: Config, tmp_path: Path) -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: heard.append(number))
    try:
        listener = At(5, raise_signal(signal.SIGUSR1))
        train(config, tmp_path, listener=listener)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert heard == [signal.SIGUSR1] and listener.heard == []


# ---- evaluations ---------------------------------------------------------------------------------------------------------------


class During(Listener):
    """Does something after a batch of the evaluation after a step, and records the steps that were done."""

    def __init__(self, step: int, action: Callable[[], None], batch: int = 1) -> None:
        self.step, self.action, self.batch = step, action, batch
        self.steps: list[int] = []
        self.lines: list[int] = []

    def started(self, trainer: Training) -> None:
        self.trainer = trainer

    def stepped(self, step: int) -> None:
        self.steps.append(step)

    def logged(self, rows: list[dict[str, Any]]) -> None:
        self.lines += [row["step"] for row in rows]

    def validating(self, done: int, batches: int) -> None:
        assert batches > 1
        if self.trainer.step == self.step and done == self.batch:
            self.action()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal ends an evaluation after its batch, however short it is."""
    monkeypatch.setattr("minimoe.training.validation.PATIENCE", 0.0)


@pytest.fixture(scope="module")
def longer(config: Config) -> Config:
    """Evaluations of several batches."""
    return with_train(config, batch_size=2, eval_batches=3)


@pytest.fixture(scope="module")
def unbroken_longer(longer: Config, tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    return train(longer, tmp_path_factory.mktemp("unbroken"))


def assert_state_of_the_last_step(run: Run) -> None:
    newest = run.newest_checkpoint()
    assert newest is not None and newest.name == f"step-{STEPS:06d}"
    rows = run.metrics()
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1)) and "val_loss" not in rows[-1]


@pytest.mark.parametrize("batch", [0, 1, 3])
def test_a_kill_in_the_last_validation_loses_nothing(longer: Config, unbroken_longer: TrainedRun, tmp_path: Path, batch: int) -> None:
    with pytest.raises(Killed):
        train(longer, tmp_path, listener=During(STEPS, kill, batch))
    run = Run.open(root=tmp_path)
    assert_state_of_the_last_step(run)
    again = During(0, kill)
    assert_same(mm.resume(run.path, listener=again), unbroken_longer)
    assert again.steps == [] and again.lines == [STEPS]
    assert contents_of(run) == contents_of(unbroken_longer.run)


def contents_of(run: Run) -> dict[str, bytes]:
    """Return the state and the metrics, without what depends on the clock."""
    state = json.loads((run.checkpoint_folder / f"step-{STEPS:06d}" / "state.json").read_text())
    state.pop("elapsed_s")
    lines = [list(row) for row in run.metrics()]
    kept = sorted(entry.name for entry in run.checkpoint_folder.iterdir())
    return {"state": json.dumps([state, lines, kept]).encode()}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_last_validation_and_resume_does_it_alone(
    longer: Config, unbroken_longer: TrainedRun, tmp_path: Path, impatient: None, number: signal.Signals, code: int
) -> None:
    with pytest.raises(Interrupted, match="the state was saved") as raised:
        train(longer, tmp_path, listener=During(STEPS, raise_signal(number)))
    run = Run.open(root=tmp_path)
    assert raised.value.exit_code == code and run.status()["state"] == "interrupted" and run.status()["step"] == STEPS
    assert_state_of_the_last_step(run)
    again = During(0, kill)
    assert_same(mm.resume(run.path, listener=again), unbroken_longer)
    assert again.steps == []


def test_a_second_interrupt_in_the_last_validation_ends_at_once_and_the_state_stays(
    longer: Config, unbroken_longer: TrainedRun, tmp_path: Path
) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(longer, tmp_path, listener=During(STEPS, twice))
    run = Run.open(root=tmp_path)
    assert run.status()["state"] == "interrupted" and run.status()["step"] == STEPS
    assert_state_of_the_last_step(run)
    assert_same(mm.resume(run.path), unbroken_longer)


def test_a_second_interrupt_in_a_step_says_what_is_saved(config: Config, tmp_path: Path) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path, listener=At(5, twice))
    status = Run.open(root=tmp_path).status()
    assert (status["state"], status["step"]) == ("interrupted", 4)


def test_an_interrupt_while_a_run_starts_again_leaves_it_interrupted_where_it_was(
    config: Config, unbroken: TrainedRun, tmp_path: Path
) -> None:
    class Starting(Listener):
        def started(self, trainer: Training) -> None:
            os.kill(os.getpid(), signal.SIGINT)

    run = stopped(config, tmp_path, 5, raise_signal(signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt):
        mm.resume(run.path, listener=Starting())
    status = json.loads((run.path / "status.json").read_text())
    assert (status["state"], status["step"]) == ("interrupted", 5)
    assert_same(mm.resume(run.path), unbroken)


@pytest.mark.parametrize("step", [4, 8])
def test_an_evaluation_that_a_signal_ended_is_done_first_when_the_run_goes_on(
    longer: Config, unbroken_longer: TrainedRun, tmp_path: Path, impatient: None, step: int
) -> None:
    with pytest.raises(Interrupted):
        train(longer, tmp_path, listener=During(step, raise_signal(signal.SIGINT)))
    run = Run.open(root=tmp_path)
    assert run.status()["step"] == step and "val_loss" not in run.metrics()[-1]
    again = mm.resume(run.path)
    assert_same(again, unbroken_longer)
    assert contents_of(run) == contents_of(unbroken_longer.run)


def test_a_short_evaluation_is_finished_before_a_signal_ends_the_run(longer: Config, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train(longer, tmp_path, listener=During(4, raise_signal(signal.SIGINT)))
    assert "val_loss" in Run.open(root=tmp_path).metrics()[-1]


@pytest.mark.parametrize(
    "place",
    [(MetricsFile, "replace_last"), (Run, "replace_state"), (Run, "note_best"), (Run, "prune"), (Run, "write_status")],
    ids=lambda place: place[1],
)
def test_a_kill_between_the_last_writes_changes_nothing(
    longer: Config, unbroken_longer: TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: tuple[type, str]
) -> None:
    plain = getattr(*place)
    listener = During(0, kill)

    def killed(self: object, *args: Any, **options: Any) -> Any:
        if listener.steps[-1:] == [STEPS]:
            raise Killed
        return plain(self, *args, **options)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(*place, killed)
        train(longer, tmp_path, listener=listener)
    run, again = Run.open(root=tmp_path), At(0, kill)
    assert_same(mm.resume(run.path, listener=again), unbroken_longer)
    assert contents_of(run) == contents_of(unbroken_longer.run)
    names = [sorted(entry.name for entry in path.iterdir()) for path in (run.path, unbroken_longer.path)]
    assert again.heard == [] and names[0] == names[1]


def test_more_steps_for_a_run_that_was_stopped_in_its_last_validation(longer: Config, tmp_path: Path, impatient: None) -> None:
    constant = with_train(longer, schedule="constant")
    with pytest.raises(Interrupted):
        train(with_train(constant, steps=6), tmp_path / "short", listener=During(6, raise_signal(signal.SIGINT)))
    run, whole = mm.resume(Run.open(root=tmp_path / "short").path, steps=STEPS), train(constant, tmp_path / "whole")
    assert sha256_of(run.path, STEPS) == sha256_of(whole.path, STEPS) and untimed(run.metrics) == untimed(whole.metrics)


def test_training_in_another_thread_needs_no_signals(config: Config, unbroken: TrainedRun, tmp_path: Path) -> None:
    done: list[TrainedRun] = []
    thread = threading.Thread(target=lambda: done.append(train(config, tmp_path)))
    thread.start()
    thread.join()
    assert_same(done[0], unbroken)


# ---- kills ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 3, 5, 10])
def test_resuming_after_a_kill_ends_with_the_same_bytes(config: Config, unbroken: TrainedRun, tmp_path: Path, step: int) -> None:
    stopped(config, tmp_path, step)
    assert_same(mm.resume(root=tmp_path), unbroken)


def test_resuming_after_a_kill_before_the_first_checkpoint_starts_anew(config: Config, unbroken: TrainedRun, tmp_path: Path) -> None:
    """The weights are drawn from the seed, so none are lost."""
    run = killed_before_its_first_checkpoint(config, tmp_path)
    assert run.newest_checkpoint() is None and not run.has_begun()
    assert_same(mm.resume(root=tmp_path), unbroken)


@pytest.mark.parametrize("step", [0, 2, 5, 10])
def test_a_run_whose_checkpoints_are_gone_is_refused_and_keeps_its_files(config: Config, tmp_path: Path, step: int) -> None:
    """Only a run that has not begun has no weights to lose."""
    run = train(config, tmp_path).run if step == STEPS else stopped(config, tmp_path, max(step, 1), kill)
    shutil.rmtree(run.checkpoint_folder)
    if step == 0:  # killed right after the first checkpoint, before any step left a line
        run.metrics_file.path.unlink(missing_ok=True)
    before = contents(run.path)
    with pytest.raises(
        CheckpointError, match=r"checkpoints: holds no checkpoint.*weights.*are lost.*minimoe train .*config\.toml"
    ) as caught:
        mm.resume(run.path, steps=20)
    assert "\n" not in str(caught.value) and contents(run.path) == before


def test_a_run_of_an_earlier_version_without_its_checkpoints_is_refused_if_it_had_any(config: Config, tmp_path: Path) -> None:
    """minimoe 0.1 did not note that a run had begun: its state, or a line of metrics, tells it."""
    run = killed_before_its_first_checkpoint(config, tmp_path)
    status = run.path / "status.json"
    fields = {key: value for key, value in json.loads(status.read_text()).items() if key != "begun"}
    status.write_text(json.dumps({**fields, "state": "interrupted"}))
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        mm.resume(run.path)
    status.write_text(json.dumps({**fields, "pid": 2**22 + 1}))
    run.metrics_file.append([{"step": 1, "loss": 1.0}])
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        mm.resume(run.path)
    run.metrics_file.path.unlink()
    with pytest.raises(Killed):
        mm.resume(run.path, listener=At(1, kill))


def test_a_best_checkpoint_that_a_kill_left_unmarked_is_marked(config: Config, unbroken: TrainedRun, tmp_path: Path) -> None:
    run = stopped(config, tmp_path, 5)
    best = run.checkpoint_folder / "best"
    assert best.read_text() == "step-000004\n"
    best.unlink()
    with pytest.raises(Interrupted):
        mm.resume(root=tmp_path, listener=At(5, raise_signal(signal.SIGINT)))
    assert best.read_text() == "step-000004\n"
    assert_same(mm.resume(root=tmp_path), unbroken)


def test_an_old_checkpoint_that_a_kill_left_unpruned_goes(config: Config, unbroken: TrainedRun, tmp_path: Path) -> None:
    """The kill came after the last checkpoint was written: nothing is left to train, but the folder is put in order."""
    run = train(config, tmp_path)
    shutil.copytree(run.path / "checkpoints" / "step-000008", run.path / "checkpoints" / "step-000002")
    run.run.write_status("running")
    assert_same(mm.resume(run.path), unbroken)
    kept = [sorted(entry.name for entry in (path / "checkpoints").iterdir()) for path in (run.path, unbroken.path)]
    assert kept[0] == kept[1]


@pytest.mark.parametrize("times", [2, 100])
def test_random_interrupts_of_the_real_command_lose_at_most_the_step_in_hand(times: int) -> None:
    """See interrupt_resume.py, whose seed differs at each run and is printed."""
    seed = random.SystemRandom().randrange(10**6)
    folder = Path(__file__).parents[1]
    path = os.pathsep.join([str(folder.parent), str(folder.parent / "backends"), os.environ.get("PYTHONPATH", "")])
    arguments = [sys.executable, str(folder / "interrupt_resume.py"), "--times", str(times), "--seed", str(seed)]
    done = subprocess.run(arguments, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, f"--seed {seed}: {done.stdout}{done.stderr}"
    assert f"{times} of {times} equal" in done.stdout


def test_random_kills_of_the_real_command_change_nothing() -> None:
    """See kill_resume.py; twenty or more times by hand."""
    folder = Path(__file__).parents[1]
    path = os.pathsep.join([str(folder.parent), str(folder.parent / "backends"), os.environ.get("PYTHONPATH", "")])
    arguments = [sys.executable, str(folder / "kill_resume.py"), "--times", "3", "--seed", "7"]
    done = subprocess.run(arguments, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 of 3 equal" in done.stdout


@pytest.mark.parametrize("start", ["weights", "frozen", "adapters"])
@pytest.mark.parametrize("script", ["kill_resume.py", "interrupt_resume.py"])
def test_random_ends_of_a_run_that_starts_from_weights_change_nothing(script: str, start: str) -> None:
    """See the two scripts; the moments are drawn from a seed that differs at each run and is printed."""
    seed = random.SystemRandom().randrange(10**6)
    folder = Path(__file__).parents[1]
    path = os.pathsep.join([str(folder.parent), str(folder.parent / "backends"), os.environ.get("PYTHONPATH", "")])
    arguments = [sys.executable, str(folder / script), "--times", "3", "--seed", str(seed), "--start", start]
    done = subprocess.run(arguments, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"--seed {seed}: {done.stdout}{done.stderr}"
    assert "3 of 3 equal" in done.stdout


# ---- errors of the disk ----------------------------------------------------------------------------------------------------------


def failing(monkeypatch: pytest.MonkeyPatch, first: int, code: int, for_ever: bool) -> None:
    """Let the system's `first`-th call from now that brings bytes to the disk fail, alone or with all later ones."""
    real, calls = os.fsync, [0]

    def fsync(descriptor: int) -> None:
        calls[0] += 1
        if calls[0] == first or (for_ever and calls[0] > first):
            raise OSError(code, os.strerror(code))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("for_ever", [False, True], ids=["once", "for ever"])
@pytest.mark.parametrize("step", [1, 3, 4, 10])
def test_a_run_that_an_error_of_the_disk_ended_says_so_and_is_resumed(
    config: Config, unbroken: TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, for_ever: bool
) -> None:
    """The state is `failed`, with the reason; where not even that can be written, no lock is held, and the state is `killed`."""
    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="Input/output error") as caught:
        train(config, tmp_path, listener=At(step, lambda: failing(patch, 2, errno.EIO, for_ever)))
    run = Run.open(root=tmp_path)
    status = run.status()
    assert status["state"] == ("killed" if for_ever else "failed") and not run.lock.path.exists()
    if not for_ever:
        assert status["error"] == str(caught.value) and status["step"] >= step
        assert list_runs(tmp_path)[0]["state"] == "failed"
    assert_same(mm.resume(run.path), unbroken)
    assert "error" not in run.status() and not list(run.path.rglob(".*"))


def test_a_fault_of_the_code_is_a_failure_too(config: Config, tmp_path: Path) -> None:
    def fault() -> None:
        raise ZeroDivisionError("a fault\nof two lines")

    with pytest.raises(ZeroDivisionError):
        train(config, tmp_path, listener=At(4, fault))
    status = Run.open(root=tmp_path).status()
    assert (status["state"], status["step"], status["error"]) == ("failed", 4, "ZeroDivisionError: a fault of two lines")


def test_a_resume_that_is_refused_leaves_the_state_as_it_is(config: Config, tmp_path: Path) -> None:
    run = stopped(config, tmp_path, 4, raise_signal(signal.SIGTERM))
    toml = (run.path / "config.toml").read_text()
    (run.path / "config.toml").write_text(toml.replace("d_hidden = 16", "d_hidden = 24"))
    before = contents(run.path)
    with pytest.raises(CheckpointError, match="belongs to another configuration"):
        mm.resume(run.path)
    assert contents(run.path) == before and run.status()["state"] == "interrupted"


def leave_behind(run: Run) -> list[Path]:
    """What writers that were killed leave in a run's folder and beside it."""
    left = [run.path / ".status.json.tmp-0123abcd", run.path / ".training.lock.tmp-0123abcd", run.path.parent / ".last.tmp-0123abcd"]
    for folder in (run.checkpoint_folder / ".step-000099.tmp-0123abcd", run.checkpoint_folder / ".step-000001.tmp-0123abcd"):
        folder.mkdir(parents=True)
        left.append(folder)
    for file in left[:3]:
        file.write_text("")
    os.utime(left[2], (0, 0))
    return left


def test_what_killed_writers_left_is_gone_when_training_starts_and_when_it_ends(config: Config, tmp_path: Path) -> None:
    run = stopped(config, tmp_path, 4)
    left = leave_behind(run)
    new, other = tmp_path / ".last.tmp-89abcdef", tmp_path / ".last.txt"
    new.write_text("of a process that is starting now")
    other.write_text("no file of minimoe")
    with pytest.raises(Interrupted):
        mm.resume(run.path, listener=At(5, raise_signal(signal.SIGTERM)))
    assert not [path for path in left if path.exists()] and new.exists() and other.exists()
    mm.resume(run.path, listener=At(STEPS, lambda: leave_behind(run) and None))
    assert not [path for path in left if path.exists()] and new.exists() and other.exists()


# ---- further, from elsewhere, from a checkpoint --------------------------------------------------------------------------------


def test_a_finished_run_is_not_resumed_without_more_steps(config: Config, tmp_path: Path) -> None:
    run = train(config, tmp_path)
    for steps in (None, STEPS, STEPS - 1):
        with pytest.raises(CheckpointError, match="--steps with a larger number"):
            mm.resume(run.path, steps=steps)
    assert run.run.status()["state"] == "finished" and Run.open(run.path).config.train.steps == STEPS


def test_resuming_for_more_steps_goes_on(config: Config, tmp_path: Path) -> None:
    """With a constant rate, 6 steps and then 10 in all are 10 at once."""
    constant = with_train(config, schedule="constant")
    short = train(with_train(constant, steps=6), tmp_path / "short")
    longer, whole = mm.resume(short.path, steps=STEPS), train(constant, tmp_path / "whole")
    assert sha256_of(longer.path, STEPS) == sha256_of(whole.path, STEPS)
    assert [row["step"] for row in longer.metrics] == list(range(1, STEPS + 1))
    assert Run.open(longer.path).config.train.steps == STEPS


def test_a_run_that_was_moved_still_resumes(config: Config, unbroken: TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = stopped(config, tmp_path / "here")
    shutil.move(run.path, tmp_path / "there")
    monkeypatch.chdir(tmp_path)
    assert_same(mm.resume("there"), unbroken)


def test_a_relative_text_is_found_from_another_working_directory(
    config: Config, unbroken: TrainedRun, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(text.parent)
    run = stopped(replace(config, data=replace(config.data, source=text.name)), tmp_path)
    monkeypatch.chdir(tmp_path)
    assert_same(mm.resume(run.path), unbroken)


@pytest.mark.parametrize("name", ["step-000006", "best"])
def test_resuming_from_a_checkpoint_goes_back_to_it(config: Config, unbroken: TrainedRun, tmp_path: Path, name: str) -> None:
    run = stopped(config, tmp_path, 9)
    assert_same(mm.resume(run.checkpoint_folder / name), unbroken)


def test_going_back_and_being_stopped_again_leaves_no_hole(config: Config, unbroken: TrainedRun, tmp_path: Path) -> None:
    """The checkpoints after the one that was named are gone, so that the next resume takes the newest of what was trained."""
    run = train(config, tmp_path)
    assert (run.path / "checkpoints" / "step-000009").is_dir()
    with pytest.raises(Interrupted):
        mm.resume(run.path / "checkpoints" / "step-000008", listener=At(9, raise_signal(signal.SIGINT)))
    found = Run.open(run.path)
    newest = found.newest_checkpoint()
    assert newest is not None and newest.name == "step-000009" and len(found.metrics()) == 9
    assert_same(mm.resume(run.path), unbroken)


# ---- damage and change ---------------------------------------------------------------------------------------------------------


def damage(checkpoint: Path, file: str = "model.safetensors") -> None:
    data = bytearray((checkpoint / file).read_bytes())
    data[len(data) // 2] ^= 1
    (checkpoint / file).write_bytes(bytes(data))


@pytest.mark.parametrize("keep", [2, 3])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(config: Config, unbroken: TrainedRun, tmp_path: Path, keep: int) -> None:
    run = stopped(with_train(config, keep=keep), tmp_path, 9)
    kept = sorted(run.checkpoint_folder.glob("step-*"))
    damage(kept[-1])
    listener = At(7, raise_signal(signal.SIGTERM))
    with pytest.raises(Interrupted):
        mm.resume(run.path, listener=listener)
    assert any(kept[-1].name in line and "SHA-256" in line for line in listener.heard)
    assert [row["step"] for row in run.metrics()] == list(range(1, 8))
    assert mm.load(run.path) is not None
    assert untimed(mm.resume(run.path).metrics) == untimed(unbroken.metrics)
    assert sha256_of(run.path, STEPS) == sha256_of(unbroken.path, STEPS)


def test_a_damaged_checkpoint_that_was_named_is_refused(config: Config, tmp_path: Path) -> None:
    run = stopped(config, tmp_path, 9)
    damage(run.checkpoint_folder / "step-000006", "optimizer.safetensors")
    with pytest.raises(CheckpointError, match=r"step-000006/optimizer\.safetensors.*damaged"):
        mm.resume(run.checkpoint_folder / "step-000006")


def test_a_run_without_a_whole_checkpoint_is_refused(config: Config, tmp_path: Path) -> None:
    run = stopped(config, tmp_path, 4)
    for checkpoint in run.checkpoint_folder.glob("step-*"):
        damage(checkpoint)
    with pytest.raises(CheckpointError, match="no checkpoint is whole"):
        mm.resume(run.path)


def test_a_changed_text_is_refused(tmp_path: Path) -> None:
    source = write_text(tmp_path)
    run = stopped(tiny(source), tmp_path / "runs", 5)
    source.write_text(source.read_text() + "more\n")
    with pytest.raises(CheckpointError, match=r"text\.txt have changed"):
        mm.resume(run.path)
    source.unlink()
    with pytest.raises(UserError, match="no such file"):
        mm.resume(run.path)


CHANGES: dict[str, tuple[str, str, str]] = {
    "a width": ("model", "d_hidden = 16", "d_hidden = 24"),
    "a router": ("model", 'router = "sigmoid_bias"', 'router = "softmax_topk"'),
    "the dtype": ("dtype", 'dtype = "float32"', 'dtype = "float64"'),
    "the tokenizer": ("tokenizer", 'tokenizer = "byte"', 'tokenizer = "char"'),
    "the split": ("val_fraction", "val_fraction = 0.1", "val_fraction = 0.2"),
    "the optimizer": ("optimizer's state", 'optimizer = "adamw"', 'optimizer = "lion"'),
}


@pytest.mark.parametrize(("names", "old", "new"), CHANGES.values(), ids=CHANGES)
def test_another_configuration_is_refused(config: Config, tmp_path: Path, names: str, old: str, new: str) -> None:
    run = stopped(config, tmp_path, 4)
    toml = (run.path / "config.toml").read_text()
    assert old in toml
    (run.path / "config.toml").write_text(toml.replace(old, new))
    with pytest.raises(CheckpointError, match=names):
        mm.resume(run.path)


def test_a_rate_may_be_changed(config: Config, tmp_path: Path) -> None:
    run = stopped(config, tmp_path, 4)
    toml = (run.path / "config.toml").read_text()
    (run.path / "config.toml").write_text(toml.replace("lr = 0.01\n", "lr = 0.002\n", 1))
    resumed: Any = mm.resume(run.path)
    assert resumed.metrics[2]["lr"] > 0.005 and max(row["lr"] for row in resumed.metrics[3:]) <= 0.002


def test_a_run_that_another_process_trains_is_left_as_it_is(config: Config, tmp_path: Path) -> None:
    run = stopped(config, tmp_path, 4)
    script = (
        "import sys; from pathlib import Path; from minimoe.runs.run import Run\n"
        "run = Run(Path(sys.argv[1])); run.claim(); print('ready', flush=True); input()"
    )
    command = [sys.executable, "-c", script, str(run.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()) as other:
        assert other.stdout is not None and other.stdout.readline() == "ready\n"
        before = contents(run.path)
        for again in (lambda: mm.resume(run.path, steps=20), lambda: train(config, tmp_path, out=run.path)):
            with pytest.raises(UserError, match=rf"process {other.pid} is still training|is not empty"):
                again()
        assert run.status()["state"] == "running" and contents(run.path) == before
        other.kill()
    assert run.status()["state"] == "killed"
    assert mm.resume(run.path).run.status()["state"] == "finished" and not run.lock.path.exists()


def test_two_threads_of_a_process_do_not_train_in_one_folder(config: Config, tmp_path: Path) -> None:
    refused: list[str] = []

    def resume_too() -> None:
        with pytest.raises(CheckpointError, match="still training this run") as caught:
            mm.resume(root=tmp_path)
        refused.append(str(caught.value))

    train(config, tmp_path, listener=At(5, resume_too))
    assert len(refused) == 1 and f"this process ({os.getpid()}) is still training" in refused[0]


def test_nothing_to_resume_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no run here yet"):
        mm.resume(root=tmp_path)
    with pytest.raises(CheckpointError, match="no such run"):
        mm.resume("nothing", root=tmp_path)


def test_ten_bad_steps_count_over_a_stop(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from minimoe.errors import Diverged
    from minimoe.model.transformer import Transformer

    plain = Transformer.loss

    def loss(self: Transformer, *args: Any, **kwargs: Any) -> Any:
        parts, rng = plain(self, *args, **kwargs), kwargs.get("rng")
        if rng is not None and rng.step >= 2:
            parts.cross_entropy.data = parts.cross_entropy.data * np.float32(np.nan)
        return parts

    monkeypatch.setattr(Transformer, "loss", loss)
    run = stopped(tiny(text, steps=30, log_every=1), tmp_path, 8, raise_signal(signal.SIGINT))
    with pytest.raises(Diverged, match="up to step 12;"):
        mm.resume(run.path)
    assert [row["skipped"] for row in run.metrics()] == [False, False] + [True] * 10
