"""What the end of a run says besides its result: why it ended early, the best checkpoint and how to use it, remedies for dead experts."""

import re
import shlex
from pathlib import Path

import pytest
from command_line import call, sets
from tiny_runs import write_text

from minimoe.runs.run import Run

SHAPE = sets(
    "model.d_model=16", "model.n_layers=1", "model.n_heads=2", "model.n_kv_heads=1", "model.head_dim=8", "model.d_hidden=16",
    "model.max_seq_len=16", "moe.n_experts=4", "moe.d_hidden=16", "train.batch_size=4", "train.seq_len=16", "train.warmup_steps=2",
    "train.backend=numpy", "train.eval_batches=1", "train.eval_every=2", "train.schedule=constant", "train.lr=0.3", "train.patience=2",
)  # fmt: skip


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_text(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("out", ["runs/plain", "a folder"])
def test_the_best_checkpoint_is_named_with_a_command_that_works(here: Path, out: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, text, _ = call(capsys, "train", "tiny-moe", *SHAPE, "--data", "text.txt", "--steps", "40", "--out", out)
    run = Run.open(out)
    rows = {row["step"]: row for row in run.metrics() if "val_loss" in row}
    last = max(rows)
    best = min(rows, key=lambda step: rows[step].get("val_loss_sampled", rows[step]["val_loss"]))
    assert code == 0 and best < last < 40
    assert f"ended early at step {last} of 40: no better validation loss in 2 evaluations (train.patience)" in text
    found = re.search(r"^best: step (\d+), validation loss (\S+) .*\n +(minimoe .*)$", text, flags=re.MULTILINE)
    assert found and (int(found[1]), found[2]) == (best, f"{rows[best]['val_loss']:.4f}")
    verb = shlex.split(found[3])
    assert verb[:3] == ["minimoe", "generate", f"{out}/checkpoints/best"]
    code, generated, _ = call(capsys, *verb[1:], "--tokens", "5")
    assert code == 0 and generated.startswith("The ")
    next_command = re.search(r"^next: (.*)\n      (.*)$", text, flags=re.MULTILINE)
    assert next_command and call(capsys, *shlex.split(next_command[2])[1:])[0] == 0


def test_a_last_checkpoint_that_is_the_best_is_not_named(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text, _ = call(capsys, "train", "tiny-moe", *SHAPE, *sets("train.lr=1e-3"), "--data", "text.txt", "--steps", "6")
    assert code == 0 and "best:" not in text and "ended early" not in text and "dead experts" not in text


def test_the_last_steps_sample_is_kept_but_shown_only_as_the_end_of_the_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = sets("train.sample_every=2", "train.lr=1e-3")
    code, text, shown = call(capsys, "train", "tiny-moe", *SHAPE, *keys, "--data", "text.txt", "--steps", "4")
    assert code == 0 and text.count("A sample:") == 1
    assert "sample at step 2:" in shown and "sample at step 4:" not in shown
    assert [row["step"] for row in Run.open().samples()] == [2, 4]


def test_a_text_without_the_prompts_letters_gets_a_command_without_it(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "digits.txt").write_text("0123456789\n" * 100)
    code, text, _ = call(capsys, "train", "tiny-moe", *SHAPE, "--set", "data.tokenizer=char", "--data", "digits.txt", "--steps", "2")
    command = shlex.split(text.split("next: ")[1].splitlines()[0])
    assert code == 0 and call(capsys, *command[1:])[0] == 0


def test_dead_experts_are_named_with_remedies(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = sets("moe.router_bias=true", "moe.router_bias_std=20.0", "train.lr=1e-3", "moe.n_experts=8")
    code, text, _ = call(capsys, "train", "tiny-moe", *SHAPE, *keys, "--data", "text.txt", "--steps", "4")
    assert code == 0 and re.search(r"^dead experts: \d of 8 ", text, flags=re.MULTILINE) and "--set moe.aux_loss_coef=0.05" in text


def test_resume_takes_another_patience(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call(capsys, "train", "tiny-moe", *SHAPE, "--data", "text.txt", "--steps", "40", "--out", "run")
    code, _, err = call(capsys, "resume", "run")
    assert code == 2 and "ended early at step" in err and err.count("\n") == 1
    code, _, err = call(capsys, "resume", "run", "--patience", "0")
    assert code == 0 and Run.open("run").status()["step"] == 40
