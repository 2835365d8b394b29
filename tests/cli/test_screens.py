"""What a user sees, through a terminal emulator: the display of training at four widths, resized, stopped, in the background.

`screens/` holds each scene of tests/scenes.py as text. To write them again: `REWRITE_SCREENS=1 python -m pytest tests/cli/test_screens.py`
"""

import io
import os
import re
import signal
import sys
import time
from pathlib import Path

import pyte
import pytest
from command_line import KEYS, ROOT, sets
from made_up_tables import tables
from rich.console import Console
from scenes import SCENES
from terminal import Terminal
from tiny_runs import write_text

from minimoe.cli import verifying
from minimoe.cli.display import PlainProgress, listener
from minimoe.cli.live import LiveProgress
from minimoe.study.verify import Check

SCREENS = Path(__file__).parent / "screens"
SCRIPT = [sys.executable, str(ROOT / "tests" / "scenes.py")]
WIDTHS = (60, 80, 120, 160)
TINY = sets(*(key for key in KEYS if not key.startswith("moe.n_experts")), "moe.n_experts=8")


@pytest.mark.parametrize("width", WIDTHS)
def test_each_scene_looks_as_it_did(width: int) -> None:
    shown = []
    with Terminal([*SCRIPT, *SCENES], width) as terminal:
        for name in SCENES:
            shown.append(f"== {name}\n{drawn(terminal, name)}")
            terminal.screen.reset()
            terminal.type("\n")
    compare_with_kept("training", width, "\n".join(shown))


def drawn(terminal: Terminal, name: str) -> str:
    """Return the screen when a scene is complete."""
    return terminal.read(lambda: terminal.screen.title == name)


def compare_with_kept(name: str, width: int, text: str) -> None:
    kept = SCREENS / f"{name}-{width}.txt"
    if os.environ.get("REWRITE_SCREENS"):
        kept.parent.mkdir(exist_ok=True)
        kept.write_text(text, encoding="utf-8")
    assert text == kept.read_text(encoding="utf-8")


@pytest.mark.parametrize("width", WIDTHS)
def test_each_table_looks_as_it_did_and_divides_no_word(width: int) -> None:
    shown = []
    for name, table in tables().items():
        screen = pyte.Screen(width, 100)
        on_screen = Console(file=io.StringIO(), width=width, force_terminal=True, _environ={"TERM": "xterm-256color"})
        on_screen.print(table)
        pyte.Stream(screen).feed(on_screen.file.getvalue().replace("\n", "\r\n"))  # type: ignore[attr-defined]
        shown.append(f"== {name}\n" + "\n".join(line.rstrip() for line in screen.display).rstrip() + "\n")
        wide = Console(file=io.StringIO(), width=1000)
        wide.print(table)
        words = set(wide.file.getvalue().replace(":", "").split())  # type: ignore[attr-defined]
        assert set(shown[-1].split("\n", 1)[1].replace(":", "").split()) <= words, name
    compare_with_kept("tables", width, "\n".join(shown))


def scene(name: str, width: int) -> str:
    """Return a scene as it was kept."""
    return dict(part.split("\n", 1) for part in (SCREENS / f"training-{width}.txt").read_text().split("== ")[1:])[name].rstrip() + "\n"


def test_a_resized_terminal_shows_the_display_as_if_it_had_always_been_of_that_size() -> None:
    with Terminal([*SCRIPT, "1x4"], 120) as terminal:
        drawn(terminal, "1x4")
        for width, rows in ((60, 24), (160, 40), (80, 12), (80, 24)):
            terminal.resize(width, rows)
            figures = scene("1x4", width).split("step ", 1)[1]
            terminal.read(lambda figures=figures: terminal.text.split("step ", 1)[-1] == figures)
            assert terminal.text.count("step ") == 1 and terminal.text.count("tiny-moe:") == 1


def test_ctrl_z_leaves_a_usable_terminal_and_fg_draws_the_display_whole() -> None:
    shell = ["bash", "--norc", "--noprofile", "-i"]
    with Terminal(shell, 80, PS1="$ ", SCRIPT=" ".join(SCRIPT)) as terminal:
        terminal.read("$")
        terminal.type("$SCRIPT resumed\n")
        drawn(terminal, "resumed")
        assert terminal.screen.cursor.hidden
        terminal.type("\x1a")
        terminal.read("Stopped")
        assert not terminal.screen.cursor.hidden
        stopped = terminal.text.splitlines()
        assert stopped[-1] == "$" and "Stopped" in stopped[-2] and "dropped" in "".join(stopped[-4:-2])
        terminal.type("bg; sleep 0.6; clear; echo in the background\n")
        assert terminal.read("in the background\n$").count("step ") == 0
        terminal.type("clear; fg\n")
        display = scene("resumed", 80).split("\nstep ", 1)[1]
        terminal.read(lambda: terminal.text.endswith(display))
        assert terminal.text.count("step ") == 1 and terminal.screen.cursor.hidden


