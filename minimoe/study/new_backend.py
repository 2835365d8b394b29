"""What `minimoe backends new` writes: a small distribution with a backend that works as it is, to be turned into a port step by step.

`ports/KIND/` has the files of each kind, and `ports/common/` those that all kinds share. They are a working distribution of the name
`placeholder`, which is replaced by the name of the new backend.
"""

from __future__ import annotations

import keyword
import re
from importlib import resources
from importlib.resources.abc import Traversable
from importlib.util import find_spec
from pathlib import Path

from minimoe.backend import available
from minimoe.errors import UserError

KINDS = {
    "mutable": "a library whose arrays can be written; NumPy stands in for it",
    "immutable": "a library whose arrays cannot be written; a small one over NumPy stands in for it",
    "kernels": "your kernels over the arrays of a backend that exists; one kernel in Numba to start from",
    "device": "a device with a compiler of its own; the processor, NumPy and Numba stand in for them",
}
"""The kinds of port, and what each starts from."""

MARK = "placeholder"


def new_backend(name: str, kind: str, out: Path | None) -> Path:
    """Write the distribution of a new backend to a folder, by default `minimoe-NAME`, and return the folder.

    Raises `UserError` for a name that cannot be that of a backend or is taken, and for a folder that exists.
    """
    check_name(name)
    folder = Path(f"minimoe-{name}") if out is None else out
    if folder.exists() or folder.is_symlink():
        raise UserError(f"{folder} exists: name a folder that does not, with --out")
    sources = resources.files("minimoe.study") / "ports"
    for part in ("common", kind):
        write(sources / part, folder, name)
    return folder


def check_name(name: str) -> None:
    """Raise `UserError` unless a backend may have this name: it becomes a distribution, a Python package and an argument."""
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name) or len(name) > 40:
        raise UserError(f"{name!r} cannot be the name of a backend: at most 40 lower-case letters and digits, with single `-` between them")
    if keyword.iskeyword(name) or name == "auto" or MARK in name:
        raise UserError(f"{name!r} cannot be the name of a backend: the word has a meaning of its own")
    package = package_of(name)
    if name in available() or find_spec(package):
        raise UserError(f"{name!r} is taken: the backend or its package, {package}, is installed here")


def package_of(name: str) -> str:
    return f"minimoe_{name.replace('-', '_')}"


def write(source: Traversable, folder: Path, name: str) -> None:
    """Copy the files of a template folder, with the name in place of the mark, in paths and in texts."""
    folder.mkdir(parents=True, exist_ok=True)
    for entry in source.iterdir():
        if entry.is_dir() and entry.name != "__pycache__":
            write(entry, folder / named(entry.name, name), name)
        elif entry.is_file():
            (folder / entry.name).write_text(named(entry.read_text(encoding="utf-8"), name), encoding="utf-8", newline="\n")


def named(text: str, name: str) -> str:
    """Return the text with the new backend's name, as a package (`minimoe_NAME`), a class (`NameBackend`) and a name."""
    text = text.replace(f"minimoe_{MARK}", package_of(name))
    text = text.replace(MARK.capitalize(), "".join(part.capitalize() for part in name.split("-")))
    return text.replace(MARK, name)
