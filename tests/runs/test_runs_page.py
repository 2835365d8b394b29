"""docs/runs.md names what a real run writes: every file, and every field of each file, no more and no fewer."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from tiny_runs import tiny, train, write_text

import minimoe as mm
from minimoe.runs.records import Status
from minimoe.runs.run import Run
from minimoe.runs.samples_file import Sample
from minimoe.runs.tabular import FIELDS, metrics_csv
from minimoe.runs.tags import change_tags
from minimoe.training.trained_run import TrainedRun

PAGE = (Path(__file__).parents[2] / "docs" / "runs.md").read_text(encoding="utf-8")


def named(heading: str) -> set[str]:
    """The names in backticks that begin the rows of the tables below a heading."""
    section = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", PAGE, flags=re.MULTILINE | re.DOTALL)
    assert section, f"docs/runs.md has no section {heading}"
    cells = re.findall(r"^\| (`[^|]+) \|", section[1], flags=re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[TrainedRun]:
    """A routed language model whose last validation is capped, and a routed model that fills in blanks, whose accuracy is measured."""
    folder = tmp_path_factory.mktemp("runs")
    config = tiny(write_text(folder), steps=4, eval_every=2, eval_batches=1, final_eval_batches=2, sample_every=2, patience=9)
    masked = tiny(folder / "text.txt", model={"head": "mlm", "causal": False}, steps=4, eval_every=2)
    return [train(config, folder / "runs"), train(replace(masked, name="masked"), folder / "runs")]


def test_the_page_names_every_field_of_metrics(runs: list[TrainedRun]) -> None:
    fields = {key for run in runs for line in (run.path / "metrics.jsonl").read_text().splitlines() for key in json.loads(line)}
    assert named("metrics.jsonl") == fields


def test_the_page_names_every_column_of_a_csv(runs: list[TrainedRun]) -> None:
    assert named("CSV") == set(FIELDS)
    columns = "".join(metrics_csv({"a": runs[0].metrics, "b": runs[1].metrics})).splitlines()[0].split(",")
    families = {re.sub(r"load_\d+_\d+", "load_L_E", re.sub(r"layers_\d+", "layers_L", column)) for column in columns}
    section = PAGE[PAGE.index("\n## CSV\n") : PAGE.index("\n## One process at a time\n")]
    others = families - named("metrics.jsonl")
    assert others == {"run", "load_L_E", "aux_loss_layers_L", "val_batches_0", "val_batches_1"}
    assert all(f"`{name}`" in section for name in others)


def test_the_page_names_every_field_of_samples() -> None:
    assert named("samples.jsonl") == set(Sample.__struct_fields__)


def test_the_page_names_every_field_of_status_json(runs: list[TrainedRun]) -> None:
    finished = set(json.loads((runs[0].path / "status.json").read_text()))
    assert named("status.json") == finished | {"error", "reason"}
    assert named("status.json") >= set(Status.__struct_fields__), "as it is read"


def test_the_page_names_every_field_of_env_json(runs: list[TrainedRun]) -> None:
    assert named("env.json") == set(json.loads((runs[0].path / "env.json").read_text()))


def test_the_page_names_every_file(runs: list[TrainedRun], tmp_path: Path) -> None:
    piped = Run.create(runs[0].config, tmp_path / "piped", kept=b"what came through a pipe")
    piped.metrics_file.path.write_bytes(b"damaged\n")
    assert piped.go_back(0, None)
    change_tags(piped.path, add=["keep"])
    locked = {path.name for path in piped.path.iterdir()}
    piped.release()
    adapted = mm.train(init=runs[0].path, root=tmp_path, steps=1, overrides=["lora.rank=2"])
    assert "base.safetensors" in {path.name for path in adapted.path.iterdir()}
    char = replace(runs[0].config.data, tokenizer="char")
    model = replace(runs[0].config.model, vocab_size=None)
    source = train(replace(runs[0].config, name="char", data=char, model=model), tmp_path)
    with_tokenizer = {path.name for path in mm.train(init=source.path, root=tmp_path, steps=1).path.iterdir()}
    found = {path.name for run in (runs[0], adapted) for path in run.path.iterdir()} | with_tokenizer | locked | {"last"}
    assert (runs[0].path.parent / "last").is_file()
    assert {name.rstrip("/") for name in named("The folder")} == found
    step = runs[0].path / "checkpoints" / "step-000004"
    assert {name for name in named("Checkpoints") if name != "best"} == {path.name for path in step.iterdir()}
    assert (runs[0].path / "checkpoints" / "best").is_file()


def test_the_page_names_every_field_of_a_checkpoints_state(runs: list[TrainedRun], tmp_path: Path) -> None:
    state: dict[str, Any] = json.loads((runs[0].path / "checkpoints" / "step-000004" / "state.json").read_text())
    assert named("state.json") == set(state) | {"base_sha256"}
    adapted = mm.train(init=runs[0].path, root=tmp_path, steps=1, overrides=["lora.rank=2"])
    assert "base_sha256" in json.loads((adapted.path / "checkpoints" / "step-000001" / "state.json").read_text())
