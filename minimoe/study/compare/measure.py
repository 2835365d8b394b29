"""Computes the row of a finished run in a comparison, from its configuration and its metrics."""

from __future__ import annotations

import math
import statistics
from typing import Any

import msgspec
import numpy as np

from minimoe.config import Config
from minimoe.config.cost import Cost
from minimoe.config.trained import training_cost
from minimoe.errors import CheckpointError
from minimoe.hints import command
from minimoe.runs.records import read_environment
from minimoe.runs.run import Run
from minimoe.study.collapse import LAST, count_dead
from minimoe.study.compare.comparison import Row, Spread


class Line(msgspec.Struct):
    """The fields of a line of metrics.jsonl that are read; None: not finite. expert_load [L][E]"""

    step: int
    loss: float | None
    tokens_per_s: float
    elapsed_s: float
    expert_load: list[list[float | None]]
    dropped: float | None
    val_loss: float | None = None
    val_bits_per_byte: float | None = None
    val_accuracy: float | None = None


def row_of(name: str, source: str, runs: list[Run], trained: bool = False, diverged: bool = False) -> Row:
    """Return the row of runs that differ only in their seed. Raises `CheckpointError` for a run that is damaged or not finished.

    diverged: a run that diverged is taken too, and has a loss of NaN.
    """
    config, lines = runs[0].config, [finished_lines(run, diverged) for run in runs]
    steps = max(map(len, lines))
    counted, tokens = run_cost(config), steps * tokens_per_step(config)
    ends = [each[-LAST:] for each in lines]
    routed_ends = [end for end in ends if end[0].expert_load]
    loads = [np.array([line.expert_load for line in end], dtype=float).mean(axis=0) for end in routed_ends]  # [L,E] per seed
    routed = bool(loads)
    return Row(
        name=name,
        source=source,
        runs=[str(run.path) for run in runs],
        trained=trained,
        backend=config.train.backend,
        parameters=counted.total,
        active=counted.active,
        flops_per_token=counted.flops_per_token,
        steps=steps,
        tokens=tokens,
        training_flops=counted.training_flops_per_token * tokens,
        seconds=statistics.fmean(each[-1].elapsed_s for each in lines),
        tokens_per_s=statistics.fmean(statistics.median(line.tokens_per_s for line in each) for each in lines),
        loss=Spread.of([statistics.fmean(number(line.loss) for line in end) for end in ends]),
        val_loss=Spread.of([number(each[-1].val_loss) for each in lines]),
        bits_per_byte=None if lines[0][-1].val_bits_per_byte is None else Spread.of([number(each[-1].val_bits_per_byte) for each in lines]),
        val_accuracy=None if lines[0][-1].val_accuracy is None else Spread.of([number(each[-1].val_accuracy) for each in lines]),
        load_entropy=statistics.fmean(least_entropy(load) for load in loads) if routed else None,
        dropped=statistics.fmean(number(line.dropped) for end in ends for line in end) if routed else None,
        dead_experts=statistics.fmean(map(count_dead, loads)) if routed else None,
        experts=int(loads[0].size) if routed else 0,
    )


def run_cost(config: Config) -> Cost:
    """Return the cost at the sequence length of training."""
    return training_cost(config, config.train.seq_len)


def tokens_per_step(config: Config) -> int:
    return config.train.accumulate * config.train.batch_size * config.train.seq_len


def least_entropy(load: Any) -> float:
    """Return the lowest entropy of a layer's load, over ln E: 1 if even, and for a single expert.   load [L,E]"""
    e = load.shape[1]
    if e == 1:
        return 1.0
    terms = load * np.log(np.where(load > 0, load, 1.0))
    return float(np.min(-np.sum(terms, axis=1)) / math.log(e))


def number(value: float | None) -> float:
    return math.nan if value is None else value


def finished_lines(run: Run, diverged: bool = False) -> list[Line]:
    """Return the metrics of every step of a finished run. Raises `CheckpointError` for any other run, but for a `diverged` one if asked."""
    diverged = diverged and run.status()["state"] == "diverged"
    if not diverged:
        check_finished(run)
    path = run.metrics_file.path
    try:
        lines = msgspec.convert(run.metrics(), list[Line])
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{path}: damaged: {error}") from None
    config, steps = run.config, len(lines) if diverged and lines else steps_done(run)
    if diverged:
        lines[-1].loss = lines[-1].val_loss = lines[-1].val_bits_per_byte = None
    if [line.step for line in lines] != list(range(1, steps + 1)):
        raise CheckpointError(f"{path}: damaged: {len(lines)} lines, expected one for each of {steps} steps")
    expected = [config.model.moe.n_experts if config.model.moe else 0] * len(config.model.moe_layers())
    if any([len(layer) for layer in line.expert_load] != expected for line in lines):
        raise CheckpointError(f"{path}: damaged: expert_load must have {len(expected)} layers of the configuration's experts")
    return lines


def steps_done(run: Run) -> int:
    """Return the steps of a finished run: fewer than it was given if it ended early."""
    status = run.status()
    return int(status["step"]) if status.get("reason") and status.get("step") else run.config.train.steps


def check_finished(run: Run) -> None:
    status = run.status()
    state, steps = status["state"], run.config.train.steps
    if state == "unknown":
        raise CheckpointError(f"{run.path}: damaged: its status.json is missing or cannot be read")
    if state == "running":
        raise CheckpointError(f"{run.path}: still running, at step {status.get('step')} of {steps}: wait until it is finished")
    if state != "finished":
        advice = f"`{command('resume', run.path)}` continues it" if state != "diverged" else "train it again, with a lower train.lr"
        raise CheckpointError(f"{run.path}: not finished ({state} at step {status.get('step')} of {steps}): {advice}")


def text_of(run: Run) -> tuple[str, str, str, bool]:
    """Return what losses are measured on: SHA-256 of the data (empty if env.json has none), tokenizer, head (the task), and whether the
    first token of a document is no target.
    """
    data = read_environment(run.path).get("data") or {}
    return data.get("sha256") or "", run.config.data.tokenizer, run.config.model.head, run.config.data.within_documents
