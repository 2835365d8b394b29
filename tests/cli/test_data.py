"""`minimoe data` and `minimoe cache`: what is kept of large texts, and all else outside of runs, is shown, checked and removed."""

import json
import os
import pty
import subprocess
import sys
import tempfile
from io import StringIO
from pathlib import Path

import pytest
from command_line import TINY, call, environment, one_line
from rich.console import Console

from minimoe import caches
from minimoe.data import corpus
from minimoe.data.store import stored_folders
from minimoe.study.cached import cached
from minimoe.study.tables import cache_table, tokens_table

LINES = "the expert sorts what the router sends\n" * 100


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory with a text that is kept; the folder of the tokens is returned."""
    monkeypatch.setenv("MINIMOE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # the cache of users without a home is there
    monkeypatch.setattr(caches, "COMPILED", ())  # the kernels of whoever runs the tests stay
    monkeypatch.setattr(corpus, "MOST_IN_MEMORY", 1000)
    monkeypatch.chdir(tmp_path)
    write(Path("text.txt"), LINES)
    return tmp_path / "cache" / "data"


def write(path: Path, text: str) -> None:
    """Write a text an hour ago."""
    path.write_text(text, encoding="utf-8")
    os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns - 3600 * 10**9))


def names(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [row["name"] for row in json.loads(call(capsys, "data", "list", "--json")[1])]


def test_a_text_is_prepared_listed_and_removed(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "data", "prepare", "text.txt")
    (name,) = names(capsys)
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        f"text.txt: 3.9 kB of text, SHA-256 {name[:12]}", f"3,900 tokens (byte): 3.9 kB in {kept / name}",
    ]  # fmt: skip
    assert call(capsys, "data", "prepare", "text.txt", "--tokenizer", "char", "--json")[0] == 0
    assert len(names(capsys)) == 2
    code, out, _ = call(capsys, "data", "list")
    assert code == 0
    assert [line.split("│")[1].strip() for line in out.splitlines() if line.startswith(name[:12])] == ["byte", "char"]
    code, out, _ = call(capsys, "data", "rm", name)
    assert code == 0 and out.endswith(" kB freed\n") and len(names(capsys)) == 1
    assert call(capsys, "data", "rm", names(capsys)[0][:4])[0] == 0
    assert call(capsys, "data", "list")[1] == "no tokens are kept: minimoe data prepare SRC makes those of a large text\n"


def test_a_short_text_is_not_kept(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(Path("short.txt"), LINES[:900])
    code, out, _ = call(capsys, "data", "prepare", "short.txt")
    assert code == 0 and out.splitlines()[1] == "900 tokens (byte): made at each start, not kept"
    assert not kept.exists()


@pytest.mark.parametrize("arguments, says", [
    (("rm",), "give the names of what to remove"), (("rm", "0abc", "--all"), "give the names of what to remove"),
    (("rm", "0abc"), "no tokens are called '0abc'"), (("prepare", "nothing.txt"), "no such file or folder"),
    (("prepare", "text.txt", "--set", "train.lr=1"), "only keys of [data] matter here"),
    (("prepare", "text.txt", "--tokenizer", "none.json"), "no such file"),
])  # fmt: skip
def test_a_mistake_is_one_line(arguments: tuple[str, ...], says: str, kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call(capsys, "data", "prepare", "text.txt")
    code, out, err = call(capsys, "data", *arguments)
    assert (code, out) == (2, "") and says in one_line(err)
    assert len(names(capsys)) == 1


def test_verify_finds_a_text_that_changed_behind_its_time(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call(capsys, "data", "prepare", "text.txt")
    before = os.stat("text.txt")
    Path("text.txt").write_text(LINES.swapcase())
    os.utime("text.txt", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert call(capsys, "data", "prepare", "text.txt")[2] == "" and len(names(capsys)) == 1
    code, _, err = call(capsys, "data", "prepare", "text.txt", "--verify")
    assert code == 0 and "text.txt: its content has changed, though its size and modification time have not" in one_line(err)
    assert len(names(capsys)) == 2
    assert call(capsys, "data", "prepare", "text.txt", "--verify")[2] == ""


def test_verify_finds_a_byte_of_the_tokens_that_changed(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call(capsys, "data", "prepare", "text.txt")
    place = kept / names(capsys)[0]
    whole = (place / "tokens").read_bytes()
    (place / "tokens").write_bytes(b"X" + whole[1:])
    assert call(capsys, "data", "prepare", "text.txt")[2] == ""
    code, _, err = call(capsys, "data", "prepare", "text.txt", "--verify")
    assert code == 0 and one_line(err) == f"{place}: tokens is damaged: its SHA-256 differs: its tokens are made again"
    assert (place / "tokens").read_bytes() == whole


def test_damaged_tokens_are_listed_and_removed(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call(capsys, "data", "prepare", "text.txt")
    (name,) = names(capsys)
    (kept / name / "header.json").write_text("{")
    out = call(capsys, "data", "list")[1]
    assert "damaged: header.json is damaged" in " ".join(out.replace("│", " ").split())
    assert call(capsys, "data", "rm", "--all")[0] == 0 and not kept.exists()


def test_training_says_what_it_keeps_unless_it_is_quiet(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train", *TINY, "--data", "text.txt", "--steps", "1"]
    assert "text.txt: 3,900 tokens (byte) made in 0 s, kept in " in call(capsys, *command)[2]
    assert "tokens (byte) made" not in call(capsys, *command)[2]
    call(capsys, "data", "rm", "--all")
    assert call(capsys, *command, "--quiet")[2] == "" and len(names(capsys)) == 1


SLOW = """
import sys
from minimoe.cli import main
from minimoe.data import corpus, pipes, progress, sources, text
corpus.MOST_IN_MEMORY, progress.PROGRESS_AFTER, progress.PAUSE, text.CHUNK = 1000, 0.0, 0.0, 1000
main(sys.argv[1:])
"""


@pytest.mark.parametrize("terminal", [False, True])
def test_the_progress_is_shown_on_standard_error(terminal: bool, kept: Path) -> None:
    command = [sys.executable, "-c", SLOW, "data", "prepare", "text.txt"]
    above, below = pty.openpty()
    done = subprocess.run(command, env=environment(), stdout=subprocess.PIPE, stderr=below if terminal else subprocess.PIPE, timeout=60)
    os.close(below)
    err = os.read(above, 100_000).decode() if terminal else done.stderr.decode()
    os.close(above)
    assert done.returncode == 0 and b"3,900 tokens" in done.stdout
    assert "reading text.txt: " in err and " so far, " in err and "tokenising text.txt: 25% of 3.9 kB, " in err
    if terminal:
        assert "\n" not in err and err.endswith("\r") and all(len(line) <= 79 for line in err.split("\r"))
        assert err.split("\r")[-2].strip() == ""
    else:
        assert "\r" not in err


def test_the_cache_is_shown_and_cleared_of_what_is_minimoes(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call(capsys, "data", "prepare", "text.txt")
    cache = kept.parent
    for name in ("minimoe_numba_0a1b/loss.nbi", "touched/1.json", "jax/step", "combine-sm_90a-0a1b.cubin", "combine-sm_90a-0a1b.json"):
        (cache / name).parent.mkdir(exist_ok=True)
        (cache / name).write_bytes(bytes(1000))
    (cache / "letters").mkdir()  # where the cache is in a folder that is shared
    (cache / "letters" / "to-ada.txt").write_text("Dear Ada")
    out = call(capsys, "cache")[1]
    kinds = {(one["what"], one["files"]) for one in json.loads(call(capsys, "cache", "--json")[1])}
    assert kinds == {
        ("tokens of large texts", 3), ("compiled kernels", 1), ("compiled kernels", 2), ("which experts were used", 1),
        ("compiled steps of JAX", 1),
    }  # fmt: skip
    assert call(capsys, "cache", "clear", "--dry-run")[1] == out
    code, out, err = call(capsys, "cache", "clear")
    assert (code, err) == (0, "") and out.endswith(" kB freed\n") and float(out.split()[0]) > 8.9
    assert [path.name for path in cache.iterdir()] == ["letters"]
    assert call(capsys, "cache")[1] == "nothing is kept outside of runs\n"


def test_both_tables_fit_eighty_columns_and_keep_names_and_paths_whole(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(Path("a-text-with-a-rather-long-name-in-a-folder-whose-path-is-even-longer.txt"), LINES)
    call(capsys, "data", "prepare", "a-text-with-a-rather-long-name-in-a-folder-whose-path-is-even-longer.txt")
    (name,) = names(capsys)
    for table, parts in ((tokens_table(stored_folders()), (name, "3,900")), (cache_table(cached()), ("tokens of", "kB"))):
        file = StringIO()
        Console(width=80, file=file).print(table)
        lines = file.getvalue().splitlines()
        assert all(len(line) <= 80 for line in lines) and "\u2026" not in file.getvalue()
        assert all(any(part in line for line in lines) for part in parts)
