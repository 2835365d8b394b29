"""Finds a run by its folder, by its name, by a checkpoint in it, or by a text file that names one (`last`, `best`)."""

import os
from contextlib import suppress
from pathlib import Path

from minimoe.errors import CheckpointError, nearest
from minimoe.files import HIDDEN
from minimoe.runs.folders import is_left_by_a_start
from minimoe.runs.records import read_regular
from minimoe.untrusted import Malformed

MOST_POINTER = 1000  # bytes of `last` and `best`
PARTS = ("config.toml", "env.json", "metrics.jsonl", "status.json", "checkpoints")  # of a run's folder


def find(path: "str | os.PathLike[str] | None", root: Path) -> tuple[Path, Path | None]:
    """Return a run's folder, and the checkpoint if the path names one; for None the newest run under `root`.

    Raises `CheckpointError` with the nearest name if it does not exist.
    """
    if path is None:
        path = root / "last"
        if not path.is_file():
            known = run_names(root)
            if known:
                raise CheckpointError(f"{path}: is missing: name the run, such as {root / known[-1]} (minimoe runs lists them)")
            raise CheckpointError(f"{root}: no run here yet: `minimoe train` starts one")
    for candidate in (Path(path), root / path):
        found = _at(_follow(candidate))
        if found is not None:
            return found
    wanted = _follow(Path(path))
    if _is_begun_without_weights(wanted):
        raise CheckpointError(f"{wanted}: the start of this run ended before its weights were written: give its command again")
    known = run_names(root)
    none = f" (and no run under {root} yet: `minimoe train` starts one)"
    hint = nearest(wanted.name, known, "minimoe runs lists them") if known else none
    problem = "is not a run's folder: it has no config.toml" if wanted.is_dir() else "no such run"
    raise CheckpointError(f"{wanted}: {problem}{hint}")


def find_folder(name: "str | os.PathLike[str]", root: Path) -> Path:
    """Return the folder of a run, also of a damaged one, by its path or its name under `root`: what is to be renamed or removed.

    Raises `CheckpointError` for anything else: a checkpoint, a link, a folder with too little of a run to be known as one.
    """
    for candidate in (Path(name), root / name):
        path = _follow(candidate)
        if path.is_symlink():
            raise CheckpointError(f"{path}: is a link to {os.readlink(path)}: name the folder itself")
        if sum(os.path.lexists(path / part) for part in PARTS) > 1:
            return path if path.name else path.absolute()
    run, _ = find(name, root)
    raise CheckpointError(
        f"{name}: is a part of the run {run}, or too little of a run to be known as one: name a run that minimoe runs lists"
    )


def folder_to_read(name: "str | os.PathLike[str] | None", root: Path) -> Path:
    """Return the folder of a run for what only reads it: as `find` does, but also that of a damaged run. Raises `CheckpointError`."""
    try:
        return find(name, root)[0]
    except CheckpointError:
        if name is None:
            raise
        try:
            return find_folder(name, root)
        except CheckpointError:
            pass
        raise


def _at(path: Path) -> tuple[Path, Path | None] | None:
    """Return the folder of the run at a path, and the checkpoint if the path is one; None if no run is there."""
    if (path / "config.toml").is_file():
        return path, None
    path = path.absolute()
    if path.name == "checkpoints" and (path.parent / "config.toml").is_file():
        return path.parent, None
    inside = path.is_dir() and path.parent.name == "checkpoints" and (path.parent.parent / "config.toml").is_file()
    return (path.parent.parent, path) if inside else None


def run_names(root: Path) -> list[str]:
    """Return the names of the folders under `root` that are runs, or what damage left of them."""
    marks = ("config.toml", "metrics.jsonl", "status.json")
    names = os.listdir(root) if root.is_dir() else []
    names = [name for name in names if HIDDEN.fullmatch(name) is None]  # what is being removed
    return sorted(name for name in names if any(os.path.lexists(root / name / mark) for mark in marks))  # even one without permission


def _is_begun_without_weights(path: Path) -> bool:
    """Return True for a folder that upcycling left before it wrote the weights: it is not a run yet, and nothing is lost."""
    with suppress(OSError):
        return path.is_dir() and any(path.iterdir()) and is_left_by_a_start(path)
    return False


def _follow(path: Path) -> Path:
    """Return the path itself or, if it is a text file that names a folder next to it (`last`, `best`), that folder."""
    if path.name not in ("last", "best") or not path.is_file():
        return path
    try:
        name = read_regular(path, MOST_POINTER).decode().strip()
    except (OSError, Malformed, UnicodeDecodeError):
        return path
    return path.parent / name if name.isprintable() else path
