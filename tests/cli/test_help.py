"""Help pages on terminals of any width."""

from collections.abc import Iterator

import click
import pytest
from command_line import call

from minimoe.cli.commands import cli


def paths(command: click.Command, *before: str) -> Iterator[tuple[str, ...]]:
    yield before
    for name, below in command.commands.items() if isinstance(command, click.Group) else ():
        yield from paths(below, *before, name)


def page(path: tuple[str, ...], width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setenv("COLUMNS", str(width))
    code, out, err = call(capsys, *path, "--help")
    assert (code, err) == (0, "")
    return out


@pytest.mark.parametrize("path", list(paths(cli)), ids=" ".join)
def test_no_line_is_too_long_and_no_word_is_divided(
    path: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = set(page(path, 160, monkeypatch, capsys).split())
    for width in (60, 80):
        text = page(path, width, monkeypatch, capsys)
        assert max(map(len, text.splitlines())) <= width
        assert set(text.split()) == words


@pytest.mark.parametrize("path", [path for path in paths(cli) if path], ids=" ".join)
def test_the_line_about_a_command_is_never_cut_off(
    path: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command: click.Command = cli
    for name in path:
        assert isinstance(command, click.Group)
        command = command.commands[name]
    first = (command.help or "").partition("\n")[0]
    assert first and first in " ".join(page(path[:-1], 60, monkeypatch, capsys).split())
