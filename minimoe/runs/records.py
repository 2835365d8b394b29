"""What the JSON files of a run hold, typed: status.json, env.json, a checkpoint's state.json, the lines of metrics.jsonl.

A run's folder may come from anywhere, so each file is read with bounds on its size and depth, and every known field has a type. Fields that
are not known here, of a later version, are kept. docs/runs.md says what each means.
"""

import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from minimoe.untrusted import Malformed, parse_json_object, read_bounded

MOST = 1_000_000  # bytes of status.json, env.json, state.json, a manifest, or one line of metrics; minimoe writes a few kB

Count = Annotated[int, Meta(ge=0, le=2**53)]
ProcessNumber = Annotated[int, Meta(ge=1, le=2**31 - 1)]


class Status(Struct):
    """status.json."""

    state: str
    pid: ProcessNumber | None = None
    process: str | None = None
    step: Count | None = None
    steps: Count | None = None
    parameters: Count | None = None
    begun: bool | None = None
    error: str | None = None


class Data(Struct):
    """What a run was trained on."""

    source: str | None = None
    sha256: str | None = None


class Environment(Struct):
    """env.json."""

    created: str | None = None
    minimoe: str | None = None
    backend: str | None = None
    weights: str | None = None
    data: Data | None = None


def read_status(run: Path) -> dict[str, Any]:
    """Return a run's status.json; empty if it is missing or is not what it should be."""
    return _read_object(run / "status.json", Status)


def read_environment(run: Path) -> dict[str, Any]:
    """Return a run's env.json; empty if it is missing or is not what it should be."""
    return _read_object(run / "env.json", Environment)


def _read_object(path: Path, kind: type[Struct]) -> dict[str, Any]:
    try:
        return checked(parse_json_object(read_regular(path)), kind)
    except (OSError, Malformed):
        return {}


def checked(fields: dict[str, Any], kind: type[Struct]) -> dict[str, Any]:
    """Return the fields, all of them, if the known ones have their types. Raises `Malformed`."""
    try:
        msgspec.convert(fields, kind)
    except msgspec.ValidationError as error:
        raise Malformed(f"{error}".replace("`", "")) from None
    return fields


def read_regular(path: Path, most: int = MOST) -> bytes:
    """Return the bytes of a file; a pipe or a device, which might never end, is refused. Raises `OSError`, `Malformed`."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise Malformed("is not a file")
    return read_bounded(path, most)


def valid_json(row: Mapping[str, Any]) -> str:
    """Return one line; Python's NaN and Infinity, which JSON does not have, become null."""
    text = json.dumps(row, default=lambda other: other.tolist())
    if "NaN" in text or "Infinity" in text:
        text = json.dumps(json.loads(text, parse_constant=lambda _: None))
    return text
