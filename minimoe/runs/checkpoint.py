"""Checkpoints: arrays and JSON in a folder that a kill at any moment leaves whole or absent, with a SHA-256 of every file.

A checkpoint is `step-000300/` with model.safetensors, optimizer.safetensors, state.json, config.json, tokenizer.json (if the task
reads text) and MANIFEST.sha256, which `sha256sum -c` reads. It is written into a hidden sibling, synced file by file, and renamed.
An existing checkpoint of the same step is moved aside first, and counts until the new one has its name. One process writes to a folder of
checkpoints at a time; any number may read. NumPy is imported only to read or write arrays, so that listing checkpoints is quick.

A checkpoint is pruned if neither it nor its manifest has optimizer.safetensors: its weights serve, but training cannot go on from it.
"""

import hashlib
import os
import re
import shutil
import stat
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from msgspec import Struct

from minimoe.errors import CheckpointError
from minimoe.files import HIDDEN, hidden_sibling, reason, sync_folder, to_json, write_atomically, write_synced
from minimoe.runs.records import MOST, ResumableState, State, checked
from minimoe.untrusted import Malformed, parse_json_object, read_bounded

if TYPE_CHECKING:
    from numpy.typing import NDArray

Arrays: TypeAlias = "Mapping[str, NDArray[Any]]"

MANIFEST = "MANIFEST.sha256"
OPTIMIZER = "optimizer.safetensors"
REQUIRED = frozenset({"model.safetensors", "state.json", "config.json"})
TOKENIZER = "tokenizer.json"
# What safetensors' NumPy reader reads back: it writes more than that (bfloat16, float8).
DTYPES = frozenset({"float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool"})
MOST_BARE_HEADER = 1_000_000  # bytes; a longer header must describe as many bytes of arrays: millions of empty ones take gigabytes
STEP = re.compile(r"step-(\d{6,})")


class PrunedError(CheckpointError):
    """A checkpoint whose optimizer state is asked for, and was removed."""


@dataclass(frozen=True)
class Checkpoint:
    """The contents of a checkpoint's folder. `optimizer` is empty if it was not read."""

    folder: Path
    step: int
    model: "dict[str, NDArray[Any]]"
    optimizer: "dict[str, NDArray[Any]]"
    state: dict[str, Any]
    config: dict[str, Any]
    tokenizer_path: Path | None

    def tokenizer_json(self) -> str | None:
        """Return the text of its tokenizer.json; None if it has none."""
        if self.tokenizer_path is None:
            return None
        try:
            return self.tokenizer_path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            raise CheckpointError(f"{self.folder.name}/{TOKENIZER}: is not UTF-8 text (damaged)") from None


# ---- writing -----------------------------------------------------------------------------------------------------------------


def step_name(step: int) -> str:
    """Return the folder's name: 300 -> step-000300."""
    return f"step-{step:06d}"


def save_checkpoint(
    folder: Path, *, model: Arrays, optimizer: Arrays, state: Mapping[str, Any], config: Mapping[str, Any], tokenizer_json: str | None
) -> None:
    """Write a checkpoint, replacing one of the same name. Equal contents give equal bytes.

    Raises `CheckpointError` if the disk is full, the folder cannot be written, or an array's dtype could not be read back; existing
    checkpoints are then untouched.
    """
    files = {
        "model.safetensors": pack(model),
        OPTIMIZER: pack(optimizer),
        "state.json": to_json(state).encode(),
        "config.json": to_json(config).encode(),
    }
    if tokenizer_json is not None:
        files[TOKENIZER] = tokenizer_json.encode()
    files[MANIFEST] = _manifest_text({name: sha256(data) for name, data in files.items()}).encode()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        tidy(folder.parent)
        _put_in_place(folder, files)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be saved: {reason(error)} (earlier checkpoints are untouched)") from error


