"""Finds the checkpoint that a run resumes from, checks that its configuration and its data still fit, and says what has changed since."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minimoe.config import Config, config_from_tables
from minimoe.errors import CheckpointError
from minimoe.files import reason
from minimoe.hints import command
from minimoe.runs.checkpoint import Checkpoint, check_resumable
from minimoe.runs.environment import environment
from minimoe.runs.records import read_regular
from minimoe.runs.run import Run
from minimoe.training.differences import RATE_KEYS, configuration_differences, machine_differences, rate_line
from minimoe.training.listener import Listener
from minimoe.training.tasks import Task
from minimoe.untrusted import Malformed, parse_json_object

UNKNOWN_MACHINE = "the machine of the run's start is not known"
KEYS_OF = {
    "model": ("model.", "moe."), "dtype": ("train.dtype",), "tokenizer": ("data.tokenizer",), "val_fraction": ("data.val_fraction",),
    "frozen parameters": ("train.freeze",), "adapters": ("lora.",), "text_key": ("data.text_key",), "loss_on": ("data.loss_on",),
}  # fmt: skip


def checkpoint_to_resume(run: Run, config: Config, task: Task, machine: Mapping[str, Any], listener: Listener) -> Checkpoint | None:
    """Load the run's newest whole checkpoint, or the one that was named; None if the run has not begun.

    machine: what env.json records besides versions. The listener is warned of newer checkpoints that are damaged, and of what has
    changed since. Raises `CheckpointError` if the checkpoint does not fit the run's configuration or data, or if all steps are done.
    """
    if run.newest_checkpoint() is None:
        if run.has_begun():
            raise CheckpointError(
                f"{run.checkpoint_folder}: holds no checkpoint, so the weights of the run are lost: restore the checkpoints from a backup, "
                f"or start again in another folder: {again(run)}"
            )
        return None
    saved, problems = run.load()
    check_resumable(saved)
    for problem in problems:
        listener.warned(f"damaged: {problem}: going back to step {saved.step}")
    before = run.with_kept_text(config_from_tables(saved.config, run.name))
    check_same_configuration(saved, before, run, config, task)
    if saved.state["data"]["sha256"] != task.sha256:
        raise CheckpointError(
            f"{run.path}: the data of {task.source} have changed since the run began (their SHA-256 differs): "
            "resume needs the same data"
        )
    steps = config.train.steps
    if saved.step > steps or (saved.step == steps and run.status()["state"] == "finished"):
        raise CheckpointError(f"{run.path}: {saved.step} steps are done: give --steps with a larger number to go further")
    check_patience(saved, before, run, config)
    say_differences(run, saved.step, before, config, listener)
    for line in changes_of_machine(run, machine):
        listener.warned(line)
    return saved


def again(run: Run) -> str:
    """Return the command that starts a run again: with --init where its weights did not come from its seed."""
    origin, config = run.origin(), run.path / "config.toml"
    if origin is None:
        return command("train", config)
    upcycled = command("convert", origin["path"], "DST", "--upcycle", "N")
    return f"{command('train', config, '--init', origin['path'])} (for an upcycled model: {upcycled})"


def check_patience(saved: Checkpoint, before: Config, run: Run, config: Config) -> None:
    """Refuse to go on with a run that ended early, unless it is given more steps or another patience. Raises `CheckpointError`."""
    status, stale = run.status(), saved.state.get("stale") or ()
    ended = status["state"] == "finished" and status.get("step") == saved.step
    if ended and 0 < config.train.patience <= len(stale) and not waits_anew(saved, config):
        raise CheckpointError(
            f"{run.path}: ended early at step {saved.step} of {before.train.steps}, after {len(stale)} "
            f"evaluation{'s' if len(stale) > 1 else ''} without a better validation loss: to go further give --patience with a larger "
            f"number (0: no end before the last step), or --steps with one above {before.train.steps}"
        )


def waits_anew(saved: Checkpoint, config: Config) -> bool:
    """Return True if evaluations without a better loss are counted from here on: the run was given more steps than it had."""
    return config.train.steps > config_from_tables(saved.config, config.name).train.steps


def say_differences(run: Run, step: int, before: Config, now: Config, listener: Listener) -> None:
    """Say each key that differs from the checkpoint's configuration, and what that does to the learning rate.

    An edit, or damage, of config.toml is a warning; steps that were asked for with the command are only said.
    """
    lines = configuration_differences(before, now)
    asked = {f"train.{key}" for key in ("steps", "patience") if getattr(run.config.train, key) == getattr(before.train, key)}
    for key, line in lines.items():
        (listener.said if key in asked else listener.warned)(line)
    rate = rate_line(before.train, now.train, step)
    if rate is not None:
        moving = {f"train.{key}" for key in RATE_KEYS} & lines.keys()
        (listener.said if moving <= asked else listener.warned)(rate)


def changes_of_machine(run: Run, machine: Mapping[str, Any]) -> list[str]:
    """Return a line for each difference between this machine and the one on which the run began."""
    try:
        recorded = parse_json_object(read_regular(run.path / "env.json"))
    except OSError as error:
        return [f"{run.path / 'env.json'}: cannot be read: {reason(error)}: {UNKNOWN_MACHINE}"]
    except Malformed as error:
        return [f"{run.path / 'env.json'}: damaged: {error}: {UNKNOWN_MACHINE}"]
    return machine_differences(recorded, {**environment(), **machine})


def check_same_configuration(saved: Checkpoint, before: Config, run: Run, config: Config, task: Task) -> None:
    """Refuse a config.toml with changes on which the weights, their dtype or the tokens depend; steps and rates may change."""
    pairs = {
        "model": (before.model, config.model),
        "dtype": (before.train.dtype, config.train.dtype),
        "tokenizer": (saved.tokenizer_json(), tokenizer_json(task)),
        "frozen parameters": (before.train.freeze, config.train.freeze),
        "adapters": (before.lora, config.lora),
        **{key: (getattr(before.data, key), getattr(config.data, key)) for key in ("val_fraction", "text_key", "loss_on")},
    }
    for name, (old, new) in pairs.items():
        if old != new:
            lines = [line for key, line in configuration_differences(before, config).items() if key.startswith(KEYS_OF[name])]
            keys = f" ({', '.join(lines[:3])})" if lines else ""
            raise CheckpointError(f"{saved.folder}: belongs to another configuration: its {name} differs from {run.path}/config.toml{keys}")


def tokenizer_json(task: Task) -> str | None:
    """Return the tokenizer.json that a checkpoint keeps; None if the task reads no text."""
    return None if task.tokenizer is None else task.tokenizer.to_json()
