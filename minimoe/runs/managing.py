"""Removes, renames and prunes runs. A kill at any moment leaves each run whole, or gone, and a run that is being trained is refused.

A run that is removed first gets a hidden name (`.tiny-moe-001.tmp-1a2b3c4d`), so that no half of it is ever seen as a run; then its files
are removed. What a kill left under such a name is removed the next time.
"""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minimoe.errors import CheckpointError, UserError
from minimoe.files import HIDDEN, hidden_sibling, reason, sync_folder
from minimoe.runs import metrics_lines, pointer, tags
from minimoe.runs.checkpoint import checkpoints, drop_optimizer, tidy
from minimoe.runs.finding import PARTS, run_names
from minimoe.runs.lock import LOCK, is_taken, read_owner
from minimoe.runs.records import writing
from minimoe.runs.run import DATA, RUNS, Run

FILES = frozenset({*PARTS, DATA, tags.NAME, LOCK, f"{LOCK}.turn"})
"""What minimoe writes into a run's folder, besides copies of damaged metrics: with anything else it is not removed."""
DAMAGED = re.compile(rf"{Path(metrics_lines.NAME).stem}\.damaged(-\d+)?\.jsonl")
NAME = re.compile(r"\w[\w.+=-]*")
RESERVED = ("last", "best", "checkpoints")


def check_removable(folder: Path) -> None:
    """Raise `CheckpointError` for a run that is being trained, or whose folder holds what minimoe did not write."""
    _refuse_trained(folder, "removed")
    foreign = sorted(entry.name for entry in folder.iterdir() if not _is_ours(entry.name))
    if run_names(folder):
        raise CheckpointError(f"{folder}: is not removed: it holds the run {run_names(folder)[0]}, which would be lost too")
    if foreign:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise CheckpointError(f"{folder}: is not removed: it holds {foreign[0]}{more}, which minimoe did not write: move it away first")


def remove(folder: Path, root: Path = RUNS) -> None:
    """Remove a run. Raises `CheckpointError` as `check_removable` does, or if a file cannot be removed."""
    check_removable(folder)
    gone = hidden_sibling(folder, "tmp")
    _rename(folder, gone)
    pointer.follow(root, folder, None)
    try:
        shutil.rmtree(gone)
    except OSError as error:
        raise CheckpointError(f"{folder}: is no run any more, but {gone} cannot be removed: {reason(error)}") from error
    _sweep(folder.parent)


def rename(folder: Path, name: str, root: Path = RUNS) -> Path:
    """Give a run another name in the same folder; `last` follows.   -> its folder now

    Raises `UserError` for a name that cannot be, or that exists, `CheckpointError` for a run that is being trained.
    """
    new = folder.parent / Path(name).name
    if Path(name).parent not in (Path(), folder.parent) or NAME.fullmatch(Path(name).name) is None or new.name in RESERVED:
        raise UserError(f"{name!r} is no name of a run: give letters, digits and . + = - _, and no path; the run stays in {folder.parent}")
    if new.exists() or new.is_symlink():
        raise UserError(f"{new}: exists already: choose another name")
    _refuse_trained(folder, "renamed")
    _rename(folder, new)
    pointer.follow(root, folder, new)
    return new


def check_prunable(folder: Path) -> None:
    """Raise `CheckpointError` for a run that is not finished: its optimizer state is what resuming needs."""
    _refuse_trained(folder, "pruned")
    state = Run(folder).status()["state"]
    if state != "finished":
        raise CheckpointError(f"{folder}: is not pruned: it is not finished ({state}), and resume needs its optimizer state")


def prune(folder: Path) -> int:
    """Remove the optimizer state from all checkpoints of a finished run, the newest last.   -> bytes that are freed

    Damaged checkpoints stay as they are. Raises `CheckpointError` as `check_prunable` does, or if a checkpoint cannot be written.
    """
    check_prunable(folder)
    inside = folder / "checkpoints"
    with Run(folder).claimed():
        if inside.is_dir():
            with writing(inside):
                tidy(inside)
        return sum(drop_optimizer(found) for found in checkpoints(inside))

def _is_ours(name: str) -> bool:
    return name in FILES or DAMAGED.fullmatch(name) is not None or HIDDEN.fullmatch(name) is not None

def _refuse_trained(folder: Path, what: str) -> None:
    if is_taken(folder):
        owner = read_owner(folder / LOCK)
        who = owner.named() if owner else "a process"
        stop = "stop it (Ctrl-C there saves its state)"
        raise CheckpointError(f"{folder}: is being trained, by {who}, so it is not {what}: wait for it, or {stop}")

def _rename(folder: Path, new: Path) -> None:
    with _claimed(folder) as run:
        try:
            run.lock.rename_folder(new)
        except OSError as error:
            raise CheckpointError(f"{folder}: cannot be renamed: {reason(error)}") from error
        sync_folder(folder.parent)

@contextmanager
def _claimed(folder: Path) -> Iterator[Run]:
    run = Run(folder)
    with run.claimed():
        yield run

def _sweep(parent: Path) -> None:
    """Remove what removals that were killed left beside a run."""
    for entry in parent.iterdir():
        match = HIDDEN.fullmatch(entry.name)
        if match is not None and match["kind"] == "tmp" and entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
