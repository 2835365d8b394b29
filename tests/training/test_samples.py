"""Samples while a run trains: each task shows what it does, the run's bytes do not depend on them, and a resumed run has the same ones."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from msgspec.structs import replace
from tiny_runs import BACKEND, tiny, train, untimed, weights_of, with_train, write_text

import minimoe as mm
from minimoe.config import Config
from minimoe.data.tokenizer import ByteTokenizer
from minimoe.errors import CheckpointError, Interrupted
from minimoe.generation.generation import Sampling, generate
from minimoe.model.transformer import Transformer
from minimoe.runs.run import Run
from minimoe.runs.samples_file import NAME
from minimoe.study.verify import verify
from minimoe.training import samples
from minimoe.training.listener import Listener
from minimoe.training.tasks import LanguageModelling, language

TOKENS = 20  # of a text, instead of 100


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language, "SHORT", TOKENS)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture
def config(text: Path) -> Config:
    return tiny(text, steps=10, sample_every=3, log_every=4, checkpoint_every=4, eval_every=5, eval_batches=1)


class Heard(Listener):
    """Keeps samples; raises a signal, or kills, after a sample."""

    def __init__(self, step: int = 0, action: Any = None) -> None:
        self.step, self.action = step, action
        self.samples: dict[int, str] = {}

    def sampled(self, step: int, text: str) -> None:
        self.samples[step] = text
        if step == self.step:
            self.action()


class Killed(BaseException):
    """Ends a run at once: nothing is saved."""


def kill() -> None:
    raise Killed


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_a_sample_is_a_text_of_that_step_and_changes_nothing_else(
    config: Config, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, heard = with_train(config, backend=backend, checkpoint_every=3, keep=9), Heard()
    run, without = train(config, tmp_path, listener=heard), train(with_train(config, sample_every=0), tmp_path)
    assert [row["step"] for row in run.samples()] == [3, 6, 9] == list(heard.samples)
    assert weights_of(run.path, 10) == weights_of(without.path, 10) and untimed(run.metrics) == untimed(without.metrics)
    assert without.run.samples() == [] and not (without.path / NAME).exists()
    for row in run.samples():
        model = mm.load(run.path / "checkpoints" / f"step-{row['step']:06d}")
        assert row == {"step": row["step"], "text": "".join(generate(model, ByteTokenizer(), "\n", TOKENS, Sampling(top_k=40)))}
        assert heard.samples[row["step"]].startswith(f"sample at step {row['step']}:\n  ")


@pytest.mark.parametrize("step", [3, 6, 9])
def test_a_run_that_was_killed_in_a_sample_and_resumed_has_the_same_ones(config: Config, step: int, tmp_path: Path) -> None:
    unbroken = train(config, tmp_path)
    with pytest.raises(Killed):
        train(config, tmp_path, listener=Heard(step, kill))
    run = Run.open(tmp_path / "tiny-002")
    with open(run.path / NAME, "ab") as file:
        file.write(b'{"step": 1')  # as a kill in the middle of a line leaves it
    again = mm.resume(run.path)
    assert (run.path / NAME).read_bytes() == (unbroken.path / NAME).read_bytes()
    assert weights_of(run.path, 10) == weights_of(unbroken.path, 10) and untimed(again.metrics) == untimed(unbroken.metrics)


def test_a_signal_in_a_sample_saves_the_step_with_its_sample(config: Config, tmp_path: Path) -> None:
    unbroken = train(config, tmp_path)
    with pytest.raises(Interrupted):
        train(config, tmp_path, listener=Heard(6, lambda: signal.raise_signal(signal.SIGINT)))
    run = Run.open(tmp_path / "tiny-002")
    assert run.status()["step"] == 6 and [row["step"] for row in run.samples()] == [3, 6]
    mm.resume(run.path)
    assert (run.path / NAME).read_bytes() == (unbroken.path / NAME).read_bytes()


def test_a_masked_model_shows_one_window_with_its_blanks_filled_each_in_turn(text: Path, tmp_path: Path) -> None:
    config = tiny(text, model={"head": "mlm", "causal": False}, steps=4, sample_every=1)
    found = [row["text"] for row in train(config, tmp_path).run.samples()]
    assert len(found) == 4 and all("_" in text.split("\n")[0] for text in found)
    assert found[0].split("\n")[0] == found[3].split("\n")[0] != found[1].split("\n")[0], "three windows"


def test_a_classifier_shows_a_digit_and_its_guess(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    shape = {"head": "classifier", "causal": False, "image_size": 8, "patch_size": 4, "n_channels": 1, "n_classes": 10}
    config = tiny("digits", model=shape, steps=4, sample_every=2)
    run = train(config, tmp_path)
    for number, row in enumerate(run.samples(), start=1):
        *drawing, guess = row["text"].split("\n")
        assert len(drawing) == 8 and guess.startswith(f"{run.task.val_classes[number]}, taken for ")  # type: ignore[attr-defined]


def test_a_slow_sample_is_cut_and_says_so(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter(range(0, 10_000, 4))
    monkeypatch.setattr(samples, "now", lambda: float(next(seconds)))
    heard = Heard()
    row = train(config, tmp_path, listener=heard).run.samples()[0]
    assert row["cut"] is True and 1 <= len(row["text"]) <= 4 and heard.samples[3].endswith(" ...")


def test_a_sample_that_takes_long_says_what_the_wait_is_for(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard, told = Heard(), Event()
    heard.waiting = lambda text: told.set() if text == "taking a sample" else None  # type: ignore[method-assign]
    plain = LanguageModelling.sample

    def sample(self: LanguageModelling, model: Transformer, number: int) -> Iterator[str]:
        assert told.wait(timeout=20)
        return plain(self, model, number)

    monkeypatch.setattr(samples, "SOON", 0.0)
    monkeypatch.setattr(LanguageModelling, "sample", sample)
    assert train(config, tmp_path, listener=heard).samples()


def test_a_model_that_cannot_show_anything_says_why_and_trains_on(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sample(self: LanguageModelling, model: Transformer, number: int) -> Iterator[str]:
        raise mm.UserError("the model's predictions are not finite numbers")
        yield ""

    monkeypatch.setattr(LanguageModelling, "sample", sample)
    run = train(config, tmp_path)
    assert run.samples()[0] == {"step": 3, "text": None, "error": "the model's predictions are not finite numbers"}
    assert run.run.status()["state"] == "finished"


def test_a_damaged_line_is_named_and_goes_when_the_run_is_resumed(config: Config, tmp_path: Path) -> None:
    run = train(config, tmp_path).run
    lines = (run.path / NAME).read_text().splitlines()
    (run.path / NAME).write_text("\n".join([lines[0], "{", *lines[1:]]) + "\n")
    with pytest.raises(CheckpointError, match=r"samples.jsonl: line 2 cannot be read \(damaged\)"):
        run.samples()
    assert [check.what for check in verify(run.path).checks if check.state == "problem"] == [NAME]
    said: list[str] = []
    heard = Heard()
    heard.said = said.append  # type: ignore[method-assign]
    mm.resume(run.path, steps=12, listener=heard)
    assert any("samples.jsonl: line 2" in text for text in said)
    assert [row["step"] for row in run.samples()] == [3, 6, 9, 12]


def test_every_line_of_the_file_is_json(config: Config, tmp_path: Path) -> None:
    run = train(replace(config, name="other"), tmp_path)
    assert [json.loads(line)["step"] for line in (run.path / NAME).read_text().splitlines()] == [3, 6, 9]
    assert BACKEND["name"] == run.config.train.backend
