"""The result of a sweep and how it is shown: a row for each combination, a column for each varied key and each figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minimoe.study.compare.comparison import LEGEND, Cells, Comparison

if TYPE_CHECKING:
    from minimoe.study.tables import Rows

SHOWN = {
    "steps": "steps", "training loss": "training", "validation loss": "validation", "  lowest to highest seed": "seeds",
    "validation accuracy": "accuracy", "dead experts": "dead", "seconds": "seconds",
}  # fmt: skip
"""Of the quantities of a comparison, those that a sweep shows, and their columns."""


@dataclass(frozen=True)
class Combinations(Comparison):
    """Combinations of values, each trained. `source`: the configuration that is varied."""

    source: str = ""

    @property
    def title(self) -> str:
        keys = " and ".join(self.rows[0].varied or ())
        seeds = f", {self.seeds} seeds each" if self.seeds > 1 else ""
        equal = "FLOPs" if self.budget == "flops" else self.budget
        return f"{self.source}: {len(self.rows)} combinations of {keys}: equal {equal}{seeds}"

    @property
    def best_text(self) -> str:
        """The best combination and its runs, in a line."""
        if not self.comparable:
            return "no combination is called the best: their losses do not compare"
        if self.best is None:
            return "no combination ended with a finite loss"
        keys = " ".join(f"{key}={shown(value)}" for key, value in (self.best.varied or {}).items())
        return f"best: {keys} ({', '.join(self.best.runs)})"

    def columns(self) -> dict[str, Cells]:
        """Return each column by its heading: the varied keys, then the figures."""
        varied = [row.varied or {} for row in self.rows]
        found = {head: tuple(shown(own[key]) for own in varied) for key, head in short_keys(list(varied[0])).items()}
        cells = self.cells()
        wanted = {**SHOWN, "bits per byte": "bits per byte"} if self.by_bytes else SHOWN
        for name, heading in wanted.items():
            if name in cells:
                found[heading] = self._mark(cells[name], "* ", "") if name == self.figure and self.best else cells[name]
        return found

    def table(self) -> Rows:
        """Return the sweep as a table for the terminal, or a list by combination; the lowest loss is marked."""
        from minimoe.study.tables import Rows

        columns = self.columns()
        table = Rows(list(columns), left=0, title=self.title, caption="\n".join([f"* the lowest. {LEGEND}", *self.notes]))
        for row, cells in zip(self.rows, zip(*columns.values(), strict=True), strict=True):
            table.add(*cells, style="bold green" if row is self.best else "")
        return table

    def markdown(self) -> str:
        """Return the sweep as a Markdown document."""
        columns = self.columns()
        lines = [f"# {self.title}", "", f"| {' | '.join([*columns, 'runs'])} |", f"|{' ---: |' * len(columns)} --- |"]
        for row, cells in zip(self.rows, zip(*columns.values(), strict=True), strict=True):
            lines.append(f"| {' | '.join(cells)} | {', '.join(f'`{run}`' for run in row.runs)} |")
        lines += ["", f"* the lowest. {LEGEND}", "", *(f"- {note}" for note in self.notes), f"- {self.best_text}"]
        return "\n".join(lines) + "\n"


def short_keys(keys: Sequence[str]) -> dict[str, str]:
    """Return each key without its table, where that leaves it distinct."""
    last = [key.rpartition(".")[2] for key in keys]
    return {key: name if last.count(name) == 1 else key for key, name in zip(keys, last, strict=True)}


def shown(value: Any) -> str:
    """Return a value as a table has it: equal values of different texts (1e-3, 0.001) look alike, a path is its last part."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return Path(value).name if "/" in value else value
    return repr(value).replace(" ", "")
