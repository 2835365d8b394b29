"""Commands that messages suggest work as they are printed: quoted for a shell, and right for the installation at hand."""

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import ROOT, TINY, call
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import write_text

from minimoe import hints
from minimoe.hints import command, install
from minimoe.training.listener import Listener

words = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))


@given(st.lists(words, max_size=4))
def test_a_shell_reads_the_words_that_were_meant(given_words: list[str]) -> None:
    assert shlex.split(command(*given_words)) == ["minimoe", *given_words]


def test_a_folder_that_looks_like_an_option_is_none() -> None:
    assert command("resume", Path("-x"), "--steps", 4) == "minimoe resume ./-x --steps 4"
    assert command("resume", Path("~/my run")) == "minimoe resume '~/my run'"


def test_a_clone_without_installation_is_suggested_as_it_was_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["my clone/cli.py", "train"])
    assert command("resume") == "python 'my clone/cli.py' resume"


ORIGINS: list[tuple[dict[str, Any], str]] = [
    ({}, "pip install 'minimoe[hf]'"),
    ({"url": "file://{tmp}/a%20b", "dir_info": {}}, "pip install '{tmp}/a b[hf]'"),
    ({"url": "file://{tmp}/gone", "dir_info": {}}, "pip install 'minimoe[hf]'"),
    ({"url": "https://host/minimoe", "vcs_info": {"vcs": "git"}}, "pip install 'minimoe[hf] @ git+https://host/minimoe'"),
    ({"url": "file:///w/minimoe.whl", "archive_info": {}}, "pip install 'minimoe[hf] @ file:///w/minimoe.whl'"),
]


@pytest.mark.parametrize(("origin", "expected"), ORIGINS)
def test_an_extra_is_added_to_the_installation_at_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, origin: dict[str, Any], expected: str
) -> None:
    (tmp_path / "a b").mkdir()
    monkeypatch.setattr(hints, "CLONE", tmp_path)  # as in site-packages: no pyproject.toml beside the package
    monkeypatch.setattr(hints, "_origin", lambda: {k: v.format(tmp=tmp_path) if k == "url" else v for k, v in origin.items()})
    assert install("hf") == expected.format(tmp=tmp_path)


def test_a_clone_installs_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert install("hf") == "pip install -e '.[hf]'"
    monkeypatch.chdir(tmp_path)
    assert install("hf") == f"pip install -e {shlex.quote(f'{ROOT}[hf]')}"


def test_no_message_names_an_installation_of_its_own() -> None:
    sources = [*(ROOT / "minimoe").rglob("*.py"), *(ROOT / "backends").rglob("*.py")]
    assert [path.name for path in sources if re.search(r"^[^`\n]*pip install '?minimoe\[", path.read_text(), re.MULTILINE)] == []


# ---- every place that prints a command ---------------------------------------------------------------------------------------------------

NAMES = ["two words", "it's", "~tilde", "$HOME;ls", "-x"]


def read_by_a_shell(line: str) -> list[str]:
    """Return the words that a shell gives to `minimoe` for a line."""
    script = f"minimoe() {{ printf '%s\\0' \"$@\"; }}\n{line}"
    return subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout.split("\0")[:-1]


def commands_in(text: str) -> list[str]:
    """Return the commands that a text names: after `next:` and on the line below it, in brackets, before what they do."""
    return re.findall(r"(?:next: |^ {6}|\(|saved: )(minimoe .+?)(?= continues|\)?$)", text, re.MULTILINE)


@pytest.mark.parametrize("name", NAMES)
def test_the_commands_that_a_run_prints_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    write_text(tmp_path)
    monkeypatch.chdir(tmp_path)
    train = ["train", *TINY, "--data", "text.txt", "--steps", "2", f"--out={name}"]
    generate, inspect = map(read_by_a_shell, commands_in(call(capsys, *train)[1]))
    assert (generate[0], inspect[0]) == ("generate", "inspect")
    for words in ([*generate, "--tokens", "3"], inspect):
        assert call(capsys, *words)[0] == 0, words
    (resume,) = map(read_by_a_shell, commands_in(call(capsys, *train)[2]))
    assert call(capsys, *resume, "--steps", "3", "--quiet")[:2] == (0, f"{name}\n")


def test_a_tokenizer_that_lacks_the_prompt_is_not_given_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ab.txt").write_text("ab\n" * 2000)
    monkeypatch.chdir(tmp_path)
    out = call(capsys, "train", *TINY, "--data", "ab.txt", "--steps", "2", "--set", "data.tokenizer=char")[1]
    generate = commands_in(out)[0]
    assert generate == "minimoe generate runs/tiny-moe-001" and call(capsys, *read_by_a_shell(generate), "--tokens", "3")[0] == 0


def test_an_interrupted_run_names_the_command_that_continues_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Stops(Listener):
        def logged(self, rows: list[dict[str, Any]]) -> None:
            os.kill(os.getpid(), signal.SIGINT)

    write_text(tmp_path)
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as stopping:
        stopping.setattr("minimoe.cli.training.listener_for", lambda quiet: Stops())
        code, _, err = call(capsys, "train", *TINY, "--data", "text.txt", "--steps", "8", "--out", "it's here")
    assert code == 130, err
    (resume,) = commands_in(err)
    assert resume == """minimoe resume 'it'"'"'s here'"""
    assert call(capsys, *read_by_a_shell(resume), "--quiet")[:2] == (0, "it's here\n")
