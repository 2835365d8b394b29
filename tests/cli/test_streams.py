"""The standard streams as terminals, pipes and services give them: line ends, closed streams, full disks, narrow encodings."""

import io
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import TINY, call, environment, minimoe, one_line
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import write_text

from minimoe.cli import main
from minimoe.cli.commands import cli
from minimoe.cli.streams import CONTROL_CHARACTERS, write_all

SHOWN = "\ufffd"


@pytest.fixture(autouse=True)
def on_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let commands in processes of their own compile nothing."""
    monkeypatch.setenv("MINIMOE_BACKEND", "numpy")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text whose lines end as on Windows, and a run."""
    folder = tmp_path_factory.mktemp("streams")
    text = write_text(folder).read_text()
    (folder / "text.txt").write_bytes(text.replace("\n", "\r\n").encode())
    done = minimoe(folder, "train", *TINY, "--data", "text.txt", "--steps", "4", "--set", "data.tokenizer=char")
    assert done.returncode == 0, done.stderr
    return folder


# ---- line ends ---------------------------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def on_a_terminal(pieces: list[str], monkeypatch: pytest.MonkeyPatch) -> str:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal := Terminal())
        write_all(pieces)
    return terminal.getvalue()


@pytest.mark.parametrize(
    "pieces, shown",
    [
        (["one\r\ntwo\r\n"], "one\ntwo\n"),
        (["one\r", "\ntwo\r", "\n"], "one\ntwo\n"),
        (["one\r", "", "\n"], "one\n"),
        (["one\rtwo"], f"one{SHOWN}two"),
        (["one\r", "two"], f"one{SHOWN}two"),
        (["one", "\r"], f"one{SHOWN}"),
        (["\r\r\n", "\n\r"], f"{SHOWN}\n\n{SHOWN}"),
        (["a\tb\x1b[31mc\x07\x9b"], f"a\tb{SHOWN}[31mc{SHOWN}{SHOWN}"),
        ([], ""),
    ],
)
def test_a_terminal_gets_line_ends_and_no_control_characters(pieces: list[str], shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert on_a_terminal(pieces, monkeypatch) == shown


@given(text=st.text("ab\r\n\x1b\t", max_size=12), data=st.data())
def test_how_a_text_is_cut_does_not_change_what_is_shown(text: str, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    pieces = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    with pytest.MonkeyPatch.context() as patch:
        whole = text.replace("\r\n", "\n").translate(CONTROL_CHARACTERS)
        assert on_a_terminal(pieces, patch) == on_a_terminal([text], patch) == whole


def test_a_file_gets_every_character_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", file := io.StringIO(newline=""))
    write_all(["a\r", "\nb\x1b\r"])
    assert file.getvalue() == "a\r\nb\x1b\r"


def test_a_prompt_with_windows_line_ends_has_line_ends_on_a_terminal(folder: Path) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "minimoe", "generate", "--prompt", "a token\r\nthe", "--tokens", "1"]
    done = subprocess.Popen(command, cwd=folder, env=environment(), stdout=theirs, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 1000):
            shown += part
    except OSError:  # the other end is closed
        pass
    assert done.wait(60) == 0 and shown.startswith(b"a token\r\nthe")
    assert done.communicate()[1] == b""


# ---- closed streams ----------------------------------------------------------------------------------------------------------------------

VERBS = {
    "version": ["--version"], "help": ["train", "--help"], "train": ["train", *TINY, "--data", "text.txt", "--steps", "2"],
    "train, quiet": ["train", *TINY, "--data", "text.txt", "--steps", "2", "--quiet"], "dry run": ["train", "--dry-run", *TINY],
    "resume": ["resume", "COPY", "--steps", "6"], "generate": ["generate", "--tokens", "3"], "eval": ["eval"],
    "inspect": ["inspect", "COPY"], "inspect, JSON": ["inspect", "COPY", "--json"], "convert": ["convert", "COPY", "EXPORTED"],
    "runs": ["runs"], "config": ["config", "tiny-moe"], "backends": ["backends"],
    "check": ["backends", "check", "numpy", "--kernel", "relu"], "compare": ["compare", "--help"], "bench": ["bench", "--help"],
}  # fmt: skip


@pytest.mark.parametrize("closed", [["stdout"], ["stderr"], ["stdin", "stdout", "stderr"]], ids=", ".join)
@pytest.mark.parametrize("arguments", VERBS.values(), ids=VERBS)
def test_every_verb_works_with_closed_streams(
    arguments: list[str], closed: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(folder)
    shutil.copytree("runs/tiny-moe-001", tmp_path / "COPY")
    arguments = [str(tmp_path / part) if part in ("COPY", "EXPORTED") else part for part in arguments]
    for name in closed:
        monkeypatch.setattr(sys, name, None)
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0


@pytest.mark.parametrize("closing", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_training_without_streams_finishes(closing: str, tmp_path: Path) -> None:
    write_text(tmp_path)
    out = tmp_path / "run"
    arguments = ["train", *TINY, "--data", "text.txt", "--steps", "2", "--out", str(out)]
    script = f'"$@" {closing}'
    done = subprocess.run(
        ["bash", "-c", script, "bash", sys.executable, "-m", "minimoe", *arguments], cwd=tmp_path, env=environment(), capture_output=True,
        text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert '"state": "finished"' in (out / "status.json").read_text() and len((out / "metrics.jsonl").read_text().splitlines()) == 2
    assert "Traceback" not in done.stdout + done.stderr


# ---- what cannot be written --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["config", "tiny-moe"], ["backends", "--json"], ["--help"], ["generate", "--tokens", "3"]])
def test_a_full_output_is_one_line(arguments: list[str], folder: Path) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "minimoe", *arguments]
        done = subprocess.run(command, cwd=folder, env=environment(), stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 2 and one_line(done.stderr) == "input or output: No space left on device"


def test_where_no_error_can_be_shown_the_exit_code_says_it(folder: Path) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "minimoe", "generate", "--prompt", ""]
        done = subprocess.run(command, cwd=folder, env=environment(), stdout=full, stderr=full, timeout=60)
    assert done.returncode == 2


def test_a_reader_that_went_away_is_no_message(folder: Path) -> None:
    command = f"{sys.executable} -m minimoe backends | head -c 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=folder, env=environment(), capture_output=True, text=True, timeout=60)
    assert done.stderr == "" and done.stdout.endswith(("\n1\n", "1\n"))


@pytest.mark.parametrize("arguments", [["inspect", "runs/tiny-moe-001"], ["backends"], ["runs"]])
def test_an_output_without_box_characters_gets_question_marks(arguments: list[str], folder: Path) -> None:
    command = [sys.executable, "-m", "minimoe", *arguments]
    env = {**environment(PYTHONIOENCODING="ascii"), "PYTHONUTF8": "0"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, timeout=60)
    assert done.returncode == 0 and done.stderr == b"" and done.stdout.isascii() and len(done.stdout) > 100


# ---- the end of a file is no interrupt ---------------------------------------------------------------------------------------------------


def test_the_end_of_a_file_is_a_fault_and_no_interrupt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def end(*_: Any, **__: Any) -> None:
        raise EOFError("Ran out of input")

    monkeypatch.setattr(cli.commands["runs"], "callback", end)
    code, out, err = call(capsys, "runs")
    assert (code, out) == (70, "") and "EOFError: Ran out of input" in one_line(err) and "interrupted" not in err


def test_an_interrupt_is_one(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.commands["runs"], "callback", interrupt)
    assert call(capsys, "runs") == (130, "", "minimoe: interrupted\n")