def replace_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Write another state.json into a checkpoint, which is whole at any moment; the other files are linked where the system can.

    Raises `CheckpointError` as `save_checkpoint` does.
    """
    data = to_json(state).encode()
    _change(folder, {**_read_manifest(folder), "state.json": sha256(data)}, {"state.json": data})


def drop_optimizer(folder: Path) -> int:
    """Remove the optimizer state from a checkpoint, which is whole at any moment. A damaged one stays as it is.   -> bytes that are freed

    Raises `CheckpointError` if it cannot be written.
    """
    try:
        digests = _read_manifest(folder)
        sizes = {name: (folder / name).stat().st_size for name in digests}
    except (CheckpointError, OSError):
        return 0
    freed = sizes.get(OPTIMIZER, 0)
    if OPTIMIZER in digests:
        _change(folder, {name: digest for name, digest in digests.items() if name != OPTIMIZER}, {})
    return freed


def is_pruned(folder: Path) -> bool:
    """Return True if a checkpoint's optimizer state was removed. Raises `CheckpointError` if its manifest is damaged."""
    return OPTIMIZER not in _read_manifest(folder)


def _change(folder: Path, digests: Mapping[str, str], changed: Mapping[str, bytes]) -> None:
    """Give a checkpoint other contents: the files that are changed, and of the others those that have a digest."""
    files = {**changed, MANIFEST: _manifest_text(digests).encode()}
    try:
        tidy(folder.parent)
        _put_in_place(folder, files, kept=sorted(digests.keys() - files.keys()))
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be saved: {reason(error)} (earlier checkpoints are untouched)") from error


def first_not_finite(arrays: Arrays) -> str | None:
    """Return the name of the first array with a number that is not finite; None if there is none."""
    import numpy as np

    return next((name for name, array in arrays.items() if not np.isfinite(array).all()), None)


def pack(arrays: Arrays) -> bytes:
    """Return safetensors bytes, names sorted. Arrays are made contiguous: safetensors writes memory as it is, wrong for `.T` or `[::2]`."""
    import numpy as np
    from safetensors.numpy import save

    for name, array in arrays.items():
        if array.dtype.name not in DTYPES:
            raise CheckpointError(f"{name}: dtype {array.dtype.name} could not be read back from a checkpoint: save it as float32")
    return save({name: np.asarray(arrays[name], order="C") for name in sorted(arrays)})


def _put_in_place(folder: Path, files: Mapping[str, bytes], kept: Iterable[str] = ()) -> None:
    """Write a checkpoint's folder with these files, and with those of the present one whose names are `kept`."""
    temporary, displaced = hidden_sibling(folder, "tmp"), hidden_sibling(folder, "old")
    try:
        temporary.mkdir()
        for name in kept:
            _link(folder / name, temporary / name)
        for name, data in files.items():
            write_synced(temporary / name, data)
        sync_folder(temporary)
        if folder.exists():
            os.replace(folder, displaced)
        os.replace(temporary, folder)
        sync_folder(folder.parent)
    except BaseException:
        if displaced.exists() and not folder.exists():
            os.replace(displaced, folder)
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(displaced, ignore_errors=True)


