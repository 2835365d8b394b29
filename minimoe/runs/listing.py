"""The list of runs that `minimoe runs` shows: of each its state, its last step, its losses, its parameters, its size and its tags."""

from collections.abc import Collection, Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import msgspec

from minimoe.errors import UserError
from minimoe.reference.extensions import UnknownName
from minimoe.runs.finding import run_names
from minimoe.runs.records import Count, read_environment, whole_lines
from minimoe.runs.run import RUNS, Run
from minimoe.runs.sizes import folder_bytes, optimizer_bytes
from minimoe.runs.tags import read_tags

Row = dict[str, Any]
SORTS = {
    "name": "name", "created": "created", "step": "step", "loss": "loss", "validation": "val_loss", "parameters": "parameters",
    "size": "bytes",
}  # fmt: skip
"""What runs are sorted by: the name on the command line, and the field."""
STATES = ("running", "killed", "finished", "interrupted", "diverged", "failed", "unknown", "damaged")


def list_runs(root: Path = RUNS) -> list[Row]:
    """Return the runs under a folder, oldest first: name, state, step, steps, loss, val_loss, val_bits_per_byte,
    best_val_loss, val_accuracy, parameters, reason (why it ended early), created, bytes, optimizer_bytes (of these the
    optimizer's state, which pruning frees) and tags.

    Fields that a damaged folder lacks are None; its state is `damaged` if config.toml or metrics.jsonl cannot be read.
    """
    return sort_runs([describe(Run(root / name)) for name in run_names(root)], "created")


def sort_runs(rows: Iterable[Row], by: str, reverse: bool = False) -> list[Row]:
    """Return runs by one of `SORTS`: names from A to Z, the oldest, the lowest or the smallest first; those without it come last."""
    key = SORTS[by]
    found = sorted(rows, key=lambda row: row["name"])
    known = [row for row in found if row[key] not in (None, "")]
    return sorted(known, key=lambda row: row[key], reverse=reverse) + [row for row in found if row[key] in (None, "")]


def select_runs(rows: Iterable[Row], states: Collection[str] = (), tags: Collection[str] = (), pattern: str | None = None) -> list[Row]:
    """Return the runs that are in one of the states, have all of the tags, and whose name matches a pattern such as `tiny-*`."""
    return [
        row
        for row in rows
        if (not states or row["state"] in states)
        and set(tags) <= set(row["tags"])
        and (pattern is None or fnmatchcase(row["name"], pattern))
    ]


class _Row(msgspec.Struct):
    """The fields of a line of metrics that the list of runs shows; reading only these is quick."""

    step: Count
    loss: float | None = None
    val_loss: float | None = None
    val_bits_per_byte: float | None = None
    val_loss_sampled: float | None = None  # only in the last line: what is compared with the lines before
    val_accuracy: float | None = None


def describe(run: Run) -> Row:
    """Return what `list_runs` says of one run."""
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
        "bytes": folder_bytes(run.path),
        "optimizer_bytes": optimizer_bytes(run.path),
        "tags": read_tags(run.path),
    }


def _quick_rows(path: Path) -> Iterator[_Row]:
    decoder = msgspec.json.Decoder(_Row)
    for line in whole_lines(path):
        try:
            yield decoder.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            continue
