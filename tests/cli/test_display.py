"""The display of a training run, above all before the first step, when kernels are compiled and the time left is unknown."""

import io
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from tiny_runs import tiny, write_text

from minimoe.cli import display
from minimoe.cli import live as live_display
from minimoe.cli.display import PlainProgress
from minimoe.cli.live import LiveProgress
from minimoe.training import progress
from minimoe.training.progress import Pace
from minimoe.training.surroundings import stop_signals
from minimoe.training.trainer import Trainer

COMPILING = "compiling kernels for this processor: once, for less than a minute"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that a test sets: its one entry is the time in seconds."""
    now = [100.0]
    for module in (display, live_display, progress):
        monkeypatch.setattr(module, "now", lambda: now[0])
    return now


@pytest.fixture
def live(tmp_path: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch) -> LiveProgress:
    """The live display of a run of 10 steps that has started, on a screen of 80 columns that nobody sees."""
    screen = Console(file=io.StringIO(), width=80, height=25, force_terminal=True)
    found = LiveProgress(screen)
    found.started(Trainer(tiny(write_text(tmp_path), steps=10)))
    found.live.stop()  # it no longer draws by itself
    return found


def shown(live: LiveProgress) -> str:
    """Return the display as it looks now."""
    console = Console(file=io.StringIO(), width=80)
    with console.capture() as capture:
        console.print(live)
    return capture.get()


def row(step: int) -> dict[str, Any]:
    figures = {"loss": 5.0, "tokens_per_s": 1000.0, "lr": 1e-3, "grad_norm": 1.0, "skipped": False}
    load = {"aux_loss": 1.0, "aux_loss_layers": [1.0], "router_entropy": 1.3, "dropped": 0.0, "expert_load": [[0.25] * 4]}
    return {"step": step, **figures, **load}


def test_before_the_first_step_a_spinner_and_the_elapsed_time_are_shown(live: LiveProgress, clock: list[float]) -> None:
    clock[0] += 7
    text = shown(live)
    assert "step 0/10" in text and "waiting for the first step" in text and "0:07" in text and "left" not in text
    assert any(frame in text for frame in "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏")


def test_a_run_that_is_resumed_for_its_last_validation_waits_for_no_step(live: LiveProgress) -> None:
    live.trainer.step = 10
    live.started(live.trainer)
    live.live.stop()
    assert "step 10/10" in shown(live) and "waiting" not in shown(live)
    live.waiting("compiling kernels: 1 of 9")
    live.validating(0, 5)
    assert "compiling kernels" in shown(live)
    live.validating(1, 5)
    assert "compiling" not in shown(live)


def test_the_last_text_of_the_backend_stands_beside_the_spinner_until_a_step_is_done(live: LiveProgress, clock: list[float]) -> None:
    live.waiting("compiling 1 of 9")
    live.waiting(COMPILING)
    clock[0] += 12
    text = shown(live)
    assert COMPILING in text and "1 of 9" not in text and "0:12" in text and "left" not in text
    live.stepped(1)
    assert COMPILING not in shown(live) and "left" not in shown(live)  # one step, which compiled, tells nothing about the others


def test_the_time_left_is_that_of_a_device_which_is_behind_the_host(live: LiveProgress, clock: list[float]) -> None:
    """Four steps are launched at once and take 20 s together; the host is told when it waits for the last."""
    live.stepped(1)
    for step in (2, 3, 4, 5):
        live.stepped(step)
    clock[0] += 20
    live.logged([row(5)])
    live.stepped(6)
    assert "0:20 left" in shown(live)  # four more steps, each of 5 s


def test_after_the_second_step_the_time_left_is_shown(live: LiveProgress, clock: list[float]) -> None:
    live.stepped(1)
    clock[0] += 2
    live.stepped(2)
    live.logged([row(2)])
    assert "0:16 left" in shown(live) and "expert load" in shown(live)


def test_the_time_left_is_never_zero_while_steps_remain(live: LiveProgress, clock: list[float]) -> None:
    for step in range(1, 10):
        live.stepped(step)
        clock[0] += 0.1
    assert "step 9/10" in shown(live) and "0:01 left" in shown(live)


def test_the_line_of_the_last_step_has_no_time_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = PlainProgress()
    plain.started(Trainer(tiny(write_text(tmp_path), steps=2)))
    for step in (1, 2):
        plain.stepped(step)
        plain.logged([row(step)])
    _, first, last = capsys.readouterr().err.splitlines()
    assert "left" in first and "left" not in last


def test_what_is_compiled_later_is_shown_below_the_measures(live: LiveProgress, clock: list[float]) -> None:
    for step in (1, 2, 3):
        live.stepped(step)
        clock[0] += 1
    live.logged([row(3)])
    live.waiting(COMPILING)
    clock[0] += 5
    text = shown(live)
    assert "loss 5.0000" in text and COMPILING in text and "0:05" in text and "left" not in text


def test_the_last_evaluation_is_waited_for_without_a_time_left(live: LiveProgress, clock: list[float]) -> None:
    for step in range(1, 11):
        live.stepped(step)
        clock[0] += 1
    assert "0:10" in shown(live) and "left" not in shown(live)


def test_the_first_ctrl_c_is_answered_while_kernels_are_compiled(live: LiveProgress, clock: list[float]) -> None:
    live.waiting(COMPILING)
    with stop_signals(live.stopping) as signals:
        assert "stopping" not in shown(live)
        os.kill(os.getpid(), signal.SIGINT)
        assert signals == [signal.SIGINT] and "stopping after this step; Ctrl-C again stops at once" in shown(live)
        live.waiting("compiling kernels: 1 of 9")
        assert "stopping after this step" in shown(live)


def test_an_evaluation_that_takes_more_than_two_seconds_is_shown_from_its_first_batch_on(live: LiveProgress, clock: list[float]) -> None:
    live.stepped(1)
    live.validating(0, 500)
    assert "validating" not in shown(live)
    clock[0] += 0.1
    live.validating(1, 500)
    assert "validating 1/500" in shown(live) and "0:50 left" in shown(live)
    clock[0] += 4.9
    live.validating(100, 500)
    assert "validating 100/500" in shown(live) and "0:20 left" in shown(live)
    live.validating(500, 500)
    assert "validating" not in shown(live)


def test_an_evaluation_that_is_short_is_not_shown(live: LiveProgress, clock: list[float]) -> None:
    for done in range(11):
        live.validating(done, 10)
        assert "validating" not in shown(live)
        clock[0] += 0.15


def test_a_first_batch_that_takes_long_is_shown_too(live: LiveProgress, clock: list[float]) -> None:
    live.validating(0, 3)
    clock[0] += 9
    assert "validating 0/3" in shown(live) and "0:09 elapsed" in shown(live)


def test_the_first_ctrl_c_says_what_it_does_to_an_evaluation(live: LiveProgress) -> None:
    trainer: Any = live.trainer
    live.validating(0, 500)
    live.stopping()
    assert "stopping after this batch; Ctrl-C again stops at once, without saving the step" in shown(live)
    trainer.step = trainer.checkpointer.saved = 10
    assert "stopping: the state of step 10 is saved; Ctrl-C again stops at once" in shown(live)
    live.validating(500, 500)
    assert "stopping after this step" in shown(live)


def test_a_pipe_gets_a_line_about_a_long_evaluation_every_ten_seconds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], clock: list[float]
) -> None:
    plain = PlainProgress()
    plain.started(Trainer(tiny(write_text(tmp_path), steps=2)))
    capsys.readouterr()
    plain.validating(0, 2000)
    for second in range(1, 26):
        clock[0] += 1
        plain.validating(second * 50, 2000)
    lines = capsys.readouterr().err.splitlines()
    seen = [("50", "0:39"), ("550", "0:29"), ("1,050", "0:19")]
    assert lines == [f"validating: {done} of 2,000 batches  {left} left" for done, left in seen]


def test_a_pipe_gets_the_answer_to_a_signal_at_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    plain = PlainProgress()
    trainer: Any = Trainer(tiny(write_text(tmp_path), steps=2))
    plain.started(trainer)
    capfd.readouterr()
    with stop_signals(plain.stopping) as trainer.stops:
        os.kill(os.getpid(), signal.SIGINT)
    assert capfd.readouterr().err == "stopping after this step; Ctrl-C again stops at once, without saving it\n"
    trainer.step = trainer.checkpointer.saved = 2
    plain.validating(0, 9)
    plain.stopping()
    assert capfd.readouterr().err == "stopping: the state of step 2 is saved; Ctrl-C again stops at once\n"


def test_a_signal_that_is_no_ctrl_c_is_answered_by_its_own_name(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    plain = PlainProgress()
    trainer: Any = Trainer(tiny(write_text(tmp_path), steps=2))
    plain.started(trainer)
    capfd.readouterr()
    with stop_signals(plain.stopping) as trainer.stops:
        os.kill(os.getpid(), signal.SIGTERM)
        assert capfd.readouterr().err == "stopping after this step (SIGTERM); Ctrl-C stops at once, without saving it\n"
        plain.validating(0, 9)
        plain.stopping()
        assert capfd.readouterr().err == "stopping after this batch (SIGTERM); Ctrl-C stops at once, without saving the step\n"


def test_a_display_whose_terminal_went_away_does_not_end_a_run(live: LiveProgress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(io.StringIO):
        gone = False

        def write(self, text: str) -> int:
            if self.gone:
                raise OSError(5, "Input/output error")
            return len(text)

    screen, stderr = Gone(), Gone()
    monkeypatch.setattr("sys.stderr", stderr)
    trainer: Any = live.trainer
    shown_on = (LiveProgress(Console(file=screen, width=80, force_terminal=True)), PlainProgress())
    for display_ in shown_on:
        display_.started(trainer)
    screen.gone = stderr.gone = True
    for display_ in shown_on:
        display_.said("a text")
        display_.stepped(1)
        display_.logged([row(1)])
        display_.stopping()
        display_.ended(trainer)


def test_no_line_is_wider_than_80_columns(live: LiveProgress, clock: list[float]) -> None:
    live.waiting("compiling " + "many kernels, " * 12)
    live.stopping()
    assert max(map(len, shown(live).splitlines())) <= 80 and "0:00" in shown(live)


def test_a_pipe_gets_the_backends_texts_as_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = PlainProgress()
    plain.started(Trainer(tiny(write_text(tmp_path), steps=10)))
    plain.waiting(COMPILING)
    plain.stepped(1)
    plain.logged([row(1)])
    _, compiling, first = capsys.readouterr().err.splitlines()
    assert compiling == COMPILING and "left unknown" in first and "\x1b" not in first


def test_no_time_left_is_known_before_the_second_step_of_this_sitting(clock: list[float]) -> None:
    pace = Pace(20)
    assert pace.left(10) is None
    pace.stepped(11)
    clock[0] += 3
    assert pace.left(11) is None
    pace.stepped(12)
    assert pace.left(12) == pytest.approx(24.0)


def test_the_time_in_which_the_process_was_stopped_counts_for_nothing(live: LiveProgress, clock: list[float]) -> None:
    live.stepped(1)
    clock[0] += 2
    live.stepped(2)
    clock[0] += 3600
    live._was_stopped(3600.0)
    clock[0] += 2
    live.stepped(3)
    assert "0:04 elapsed  0:14 left" in shown(live)


def test_a_resumed_run_shows_the_time_and_the_losses_of_all_its_sessions(live: LiveProgress, clock: list[float]) -> None:
    trainer: Any = SimpleNamespace(**{name: getattr(live.trainer, name) for name in ("config", "task", "backend", "uniform_aux_loss")})
    trainer.step, trainer.saved, trainer.best, trainer.elapsed = 4, 4, 3.5, 60.0
    trainer.earlier_losses = lambda: [8.0, None, 6.0, 5.0]
    live.started(trainer)
    live.live.stop()
    live.stepped(5)
    clock[0] += 5
    live.logged([row(5)])
    text = shown(live)
    assert "1:05 elapsed" in text and "validation 3.5000" in text and "loss  █?▃▁▁" in text


def test_memory_of_a_device_is_shown_beside_that_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def text(process: int | None, device: int) -> str:
        monkeypatch.setattr(progress, "peak_memory", lambda: process)
        backend: Any = SimpleNamespace(memory=lambda: {"used": 0, "peak": device})
        return progress.memory_text(SimpleNamespace(backend=backend))  # type: ignore[arg-type]

    assert text(400 * 2**20, 3 * 2**30) == "400.0 MiB, device 3.0 GiB"
    assert text(400 * 2**20, 401 * 2**20) == text(400 * 2**20, 0) == "400.0 MiB"  # a backend that reports the process, or nothing
    assert text(None, 3 * 2**30) == "device 3.0 GiB"


@pytest.mark.parametrize("height", [1, 2, 5, 9, 12, 24])
def test_the_display_is_never_higher_than_the_terminal(live: LiveProgress, clock: list[float], height: int) -> None:
    live.stepped(1)
    live.logged([{**row(1), "expert_load": [[1 / 64] * 64] * 12, "aux_loss_layers": [1.0] * 12}, {**row(2), "loss": 4.0}])
    live.waiting("compiling " + "many kernels, " * 12)
    live.validating(0, 5)
    clock[0] += 9
    live.stopping()
    assert len(live.lines(80, height)) <= height
