"""Rows, chats and several sources whose tokens are kept in mapped files: the same as in memory, and read only once."""

import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minimoe.config import DataConfig, SourceConfig
from minimoe.data import corpus, listing
from minimoe.data.mixture import load_data

ROWS = [{"text": f"row {n} of many"} for n in range(200)]
CHATS = [{"prompt": f"{n}?", "completion": f"é{n}"} for n in range(200)]


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, DataConfig]:
    """Files that were written an hour ago."""
    for name, rows in {"rows.jsonl": ROWS, "chats.jsonl": [*CHATS, {"prompt": "", "completion": " "}]}.items():
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime - 3600))
    rows, chats = str(tmp_path / "rows.jsonl"), str(tmp_path / "chats.jsonl")
    parts = SourceConfig(source=rows, weight=0.3), SourceConfig(source=chats)
    return {
        "rows": DataConfig(source=rows), "chats": DataConfig(source=chats, tokenizer="char"), "several": DataConfig(sources=parts),
        "all": DataConfig(source=chats, loss_on="all"), "pattern": DataConfig(source=f"{tmp_path}/r*.jsonl:text"),
    }  # fmt: skip


def values(data: DataConfig) -> dict[str, Any]:
    """Everything that a corpus says, in memory."""
    found = load_data(data, seq_len=8)
    kept = {field.name: getattr(found, field.name) for field in fields(found) if field.name not in ("tokenizer", "train", "val")}
    listed = {name: np.asarray(value).tolist() for name, value in kept.items() if name.startswith(("train_", "val_")) and value is not None}
    splits = {"train": np.asarray(found.train).tolist(), "val": np.asarray(found.val).tolist()}
    return {**kept, **listed, **splits, "tokenizer": found.tokenizer.to_json()}


@pytest.mark.parametrize("kind", ["rows", "chats", "all", "pattern", "several"])
def test_kept_tokens_of_rows_are_those_of_memory_and_their_files_are_read_once(
    kind: str, sources: dict[str, DataConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINIMOE_CACHE_DIR", str(tmp_path / "cache"))
    in_memory = values(sources[kind])
    assert not list(tmp_path.glob("cache/data/*-*"))
    monkeypatch.setattr(corpus, "MOST_IN_MEMORY", 1000)
    assert values(sources[kind]) == in_memory
    assert len(list(tmp_path.glob("cache/data/*-*"))) == (2 if kind == "several" else 1)
    monkeypatch.setattr(listing, "read_documents", lambda *given: pytest.fail("the rows are read again"))
    assert values(sources[kind]) == in_memory


def test_what_a_row_is_read_as_is_part_of_what_is_noted(
    sources: dict[str, DataConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINIMOE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(corpus, "MOST_IN_MEMORY", 100)
    source = sources["all"].source
    assert load_data(DataConfig(source=source)).val_learned is not None
    assert load_data(DataConfig(source=source, loss_on="all")).val_learned is None
    column = load_data(DataConfig(source=source, text_key="prompt"))
    assert column.tokenizer.decode(np.asarray(column.train[:4])) == "0?\n\n"
