"""The learning-rate range test: which rates it tries, when it ends, what it suggests, and that it leaves nothing behind."""

import math
import re
import shlex
import signal
from pathlib import Path
from typing import Any

import pytest
from command_line import TINY, call, sets
from tiny_runs import tiny, write_text

from minimoe.config import Config
from minimoe.errors import Diverged, UserError
from minimoe.study.find_lr import HIGH, LOW, RangeTest, find_lr
from minimoe.training.listener import Listener
from minimoe.training.metrics import Backlog
from minimoe.training.trainer import Trainer


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture
def config(text: Path) -> Config:
    return tiny(text)


def test_rates_grow_by_equal_factors_until_the_loss_diverges(config: Config) -> None:
    found = find_lr(config, 60)
    factors = {round(after / before, 9) for before, after in zip(found.rates, found.rates[1:], strict=False)}
    assert found.rates[0] == LOW and factors == {round((HIGH / LOW) ** (1 / 59), 9)}
    assert found.diverged and len(found.rates) < 60 and found.rates[-1] < HIGH
    assert len(found.losses) == len(found.smoothed) == len(found.rates)
    assert 1e-4 < found.suggested < 0.5 and found.suggested < found.rates[found.lowest]


def test_the_first_losses_are_those_of_the_model_at_such_rates(config: Config) -> None:
    trainer = Trainer(config)
    for rate in (LOW, LOW * (HIGH / LOW) ** (1 / 39)):
        trainer.do_step(rate)
    rows = [row for row, _ in trainer.backlog.take()]
    found = find_lr(config, 40)
    assert found.losses[:2] == [row["loss"] for row in rows] and found.rates[:2] == [row["lr"] for row in rows]
    assert found.smoothed[0] == pytest.approx(found.losses[0])
    assert found.smoothed[1] == pytest.approx((0.5 * found.losses[0] + found.losses[1]) / 1.5)


def test_the_loss_is_smoothed_over_the_same_share_of_the_rates_however_many_steps_there_are(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lag(steps: int) -> float:
        """Decades of rates between a fall of the loss and that of the smoothed loss to half its height."""
        trainer_losses = iter([2.0] * (steps // 2) + [1.0] * steps)
        monkeypatch.setattr(Trainer, "do_step", lambda self, rate: setattr(self, "step", self.step + 1))
        monkeypatch.setattr(Backlog, "take", lambda self: [({"loss": next(trainer_losses), "skipped": False}, b"")])
        found = find_lr(config, steps)
        at = next(i for i, loss in enumerate(found.smoothed) if loss <= 1.5)
        return (at - steps // 2) / steps * 7

    assert lag(400) == pytest.approx(lag(200), abs=0.1) and lag(50) == pytest.approx(lag(200), abs=0.15)


def test_the_suggestion_is_a_third_of_the_rate_at_which_most_of_the_fall_was_reached() -> None:
    rates = [10.0**power for power in range(-6, 1)]
    found = RangeTest(rates, [], [5.0, 5.0, 4.0, 2.3, 2.0, 2.2, 6.0], True)
    assert found.lowest == 4 and found.reached == 4 and found.suggested == pytest.approx(3.3e-3)
    assert RangeTest(rates, [], [5.0, 5.0, 4.0, 2.1, 2.0, 1.99, 6.0], True).suggested == pytest.approx(3.3e-4)
    chart = found.chart(now=1e-3).splitlines()
    assert len(chart) == 8 and max(map(len, chart)) <= 80
    assert [line.split("< ")[1] for line in chart if "<" in line] == ["train.lr", "suggested, lowest"]


def test_two_hundred_steps_make_fifteen_lines(config: Config) -> None:
    rates = [LOW * (HIGH / LOW) ** (i / 199) for i in range(200)]
    losses = [5.0 - 3.0 * min(1.0, i / 150) + max(0, i - 150) for i in range(200)]
    chart = RangeTest(rates, losses, losses, True).chart(1e-3).splitlines()
    assert len(chart) == 16 and max(map(len, chart)) <= 80 and sum("<" in line for line in chart) == 3


def poisoned(monkeypatch: pytest.MonkeyPatch, first: int, value: float) -> None:
    """Make the loss of a step, and of those after it, something else."""
    from minimoe.training.metrics import Backlog

    plain = Backlog.take

    def take(self: Backlog) -> list[tuple[dict[str, Any], int]]:
        return [({**row, "loss": value if row["step"] >= first else row["loss"]}, bad) for row, bad in plain(self)]

    monkeypatch.setattr(Backlog, "take", take)


def test_a_loss_that_is_not_finite_ends_the_test(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    poisoned(monkeypatch, 31, math.nan)
    found = find_lr(config, 40)
    assert found.diverged and len(found.losses) == 30


@pytest.mark.parametrize(
    ("first", "value", "kind", "message"),
    [(1, math.inf, Diverged, "the first loss is not finite"), (1, 5.5, UserError, "no rate made the loss fall")],
)
def test_a_test_that_finds_nothing_says_so(
    config: Config, first: int, value: float, kind: type[UserError], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned(monkeypatch, first, value)
    with pytest.raises(kind, match=message) as error:
        find_lr(config, 20)
    assert error.value.exit_code == (3 if kind is Diverged else 2)


def test_the_display_is_ended_also_by_an_interrupt(config: Config) -> None:
    class Stops(Listener):
        has_ended = False

        def stepped(self, step: int) -> None:
            signal.raise_signal(signal.SIGINT)

        def ended(self, trainer: Any) -> None:
            self.has_ended = True

    listener = Stops()
    with pytest.raises(KeyboardInterrupt):
        find_lr(config, 40, listener)
    assert listener.has_ended


def test_the_command_suggests_a_rate_with_a_command_that_works_and_leaves_nothing(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["train", "tiny-moe", *TINY, "--data", str(text), "--steps", "40", "--seed", "3", "--find-lr"]
    code, out, err = call(capsys, *command)
    assert code == 0 and not list(tmp_path.iterdir()) and "step    20/40" in err
    suggested = re.search(r"^suggested: train\.lr = (\S+), ", out, flags=re.MULTILINE)
    following = re.search(r"^next: minimoe (.*)$", out, flags=re.MULTILINE)
    assert suggested and following and max(len(line) for line in out.splitlines() if "next" not in line) <= 80
    words = shlex.split(following[1])
    assert "--seed" in words and f"train.lr={suggested[1]}" in words
    code, quiet, err = call(capsys, *command, "--quiet")
    assert (code, quiet, err) == (0, f"{suggested[1]}\n", "")
    assert call(capsys, *words, "--steps", "2")[0] == 0 and (tmp_path / "runs").is_dir()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "there"], "leaves no run behind: leave out --out"),
        (["--dry-run"], "leave out --dry-run"),
        (["--steps", "5"], "needs 20 steps or more, got 5"),
        (["--set", "data.source=nowhere.txt"], "nowhere.txt"),
    ],
)
def test_what_cannot_be_tested_is_one_line(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, "train", "tiny-moe", *TINY, *sets("train.backend=numpy"), "--find-lr", *options)
    assert code == 2 and message in err and err.count("\n") == 1
