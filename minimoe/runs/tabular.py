"""Metrics and lists of runs as CSV (RFC 4180, UTF-8, lines end in a newline), for spreadsheets. docs/runs.md has the columns.

A field that is a list becomes a column for each of its numbers: `expert_load` of layer 0, expert 3 is `load_0_3`. What is null in the JSON,
or was not measured, is an empty cell.
"""

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from msgspec.structs import fields

from minimoe.runs.records import MetricsRow

Row = Mapping[str, Any]
SHORT = {"expert_load": "load"}
SCALARS = [field.name for field in fields(MetricsRow) if "list" not in str(field.type) and "tuple" not in str(field.type)]
"""The columns that every table of metrics has, behind that of the run, in this order."""
FIELDS = (
    "name", "state", "step", "steps", "loss", "val_loss", "val_bits_per_byte", "best_val_loss", "val_accuracy", "parameters", "reason",
    "created", "bytes", "optimizer_bytes", "tags",
)  # fmt: skip
"""The columns of a list of runs, which are the fields of `list_runs`."""


def metrics_csv(runs: Mapping[str, Sequence[Row]]) -> Iterator[str]:
    """Yield the lines of a table with a row for each step of each run: {name: its metrics}."""
    found: dict[tuple[str, tuple[int, ...]], None] = {}
    for rows in runs.values():
        for row in rows:
            found.update(dict.fromkeys(_flat(row)))
    others = [key for key in found if not key[1] and key[0] not in SCALARS]
    lists = sorted(key for key in found if key[1])
    columns = [*((name, ()) for name in SCALARS), *others, *lists]
    yield _line(["run", *(_title(*column) for column in columns)])
    for name, rows in runs.items():
        for row in rows:
            cells = _flat(row)
            yield _line([name, *(_cell(cells.get(column)) for column in columns)])


def runs_csv(rows: Iterable[Row]) -> Iterator[str]:
    """Yield the lines of a table with a row for each run, with the fields of `minimoe runs --json`; tags are joined by spaces."""
    yield _line(FIELDS)
    for row in rows:
        yield _line([" ".join(value) if isinstance(value := row[column], list) else _cell(value) for column in FIELDS])


def _flat(row: Row) -> dict[tuple[str, tuple[int, ...]], Any]:
    """Return each number of a row by its field, and by its indices where the field is a list, or a list of lists."""
    found: dict[tuple[str, tuple[int, ...]], Any] = {}
    for name, value in row.items():
        if not isinstance(value, list):
            found[name, ()] = value
            continue
        for i, inner in enumerate(value):
            if isinstance(inner, list):
                found.update({(name, (i, j)): number for j, number in enumerate(inner)})
            else:
                found[name, (i,)] = inner
    return found


def _title(name: str, indices: tuple[int, ...]) -> str:
    return "_".join([SHORT.get(name, name), *map(str, indices)])


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _line(cells: Sequence[str]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\r\n").writerow(cells)  # so that cells with either of the two are quoted
    return text.getvalue().removesuffix("\r\n") + "\n"
