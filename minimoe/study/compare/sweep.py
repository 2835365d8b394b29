"""A sweep: one configuration with every combination of some values, each trained within the same budget.

    sweep("tiny-moe", ["train.lr=1e-3,3e-4", "moe.n_experts=4,8"]).best

A combination is known by its whole configuration and the digest of its data. So a second call reads the runs that are finished, resumes
those that were stopped, and trains only the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace as with_field
from itertools import product
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from msgspec.structs import replace

from minimoe.config import Config
from minimoe.config.files import override_value
from minimoe.errors import CheckpointError, ConfigError, Diverged, Interrupted, UserError, printable
from minimoe.runs.finding import run_names
from minimoe.runs.folders import folder_name
from minimoe.runs.records import read_environment
from minimoe.runs.run import RUNS, Run
from minimoe.study.compare.combinations import Combinations, short_keys, shown
from minimoe.study.compare.comparison import Row
from minimoe.study.compare.measure import row_of
from minimoe.study.compare.race import Contender, are_compared_by_bytes, check_budget, find, notes_of, steps_for, texts_note, with_steps
from minimoe.training.weights import Weights, open_weights

if TYPE_CHECKING:
    from minimoe.training.listener import Listener

MOST = 64  # runs
MOST_NAME = 100  # characters of a run's name
OWN_OPTION = {"train.steps": "--steps", "train.seed": "--seeds"}


class Varied(NamedTuple):
    """A key and its values, as `--set` takes them and as they are shown."""

    key: str
    texts: list[str]
    values: list[Any]


class Start(NamedTuple):
    """What the runs of a sweep have in common: budget and folder, and the weights that they start from (None: drawn from the seed)."""

    budget: str
    root: Path
    init: str | None
    weights: Weights | None

    def is_that_of(self, run: Run) -> bool:
        """Return True if a run started from the same weights."""
        recorded = read_environment(run.path).get("weights")
        if self.weights is None:
            return not isinstance(recorded, dict)
        return isinstance(recorded, dict) and recorded.get("sha256") == self.weights.sha256


def sweep(
    source: str, vary: Iterable[str], *, budget: str = "steps", seeds: int = 1, overrides: Iterable[str] = (), data: str | None = None,
    steps: int | None = None, backend: str | None = None, init: str | None = None, root: Path = RUNS,
    listener_for: Callable[[str], Listener] | None = None, say: Callable[[str], None] = lambda text: None,
) -> Combinations:  # fmt: skip
    """Train a preset or TOML file with every combination of the values in `vary` ("train.lr=1e-3,3e-4"), each with `seeds` seeds.

    The first combination sets the budget, as in `compare`, whose other arguments these are. `init`: a run, a checkpoint or a model folder
    whose weights each of them starts from, as in `train`. `say` is told of runs that are only read. A run that diverges has a loss of NaN.
    Everything is checked before the first step. Raises `UserError` for what cannot be trained, for unknown keys, for a single value and for
    more than 64 runs; `Interrupted` as training does.
    """
    overrides = tuple(overrides)
    check_budget(budget, seeds)
    varied = [read_varied(text) for text in vary]
    check_varied(varied, overrides, seeds)
    if init is not None and budget == "seconds":
        raise UserError("compare: --init and --budget seconds do not go together: a step is timed from drawn weights; give another budget")
    weights = None if init is None else open_weights(init, root)
    contenders = list(combinations(source, varied, overrides, data, backend, root, weights))
    first = contenders[0]
    if steps is not None:
        first.config = with_steps(first.config, steps)
    rows: list[Row] = []
    runs: list[list[Run]] = []
    for number, contender in enumerate(contenders, start=1):
        if rows:
            contender.config = with_steps(contender.config, steps_for(budget, contender.config, first.config, rows[0].seconds))
        label = f"{number} of {len(contenders)}: {contender.name}"
        runs.append(list(seeds_of(contender, Start(budget, root, init, weights), seeds, label, listener_for, say)))
        rows.append(row_of(contender.name, contender.source, runs[-1], trained=True, diverged=True))
    values = [dict(zip([v.key for v in varied], combined, strict=True)) for combined in product(*(v.values for v in varied))]
    rows = [with_field(row, varied=value) for row, value in zip(rows, values, strict=True)]
    by_bytes, name = are_compared_by_bytes(runs, rows), printable(Path(source).stem if source.endswith(".toml") else source)
    comparable = by_bytes or not texts_note(runs, by_bytes)
    notes = notes_of(contenders, runs, rows, budget, by_bytes)
    if weights is not None:
        notes.insert(0, f"All start from the weights of {printable(weights.named)}.")
    return Combinations(budget, seeds, rows, notes, by_bytes, comparable, name)


# ---- what is varied ------------------------------------------------------------------------------------------------------------------


def read_varied(text: str) -> Varied:
    """Return the key and the values of `train.lr=1e-3,3e-4`. Raises `ConfigError` for fewer than two values, or equal ones."""
    key, separator, rest = text.partition("=")
    key = key.strip()
    if not separator or not key:
        raise ConfigError(f"--vary {text}: expected KEY=A,B,..., as in --vary train.lr=1e-3,3e-4")
    texts = split_values(rest)
    if len(texts) < 2:
        raise ConfigError(f"--vary {text}: needs two values or more, separated by commas; --set {text} gives one")
    values = [override_value(key, part) for part in texts]
    for i, value in enumerate(values):
        if any(value == other and type(value) is type(other) for other in values[:i]):
            raise ConfigError(f"--vary {text}: {texts[i]} is given twice")
    return Varied(key, texts, values)


def split_values(text: str) -> list[str]:
    """Split at commas that are neither within brackets nor within quotes."""
    parts, depth, quote = [""], 0, ""
    for char in text:
        if quote:
            quote = "" if char == quote else quote
        elif char in "\"'":
            quote = char
        depth += 0 if quote else (char in "[{") - (char in "]}")
        if char == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += char
    return [part.strip() for part in parts if part.strip()]


def check_varied(varied: list[Varied], overrides: tuple[str, ...], seeds: int) -> None:
    """Refuse keys that are given twice or that have an option of their own, and more runs than `MOST`. Raises `ConfigError`."""
    keys = [v.key for v in varied]
    given = {override.partition("=")[0].strip() for override in overrides}
    for key in keys:
        if keys.count(key) > 1:
            raise ConfigError(f"--vary {key} is given twice: give all its values at once, separated by commas")
        if key in given:
            raise ConfigError(f"--set {key} and --vary {key} both give its value: keep one")
        if key in OWN_OPTION:
            what = "every run gets the same budget" if key == "train.steps" else "it would be chance that is compared"
            raise ConfigError(f"--vary {key}: {what}: give {OWN_OPTION[key]}")
    counts = [len(v.texts) for v in varied]
    runs = prod(counts) * seeds
    if runs > MOST:
        asked = " x ".join(map(str, counts)) + (f" combinations x {seeds} seeds" if seeds > 1 else "")
        shown = f"{asked} = {runs}" if len(counts) > 1 or seeds > 1 else str(runs)
        raise ConfigError(f"--vary asks for {shown} runs: at most {MOST}, so leave out values, or sweep in parts")


def combinations(
    source: str, varied: list[Varied], overrides: tuple[str, ...], data: str | None, backend: str | None, root: Path,
    weights: Weights | None = None,
) -> Iterator[Contender]:
    """Yield each combination, checked; its label is its name, and names the run's folder too. Raises `UserError` with the keys."""
    short = short_keys([v.key for v in varied]).values()
    for texts, values in zip(product(*(v.texts for v in varied)), product(*(v.values for v in varied)), strict=True):
        label = " ".join(f"{key}={shown(value)}" for key, value in zip(short, values, strict=True))
        sets = [f"{v.key}={text}" for v, text in zip(varied, texts, strict=True)]
        try:
            found = find(source, root, (*overrides, *sets), data, backend, weights)
        except UserError as error:
            raise type(error)(f"--vary {printable(' '.join(sets))}: {error}") from None
        if found.given is not None:
            raise UserError(f"compare: --vary trains a configuration: {source} is a run; its own is {found.given.path / 'config.toml'}")
        name = f"{found.config.name} {label}"[:MOST_NAME]
        yield Contender(found.source, printable(label), replace(found.config, name=name), None, found.sha256)


