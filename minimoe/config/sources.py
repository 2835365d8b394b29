"""Where the tables of a configuration come from: presets, TOML files, and what these extend.

A path in a file is relative to the file's own folder: `extends`, `data.source`, `data.tokenizer`. What is not there is looked for in
the working folder.
"""

import glob
import os.path
import re
import reprlib
from collections.abc import Callable, Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from minimoe.config import data_names
from minimoe.errors import ConfigError, nearest
from minimoe.untrusted import MOST_TOML, Malformed, decode_text, parse_toml, read_bounded

LISTED = "minimoe config lists the presets"
MOST_FILES = 20  # that extend each other
BUILT_IN = {"source": data_names.BUILT_IN, "tokenizer": ("byte", "char")}  # not paths
BACKSLASH = re.compile(r'"([^"\n]*\\[^"\n]*)"')
Say = Callable[[str], None]


def preset_names() -> list[str]:
    """Return the names of the presets that minimoe ships."""
    names = (entry.name for entry in resources.files("minimoe.config.presets").iterdir())
    return sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml"))


def preset_text(name: str) -> str:
    """Return a preset as commented TOML."""
    if name not in preset_names():
        raise ConfigError(f"no preset {name!r}{nearest(name, preset_names(), LISTED)}")
    return (resources.files("minimoe.config.presets") / f"{name}.toml").read_text(encoding="utf-8")


def preset_about(name: str) -> str:
    """Return what a preset is, in a few words: its first line is `# NAME: WORDS.`"""
    first = preset_text(name).partition("\n")[0]
    return first.partition(": ")[2].removesuffix(".")


def read_tables(source: str, say: Say) -> dict[str, Any]:
    """Return the raw tables of a preset or file, merged into those that it extends; `say` is called where a path means two files."""
    found: Path | str = Path(source) if _is_path(source) or os.path.isfile(source) else source
    if isinstance(found, str) and found not in preset_names():
        raise ConfigError(f"no preset and no file {source!r}{nearest(source, preset_names(), LISTED)}")
    layers: list[dict[str, Any]] = []
    chain: list[Path | str] = []
    asked = ""  # which file wants this one, for messages
    while True:
        if any(_same(found, before) for before in chain):
            raise ConfigError(f"extends forms a circle: {' -> '.join(map(str, (*chain, found)))}")
        if len(chain) == MOST_FILES:
            raise ConfigError(f"more than {MOST_FILES} files extend each other: {' -> '.join((*map(str, chain[:3]), '...', str(found)))}")
        chain.append(found)
        tables = _tables_of(found, asked)
        parent = tables.pop("extends", None)
        if isinstance(found, Path):
            _find_data(tables, found, say)
        layers.append(tables)
        if parent is None:
            break
        if not isinstance(parent, str):
            raise ConfigError(f"{found}: extends: expected a preset or file, got {reprlib.repr(parent)}")
        asked = f"{found}: extends = {parent!r}: "
        found = _extended(parent, found, say)
    merged = layers.pop()
    for tables in reversed(layers):
        merged = merge(merged, tables)
    return merged


def merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with `over` merged into it, table by table; a value such as `moe = "none"` replaces a table."""
    merged = dict(base)
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = merge(merged[key], value)
            if key == "data":
                drop_replaced(merged[key], value)
        else:
            merged[key] = value
    return merged


def drop_replaced(data: dict[str, Any], given: Iterable[str]) -> None:
    """Remove from [data], in place, what the keys that were given last replace: `source` and `sources` exclude each other."""
    for key, other in (("source", "sources"), ("sources", "source")):
        if key in given and other not in given:
            data.pop(other, None)


# ---- one preset or file ----------------------------------------------------------------------------------------------------------


def _tables_of(found: Path | str, asked: str) -> dict[str, Any]:
    text = preset_text(found) if isinstance(found, str) else _read_text(found, asked)
    try:
        return parse_toml(text)
    except Malformed as error:
        raise ConfigError(f"{found}: {error}{_backslash_hint(text, str(error))}") from None


def _read_text(path: Path, asked: str) -> str:
    try:
        return decode_text(read_bounded(path, MOST_TOML))
    except FileNotFoundError:
        raise ConfigError(f"no configuration file {path}") from None
    except Malformed as error:
        raise ConfigError(f"{path}: {error}") from None
    except ValueError:  # open() raises it for a path with a NUL
        raise ConfigError(f"no configuration file {str(path)!r}") from None
    except OSError as error:
        raise ConfigError(f"{asked or f'{path}: '}cannot be read: {error.strerror}") from None


def _backslash_hint(text: str, problem: str) -> str:
    """Return what to write instead, if the line at fault has a backslash between double quotes, as Windows' paths have."""
    place = re.search(r"at line (\d+)", problem)
    line = text.split("\n")[int(place[1]) - 1] if place else ""
    quoted = BACKSLASH.search(line)
    return f": a backslash begins an escape between double quotes: write '{quoted[1]}'" if quoted else ""


