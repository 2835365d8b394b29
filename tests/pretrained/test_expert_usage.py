"""How often each expert of a folder was used: noted in the user's cache, added up, and forgotten if the note cannot be true."""

from pathlib import Path

import numpy as np
import pytest

from minimoe.pretrained.expert_usage import note, recall


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINIMOE_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "model.safetensors").write_bytes(b"weights")
    return tmp_path / "m"


def rows(*layers: list[int]) -> list[np.ndarray]:
    return [np.array(layer, np.int64) for layer in layers]


def test_rows_are_added_up(folder: Path) -> None:
    assert recall(folder, (2, 3)) is None
    note(folder, rows([1, 0, 2], [0, 0, 3]))
    note(folder, rows([1, 1, 1], [4, 0, 0]))
    found = recall(folder, (2, 3))
    assert found is not None and [layer.tolist() for layer in found] == [[2, 1, 3], [4, 0, 3]]


@pytest.mark.parametrize("text", [
    "[" * 100_000, "[[1, 2, 3], [" + "9" * 5000 + ", 0, 0]]", "[[1, 2, 1e999], [0, 0, 0]]", "[1, [0, 0, 0]]", "[[1, 2], [0, 0]]",
    "[[1, 2, 3]]",
    "[[1, 2, -1], [0, 0, 0]]", "[[1, 2, 9223372036854775807], [0, 0, 0]]", "{}", "", "\xff", '[["\\ud800", 0, 0], [0, 0, 0]]',
])  # fmt: skip
def test_a_note_that_cannot_be_true_is_begun_anew(folder: Path, text: str) -> None:
    note(folder, rows([1, 0, 2], [0, 0, 3]))
    (kept,) = (folder.parent / "cache" / "touched").iterdir()
    kept.write_text(text, encoding="latin-1")
    assert recall(folder, (2, 3)) is None
    note(folder, rows([1, 0, 2], [0, 0, 3]))
    found = recall(folder, (2, 3))
    assert found is not None and [layer.tolist() for layer in found] == [[1, 0, 2], [0, 0, 3]]
