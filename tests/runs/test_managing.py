"""Runs are removed, renamed and tagged: whole or not at all, never while they are trained, and `last` follows."""

import json
import shutil
from pathlib import Path

import pytest
from command_line import contents
from killed_calls import Killed, die_at

from minimoe.config import Config
from minimoe.errors import CheckpointError, UserError
from minimoe.runs.finding import find_folder, run_names
from minimoe.runs.managing import FILES, remove, rename
from minimoe.runs.references import references
from minimoe.runs.run import Run
from minimoe.runs.tags import change_tags, read_tags


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "runs"


def make(root: Path, *names: str) -> list[Path]:
    """Finished runs without checkpoints, each created a second after the one before."""
    folders = []
    for second, name in enumerate(names):
        run = Run.create(Config(name=name), out=root / name, root=root, extra={"created": f"2026-01-01T00:00:{second:02d}Z"})
        run.metrics_file.append([{"step": 1, "loss": 1.0}])
        run.write_status("finished", step=1)
        run.release()
        folders.append(run.path)
    return folders


def last(root: Path) -> str | None:
    return (root / "last").read_text() if (root / "last").exists() else None


# ---- removing ----------------------------------------------------------------------------------------------------------------------


def test_last_names_the_newest_run_that_is_left(root: Path) -> None:
    a, b, c = make(root, "a", "z", "c")
    remove(a, root)
    assert last(root) == "c\n" and not a.exists()
    remove(c, root)
    assert last(root) == "z\n", "the newest, not the last of the alphabet"
    remove(b, root)
    assert last(root) is None and list(root.iterdir()) == []


def test_a_run_elsewhere_is_removed_and_last_stays(root: Path, tmp_path: Path) -> None:
    make(root, "a")
    (other,) = make(tmp_path / "elsewhere", "x")
    remove(other, root)
    assert last(root) == "a\n" and not other.exists()


def test_a_run_that_is_being_trained_is_neither_removed_nor_renamed(root: Path) -> None:
    (folder,) = make(root, "a")
    with Run(folder).claimed():
        before = contents(folder)
        with pytest.raises(CheckpointError, match=r"a: is being trained, by this process .*, so it is not removed: wait for"):
            remove(folder, root)
        with pytest.raises(CheckpointError, match=r"a: is being trained, by this process .*, so it is not renamed"):
            rename(folder, "b", root)
        assert contents(folder) == before
    remove(folder, root)


def test_what_minimoe_did_not_write_is_not_removed(root: Path) -> None:
    a, _ = make(root, "a", "b")
    (a / "notes.txt").write_text("mine")
    (a / "src").mkdir()
    with pytest.raises(CheckpointError, match=r"a: is not removed: it holds notes\.txt and 1 more, which minimoe did not write: move it"):
        remove(a, root)
    (a / "notes.txt").unlink()
    (a / "src").rmdir()
    shutil.copytree(root / "b", a / "b")
    with pytest.raises(CheckpointError, match=r"a: is not removed: it holds the run b, which would be lost too"):
        remove(a, root)
    shutil.rmtree(a / "b")
    (a / "metrics.damaged-2.jsonl").write_text("")
    (a / "tags.txt").write_text("x\n")
    remove(a, root)
    assert run_names(root) == ["b"]


def test_a_damaged_run_can_be_removed_and_renamed(root: Path) -> None:
    (folder,) = make(root, "a")
    (folder / "config.toml").unlink()
    (folder / "env.json").write_bytes(b"\xff")
    assert rename(find_folder("a", root), "b", root) == root / "b"
    remove(find_folder("b", root), root)
    assert run_names(root) == []


@pytest.mark.parametrize("what", ["checkpoint", "link", "project", "file", "nothing"])
def test_what_is_no_run_is_refused(root: Path, tmp_path: Path, what: str) -> None:
    (folder,) = make(root, "a")
    Run(folder).save(1, model={}, optimizer={}, state={})
    (root / "link").symlink_to(folder)
    (root / "project").mkdir()
    (root / "project" / "config.toml").write_text("name = 'mine'\n")
    (root / "file").write_text("")
    name, message = {
        "checkpoint": ("a/checkpoints/step-000001", "is a part of the run"),
        "link": ("link", "is a link to"),
        "project": ("project", "too little of a run to be known as one"),
        "file": ("file", "no such run"),
        "nothing": ("b", r"no such run"),
    }[what]
    with pytest.raises(CheckpointError, match=message) as caught:
        find_folder(name, root)
    assert "\n" not in str(caught.value)


