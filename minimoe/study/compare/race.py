"""Decides what is compared and for how many steps each is trained, and trains.

The budget is the amount that all have in common with the first: steps; tokens (steps x tokens per step); flops (training FLOPs, as
config/cost.py counts them); or seconds (the first's training time; a step of the others is timed in a short trial). Steps are rounded to
the nearest whole number.
"""

from __future__ import annotations

import math
import os
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec.structs import replace

from minimoe.config import Config, load_config, preset_names
from minimoe.config.given import Sources
from minimoe.data.pipes import is_pipe
from minimoe.errors import CheckpointError, UserError, nearest, printable
from minimoe.runs.run import RUNS, Run
from minimoe.study.compare.comparison import Comparison, Row, compared
from minimoe.study.compare.measure import check_finished, row_of, run_cost, steps_done, text_of, tokens_per_step

if TYPE_CHECKING:
    from minimoe.training.listener import Listener
    from minimoe.training.weights import Weights

BUDGETS = ("steps", "tokens", "flops", "seconds")
TRIAL_STEPS = 3
NEAR = 0.05  # a finished run that is this close to the budget needs no note


@dataclass
class Contender:
    """One source of a comparison: a configuration to train, or a finished run."""

    source: str
    name: str
    config: Config
    given: Run | None  # the finished run; None if it is to be trained
    sha256: str = ""  # of the data to train on


def compare(
    sources: Sequence[str | os.PathLike[str]], budget: str = "steps", seeds: int = 1, overrides: Iterable[str] = (),
    data: Sources | None = None, steps: int | None = None, backend: str | None = None, root: Path = RUNS,
    listener_for: Callable[[str], Listener] | None = None,
) -> Comparison:  # fmt: skip
    """Train each preset or TOML file with `seeds` seeds, each a run under `root`; read each finished run; set them side by side.

    overrides, data, backend: for all that are trained. steps: for the first. listener_for: returns the listener of the run with that label.
    Everything is checked before the first step. Raises `UserError` for fewer than two sources, an unknown name, a configuration that cannot
    be trained, a run that is not finished or damaged; `Diverged` and `Interrupted` as training does.
    """
    overrides, names = tuple(overrides), [os.fspath(source) for source in sources]
    check_request(names, budget, seeds)
    contenders = [find(name, root, overrides, data, backend) for name in names]
    check_options(contenders, seeds > 1 or bool(overrides or data or steps or backend), steps)
    distinct_names(contenders)
    first = contenders[0]
    if steps is not None:
        first.config = with_steps(first.config, steps)
    rows: list[Row] = []
    runs: list[list[Run]] = []
    for contender in contenders:
        if contender.given is None and rows:
            contender.config = with_steps(contender.config, steps_for(budget, contender.config, first.config, rows[0].seconds))
        runs.append([contender.given] if contender.given is not None else train_seeds(contender, seeds, root, listener_for))
        rows.append(row_of(contender.name, contender.source, runs[-1], trained=contender.given is None))
    by_bytes = are_compared_by_bytes(runs, rows)
    comparable = by_bytes or not texts_note(runs, by_bytes)
    return Comparison(budget, seeds, rows, notes_of(contenders, runs, rows, budget, by_bytes), by_bytes, comparable)


# ---- what is compared ----------------------------------------------------------------------------------------------------------------


def check_request(sources: list[str], budget: str, seeds: int) -> None:
    if len(sources) < 2:
        raise UserError(
            f"compare: needs two sources at least (presets, TOML files or finished runs), got {len(sources)}; one is trained with several "
            "values of a key by --vary KEY=A,B"
        )
    twice = [source for source, times in Counter(sources).items() if times > 1]
    if twice:
        raise UserError(f"compare: {twice[0]} is given twice: to see the spread of one configuration, give --seeds")
    check_budget(budget, seeds)


def check_budget(budget: str, seeds: int) -> None:
    if budget not in BUDGETS:
        raise UserError(f"compare: no budget {budget!r}{nearest(budget, BUDGETS)}")
    if seeds < 1:
        raise UserError(f"compare: --seeds ({seeds}) must be 1 or more")


