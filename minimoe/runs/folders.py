"""The folder that a new run gets: numbered, new, empty, or left by a start that ended before there was anything to lose.

`env.json` is written first, whole. `config.toml` makes the folder a run: training writes it before the first checkpoint, since its weights
can be drawn from the seed again; a start from other weights writes it after step-000000, which has them. So a start that ended early is a
run without a checkpoint, or no run with step-000000.
"""

import os
import re
import shutil
import time
from contextlib import suppress
from pathlib import Path

from minimoe.errors import ConfigError
from minimoe.files import HIDDEN
from minimoe.hints import command
from minimoe.runs import checkpoint
from minimoe.runs.lock import LOCK, is_lock
from minimoe.runs.records import read_environment, read_status

OF_A_START = frozenset(  # and the lock
    {"env.json", "status.json", "config.toml", "data.txt", "tokenizer.json", "base.safetensors", "checkpoints"}
)
HOUR = 3600  # seconds


def next_folder(name: str, root: Path) -> Path:
    """Make `root/NAME-001`, one above the highest that exists. mkdir decides between processes that start at the same time."""
    name = folder_name(name)
    root.mkdir(parents=True, exist_ok=True)
    taken = [re.fullmatch(re.escape(name) + r"-(\d{3,})", entry.name) for entry in root.iterdir()]
    number = max((int(match[1]) for match in taken if match), default=0)
    while True:
        number += 1
        path = root / f"{name}-{number:03d}"
        try:
            path.mkdir()
        except FileExistsError:
            continue
        return path


def folder_name(name: str) -> str:
    """Return a configuration's name as folders are called after it."""
    return re.sub(r"[^\w.-]+", "-", name).strip(".-") or "model"


def check_free(out: Path) -> None:
    """Refuse a folder that is neither new nor empty nor left by a start that ended early, or cannot be made. Raises `ConfigError`."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out}: is a file: a run needs a new or empty folder")
    if out.is_dir() and any(out.iterdir()) and not is_left_by_a_start(out):
        continued = f" ({command('resume', out)} continues the run in it)" if (out / "config.toml").is_file() else ""
        raise ConfigError(f"{out}: is not empty: a run needs a new or empty folder{continued}")
    above = next(parent for parent in (out, *out.absolute().parents) if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ConfigError(f"{out}: cannot be written: {above} is not a writable folder")


def is_left_by_a_start(out: Path) -> bool:
    """Return True for a folder that holds nothing but what a start of training or upcycling wrote before it ended early."""
    names = _names(out)
    if LOCK in names and is_lock(out / LOCK):
        names.remove(LOCK)
    if not names <= OF_A_START or (names and "created" not in read_environment(out)):
        return False
    saved = _names(out / "checkpoints") if "checkpoints" in names else set()
    saved |= {checkpoint.step_name(checkpoint.step_of(folder) or 0) for folder in checkpoint.checkpoints(out / "checkpoints")}
    if "config.toml" in names:
        return not saved and not has_begun(out)
    return saved <= {checkpoint.step_name(0)}


def clear(out: Path) -> bool:
    """Empty a folder that `is_left_by_a_start`, but for the lock that this process holds.   -> whether there was anything"""
    entries = [entry for entry in out.iterdir() if entry.name != LOCK]
    entries.sort(key=lambda entry: entry.name == "env.json")  # last: it tells a later start that these are leftovers
    for entry in entries:
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    return bool(entries)


def has_begun(run: Path) -> bool:
    """Return True if a run has had a checkpoint, so that its weights can no longer be drawn from its seed.

    status.json says so since the first checkpoint. minimoe 0.1 did not note it; its state or a line of metrics does. Weights that did not
    come from the seed cannot be drawn at all.
    """
    status = read_status(run)
    begun = status.get("begun")
    if begun is None:
        begun = status.get("state", "unknown") not in ("unknown", "running")
    from_elsewhere = (read_environment(run).get("weights") or "seed") != "seed"  # a path, or what it says of them
    return begun or from_elsewhere or bool(status.get("step")) or _has_a_line(run / "metrics.jsonl")


def tidy_beside(run: Path) -> None:
    """Remove what killed writers of `last` left beside a run. Other processes may be starting there: what they write is not an hour old."""
    for entry in run.parent.glob(".last.tmp-*"):
        with suppress(OSError):
            if HIDDEN.fullmatch(entry.name) and entry.is_file() and entry.stat().st_mtime < time.time() - HOUR:
                entry.unlink()


def _has_a_line(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


def _names(folder: Path) -> set[str]:
    """Return the names in a folder, but for the hidden ones of writers that were killed."""
    return {entry.name for entry in folder.iterdir() if not HIDDEN.fullmatch(entry.name)} if folder.is_dir() else {folder.name}
