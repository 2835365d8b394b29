"""What differs between two runs or configurations: keys, data, environment, results."""

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
    from rich.console import RenderableType

ENVIRONMENT = (
    "minimoe", "python", "numpy", "numba", "libc", "platform", "processor", "cpu_count", "cpu_quota", "backend", "threads", "weights",
)  # fmt: skip
RESULTS = ("state", "step", "parameters", "loss", "val_loss", "best_val_loss", "val_accuracy")
CHOSEN = ("configuration", "data")
"""The sections that somebody chose: with equal ones, two runs are the same experiment."""

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
        """True if configuration and data are the same."""
        return not any(self.differences.get(section) for section in CHOSEN)

    def to_dict(self) -> dict[str, Any]:
        """Return what `minimoe diff --json` prints."""
        return {**asdict(self), "same": self.same}

    def table(self) -> RenderableType:
        """Return a table with a row for each key that differs."""
        from rich import box
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), min_width=60)
        table.add_column("", overflow="fold", min_width=20)
        table.add_column(Text(printable(self.a)), overflow="fold", ratio=1)
        table.add_column(Text(printable(self.b)), overflow="fold", ratio=1)
        for section, keys in self.differences.items():
            table.add_row(Text(section, style="bold"), Text(_count(len(keys), self.equal[section]), style="dim"), "")
            for key, pair in keys.items():
                table.add_row(Text(f"  {key}"), *(Text(shown(key, value)) for value in pair))
        verdict = "configuration and data are the same" if self.same else "configuration or data differ"
        return Group(table, *(Text(f"not compared: {problem}") for problem in self.problems), Text(verdict))


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
    order = ("configuration", "data", "environment", "results")
    ordered: dict[str, dict[str, tuple[Any, Any]]] = {name: differences[name] for name in order if name in differences}
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
    """Return a value as the table shows it: digests are cut to twelve digits, and what is not set is a dash."""
    if value is None:
        return "-"
    if key == "sha256":
        return str(value)[:12]
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.5g}"
    return printable(value if isinstance(value, str) else str(value))
