"""Finds out what a path is, and verifies it: a run, one checkpoint, or a model folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from minimoe.errors import CheckpointError
from minimoe.pretrained.folder import CONFIG, INDEX, is_model_folder
from minimoe.runs.run import RUNS, Run
from minimoe.study.verify.checkpoint import Verified
from minimoe.study.verify.checks import Check, Tell
from minimoe.study.verify.folder import checks_of_folder
from minimoe.study.verify.run import checks_of_run

WIDTH = len("checkpoints/step-000000")
PARTS = ("metrics.jsonl", "status.json", "checkpoints")


class Verification(NamedTuple):
    """What is verified, and the checks, which are made as they are asked for. `width`: of the longest name among them."""

    path: Path
    kind: str
    checks: Iterator[Check]
    width: int


def verify(what: str | Path, tell: Tell = lambda text: None) -> Verification:
    """Verify a run (by folder or name), a checkpoint's folder, or a model folder. Raises `CheckpointError` if it is none of these."""
    path = Path(what)
    if is_model_folder(path) or _has_weights(path):
        width = max((len(entry.name) for entry in path.iterdir() if _matters(entry)), default=WIDTH)
        return Verification(path, "model folder", checks_of_folder(path, tell), width)
    if (path / "state.json").is_file() and not (path / "config.toml").exists():
        return Verification(path, "checkpoint", Verified(path, path.resolve().name).checks(), WIDTH)
    run = _run(path)
    return Verification(run.path, "run", checks_of_run(run, tell), WIDTH)


def _matters(entry: Path) -> bool:
    return entry.suffix == ".safetensors" or entry.name in (CONFIG, INDEX)


def _has_weights(path: Path) -> bool:
    """Return True for a folder with weights or an index that is neither a run nor a checkpoint: a model folder, whole or not."""
    others = ("config.toml", "state.json", "optimizer.safetensors")
    return path.is_dir() and any(map(_matters, path.iterdir())) and not any((path / name).exists() for name in others)


def _run(path: Path) -> Run:
    """Return the run; also one that has lost its config.toml, without which it cannot be opened."""
    try:
        return Run.open(path)
    except CheckpointError:
        for folder in (path, RUNS / path):
            if sum((folder / name).exists() for name in PARTS) > 1:
                return Run(folder)
        raise