def test_a_process_that_was_stopped_from_outside_draws_the_display_whole() -> None:
    with Terminal([*SCRIPT, "1x4"], 80) as terminal:
        drawn(terminal, "1x4")
        os.kill(terminal.process.pid, signal.SIGCONT)  # nothing was stopped
        time.sleep(0.5)
        assert terminal.read("step ") == scene("1x4", 80)
        os.kill(terminal.process.pid, signal.SIGSTOP)
        terminal.screen.reset()  # what stands there now is someone else's
        time.sleep(1.2)
        os.kill(terminal.process.pid, signal.SIGCONT)
        assert terminal.read("dropped") == "step " + scene("1x4", 80).split("step ", 1)[1]


def test_without_colours_none_is_sent() -> None:
    colour = re.compile(rb"\x1b\[[0-9;]*3[0-8][0-9;]*m")
    for variables, coloured in (({}, True), ({"NO_COLOR": "1"}, False)):
        with Terminal([*SCRIPT, "1x4"], 80, **variables) as terminal:
            assert "▇" in drawn(terminal, "1x4")
            assert bool(colour.search(terminal.output)) is coloured


# ---- a run ---------------------------------------------------------------------------------------------------------------------------


def command(folder: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "minimoe", *arguments]


def test_a_run_ends_with_its_display_whole_and_a_resumed_one_keeps_its_curve(tmp_path: Path) -> None:
    write_text(tmp_path)
    train = command(tmp_path, "train", *TINY, "--data", "text.txt", "--steps", "6", "--out", "run")
    with Terminal(train, 80, cwd=tmp_path, rows=40) as terminal:
        text = terminal.read("next: ")
        assert text.count("step ") == 1 and "step 6/6 " in text and "elapsed" in text and not terminal.screen.cursor.hidden
        assert re.search(r"peak memory [0-9.]+ [MG]iB$", text, re.M)
    with Terminal(command(tmp_path, "resume", "run", "--steps", "8"), 80, cwd=tmp_path, rows=40) as terminal:
        text = terminal.read("next: ")
        assert re.findall(r"^step +[0-9/]+", text, re.M) == ["step 8/8"] and "\ncontinuing at step 6\n" in text
        assert len(re.search(r"^loss  ([▁▂▃▄▅▆▇█]+)$", text, re.M)[1]) == 8  # type: ignore[index]


def test_a_terminal_that_draws_nothing_again_gets_plain_lines_that_are_broken_between_words(tmp_path: Path) -> None:
    write_text(tmp_path)
    train = command(tmp_path, "train", *TINY, "--data", "text.txt", "--steps", "4", "--out", "run")
    with Terminal(train, 60, cwd=tmp_path, rows=60, TERM="dumb") as terminal:
        text = terminal.read("next: ")
    assert b"\x1b" not in terminal.output
    lines = text.splitlines()
    last = next(number for number, line in enumerate(lines) if re.match(r"step +4/4  loss [0-9.]+  val [0-9.]+ ", line))
    figures = " ".join(line.strip() for line in lines[last : last + 3])
    assert re.search(r" elapsed 0:\d\d +peak memory [0-9.]+ [MG]iB +expert load [0-9.]+% to [0-9.]+%", figures)


def test_where_the_display_cannot_be_drawn_lines_are_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stderr:
        encoding = "utf-8"

        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Stderr())
    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(listener(quiet=False), LiveProgress)
    monkeypatch.setattr(Stderr, "encoding", "iso-8859-1")  # it has no bars
    assert isinstance(listener(quiet=False), PlainProgress)
    monkeypatch.setattr(Stderr, "encoding", "utf-8")
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(listener(quiet=False), PlainProgress)


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_what_verify_says_fits_the_terminal(columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = verifying.shown(Check("checkpoints/step-000300", "problem", "a text of many words " * 9), 24).splitlines()
    assert max(map(len, lines)) <= min(columns, 80) and len(lines) > 3
    monkeypatch.setattr(verifying, "redraws", lambda stream: True)
    waiting = verifying.Waiting()
    waiting.pause = 0.0
    waiting.tell("model-00001-of-00002.safetensors " * 9)
    assert len(capsys.readouterr().err.strip("\r")) < min(columns, 81)