def test_a_kill_while_a_run_is_removed_leaves_it_whole_or_gone(root: Path, tmp_path: Path) -> None:
    make(root, "a", "b")
    Run(root / "b").save(1, model={}, optimizer={}, state={})
    whole = contents(root / "b")
    for moment in range(200):
        copy = Path(shutil.copytree(root, tmp_path / str(moment)))
        finished = True
        with pytest.MonkeyPatch.context() as monkeypatch:
            die_at(monkeypatch, moment)
            try:
                remove(copy / "b", copy)
            except Killed:
                finished = False
        names = run_names(copy)
        assert names == ["a"] or (names == ["a", "b"] and whole.items() <= contents(copy / "b").items()), moment
        Run.open("a", copy)
        if "b" in names:
            remove(copy / "b", copy)
        remove(copy / "a", copy)
        left = [path.name for path in copy.iterdir() if not path.name.startswith(".last.tmp-")]  # which goes when it is an hour old
        assert left == [], f"killed at call {moment}: the next removal clears what the dead one left"
        if finished:
            break
    assert moment > 9


# ---- renaming ----------------------------------------------------------------------------------------------------------------------


def test_a_renamed_run_is_the_same_and_last_follows(root: Path) -> None:
    a, b = make(root, "a", "b")
    before = contents(b)
    assert rename(b, "lr=1e-3", root) == root / "lr=1e-3"
    assert contents(root / "lr=1e-3") == before and not b.exists() and last(root) == "lr=1e-3\n"
    rename(a, f"{root}/first", root)
    assert last(root) == "lr=1e-3\n" and run_names(root) == ["first", "lr=1e-3"]


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "x/y", "../b", "a b", "last", "best", "a\n", "-x"])
def test_a_name_that_cannot_be_is_refused(root: Path, name: str) -> None:
    (a,) = make(root, "a")
    with pytest.raises(UserError, match="is no name of a run: give letters, digits"):
        rename(a, name, root)
    assert run_names(root) == ["a"]


def test_a_name_that_is_taken_is_refused(root: Path) -> None:
    a, _ = make(root, "a", "b")
    (root / "empty").mkdir()
    (root / "dangling").symlink_to(root / "nowhere")
    for name in ("a", "b", "empty", "dangling"):
        with pytest.raises(UserError, match=f"{name}: exists already: choose another name"):
            rename(a, name, root)


def test_what_names_a_run_from_outside_is_found(root: Path) -> None:
    make(root, "tiny", "tiny-001", "c")
    tokenizer = "/x/runs/tiny-001/checkpoints/step-000001/tokenizer.json"
    (root / "c" / "config.toml").write_text(f'name = "tiny-001"\n[data]\ntokenizer = "{tokenizer}"\n')
    (root / "c" / "env.json").write_text(json.dumps({"weights": "upcycled from runs/tiny-001"}))
    (root / "compare-001.json").write_text(json.dumps({"rows": [{"runs": ["runs/tiny-001"]}]}))
    (root / "damaged.json").write_text("{")
    (root / "tiny" / "env.json").write_bytes(b"\xff")
    found = [f"{root}/c/config.toml: data.tokenizer", f"{root}/c/env.json: weights", f"{root}/compare-001.json: rows.runs"]
    assert references(root / "tiny-001", root) == found
    assert references(root / "tiny", root) == []


# ---- tags --------------------------------------------------------------------------------------------------------------------------


def test_tags_are_lines_of_a_file(root: Path) -> None:
    (a,) = make(root, "a")
    assert read_tags(a) == []
    assert change_tags(a, add=["b", "a", "b"]) == ["a", "b"] and (a / "tags.txt").read_text() == "a\nb\n"
    assert change_tags(a, add=["c"], remove=["a", "never"]) == ["b", "c"]
    assert change_tags(a, remove=["b", "c"]) == [] and not (a / "tags.txt").exists()
    assert "tags.txt" in FILES


@pytest.mark.parametrize("tag", ["", "a b", "-x", "x" * 41, "a\nb", "a/b", "\x1b[31m"])
def test_what_is_no_tag_is_refused_and_nothing_written(root: Path, tag: str) -> None:
    (a,) = make(root, "a")
    with pytest.raises(UserError, match=r"is no tag: a tag is one word of up to 40 letters"):
        change_tags(a, add=["good", tag])
    assert not (a / "tags.txt").exists()


@pytest.mark.parametrize("data", [b"\xff\xfe", b"good\n\x1b[31m\ngood\n", b"x" * 2_000_000, None])
def test_a_damaged_file_of_tags_never_hides_the_run(root: Path, data: bytes | None) -> None:
    (a,) = make(root, "a")
    if data is None:
        (a / "tags.txt").mkdir()
    else:
        (a / "tags.txt").write_bytes(data)
    assert read_tags(a) == (["good"] if data and data.startswith(b"good") else [])
