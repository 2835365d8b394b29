"""Finds what names a run from outside its folder: files of other runs (a text, a tokenizer, initial weights) and saved comparisons."""

import re
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from minimoe.runs.finding import run_names
from minimoe.runs.records import read_regular
from minimoe.untrusted import Malformed, parse_json_object


def references(run: Path, root: Path) -> list[str]:
    """Return where a run's name is in files of other runs under `root`: `runs/b/config.toml: data.tokenizer`. Damaged ones have none."""
    word = re.compile(rf"(?<![\w.-]){re.escape(run.name)}(?![\w.-])")
    others = [root / name for name in run_names(root) if name != run.name]
    files = [other / name for other in others for name in ("config.toml", "env.json")]
    files += sorted(root.glob("*.json"))
    found = []
    for file in files:
        keys = [key for key, text in _texts(_read(file)) if key != "name" and word.search(text)]
        found += [f"{file}: {keys[0]}"] if keys else []
    return found


def _read(file: Path) -> Any:
    with suppress(OSError, Malformed, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError):
        data = read_regular(file)
        return tomllib.loads(data.decode()) if file.suffix == ".toml" else parse_json_object(data)
    return {}


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield each text in a file's tables, with its dotted key."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _texts(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner, key)
