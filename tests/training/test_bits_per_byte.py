"""Bits per byte: of the very targets that were measured, whatever the tokenizer; none where there is no code for the text."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import made_tokenizers
import numpy as np
import pytest
from command_line import TINY, call
from msgspec.structs import replace
from tiny_runs import tiny, train, write_text

from minimoe.config import Config
from minimoe.data.batches import sample_windows, windows
from minimoe.data.tokenizer import Tokenizer
from minimoe.pretrained.loading import open_model
from minimoe.runs.listing import list_runs
from minimoe.study.compare import compare
from minimoe.study.evaluate import evaluate_run


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_text(tmp_path_factory.mktemp("text"))
    path.write_text("".join(f"Gr\u00f6\u00dfe {line}" for line in path.read_text().splitlines(keepends=True)), encoding="utf-8")
    return path


def tokenized(text: Path, tokenizer: str, folder: Path, **keys: Any) -> Config:
    """A configuration with one of the built-in tokenizers, or one of a kind that is made here."""
    name = tokenizer if tokenizer in ("byte", "char") else str(made_tokenizers.write(tokenizer, folder))
    config = tiny(text, **{"steps": 4, "eval_every": 2, "eval_batches": 1, **keys})
    return replace(config, data=replace(config.data, tokenizer=name), name=tokenizer)


SIZES: dict[str, Callable[[Tokenizer, int], int]] = {
    "byte": lambda tokenizer, id: 1,
    "char": lambda tokenizer, id: len(tokenizer.decode([id]).encode()),
    "byte-level": lambda tokenizer, id: len(tokenizer.token(id)),  # its names have one printable character for each byte
}


@pytest.mark.parametrize("tokenizer", SIZES)
def test_they_are_the_nats_of_the_targets_over_the_bytes_of_their_text(text: Path, tokenizer: str, tmp_path: Path) -> None:
    run = train(tokenized(text, tokenizer, tmp_path), tmp_path / "runs")
    val = run.corpus.val
    parts = {2: sample_windows(val, 16, 4, 1), 4: windows(val, 16, 4)}
    for step, batches in parts.items():
        targets = [targets[targets >= 0] for _, targets in batches]
        size = sum(SIZES[tokenizer](run.corpus.tokenizer, id) for part in targets for id in part.tolist())
        row = run.metrics[step - 1]
        assert row["val_bits_per_byte"] == pytest.approx(row["val_loss"] * sum(map(len, targets)) / math.log(2) / size)
    assert run.val_bits_per_byte == run.metrics[-1]["val_bits_per_byte"]
    assert all("val_bits_per_byte" not in row for row in run.metrics if "val_loss" not in row)
    listed = list_runs(tmp_path / "runs")[0]
    assert listed["val_bits_per_byte"] == run.val_bits_per_byte and listed["val_loss"] == run.val_loss
    measured = evaluate_run(open_model(run.path), None)
    assert measured["bits_per_byte"] == pytest.approx(run.val_bits_per_byte)
    assert f"{run.val_bits_per_byte:.4f} bits per byte" in measured["summary"]


def test_a_tokenizer_that_changes_the_text_has_none_and_says_why(text: Path, tmp_path: Path) -> None:
    run = train(tokenized(text, "wordpiece", tmp_path, steps=2), tmp_path / "runs")
    assert run.val_bits_per_byte is None and all("val_bits_per_byte" not in row for row in run.metrics)
    measured = evaluate_run(open_model(run.path), None)
    assert measured["bits_per_byte"] is None and "changes the text" in measured["no_bits_per_byte"]
    assert "no bits per byte" in measured["summary"]


def test_a_masked_model_has_none_and_says_why(text: Path, tmp_path: Path) -> None:
    run = train(tiny(text, model={"head": "mlm", "causal": False}, steps=2), tmp_path)
    assert run.val_bits_per_byte is None
    assert "both sides" in evaluate_run(open_model(run.path), None)["no_bits_per_byte"]


def test_models_with_different_tokenizers_are_compared_by_bits_per_byte(text: Path, tmp_path: Path) -> None:
    runs = [train(tokenized(text, kind, tmp_path, steps=steps), tmp_path / "runs") for kind, steps in (("byte", 6), ("byte-level", 4))]
    found = compare([str(run.path) for run in runs])
    assert found.by_bytes and any("bits per byte of the text" in note for note in found.notes)
    assert found.best is not None and found.best.bits_per_byte is not None
    assert found.best.bits_per_byte.mean == min(run.val_bits_per_byte or math.inf for run in runs)
    assert found.best.name != min(found.rows, key=lambda row: row.val_loss.mean).name, "a token of several bytes costs more nats"
    assert found.to_dict()["by"] == "bits per byte"
    bold = [line for line in found.markdown().splitlines() if "**" in line]
    assert len(bold) == 1 and bold[0].startswith("| bits per byte |")


def test_models_of_one_tokenizer_are_compared_by_their_loss(text: Path, tmp_path: Path) -> None:
    runs = [train(tokenized(text, "byte", tmp_path, steps=steps), tmp_path / "runs") for steps in (2, 4)]
    found = compare([str(run.path) for run in runs])
    assert not found.by_bytes and found.to_dict()["by"] == "validation loss"


def test_a_tokenizer_without_a_count_leaves_nothing_to_compare_by(text: Path, tmp_path: Path) -> None:
    runs = [train(tokenized(text, kind, tmp_path, steps=2), tmp_path / "runs") for kind in ("byte", "wordpiece")]
    found = compare([str(run.path) for run in runs])
    assert not found.by_bytes and any("do not compare" in note for note in found.notes)


def test_the_end_shows_them(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, _ = call(capsys, "train", *TINY, "--data", str(text), "--steps", "2")
    row = json.loads((tmp_path / "runs/tiny-moe-001/metrics.jsonl").read_text().splitlines()[-1])
    assert code == 0 and f"validation loss {row['val_loss']:.4f}   {row['val_bits_per_byte']:.4f} bits per byte" in out
    assert np.isclose(row["val_bits_per_byte"], row["val_loss"] / math.log(2))