def check_options(contenders: list[Contender], options: bool, steps: int | None) -> None:
    """Refuse options of training if nothing is trained."""
    if options and all(contender.given for contender in contenders):
        raise UserError("compare: all are finished runs, so nothing is trained: leave out --seeds, --steps, --data, --backend, --set")
    if steps is not None and contenders[0].given is not None:
        raise UserError(f"compare: --steps is for a first source that is trained, {contenders[0].source} is a finished run: put it second")


def find(
    source: str, root: Path, overrides: tuple[str, ...], data: Sources | None, backend: str | None, weights: Weights | None = None
) -> Contender:
    """Find a preset, a TOML file, or a finished run (its folder, or its name under `root`), and check it as far as possible.

    `weights`: those that a configuration starts from, which also complete it; None: they are drawn from its seed.
    """
    if source not in preset_names() and not (source.endswith(".toml") and not Path(source).is_dir()):
        run = find_run(source, root)
        return Contender(source, run.name, run.config, run)
    from minimoe.backend import load
    from minimoe.training.starting import with_options
    from minimoe.training.tasks import load_task

    config = load_config(source, overrides) if weights is None else weights.configuration(source, overrides)
    config = with_options(config, data=data, backend=backend)
    if weights is not None:
        weights.fit(config)
    pipe = next((part.source for part in config.data.parts if is_pipe(Path(part.source))), None)
    if pipe is not None:
        raise UserError(f"compare: {pipe} is a pipe, which can be read only once: save what it delivers, and give that file")
    config.check_trainable()
    task = load_task(config)
    settings = replace(task.config.train, backend=load(config.train.backend).name)
    return Contender(source, config.name, replace(task.config, train=settings), None, task.sha256)


def find_run(source: str, root: Path) -> Run:
    """Open a finished, undamaged run. Raises `CheckpointError`, for an unknown name with the nearest preset or run."""
    try:
        run = Run.open(source, root)
    except CheckpointError:
        if Path(source).exists() or (root / source).exists():
            raise
        runs = [folder.name for folder in (root.iterdir() if root.is_dir() else ()) if (folder / "config.toml").is_file()]
        hint = nearest(source, [*preset_names(), *runs])
        raise CheckpointError(f"{source}: no preset, TOML file or run of that name{hint}") from None
    if run.checkpoint is not None:
        raise CheckpointError(f"{source}: is a checkpoint, compare reads whole runs: give {run.path}")
    check_finished(run)
    row_of(source, source, [run])  # raises for a damaged run before anything is trained
    return run


def distinct_names(contenders: list[Contender]) -> None:
    """Name those that share a name by what was given on the command line; a name is shown, so a terminal must not obey it."""
    names = Counter(contender.name for contender in contenders)
    for contender in contenders:
        contender.name = printable(contender.source if names[contender.name] > 1 else contender.name)


# ---- for how many steps --------------------------------------------------------------------------------------------------------------


def with_steps(config: Config, steps: int) -> Config:
    return replace(config, train=replace(config.train, steps=steps))


def steps_for(budget: str, config: Config, first: Config, seconds: float) -> int:
    """Return the steps for which a configuration costs what the first did, at least one. `seconds`: those of the first."""
    from minimoe.study.bench import step_seconds

    if budget == "steps":
        return first.train.steps
    if budget == "seconds":
        return max(1, round(seconds / statistics.median(step_seconds(config, config.train.backend, TRIAL_STEPS))))
    wanted, each = first.train.steps * tokens_per_step(first), tokens_per_step(config)
    if budget == "flops":
        wanted, each = wanted * run_cost(first).training_flops_per_token, each * run_cost(config).training_flops_per_token
    return max(1, round(wanted / each))


def train_seeds(contender: Contender, seeds: int, root: Path, listener_for: Callable[[str], Listener] | None) -> list[Run]:
    """Train a run for each seed, counting up from the configuration's seed (0 by default)."""
    from minimoe.training.starting import train

    runs = []
    for seed in range(contender.config.train.seed, contender.config.train.seed + seeds):
        label = f"{contender.name}, seed {seed}, {contender.config.train.steps} steps"
        config = replace(contender.config, train=replace(contender.config.train, seed=seed))
        runs.append(train(config, root=root, listener=listener_for(label) if listener_for else None).run)
    return runs


