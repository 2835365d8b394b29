"""What the JSON files of a run hold, typed: status.json, env.json, a checkpoint's state.json, the lines of metrics.jsonl.

A run's folder may come from anywhere, so each file is read with bounds on its size and depth, and every known field has a type. Fields that
are not known here, of a later version, are kept. docs/runs.md says what each means.
"""

import json
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from minimoe.errors import CheckpointError
from minimoe.files import reason
from minimoe.untrusted import Malformed, parse_json_object, read_bounded

MOST = 1_000_000  # bytes of a small file such as status.json or a manifest; minimoe writes a few kB
MOST_LINE = 16_000_000  # bytes of one line of metrics, which has the load of every expert

Count = Annotated[int, Meta(ge=0, le=2**53)]
Word = Annotated[str, Meta(pattern=r"\A[a-z_-]{1,30}\Z")]  # it is shown on terminals
Share = Annotated[float, Meta(ge=0, le=2)]  # a fraction, rounded
ProcessNumber = Annotated[int, Meta(ge=1, le=2**31 - 1)]


class Status(Struct):
    """status.json."""

    state: Word
    pid: ProcessNumber | None = None
    process: str | None = None
    step: Count | None = None
    steps: Count | None = None
    parameters: Count | None = None
    begun: bool | None = None
    error: str | None = None
    reason: str | None = None


class Data(Struct):
    """What a run was trained on."""

    source: str | None = None
    sha256: str | None = None


class Weights(Struct):
    """The weights that a run started from."""

    path: str
    step: Count | None = None
    sha256: str | None = None


class Environment(Struct):
    """env.json."""

    created: str | None = None
    minimoe: str | None = None
    backend: str | None = None
    weights: Weights | str | None = None  # "seed"; an earlier version wrote the path of an upcycled model
    data: Data | None = None


class State(Struct):
    """state.json of a checkpoint."""

    step: Count | None = None  # by default that in the folder's name
    elapsed_s: float | None = None
    best: float | None = None
    best_step: Count | None = None
    bad: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    stale: list[Count] | None = None
    data: Data | None = None
    metrics_sha256: str | None = None
    base_sha256: str | None = None


class DigestedData(Struct):
    """The part of `Data` without which a run is not resumed."""

    sha256: str


class ResumableState(Struct):
    """What state.json must have for training to go on; `State` has the types."""

    elapsed_s: float
    best: float | None
    best_step: int | None
    bad: int
    data: DigestedData


class MetricsRow(Struct):
    """A line of metrics.jsonl; an earlier version wrote fewer fields, and what is not finite is null."""

    step: Count
    loss: float | None = None
    aux_loss: float | None = None
    z_loss: float | None = None
    router_loss: float | None = None
    lr: float | None = None
    grad_norm: float | None = None
    step_ms: float | None = None
    tokens_per_s: float | None = None
    elapsed_s: float | None = None
    expert_load: list[list[Share | None]] = []
    aux_loss_layers: list[float | None] = []
    dropped: float | None = None
    router_entropy: float | None = None
    skipped: bool = False
    val_loss: float | None = None
    val_bits_per_byte: float | None = None
    val_loss_sampled: float | None = None
    val_batches: tuple[Count, Count] | None = None
    val_accuracy: float | None = None


def read_status(run: Path) -> dict[str, Any]:
    """Return a run's status.json; empty if it is missing or is not what it should be."""
    return _read_object(run / "status.json", Status)


def status_to_change(run: Path) -> dict[str, Any]:
    """Return a run's status.json, to be written with changes. Raises `OSError` if it cannot be read now, since its fields would be lost."""
    try:
        return checked(parse_json_object(read_regular(run / "status.json")), Status)
    except (FileNotFoundError, Malformed):
        return {}


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
        raise Malformed(str(error).replace("`", "").replace(" | null", "")) from None
    return fields


def read_regular(path: Path, most: int = MOST) -> bytes:
    """Return the bytes of a file; a pipe or a device, which might never end, is refused. Raises `OSError`, `Malformed`."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise Malformed("is not a file")
    return read_bounded(path, most)


# ---- lines ---------------------------------------------------------------------------------------------------------------------


def whole_lines(path: Path) -> list[bytes]:
    """Return the lines that end with a newline; none if there is no file. Raises `CheckpointError`."""
    lines: list[bytes] = []
    rest = b""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise CheckpointError(f"{path}: is not a file")
        with open(path, "rb") as file:
            while block := file.read(MOST_LINE):
                parts = (rest + block).split(b"\n")
                if len(parts[0]) >= MOST_LINE:  # the only one that began in an earlier block
                    raise CheckpointError(f"{path}: line {len(lines) + 1} is longer than {MOST_LINE:,} bytes (damaged)")
                rest = parts.pop()
                lines += parts
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {reason(error)}") from error
    return lines


def metrics_row(line: bytes) -> dict[str, Any]:
    """Return the fields of a line of metrics.jsonl. Raises `Malformed`."""
    try:
        row = parse_json_object(line)
    except Malformed as error:
        raise Malformed(f"is not a JSON object (damaged): {error}") from None
    try:
        return checked(row, MetricsRow)
    except Malformed as error:
        raise Malformed(f"has a wrong value (damaged): {error}") from None


class Loss(Struct):
    """The one field of a line of metrics.jsonl that a curve needs."""

    loss: float | None = None


def loss_of(line: bytes) -> float | None:
    """Return the loss in a line of metrics.jsonl; None if it has none, or if the line is damaged."""
    try:
        return msgspec.json.decode(line, type=Loss).loss
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return None


def valid_json(row: Mapping[str, Any]) -> str:
    """Return one line; Python's NaN and Infinity, which JSON does not have, become null."""
    text = json.dumps(row, default=lambda other: other.tolist())
    if "NaN" in text or "Infinity" in text:
        text = json.dumps(json.loads(text, parse_constant=lambda _: None))
    return text


# ---- errors --------------------------------------------------------------------------------------------------------------------


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an error of the system into a `CheckpointError` that says which file of a run cannot be written."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {reason(error)}") from error
