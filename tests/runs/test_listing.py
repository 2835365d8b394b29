"""The list of runs is filtered and sorted, whatever its rows hold; damaged folders are in it."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minimoe.cli import managing
from minimoe.config import Config
from minimoe.figures import file_size
from minimoe.runs.listing import SORTS, STATES, list_runs, select_runs, sort_runs
from minimoe.runs.run import Run
from minimoe.runs.sizes import folder_bytes, optimizer_bytes
from minimoe.runs.tags import change_tags

NAMES = st.text("abz-01", min_size=1, max_size=4)
LOSSES = st.none() | st.floats(-10, 10)
ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "name": NAMES, "state": st.sampled_from(STATES), "step": st.integers(0, 9), "loss": LOSSES, "val_loss": LOSSES,
            "parameters": st.none() | st.integers(0, 99), "created": st.sampled_from(["", "2026-01-01", "2026-02-01"]),
            "bytes": st.integers(0, 99), "tags": st.lists(st.sampled_from("xyz"), unique=True),
        }
    ),
    max_size=8,
    unique_by=lambda row: row["name"],
)


@given(ROWS, st.sampled_from(sorted(SORTS)), st.booleans())
def test_sorting_keeps_every_row_and_puts_those_without_the_figure_last(rows: list[dict[str, Any]], by: str, reverse: bool) -> None:
    found = sort_runs(rows, by, reverse)
    assert sorted(row["name"] for row in found) == sorted(row["name"] for row in rows)
    values = [row[SORTS[by]] for row in found]
    known = [value for value in values if value not in (None, "")]
    assert values[: len(known)] == known == sorted(known, reverse=reverse)
    assert sort_runs(list(reversed(rows)), by, reverse) == found, "the order of the folder does not matter"


PATTERNS = {
    "*": lambda name: True,
    "a*": lambda name: name[0] == "a",
    "?": lambda name: len(name) == 1,
    "[ab]*": lambda name: name[0] in "ab",
}


@given(ROWS, st.sets(st.sampled_from(STATES), max_size=2), st.sets(st.sampled_from("xyz"), max_size=2), st.sampled_from([None, *PATTERNS]))
def test_a_filter_keeps_exactly_the_rows_that_fit(
    rows: list[dict[str, Any]], states: set[str], tags: set[str], pattern: str | None
) -> None:
    found = select_runs(rows, states, tags, pattern)
    for row in rows:
        wanted = not states or row["state"] in states
        wanted = wanted and tags <= set(row["tags"]) and (pattern is None or PATTERNS[pattern](row["name"]))
        assert (row in found) == wanted
    assert select_runs(found, states, tags, pattern) == found


def test_the_command_line_knows_every_order_and_every_state() -> None:
    assert (set(managing.SORTS), managing.STATES) == (set(SORTS), STATES)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("a", "b"):
        run = Run.create(Config(name=name), out=tmp_path / "runs" / name, root=tmp_path / "runs")
        run.save(1, model={}, optimizer={}, state={})
        run.metrics_file.append([{"step": 1, "loss": 1.0}])
        run.write_status("finished", step=1)
        run.release()
    return tmp_path / "runs"


def test_sizes_and_tags_are_listed(root: Path) -> None:
    change_tags(root / "b", add=["baseline"])
    a, b = list_runs(root)
    assert (a["tags"], b["tags"]) == ([], ["baseline"])
    assert a["bytes"] == sum(path.stat().st_size for path in (root / "a").rglob("*") if path.is_file()) == folder_bytes(root / "a")
    assert a["optimizer_bytes"] == (root / "a/checkpoints/step-000001/optimizer.safetensors").stat().st_size


@pytest.mark.parametrize("damage", ["config.toml", "env.json", "metrics.jsonl", "status.json", "tags.txt", "checkpoints"])
@pytest.mark.parametrize("how", ["gone", "garbage", "folder", "loop"])
def test_a_damaged_run_is_listed_and_hides_no_other(root: Path, damage: str, how: str) -> None:
    path = root / "a" / damage
    if path.is_dir():
        path.rename(root / "aside")
    path.unlink(missing_ok=True)
    if how == "garbage":
        path.write_bytes(b"\xff\x00{")
    elif how == "folder":
        path.mkdir()
    elif how == "loop":
        path.symlink_to(path)
    rows = list_runs(root)
    assert sorted(row["name"] for row in rows) == ["a", "b"]
    assert all(isinstance(row["bytes"], int) and isinstance(row["tags"], list) for row in rows)
    json.dumps(rows)
    for by in SORTS:
        sort_runs(rows, by)
    assert optimizer_bytes(root / "a") >= 0


def test_a_run_that_is_being_removed_is_not_listed(root: Path) -> None:
    (root / "a").rename(root / ".a.tmp-0123abcd")
    assert [row["name"] for row in list_runs(root)] == ["b"]


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (99_940, "99.9 kB"), (99_960, "100 kB"), (999_400, "999 kB"), (999_600, "1.0 MB"),
     (123_456_789, "123 MB"), (5_800_000_000, "5.8 GB"), (12e12, "12000 GB")],
)  # fmt: skip
def test_a_size_has_two_or_three_digits(count: int, text: str) -> None:
    assert file_size(int(count)) == text
