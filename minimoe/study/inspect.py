"""Computes what `minimoe inspect` shows: the cost of a model, the expert load of a run, and which experts of a folder were used."""

from __future__ import annotations

import io
import math
import os
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from minimoe.config import Config, load_config, preset_names
from minimoe.config.cost import Cost, cost
from minimoe.config.trained import trained_line, training_cost
from minimoe.errors import CheckpointError, ConfigError, UserError, printable
from minimoe.figures import file_size, memory_size, number, percent
from minimoe.pretrained.folder import is_model_folder
from minimoe.pretrained.loading import model_folder
from minimoe.runs.records import MetricsRow
from minimoe.runs.run import Run

if TYPE_CHECKING:
    from minimoe.study.tables import Rows

BYTE_VOCABULARY = 256


@dataclass(frozen=True, repr=False)
class Report:
    """A model's cost; for a run also its state, losses and expert load; for a model folder its files and the experts used."""

    name: str
    config: Config
    cost: Cost
    run: dict[str, Any] | None = None
    folder: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the report as `inspect --json` prints it."""
        facts = {"run": self.run, "folder": self.folder}
        return {"name": self.name, **self.cost.to_dict(), **{key: value for key, value in facts.items() if value}}

    def __repr__(self) -> str:
        """Return what `minimoe inspect` prints."""
        from rich.text import Text

        text = io.StringIO()
        with redirect_stdout(text):
            self.show()
        return Text.from_ansi(text.getvalue()).plain.rstrip()  # without colours, which a notebook's kernel asks for

    def show(self) -> None:
        """Print the cost part by part and, for a run or a folder, the load of its experts."""
        from minimoe.layers.balance import uniform_aux_loss
        from minimoe.study.load import LoadTable
        from minimoe.study.tables import show

        show_cost(self)
        if self.folder:
            show_folder(self.folder)
        if self.run:
            facts = self.run
            accuracy = "" if facts["val_accuracy"] is None else f"   accuracy {percent(facts['val_accuracy'])}"
            losses = f"loss {number(facts['loss'])}   validation loss {number(facts['val_loss'])}"
            show(f"{facts['state']} at step {facts['step']}   {losses}{accuracy}\n")
            if line := trained_line(self.config):
                show(f"{line}\n")
            if facts["weights"]:
                show(f"started from the weights of {printable(facts['weights']['path'])}\n")
            moe = self.config.model.moe
            if facts["expert_load"] and moe is not None:
                last = msgspec.to_builtins(msgspec.convert(facts["last"], MetricsRow))  # with all fields
                show(LoadTable(facts["expert_load"], uniform_aux_loss(moe, len(facts["expert_load"])), last))


def inspect(what: str | os.PathLike[str], overrides: tuple[str, ...] = ()) -> Report:
    """Report on a preset, a TOML file, a run, or a model folder; nothing is allocated. Raises `ConfigError` for anything else."""
    what = os.fspath(what)
    is_config = what in preset_names() or (what.endswith(".toml") and Path(what).is_file())
    if is_config and not is_model_folder(what):
        config = load_config(what, overrides)
        return Report(what, config, training_cost(_with_vocabulary(config)))
    folder = model_folder(what)
    if folder is not None:
        if overrides:
            raise ConfigError(f"{what}: is a model folder: --set is for a preset or a TOML file")
        return _inspect_folder(folder)
    try:
        run = Run.open(what)
    except CheckpointError as missing:
        if Path(what).exists():
            raise
        try:
            load_config(what)
        except ConfigError as error:
            raise ConfigError(f"{what}: no run of that name here, and {error}") from None
        raise missing from None
    if overrides:
        raise ConfigError(f"{what}: is a run: --set is for a preset or a TOML file")
    config = run.config
    return Report(run.name, config, training_cost(config, config.train.seq_len), _run_facts(run))


def _inspect_folder(path: Path) -> Report:
    """Report on a model folder: names and shapes are checked, weights are not read."""
    from minimoe.pretrained.expert_usage import recall
    from minimoe.pretrained.opening import open_folder

    model = open_folder(path)
    provenance = model.provenance
    assert provenance is not None
    files = provenance.folder.files.values()
    routed, moe = model.config.moe_layers(), model.config.moe
    used = recall(path, (len(routed), moe.n_experts)) if moe is not None and routed else None
    facts: dict[str, Any] = {
        "path": str(path), "family": provenance.family.model_type, "files": len(files),
        "bytes": sum(entry.stop - entry.start for file in files for entry in file.entries.values()),
        "dtypes": sorted({entry.dtype for file in files for entry in file.entries.values()}),
        "routed_layers": list(routed), "expert_rows": [layer.tolist() for layer in used or []],
    }  # fmt: skip
    config = Config(model=model.config, name=path.resolve().name or "model")
    return Report(config.name, config, cost(model.config), folder=facts)


def show_folder(facts: dict[str, Any]) -> None:
    """Print a model folder's files, and which of its experts were ever used on this machine."""
    from minimoe.study.load import LoadTable
    from minimoe.study.tables import show

    show(f"{facts['family']}: {file_size(facts['bytes'])} in {facts['files']} files, {', '.join(facts['dtypes'])}, read when needed\n")
    rows = facts["expert_rows"]
    if not rows and facts["routed_layers"]:
        show("experts used: none yet (`minimoe generate` notes them)")
    if rows:
        used = [sum(n > 0 for n in layer) for layer in rows]
        fewest, most, experts = min(used), max(used), len(rows[0])
        per_layer = f"{fewest}" if fewest == most else f"{fewest} to {most}"
        show(f"experts used here: {sum(used)} of {experts * len(rows)}, {per_layer} of {experts} per layer; their share of all rows:")
        show(LoadTable([[n / max(1, sum(layer)) for n in layer] for layer in rows], 0.0))


