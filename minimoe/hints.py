"""Commands that messages suggest: each works as it is printed, in the shell and in the installation that the reader has."""

from __future__ import annotations

import json
import shlex
import sys
from importlib import metadata
from pathlib import Path
from urllib.parse import unquote, urlsplit

CLONE = Path(__file__).parent.parent


def command(*words: object) -> str:
    """Return `minimoe WORD ...`, quoted for a shell; from a clone that runs `cli.py`, `python cli.py WORD ...`."""
    started = sys.argv[0] if sys.argv else ""
    program = f"python {shlex.quote(started)}" if Path(started).name == "cli.py" else "minimoe"
    return " ".join([program, *map(quoted, words)])


def quoted(word: object) -> str:
    """Return a word of a command, quoted for a shell. A path that begins with a hyphen is not taken for an option."""
    text = str(word)
    return shlex.quote(f"./{text}" if isinstance(word, Path) and text.startswith("-") else text)


def install(extra: str) -> str:
    """Return the command that adds an extra to this installation: a clone, a folder or an address that pip was given, or a package."""
    if (CLONE / "pyproject.toml").is_file():
        place = "." if Path.cwd() == CLONE else CLONE
        return f"pip install -e {_with_extra(str(place), extra)}"
    return f"pip install {_requirement(_origin(), extra)}"


def _origin() -> dict[str, object]:
    """Return what pip recorded of where the package came from (the file direct_url.json); empty for one from an index."""
    try:
        found = json.loads(metadata.distribution("minimoe").read_text("direct_url.json") or "{}")
    except (metadata.PackageNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _requirement(origin: dict[str, object], extra: str) -> str:
    url = str(origin.get("url", ""))
    folder = unquote(urlsplit(url).path)
    if "dir_info" in origin and Path(folder).is_dir():
        return _with_extra(folder, extra)
    if isinstance(origin.get("vcs_info"), dict):
        return shlex.quote(f"minimoe[{extra}] @ {origin['vcs_info']['vcs']}+{url}")  # type: ignore[index]
    if "archive_info" in origin:
        return shlex.quote(f"minimoe[{extra}] @ {url}")
    return _with_extra("minimoe", extra)


def _with_extra(what: str, extra: str) -> str:
    return shlex.quote(f"{what}[{extra}]")
