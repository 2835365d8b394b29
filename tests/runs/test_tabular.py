"""Metrics and lists of runs as CSV: read back, they are what the JSON has."""

import csv
import io
from pathlib import Path
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st
from tiny_runs import tiny, train, write_text

from minimoe.runs.listing import list_runs
from minimoe.runs.tabular import FIELDS, SCALARS, metrics_csv, runs_csv
from minimoe.runs.tags import change_tags

NUMBERS = st.none() | st.floats(allow_nan=False, allow_infinity=False)


def read(lines: Any) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO("".join(lines))))


def test_every_number_of_the_metrics_is_a_cell(tmp_path: Path) -> None:
    run = train(tiny(write_text(tmp_path), model={"n_layers": 2}, steps=4, eval_every=2, eval_batches=1), tmp_path / "runs")
    rows = read(metrics_csv({"a": run.metrics, "b": run.metrics[:1]}))
    assert [(row["run"], row["step"]) for row in rows] == [("a", "1"), ("a", "2"), ("a", "3"), ("a", "4"), ("b", "1")]
    for row, metrics in zip(rows, run.metrics, strict=False):
        assert float(row["loss"]) == metrics["loss"] and row["skipped"] == "false"
        assert float(row["load_1_3"]) == metrics["expert_load"][1][3]
        assert float(row["aux_loss_layers_0"]) == metrics["aux_loss_layers"][0]
        assert row["val_loss"] == ("" if "val_loss" not in metrics else str(metrics["val_loss"]))
    assert list(rows[0])[: len(SCALARS) + 1] == ["run", *SCALARS] and SCALARS[:2] == ["step", "loss"]
    assert list(rows[0])[-8:] == [f"load_{layer}_{expert}" for layer in range(2) for expert in range(4)]


LOADS = st.lists(st.lists(NUMBERS, max_size=12), max_size=3)
OPTIONAL = {"loss": NUMBERS, "expert_load": LOADS, "of a later version": NUMBERS | st.text(max_size=5)}


@given(st.lists(st.fixed_dictionaries({"step": st.integers(1, 99)}, optional=OPTIONAL), max_size=5))
@example([{"step": 1, "of a later version": "\r0"}])
def test_any_rows_read_back(metrics: list[dict[str, Any]]) -> None:
    rows = read(metrics_csv({'a "b", c': metrics}))
    assert len(rows) == len(metrics)
    for row, given_ in zip(rows, metrics, strict=True):
        assert row["run"] == 'a "b", c' and row["loss"] == ("" if given_.get("loss") is None else str(given_["loss"]))
        cells = {f"load_{i}_{j}": x for i, layer in enumerate(given_.get("expert_load", [])) for j, x in enumerate(layer) if x is not None}
        assert {key: float(value) for key, value in row.items() if key.startswith("load_") and value} == cells


def test_a_table_without_rows_has_its_header(tmp_path: Path) -> None:
    assert "".join(metrics_csv({"a": []})) == ",".join(["run", *SCALARS]) + "\n"
    assert "".join(runs_csv(list_runs(tmp_path))) == ",".join(FIELDS) + "\n"


def test_every_field_of_a_run_is_a_column(tmp_path: Path) -> None:
    run = train(tiny(write_text(tmp_path), steps=1), tmp_path / "runs")
    change_tags(run.path, add=["b", "a"])
    (found,) = list_runs(tmp_path / "runs")
    assert tuple(found) == FIELDS
    (row,) = read(runs_csv([found]))
    assert row["tags"] == "a b" and row["val_accuracy"] == "" and float(row["loss"]) == found["loss"]