def _with_vocabulary(config: Config) -> Config:
    """Set the vocabulary: a byte tokenizer's is known, a char tokenizer's depends on the text, which is read if it is there."""
    from msgspec.structs import replace

    if config.model.vocab_size is not None or config.model.image_size:
        return config
    masked = config.model.head == "mlm"
    size = BYTE_VOCABULARY + masked
    if config.data.tokenizer != "byte":
        from minimoe.data.mixture import load_data
        from minimoe.training.tasks.masked import masked_vocabulary

        try:
            tokenizer = load_data(config.data).tokenizer
            size = masked_vocabulary(tokenizer) if masked else tokenizer.vocab_size
        except UserError as error:
            raise ConfigError(f"model.vocab_size comes from the text, and {error}: give it with --set model.vocab_size=65") from None
    return replace(config, model=replace(config.model, vocab_size=size))


def _run_facts(run: Run) -> dict[str, Any]:
    """Return state, losses and expert load of a run, from its metrics."""
    rows = run.metrics()
    last = rows[-1] if rows else {}
    validated = [row for row in rows if "val_loss" in row]
    latest = validated[-1] if validated else {}
    loads = [[share or 0.0 for share in layer] for layer in last.get("expert_load") or []]  # null: not finite
    if len({len(layer) for layer in loads}) != 1 or not loads[0]:
        loads = []
    entropies = [-sum(share * math.log(share) for share in layer if share > 0) for layer in loads]
    return {
        "path": str(run.path), "weights": run.origin(), "state": run.status()["state"], "step": last.get("step", 0),
        "loss": last.get("loss"),
        "val_loss": latest.get("val_loss"), "val_accuracy": latest.get("val_accuracy"), "expert_load": loads, "load_entropy": entropies,
        "skipped": sum(bool(row.get("skipped")) for row in rows), "last": last or None,
    }  # fmt: skip


def show_cost(report: Report) -> None:
    """Print parameters and FLOPs, in total and part by part, and the memory of weights, gradients, optimizer and cache in total."""
    from minimoe.study.tables import show

    counted, memory = report.cost, report.cost.bytes
    parameters = f"{counted.total:,} parameters, {counted.active:,} active per token"
    show(f"{printable(report.name)}: {parameters}, {counted.flops_per_token:,} FLOPs per token forward")
    show(cost_table(counted))
    show(
        f"weights {memory_size(memory.weights)}, gradients {memory_size(memory.gradients)}, optimizer {memory_size(memory.optimizer)}; "
        f"key/value cache {memory_size(memory.kv_cache_per_token)} per token; sequence length {counted.seq_len}\n"
    )


def cost_table(counted: Cost) -> Rows:
    """Return a table with a row for each part of the model, such as attention or experts."""
    from minimoe.study.tables import Rows

    table = Rows(("part", "count", "parameters", "active", "FLOPs per token", "share"))
    for part in counted.parts:
        share = part.flops_per_token / max(1, counted.flops_per_token)
        cells = (f"{n:,}" for n in (part.count, part.parameters, part.active, part.flops_per_token))
        table.add(part.name, *cells, f"{share:.1%}")
    return table
