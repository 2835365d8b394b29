"""Finds the checkpoint that a run resumes from, and checks that its configuration and its data still fit."""

from __future__ import annotations

from collections.abc import Callable

from minimoe.config import Config, config_from_tables
from minimoe.errors import CheckpointError
from minimoe.runs.checkpoint import Checkpoint
from minimoe.runs.run import Run
from minimoe.training.tasks import Task


def checkpoint_to_resume(run: Run, config: Config, task: Task, say: Callable[[str], None]) -> Checkpoint | None:
    """Load the run's newest whole checkpoint, or the one that was named; None if the run has not begun.

    `say` is called for newer checkpoints that are damaged. Raises `CheckpointError` if the checkpoint does not fit the run's configuration
    or data, or if all steps are done.
    """
    if run.newest_checkpoint() is None:
        if run.has_begun():
            raise CheckpointError(
                f"{run.checkpoint_folder}: holds no checkpoint, and the weights that the run had are lost with them: bring them back "
                f"from a copy, or start anew in another folder: minimoe train {run.path / 'config.toml'} (for an upcycled model: minimoe "
                "convert MODEL DST --upcycle N)"
            )
        return None
    saved, problems = run.load()
    for problem in problems:
        say(f"damaged: {problem}: going back to step {saved.step}")
    check_same_configuration(saved, run, config, task)
    if saved.state["data"]["sha256"] != task.sha256:
        raise CheckpointError(
            f"{run.path}: the data of {task.source} have changed since the run began (their SHA-256 differs): "
            "resume needs the same data"
        )
    steps = config.train.steps
    if saved.step > steps or (saved.step == steps and run.status()["state"] == "finished"):
        raise CheckpointError(f"{run.path}: {saved.step} steps are done: give --steps with a larger number to go further")
    return saved


def check_same_configuration(saved: Checkpoint, run: Run, config: Config, task: Task) -> None:
    """Refuse a config.toml with changes on which the weights, their dtype or the tokens depend; steps and rates may change."""
    before = config_from_tables(saved.config, run.name)
    pairs = {
        "model": (before.model, config.model),
        "dtype": (before.train.dtype, config.train.dtype),
        "tokenizer": (saved.tokenizer_json(), tokenizer_json(task)),
        "val_fraction": (before.data.val_fraction, config.data.val_fraction),
    }
    for name, (old, new) in pairs.items():
        if old != new:
            raise CheckpointError(f"{saved.folder}: belongs to another configuration: its {name} differs from {run.path}/config.toml")


def tokenizer_json(task: Task) -> str | None:
    """Return the tokenizer.json that a checkpoint keeps; None if the task reads no text."""
    return None if task.tokenizer is None else task.tokenizer.to_json()