# ---- what a reader should know -------------------------------------------------------------------------------------------------------


def notes_of(contenders: list[Contender], runs: list[list[Run]], rows: list[Row], budget: str, by_bytes: bool) -> list[str]:
    """Return a line for each thing that a reader of the figures should know."""
    notes = [*texts_note(runs, by_bytes), *capped_notes(runs), *early_notes(runs), *budget_notes(contenders, rows, budget)]
    return notes if not by_bytes and texts_note(runs, by_bytes) else [*notes, *chance_note(rows, by_bytes)]


def are_compared_by_bytes(runs: list[list[Run]], rows: list[Row]) -> bool:
    """Return True if the models differ in their tokenizers alone, and bytes are counted for all of them."""
    texts = {text_of(run) for group in runs for run in group}
    same = len({(sha256, *rest) for sha256, _, *rest in texts}) == 1
    return len(texts) > 1 and same and all(row.bits_per_byte is not None or math.isnan(row.val_loss.mean) for row in rows)


def texts_note(runs: list[list[Run]], by_bytes: bool) -> list[str]:
    """Return a note on what compares, if the models were not measured on the same tokens."""
    if by_bytes:
        return ["The tokenizers differ, so nats per token do not compare: the models are compared by bits per byte of the text."]
    texts = {text_of(run) for group in runs for run in group}
    return [] if len(texts) == 1 else ["The data, tokenizers, tasks or targets differ: losses do not compare."]


def capped_notes(runs: list[list[Run]]) -> list[str]:
    """Return a note for each model whose last validation did not cover the whole split; one note if it is the same for several."""
    capped = [(run.metrics_file.last_row() or {}).get("val_batches") for run, *_ in runs]
    texts = ["" if c is None else f"{c[0]:,} of {c[1]:,} batches (train.final_eval_batches)." for c in capped]
    if len(runs) > 1 and len(set(texts)) == 1:
        return [f"All validation losses are over {texts[0]}"] if texts[0] else []
    return [f"{run.name}: its validation loss is over {text}" for (run, *_), text in zip(runs, texts, strict=True) if text]


def early_notes(runs: list[list[Run]]) -> list[str]:
    """Return a note for each run that ended before its last step."""
    early = [run for group in runs for run in group if run.status().get("reason")]
    return [f"{run.name}: ended early at step {steps_done(run)} of {run.config.train.steps} (train.patience)." for run in early]


def budget_notes(contenders: list[Contender], rows: list[Row], budget: str) -> list[str]:
    """Return a note for each finished run that is far from the budget: it is read whatever the budget is."""
    amounts = {"steps": "steps", "tokens": "tokens", "flops": "training_flops", "seconds": "seconds"}
    wanted = float(getattr(rows[0], amounts[budget]))
    found = []
    for contender, row in zip(contenders[1:], rows[1:], strict=True):
        got = float(getattr(row, amounts[budget]))
        if contender.given is not None and abs(got - wanted) > NEAR * wanted:
            unit = "training FLOPs" if budget == "flops" else budget
            found.append(f"{row.name}, a finished run, has {got:.4g} {unit}, {rows[0].name} {wanted:.4g}: the budget does not hold for it.")
    return found


def chance_note(rows: list[Row], by_bytes: bool = False) -> list[str]:
    """Return a note on whether the difference between the two best is larger than that between seeds."""
    finite = [row for row in rows if math.isfinite(compared(row, by_bytes).mean)]
    if len(finite) < 2:
        return ["Losses that are not finite (nan) do not compare."]
    first, second = sorted(finite, key=lambda row: compared(row, by_bytes).mean)[:2]
    if any(len(row.runs) == 1 for row in (first, second)):
        return ["With one seed, a small difference may be chance; --seeds 3, for configurations, shows the spread."]
    if compared(first, by_bytes).max < compared(second, by_bytes).min:
        return [f"Every seed of {first.name} is below every seed of {second.name}."]
    return [f"The seeds of {first.name} and {second.name} overlap: their difference may be chance."]
