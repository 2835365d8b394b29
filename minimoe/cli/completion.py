"""Completion in bash, zsh and fish, by click: what may stand in the place of an argument or of an option's value.

A key is pressed and the answer awaited, so each function imports only what it needs.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable
from typing import Any

import click
from click.shell_completion import BashComplete, CompletionItem, ZshComplete, add_completion_class

Completer = Callable[[click.Context, click.Parameter, str], list[CompletionItem[str]]]

# ---- what may stand somewhere ------------------------------------------------------------------------------------------------------------


def presets() -> Iterable[tuple[str, str]]:
    from minimoe.config.sources import preset_about, preset_names

    return [(name, preset_about(name)) for name in preset_names()]


def configurations() -> Iterable[tuple[str, str]]:
    """Return the presets, and the TOML files of the working folder."""
    from pathlib import Path

    return [*presets(), *((path.name, "") for path in sorted(Path().glob("*.toml")))]


def runs() -> Iterable[tuple[str, str]]:
    from pathlib import Path

    from minimoe.runs.finding import run_names

    return [(name, "") for name in run_names(Path("runs"))]


def backends() -> Iterable[tuple[str, str]]:
    from minimoe.reference.extensions import backend_names

    return [(name, "") for name in backend_names()]


def sources() -> Iterable[tuple[str, str]]:
    from minimoe.config.sources import BUILT_IN

    return [(name, "") for name in BUILT_IN["source"]]


def settings(written: str) -> Iterable[tuple[str, str]]:
    """Return `train.lr=` and all other keys or, once a key is written, `train.schedule=cosine` and its other values."""
    from minimoe.config.keys import choices, full_keys, table_below
    from minimoe.config.sources import BUILT_IN
    from minimoe.reference import optimizers, routers
    from minimoe.reference.extensions import backend_names

    key, equals, _ = written.partition("=")
    if not equals:
        return [(f"{key}=", "") for key, field in full_keys().items() if table_below(field) is None]
    names: dict[str, Callable[[], Iterable[str]]] = {
        "moe.router": routers.names, "train.optimizer": optimizers.names, "train.backend": lambda: ["auto", *backend_names()],
        "data.source": lambda: BUILT_IN["source"], "data.tokenizer": lambda: BUILT_IN["tokenizer"],
    }  # fmt: skip
    values = names[key]() if key in names else choices(key) if key in full_keys() else []
    return [(f"{key}={value}", "") for value in values]


# ---- for click -----------------------------------------------------------------------------------------------------------------------


def completing(*kinds: Callable[[], Iterable[tuple[str, str]]], files: bool = True) -> Completer:
    """Return the completer of names of these kinds; where none begins as what is written does, the shell completes files."""

    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
        found = _matching((item for kind in kinds for item in kind()), incomplete)
        return found or ([CompletionItem(incomplete, type="file")] if files else [])

    return complete


def complete_setting(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
    return _matching(settings(incomplete), incomplete)


def _matching(items: Iterable[tuple[str, str]], incomplete: str) -> list[CompletionItem[str]]:
    return [CompletionItem(name, help=about or None) for name, about in items if name.startswith(incomplete)]


# ---- for the shells ------------------------------------------------------------------------------------------------------------------


class Bash(BashComplete):
    """bash takes `train.lr=1` for three words, and completes the last one: they are joined for click, and parted again for bash.

    No space follows a value that ends in "=", and a name is quoted where bash needs it.
    """

    source_template = BashComplete.source_template.replace(
        "COMPREPLY+=($value)", 'COMPREPLY+=("$value")\n            if [[ $value == *= ]]; then compopt -o nospace; fi'
    )
    before = ""  # what bash takes for earlier words

    def get_completion_args(self) -> tuple[list[str], str]:
        args, last = super().get_completion_args()
        words: list[str] = []
        for word in [*args, last]:
            if words and (word == "=" or (word and words[-1].endswith("="))):
                words[-1] += word
            else:
                words.append(word)
        joined = words.pop()
        if "=" not in last.removeprefix("="):  # else bash was told not to break words there
            value = joined.partition("=")[2] if joined.startswith("-") else joined
            self.before = value[: value.rfind("=") + 1]
        return words, joined

    def format_completion(self, item: CompletionItem[Any]) -> str:
        value = str(item.value).removeprefix(self.before)
        return f"{item.type},{shlex.quote(value) if item.type == 'plain' and value else value}"


class Zsh(ZshComplete):
    """No space follows a value that ends in "="."""

    source_template = ZshComplete.source_template.replace(
        '    if [ -n "$completions" ]; then',
        """    local -a unfinished
    unfinished=(${(M)completions:#*=})
    completions=(${completions:#*=})
    if [ -n "$unfinished" ]; then
        compadd -U -V unsorted -S '' -a unfinished
    fi

    if [ -n "$completions" ]; then""",
    )


add_completion_class(Bash)
add_completion_class(Zsh)
