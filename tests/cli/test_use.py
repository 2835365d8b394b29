"""`minimoe generate` with prompts from elsewhere, in a conversation and in its loop, and `minimoe fill`."""

import io
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import call, minimoe, one_line, sets
from terminal import Terminal
from tiny_runs import write_text

SHAPE = sets(
    "model.d_model=16", "model.n_layers=1", "model.n_heads=2", "model.d_hidden=16", "model.max_seq_len=64", "train.batch_size=4",
    "train.seq_len=64", "train.backend=numpy",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a language model and a masked one, both barely trained."""
    folder = tmp_path_factory.mktemp("use")
    write_text(folder)
    for preset, name, more in (("tiny-dense", "lm", sets("model.n_kv_heads=1", "model.head_dim=8")), ("bert-tiny", "bert", [])):
        done = minimoe(folder, "train", preset, *SHAPE, *more, "--data", "text.txt", "--steps", "4", "--quiet", "--out", name)
        assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MINIMOE_BACKEND", "numpy")
    return folder


def piped(text: str | bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    data = text.encode() if isinstance(text, str) else text
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))


# ---- prompts -------------------------------------------------------------------------------------------------------------------------


def test_a_prompt_comes_from_standard_input_or_a_file(here: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    typed = call(capsys, "generate", "lm", "--prompt", "a token", "--tokens", "5")
    piped("a token\n", monkeypatch)
    assert call(capsys, "generate", "lm", "--prompt", "-", "--tokens", "5") == typed
    (tmp_path / "p.txt").write_text("a token\n")
    assert call(capsys, "generate", "lm", "--prompt-file", str(tmp_path / "p.txt"), "--tokens", "5") == typed
    piped("one", monkeypatch)
    code, out, _ = call(capsys, "generate", "lm", "--prompt", "-", "--prompt-file", str(tmp_path / "p.txt"), "--tokens", "1")
    assert code == 0 and "== prompt 1 of 2\none" in out and "== prompt 2 of 2\na token" in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["generate", "lm", "--prompt", "-", "--prompt", "-"], "can be read once"),
        (["generate", "lm", "--prompt", "-"], "standard input: empty"),
        (["generate", "lm", "--chat"], "standard input: empty: each line"),
        (["generate", "lm", "--prompt-file", "none.txt"], "none.txt: cannot be read: No such file"),
        (["generate", "lm", "--interactive", "--prompt", "a"], "--interactive reads prompts itself"),
        (["generate", "lm", "--system", "a"], "give --chat as well"),
        (["generate", "bert"], "head = 'mlm'; fill"),
        (["fill"], "fill takes a run"),
        (["fill", "lm", "a [MASK]"], "head = 'lm'"),
        (["fill", "bert", "no blank"], "has no [MASK]"),
        (["fill", "bert", "-"], "standard input: empty"),
        (["fill", "nowhere", "a [MASK]"], "no such run"),
        (["fill", "bert", "a [MASK]", "--top", "0"], "Invalid value for '--top'"),
    ],
)
def test_what_cannot_be_used_is_one_line(arguments: list[str], says: str, here: Path, monkeypatch: Any, capsys: Any) -> None:
    piped("", monkeypatch)
    code, out, err = call(capsys, *arguments)
    assert (code, out) == (2, "") and says in err.splitlines()[-1]
    if arguments[-1] != "--chat":  # which says first that there is no template
        assert one_line(err)


# ---- conversations -------------------------------------------------------------------------------------------------------------------


def test_without_a_terminal_each_line_is_a_prompt_whatever_it_begins_with(here: Path, monkeypatch: Any, capsys: Any) -> None:
    piped("a token\n\n/quit\n", monkeypatch)
    code, out, err = call(capsys, "generate", "lm", "--interactive", "--tokens", "3", "--temperature", "0")
    alone = [call(capsys, "generate", "lm", "--prompt", text, "--tokens", "3", "--temperature", "0")[1] for text in ("a token", "/quit")]
    assert (code, out, err) == (0, "".join(alone), "")


def test_messages_of_a_chat_are_lines_or_prompts_and_the_form_is_said(here: Path, monkeypatch: Any, capsys: Any) -> None:
    piped("one\ntwo\n", monkeypatch)
    code, lines, err = call(capsys, "generate", "lm", "--chat", "--tokens", "4")
    assert code == 0 and "no chat template: messages are written in the plain form" in err
    code, headed, _ = call(capsys, "generate", "lm", "--chat", "--tokens", "4", "--prompt", "one", "--prompt", "two")
    first, second = (part.partition("\n\n")[2].removesuffix("\n\n") for part in headed.split("== prompt ")[1:])
    assert code == 0 and lines == f"{first}\n{second}\n"


def test_a_line_that_is_not_text_is_named_by_its_number(here: Path, monkeypatch: Any, capsys: Any) -> None:
    piped(b"one\n\xff\n", monkeypatch)
    code, out, err = call(capsys, "generate", "lm", "--interactive", "--tokens", "1")
    assert code == 2 and out.startswith("one") and "standard input, line 2: not UTF-8" in one_line(err)


def test_the_loop_on_a_terminal(folder: Path) -> None:
    """A prompt, an unknown command, Ctrl-C in an answer and at the prompt, an end by Ctrl-D."""
    command = [sys.executable, "-m", "minimoe", "generate", "lm", "--interactive", "--tokens", "1000000", "--stop", "STOP"]
    with Terminal(command, 80, 40, folder, MINIMOE_BACKEND="numpy") as terminal:
        assert "each line is continued; /help lists the commands" in " ".join(terminal.read(">>>").split())
        terminal.type("/nothing\n")
        terminal.read("no command /nothing")
        terminal.type("/help\n")
        terminal.read("/reset   begin anew")
        terminal.type("a token\n")
        answer = b""
        while len(answer) < 100:  # of 1,000,000 tokens, which do not pause
            answer += os.read(terminal.ours, 1000)
        terminal.stream.feed(answer)
        terminal.type("\x03")
        terminal.read("(stopped)")
        assert terminal.process.poll() is None
        terminal.type("\x03")
        terminal.read("/quit or Ctrl-D ends")
        terminal.type("/reset\n")
        terminal.read("begun anew")
        terminal.type("\x04")
        assert terminal.process.wait(30) == 0


def test_the_answers_alone_go_into_a_file(here: Path, monkeypatch: Any, capsys: Any) -> None:
    class Keyboard(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Keyboard("a \\\ntoken\n//\n/quit\nnever read\n"))
    code, out, err = call(capsys, "generate", "lm", "--interactive", "--tokens", "1")
    assert code == 0 and out.startswith("a \ntoken") and "\n/" in out and "never" not in out
    assert err.count(">>> ") == 3 and err.count("... ") == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# ---- blanks --------------------------------------------------------------------------------------------------------------------------


def test_fill_shows_a_table_for_each_blank_and_the_text(here: Path, monkeypatch: Any, capsys: Any) -> None:
    code, out, err = call(capsys, "fill", "bert", "the [MASK]at[MASK]", "--top", "3")
    assert (code, err) == (0, "") and "blank 1 of 2" in out and "blank 2 of 2" in out and out.count("%") == 6
    piped("the [MASK]at[MASK]\n", monkeypatch)
    code, line, _ = call(capsys, "fill", "bert", "-", "--top", "3", "--json")
    found = json.loads(line)
    assert code == 0 and out.endswith(f"{found['text']}\n") and [len(mask) for mask in found["masks"]] == [3, 3]
    assert all(f"{guess['token']!r}" in out for mask in found["masks"] for guess in mask)