# ---- paths in a file -------------------------------------------------------------------------------------------------------------


def _is_path(source: str) -> bool:
    return source.endswith(".toml") or "/" in source


def _same(one: Path | str, other: Path | str) -> bool:
    """Return True if these are the same preset, or the same file under any path."""
    if isinstance(one, str) or isinstance(other, str):
        return one == other and type(one) is type(other)
    return one.resolve() == other.resolve()


def _extended(parent: str, asker: Path | str, say: Say) -> Path | str:
    """Return the preset or file that `asker` extends. Raises `ConfigError` if there is none."""
    if parent in preset_names() and not os.path.isfile(parent):
        return parent
    if isinstance(asker, Path):
        found = _beside(parent, asker, f"{asker}: extends = {parent!r}", say)
        if found is not None and not found.is_file() and not found.is_dir():
            raise ConfigError(f"{asker}: extends {parent!r}, which is not a file")  # a device or a pipe may never end
        if found is not None and (_is_path(parent) or found.is_file()):
            return found
    if _is_path(parent):
        raise ConfigError(f"{asker}: extends = {parent!r}: no such file beside it or in the working folder")
    raise ConfigError(f"{asker}: extends = {parent!r}: no preset and no file of that name{nearest(parent, preset_names(), LISTED)}")


def _find_data(tables: dict[str, Any], asker: Path, say: Say) -> None:
    """Complete, in place, the paths of the data that a file names, where they exist."""
    data = tables.get("data")
    if not isinstance(data, dict):
        return
    sources = data.get("sources")
    several = sources if isinstance(sources, list) else []
    for table, key in ((data, "source"), (data, "tokenizer"), *((part, "source") for part in several)):
        name = table.get(key) if isinstance(table, dict) else None
        if isinstance(name, str) and name not in BUILT_IN[key]:
            what = f"{asker}: data.{key} = {name!r}"
            table[key] = _source_beside(name, asker, what, say) if key == "source" else str(_beside(name, asker, what, say) or name)


def _source_beside(name: str, asker: Path, what: str, say: Say) -> str:
    """Return a source whose path is completed, with the column that follows it; a pattern, where it matches a file."""
    path, column = (name, None) if _beside(name, asker, what, lambda text: None) else data_names.split_column(name)
    if not data_names.is_pattern(path, asker.parent):
        found = str(_beside(path, asker, what, say) or path)
    else:
        beside, here = str(asker.parent / path), glob.glob(path, recursive=True)
        found = beside if glob.glob(beside, recursive=True) else path
        if found == beside and here and os.path.abspath(found) != os.path.abspath(path):
            say(f"{what} means the files beside it, {beside}, not those in the working folder")
    return found if column is None else f"{found}:{column}"


def _beside(name: str, asker: Path, what: str, say: Say) -> Path | None:
    """Return the file or folder of this name beside `asker` or, if it has none, in the working folder; None if there is none at all."""
    beside, here = asker.parent / name, Path(name)
    try:
        if not beside.exists():
            return here if here.exists() else None
        if here.exists() and not here.samefile(beside):
            say(f"{what} means {beside}, beside it, not the file of that name in the working folder")
    except (OSError, ValueError):  # not a path: it has a NUL, or is longer than the system allows
        return None
    return beside