# ---- runs that are trained, resumed or read --------------------------------------------------------------------------------------------


def seeds_of(
    contender: Contender, start: Start, seeds: int, label: str, listener_for: Callable[[str], Listener] | None, say: Callable[[str], None]
) -> Iterator[Run]:  # fmt: skip
    """Yield the run of each seed, counting up from the configuration's."""
    settings = contender.config.train
    for seed in range(settings.seed, settings.seed + seeds):
        config = replace(contender.config, train=replace(settings, seed=seed))
        run = same_run(config, contender.sha256, start)
        state = None if run is None else run.status()["state"]
        if run is not None and state in ("finished", "diverged"):
            say(f"== {label}, seed {seed}: {state} before, in {run.path}")
            yield run
            continue
        if run is not None and state == "running":
            raise CheckpointError(f"{run.path}: another process trains this combination: wait until it is finished")
        listener = None if listener_for is None else listener_for(f"{label}, seed {seed}, {config.train.steps} steps")
        yield trained(config, run, contender.sha256, start, listener)


def trained(config: Config, run: Run | None, sha256: str, start: Start, listener: Listener | None) -> Run:
    """Train a combination from its start, or resume its run.   -> the run, finished or diverged"""
    from minimoe.training.starting import resume, train

    try:
        if run is not None:
            return resume(run.path, listener=listener).run
        return train(config, init=start.init, root=start.root, listener=listener).run
    except Diverged as error:
        found = same_run(config, sha256, start)
        if found is None:
            raise
        if listener is not None:
            listener.warned(str(error))
        return found
    except Interrupted as error:
        raise Interrupted(error.exit_code - 128, "the state was saved: the same command goes on from there") from error


def same_run(config: Config, sha256: str, start: Start) -> Run | None:
    """Return the newest run of this configuration, these data and the same first weights; None if there is none.

    With equal seconds, the number of steps comes from a measured trial, and is not compared.
    """
    for name in reversed([name for name in run_names(start.root) if name.startswith(folder_name(config.name))]):
        run = Run(start.root / name)
        with suppress(UserError):  # what is damaged is not taken for it
            found = with_steps(run.config, config.train.steps) if start.budget == "seconds" else run.config
            if start.weights is not None and start.weights.kept_tokenizer:  # a copy, which the run keeps
                found = replace(found, data=replace(found.data, tokenizer=config.data.tokenizer))
            if found == config and run.data_sha256() == sha256 and start.is_that_of(run):
                return run
    return None
