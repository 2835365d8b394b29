"""The list of runs that `minimoe runs` shows: of each its state, its last step, its losses and its parameters."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from minimoe.errors import UserError
from minimoe.reference.extensions import UnknownName
from minimoe.runs.finding import run_names
from minimoe.runs.records import Count, read_environment, whole_lines
from minimoe.runs.run import RUNS, Run


def list_runs(root: Path = RUNS) -> list[dict[str, Any]]:
    """Return the runs under a folder, oldest first: name, state, step, steps, loss, val_loss, val_bits_per_byte,
    best_val_loss, val_accuracy, parameters, reason (why it ended early).

    Fields that a damaged folder lacks are None; its state is `damaged` if config.toml or metrics.jsonl cannot be read.
    """
    found = [_summary(Run(root / name)) for name in run_names(root)]
    return sorted(found, key=lambda row: (row["created"], row["name"]))


class _Row(msgspec.Struct):
    """The fields of a line of metrics that the list of runs shows; reading only these is quick."""

    step: Count
    loss: float | None = None
    val_loss: float | None = None
    val_bits_per_byte: float | None = None
    val_loss_sampled: float | None = None  # only in the last line: what is compared with the lines before
    val_accuracy: float | None = None


def _summary(run: Run) -> dict[str, Any]:
    status = run.status()
    rows: list[_Row] = []
    steps = None
    try:
        rows.extend(_quick_rows(run.metrics_file.path))
        steps = run.config.train.steps
    except UserError as error:
        if not isinstance(error.__cause__, UnknownName):  # the package of a router or an optimizer is not installed here
            status["state"] = "damaged"
    measured = next((row for row in reversed(rows) if row.val_loss is not None), None)
    compared = [row.val_loss if row.val_loss_sampled is None else row.val_loss_sampled for row in rows]
    return {
        "name": run.name,
        "state": status["state"],
        "step": rows[-1].step if rows else status.get("step") or 0,
        "steps": status.get("steps") or steps,
        "loss": rows[-1].loss if rows else None,
        "val_loss": measured and measured.val_loss,
        "val_bits_per_byte": measured and measured.val_bits_per_byte,
        "best_val_loss": min((loss for loss in compared if loss is not None), default=None),
        "val_accuracy": measured and measured.val_accuracy,
        "parameters": status.get("parameters"),
        "reason": status.get("reason"),
        "created": read_environment(run.path).get("created") or "",
    }


def _quick_rows(path: Path) -> Iterator[_Row]:
    decoder = msgspec.json.Decoder(_Row)
    for line in whole_lines(path):
        try:
            yield decoder.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            continue
