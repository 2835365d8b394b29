"""A text with characters that its tokenizer drops: training, its plan and an evaluation say how many."""

import json
from pathlib import Path
from typing import Any

import made_tokenizers
import pytest
from command_line import TINY, call, sets
from made_tokenizers import PLAIN
from msgspec.structs import replace
from tiny_runs import tiny, train

from minimoe.config import DataConfig
from minimoe.data.corpus import whole_corpus
from minimoe.training.listener import Listener


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A text with two characters that the tokenizer beside it has no token for: é 40 times, ü 20 times."""
    made_tokenizers.write("metaspace", tmp_path)
    path = tmp_path / "text.txt"
    path.write_text(f"{PLAIN} é é ü " * 20, encoding="utf-8")
    return path


def note(text: Path) -> str:
    return f"tokenizer.json drops 60 characters of {text} that it has no token for: 'é', 'ü'"


def test_a_corpus_notes_them_once_for_the_whole_text(text: Path) -> None:
    corpus = whole_corpus(DataConfig(source=str(text), tokenizer=str(text.parent / "tokenizer.json")))
    assert corpus.notes == (note(text),)
    assert whole_corpus(DataConfig(source=str(text), tokenizer="char")).notes == ()


def test_training_says_it(text: Path) -> None:
    class Hearing(Listener):
        heard: list[str] = []

        def warned(self, text: str) -> None:
            self.heard.append(text)

    data = DataConfig(source=str(text), tokenizer=str(text.parent / "tokenizer.json"))
    train(replace(tiny(text, dense=True, steps=1), data=data), text.parent / "runs", listener=Hearing())
    assert Hearing.heard.count(f"warning: {note(text)}") == 1


def test_the_plan_of_a_run_and_an_evaluation_say_it(text: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(text.parent)
    how = ["--data", str(text), *TINY, *sets("data.tokenizer=tokenizer.json")]
    code, out, err = call(capsys, "train", *how, "--dry-run")
    assert code == 0 and f"minimoe: {note(text)}\n" in err
    for quiet in ([], ["--quiet"]):
        code, out, err = call(capsys, "train", *how, "--steps", "1", *quiet)
        assert code == 0 and " ".join(err.split()).count(note(text)) == 1
    for more in ([], ["--data", str(text)]):
        code, out, err = call(capsys, "eval", "--json", *more)
        assert (code, err) == (0, f"minimoe: {note(text)}\n")
        assert json.loads(out)["source"] == str(text) and "notes" not in json.loads(out)
