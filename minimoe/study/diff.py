"""What differs between two runs or configurations: keys, data, the weights that they started from, environment, results."""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minimoe.config import Config, load_config, preset_names, to_tables
from minimoe.errors import CheckpointError, ConfigError, UserError, printable
from minimoe.runs.finding import folder_to_read
from minimoe.runs.listing import describe
from minimoe.runs.records import read_environment
from minimoe.runs.run import RUNS, Run
from minimoe.training.differences import flat

if TYPE_CHECKING:
    from minimoe.study.tables import Rows

ENVIRONMENT = (
    "minimoe", "python", "numpy", "numba", "libc", "platform", "processor", "cpu_count", "cpu_quota", "backend", "threads",
)  # fmt: skip
RESULTS = ("state", "step", "parameters", "loss", "val_loss", "best_val_loss", "val_accuracy")
CHOSEN = ("configuration", "data", "start")
"""The sections that somebody chose: with equal ones, two runs are the same experiment. `start` is where the first weights came from."""
SECTIONS = (*CHOSEN, "environment", "results")

Values = dict[str, Any]


@dataclass(frozen=True)
class Side:
    """What is known of one run or configuration, by section and key, and what could not be read."""

    name: str
    sections: dict[str, Values]
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Difference:
    """What differs: by section, each key with both values (None: unset, or not known). Sections that only one side has are not compared."""

    a: str
    b: str
    differences: dict[str, dict[str, tuple[Any, Any]]]
    equal: dict[str, int]  # how many keys of each section are the same
    problems: list[str]

    @property
    def same(self) -> bool:
        """True if both configurations are known, and nothing that somebody chose differs, as far as it is known of both."""
        return "configuration" in self.differences and not any(self.differences.get(section) for section in CHOSEN)

    @property
    def verdict(self) -> str:
        """The last line of the report: what is the same, or that something differs."""
        known = [section for section in CHOSEN if section in self.differences]
        if self.same:
            return f"the same: {', '.join(known)}"
        differ = [section for section in known if self.differences[section]]
        return f"different: {', '.join(differ)}" if differ else "the configurations cannot be compared"

    def to_dict(self) -> dict[str, Any]:
        """Return what `minimoe diff --json` prints."""
        return {**asdict(self), "same": self.same}

    def table(self) -> Rows:
        """Return a row for each key that differs, below its section."""
        from minimoe.study.tables import Rows

        table = Rows(["", printable(self.a), printable(self.b)], left=3)
        for section, keys in self.differences.items():
            table.add(f"{section}: {_count(len(keys), self.equal[section])}", "", "", style="bold")
            for key, pair in keys.items():
                table.add(f"  {key}", *(shown(key, value) for value in pair))
        return table


def _count(differ: int, equal: int) -> str:
    return f"{equal} the same" if not differ else f"{differ} {'differs' if differ == 1 else 'differ'}, {equal} the same"


def diff(a: str | os.PathLike[str], b: str | os.PathLike[str], root: Path = RUNS) -> Difference:
    """Compare two runs (by folder or name, damaged ones too), presets or TOML files. Raises `UserError` for what is none of these."""
    one, other = side(os.fspath(a), root), side(os.fspath(b), root)
    differences: dict[str, dict[str, tuple[Any, Any]]] = {}
    equal = {}
    for section in one.sections.keys() & other.sections.keys():
        old, new = one.sections[section], other.sections[section]
        keys = [*old, *(key for key in new if key not in old)]
        differences[section] = {key: (old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)}
        equal[section] = len(keys) - len(differences[section])
    ordered = {name: differences[name] for name in SECTIONS if name in differences}
    return Difference(one.name, other.name, ordered, equal, [*one.problems, *other.problems])


def side(what: str, root: Path) -> Side:
    """Return what is known of a run, a preset or a TOML file."""
    if what in preset_names() or (what.endswith(".toml") and Path(what).is_file()):
        return Side(what, {"configuration": _flat(load_config(what))})
    try:
        folder = folder_to_read(what, root)
    except CheckpointError as error:
        if Path(what).exists():
            raise
        raise ConfigError(f"{error}; presets: {', '.join(preset_names())}") from None
    run, problems = Run(folder), list[str]()
    sections = {"data": _data(run), "environment": _environment(run), "results": _results(run, problems)}
    if start := _start(run):
        sections["start"] = start
    try:
        sections["configuration"] = _flat(run.config)
    except UserError as error:
        problems.append(str(error))
    return Side(what, sections, problems)


def _flat(config: Config) -> Values:
    return {key: value for key, value in flat(to_tables(config)).items() if key != "name"}


def _data(run: Run) -> Values:
    data = read_environment(run.path).get("data")
    return {key: data.get(key) for key in ("source", "sha256")} if isinstance(data, Mapping) else {}


def _start(run: Run) -> Values:
    """Return where the run's first weights came from: `weights` is "seed", or their folder, with step and digest; empty if not recorded."""
    weights = read_environment(run.path).get("weights")
    if not isinstance(weights, Mapping):
        return {"weights": weights} if weights else {}
    return {"weights": weights.get("path"), "step": weights.get("step"), "sha256": weights.get("sha256")}


def _environment(run: Run) -> Values:
    found = read_environment(run.path)
    blas = found.get("blas")
    names = [f"{entry.get('name')} {entry.get('version')}" for entry in blas if isinstance(entry, dict)] if isinstance(blas, list) else []
    return {**{key: found[key] for key in ENVIRONMENT if found.get(key) is not None}, **({"blas": ", ".join(names)} if names else {})}


def _results(run: Run, problems: list[str]) -> Values:
    described = describe(run)
    found = {key: described[key] for key in RESULTS if described[key] is not None}
    try:
        rows, damaged = run.metrics_file.readable_rows()
    except UserError as error:
        problems.append(str(error))
        return found
    if damaged:
        problems.append(f"{run.metrics_file.path}: {damaged} damaged line{'s' if damaged > 1 else ''}")
    speeds = [row["tokens_per_s"] for row in rows if row.get("tokens_per_s") is not None]
    times = [row["elapsed_s"] for row in rows if row.get("elapsed_s") is not None]
    return found | ({"tokens_per_s": statistics.median(speeds)} if speeds else {}) | ({"elapsed_s": times[-1]} if times else {})


def shown(key: str, value: Any) -> str:
    """Return a value as the table shows it: a digest by twelve digits, a folder below this one without the way here, a dash for None."""
    if value is None:
        return "-"
    if key == "sha256":
        return str(value)[:12]
    if key == "weights" and Path(value).is_relative_to(Path.cwd()):
        return printable(str(Path(value).relative_to(Path.cwd())))
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.5g}"
    return printable(value if isinstance(value, str) else str(value))