def _link(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        write_synced(target, source.read_bytes())


def tidy(parent: Path) -> None:
    """Clean up after writers that were killed: a checkpoint moved aside gets its name back if it was not replaced; the rest is removed."""
    for entry in sorted(parent.iterdir()):
        match = HIDDEN.fullmatch(entry.name)
        if match is None:
            continue
        target = parent / match["target"]
        if match["kind"] == "old" and not target.exists():
            os.replace(entry, target)
        elif entry.is_file():
            with suppress(OSError):
                entry.unlink()
        else:
            shutil.rmtree(entry, ignore_errors=True)


def prune(folder: Path, keep: int, best: int | None) -> None:
    """Remove all but the newest `keep` checkpoints (at least one), from which training can go on, and the weights of step `best`.

    Each is renamed to a hidden name before its files are removed, so that a kill leaves no incomplete checkpoint under a checkpoint's name.
    """
    for checkpoint in checkpoints(folder)[: -max(keep, 1)]:
        if step_of(checkpoint) != best:
            _remove(checkpoint)
        elif HIDDEN.fullmatch(checkpoint.name) is None:
            drop_optimizer(checkpoint)


def cut(folder: Path, step: int) -> None:
    """Remove the checkpoints after a step, damaged or not: a run that resumes from an earlier one writes them again."""
    for checkpoint in reversed(checkpoints(folder)):
        if (step_of(checkpoint) or 0) > step:
            _remove(checkpoint)


def _remove(checkpoint: Path) -> None:
    leaving = hidden_sibling(checkpoint, "tmp")
    try:
        os.replace(checkpoint, leaving)
    except OSError as error:
        raise CheckpointError(f"{checkpoint}: cannot be removed: {reason(error)}") from error
    shutil.rmtree(leaving, ignore_errors=True)


def write_best(folder: Path, step: int) -> None:
    """Name the best checkpoint in the text file `best`."""
    write_atomically(folder / "best", f"{step_name(step)}\n")


def read_best(folder: Path) -> int | None:
    """Return the step of the best checkpoint; None if none is named or it no longer exists."""
    try:
        name = read_bounded(folder / "best", MOST).decode().strip() if (folder / "best").is_file() else ""
    except (OSError, Malformed, UnicodeDecodeError):
        return None
    match = STEP.fullmatch(name)
    return int(match[1]) if match and (folder / name).is_dir() else None


# ---- reading -----------------------------------------------------------------------------------------------------------------


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a folder, by step, oldest first. One that was moved aside counts if it was not replaced."""
    found: dict[int, Path] = {}
    for entry in sorted(folder.iterdir(), reverse=True) if folder.is_dir() else []:  # "step-..." sorts above ".step-..."
        step = step_of(entry)
        hidden = HIDDEN.fullmatch(entry.name)
        if step is not None and entry.is_dir() and (hidden is None or hidden["kind"] == "old"):
            found.setdefault(step, entry)
    return [found[step] for step in sorted(found)]


def step_of(folder: Path) -> int | None:
    """Return the step in the name of a checkpoint's folder; None for any other name."""
    hidden = HIDDEN.fullmatch(folder.name)
    match = STEP.fullmatch(hidden["target"] if hidden else folder.name)
    return int(match[1]) if match else None


def is_good(folder: Path, best: bool = False) -> bool:
    """Return True if a checkpoint is whole and finite, and its step was not skipped: else its weights may be what made the loss infinite.

    One that an evaluation called the `best` is known not to be that.
    """
    try:
        found = load_checkpoint(folder, optimizer=not is_pruned(folder))
    except CheckpointError:
        return False
    return (best or found.state.get("bad") == 0) and first_not_finite({**found.model, **found.optimizer}) is None


def newest_whole(folder: Path, optimizer: bool = True) -> tuple[Checkpoint, list[str]]:
    """Return the newest checkpoint that agrees with its manifest, and a line about each newer one that does not.

    Raises `CheckpointError` if there is none, with a line about each, and if the newest was pruned and `optimizer` is True: going back to
    one before it would lose steps.
    """
    problems: list[str] = []
    for path in reversed(checkpoints(folder)):
        try:
            return load_checkpoint(path, optimizer=optimizer), problems
        except CheckpointError as error:
            if isinstance(error, PrunedError) and not problems:
                raise PrunedError(f"{folder.parent}: {error}") from None
            problems.append(str(error))
    if not problems:
        raise CheckpointError(f"{folder}: no checkpoint yet")
    raise CheckpointError(f"{folder}: no checkpoint is whole: {'; '.join(problems)}")


def load_checkpoint(folder: Path, verify: bool = True, optimizer: bool = True) -> Checkpoint:
    """Read a checkpoint; the arrays are writable.

    verify: compare every file that is read with the manifest. optimizer: False does not read that file (to generate or evaluate).
    Raises `CheckpointError` with the names of checkpoint and file if one is missing, damaged or unreadable.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such checkpoint")
    digests = _read_manifest(folder) if verify else {}
    if verify and optimizer and OPTIMIZER not in digests:
        raise PrunedError(
            f"{folder.name}: its optimizer state was removed, so training cannot go on from it; "
            "generate, eval, inspect and convert use its weights"
        )
    state = _json(folder, "state.json", digests, State)
    step = step_of(folder) if state.get("step") is None else state["step"]
    if step is None:
        raise CheckpointError(f"{folder.name}/state.json: names no step")
    tokenizer = folder / TOKENIZER if (folder / TOKENIZER).exists() or TOKENIZER in digests else None
    if tokenizer is not None:
        _read(folder, TOKENIZER, digests)
    return Checkpoint(
        folder=folder,
        step=step,
        model=read_arrays(folder, "model.safetensors", digests),
        optimizer=read_arrays(folder, OPTIMIZER, digests) if optimizer else {},
        state=state,
        config=_json(folder, "config.json", digests),
        tokenizer_path=tokenizer,
    )


def run_of(folder: Path) -> Path:
    """Return the folder of the run that a checkpoint's folder lies in."""
    return folder.absolute().parent.parent


def read_arrays(folder: Path, name: str, digests: Mapping[str, str]) -> "dict[str, NDArray[Any]]":
    """Return the arrays of a safetensors file, which are writable. Raises `CheckpointError` as `load_checkpoint` does."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    data = _read(folder, name, digests)
    header = int.from_bytes(data[:8], "little")
    behind = len(data) - 8 - header
    if header > MOST_BARE_HEADER and 0 <= behind < header:
        raise CheckpointError(f"{folder.name}/{name}: a header of {header} bytes for {behind} bytes of arrays")
    try:
        arrays = load(data)
    except (SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(f"{folder.name}/{name}: not a safetensors file that can be read here: {error}") from None
    return {key: array if array.flags.writeable else array.copy() for key, array in arrays.items()}


def check_resumable(saved: Checkpoint) -> None:
    """Raise `CheckpointError` if state.json lacks what training needs to go on."""
    try:
        checked(saved.state, ResumableState)
    except Malformed as error:
        raise CheckpointError(f"{saved.folder.name}/state.json: {error}") from None


def _json(folder: Path, name: str, digests: Mapping[str, str], kind: type[Struct] | None = None) -> dict[str, Any]:
    data = _read(folder, name, digests, MOST)
    try:
        value = parse_json_object(data)
        return value if kind is None else checked(value, kind)
    except Malformed as error:
        raise CheckpointError(f"{folder.name}/{name}: {error} (damaged)") from None


def _read(folder: Path, name: str, digests: Mapping[str, str], most: int | None = None) -> bytes:
    """Return a file's bytes, compared with the digest if one is given."""
    path = folder / name
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise CheckpointError(f"{folder.name}/{name}: is not a file")
        data = path.read_bytes() if most is None else read_bounded(path, most)
    except FileNotFoundError:
        raise CheckpointError(f"{folder.name}/{name}: is missing") from None
    except OSError as error:
        raise CheckpointError(f"{folder.name}/{name}: cannot be read: {reason(error)}") from error
    except Malformed as error:
        raise CheckpointError(f"{folder.name}/{name}: {error} (damaged)") from None
    if name in digests and sha256(data) != digests[name]:
        raise CheckpointError(f"{folder.name}/{name}: its SHA-256 does not match the manifest (damaged)")
    return data


def _read_manifest(folder: Path) -> dict[str, str]:
    """Return the digests by file name. A manifest that differs in any byte from what minimoe would write is damaged."""
    text = _read(folder, MANIFEST, {}, MOST).decode("utf-8", errors="replace")
    digests = {name: digest for digest, _, name in (line.partition("  ") for line in text.split("\n")[:-1])}
    known = REQUIRED | {OPTIMIZER, TOKENIZER}
    unlisted = sorted(name for name in known - digests.keys() if name in REQUIRED or (folder / name).exists())
    if unlisted:
        raise CheckpointError(f"{folder.name}/{MANIFEST}: does not list {unlisted[0]} (damaged)")
    if not digests.keys() <= known or _manifest_text(digests) != text:
        raise CheckpointError(f"{folder.name}/{MANIFEST}: is not what was written (damaged)")
    return digests


def _manifest_text(digests: Mapping[str, str]) -> str:
    return "".join(f"{digests[name]}  {name}\n" for name in sorted(digests))


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
