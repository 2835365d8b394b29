"""The result of a comparison and how it is shown: a column for each model, a row for each quantity."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minimoe.errors import ConfigError

if TYPE_CHECKING:
    from minimoe.study.tables import Rows

LEGEND = "Validation: nats per token (image) over the whole validation split, at the end. Training loss, load and drops: the last 10 steps."
Cells = tuple[str, ...]  # one quantity of each model, as text


@dataclass(frozen=True)
class Spread:
    """The mean over seeds, the lowest and the highest."""

    mean: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return the spread of some values; it is NaN if one of them is."""
        if any(math.isnan(value) for value in values):
            return cls(math.nan, math.nan, math.nan)
        return cls(sum(values) / len(values), min(values), max(values))


@dataclass(frozen=True)
class Row:
    """One model: its size, its cost and its results. Losses are in nats per token (image); figures of experts are None if it is dense."""

    name: str
    source: str
    runs: list[str]  # folders, one for each seed
    trained: bool  # in this comparison, within the budget; False for a finished run
    backend: str
    parameters: int
    active: int  # parameters that one token uses
    flops_per_token: int  # forward
    steps: int
    tokens: int
    training_flops: int  # over all steps
    seconds: float  # in training steps, without evaluations; mean over seeds
    tokens_per_s: float  # median over steps, mean over seeds
    loss: Spread  # mean of the last 10 steps
    val_loss: Spread  # whole validation split, at the end
    load_entropy: float | None  # entropy of the last 10 steps' load over ln E, 1 if even; the lowest of all layers, mean over seeds
    dropped: float | None  # fraction of slots that capacity dropped in the last 10 steps, mean over seeds
    dead_experts: float | None  # experts with a load below 1 / (20 E) in the last 10 steps, over all layers; mean over seeds
    experts: int  # over all layers
    val_accuracy: Spread | None = None  # whole validation split, at the end; None for a language model
    varied: dict[str, Any] | None = None  # the values of a sweep's keys
    bits_per_byte: Spread | None = None  # `val_loss` in bits per byte of the text; None where bytes are not counted


@dataclass(frozen=True, repr=False)
class Comparison:
    """Models side by side. `notes`: what a reader of the figures should know. `by_bytes`: their tokens differ, their bytes do not.

    `comparable`: False if they were measured on different text, so that none is the best.
    """

    budget: str
    seeds: int
    rows: list[Row]
    notes: list[str] = field(default_factory=list)
    by_bytes: bool = False
    comparable: bool = True

    @property
    def figure(self) -> str:
        """The name of the quantity by which models are compared."""
        return "bits per byte" if self.by_bytes else "validation loss"

    def __repr__(self) -> str:
        """Return the table, as `minimoe compare` prints it."""
        from rich.console import Console

        screen = Console(width=100, force_jupyter=False, force_terminal=False)
        with screen.capture() as text:
            screen.print(self.table())
        return text.get().rstrip()

    @property
    def best(self) -> Row | None:
        """The model with the lowest of it; None if all are NaN, or do not compare."""
        finite = [row for row in self.rows if self.comparable and math.isfinite(compared(row, self.by_bytes).mean)]
        return min(finite, key=lambda row: compared(row, self.by_bytes).mean) if finite else None

    @property
    def title(self) -> str:
        sides = " and ".join(row.name for row in self.rows) if len(self.rows) == 2 else f"{len(self.rows)} models"
        if not any(row.trained for row in self.rows):
            return f"{sides}: finished runs"
        seeds = f", {self.seeds} seeds each" if self.seeds > 1 else ""
        return f"{sides}: equal {'FLOPs' if self.budget == 'flops' else self.budget}{seeds}"

    @property
    def best_text(self) -> str:
        """What names the best below the table; empty where the table's columns have the names."""
        return ""

    # ---- what is shown ---------------------------------------------------------------------------------------------------------------

    def cells(self) -> dict[str, Cells]:
        """Return each quantity by name: its value for each model, as text."""
        rows = self.rows
        found = {
            "parameters": tuple(count(row.parameters) for row in rows),
            "active per token": tuple(count(row.active) for row in rows),
            "FLOPs per token, forward": tuple(count(row.flops_per_token) for row in rows),
            "backend": tuple(row.backend for row in rows),
            "steps": tuple(f"{row.steps:,}" for row in rows),
            "tokens": tuple(count(row.tokens) for row in rows),
            "training FLOPs": tuple(f"{row.training_flops:.3g}" for row in rows),
            "seconds": tuple(f"{row.seconds:,.{2 if row.seconds < 10 else 0}f}" for row in rows),
            "tokens/s": tuple(f"{row.tokens_per_s:,.0f}" for row in rows),
            "training loss": tuple(f"{row.loss.mean:.4f}" for row in rows),
            "validation loss": tuple(f"{row.val_loss.mean:.4f}" for row in rows),
        }
        if any(row.bits_per_byte for row in rows):
            found["bits per byte"] = tuple("-" if row.bits_per_byte is None else f"{row.bits_per_byte.mean:.4f}" for row in rows)
        if any(len(row.runs) > 1 for row in rows):
            spreads = ((row, compared(row, self.by_bytes)) for row in rows)
            ends = (f"{spread.min:.4f} to {spread.max:.4f}" if len(row.runs) > 1 else "-" for row, spread in spreads)
            found["  lowest to highest seed"] = tuple(ends)
        if any(row.val_accuracy for row in rows):
            found["validation accuracy"] = tuple("-" if row.val_accuracy is None else f"{row.val_accuracy.mean:.1%}" for row in rows)
        if any(row.experts for row in rows):
            found["lowest load entropy / ln E"] = tuple("-" if row.load_entropy is None else f"{row.load_entropy:.3f}" for row in rows)
            found["dropped"] = tuple("-" if row.dropped is None else f"{row.dropped:.1%}" for row in rows)
            found["dead experts"] = tuple("-" if row.dead_experts is None else f"{row.dead_experts:g} of {row.experts}" for row in rows)
        return found

    def table(self) -> Rows:
        """Return the comparison as a table for the terminal, or a list by model; the lowest validation loss is marked."""
        from minimoe.study.tables import Rows

        caption = "\n".join([f"* the lowest. {LEGEND}", *self.notes])
        table = Rows(["", *(row.name for row in self.rows)], title=self.title, caption=caption, by_column=True)
        for name, cells in self.cells().items():
            marked = name == self.figure
            shown = self._mark(cells, "* ", "") if marked and self.best else cells
            table.add(name, *shown, style="bold" if marked else "", section=name in ("FLOPs per token, forward", "tokens/s"))
        return table

    def markdown(self) -> str:
        """Return the comparison as a Markdown document."""
        lines = [f"# {self.title}", "", f"| | {' | '.join(row.name for row in self.rows)} |", f"| --- |{' ---: |' * len(self.rows)}"]
        for name, cells in self.cells().items():
            shown = self._mark(cells, "**", "**") if name == self.figure else cells
            lines.append(f"| {name.strip()} | {' | '.join(shown)} |")
        lines += ["", LEGEND + ("" if self.best is None else " In bold: the lowest."), ""]
        lines += [f"- {note}" for note in self.notes]
        lines += [f"- {row.name}: {', '.join(f'`{run}`' for run in row.runs)}" for row in self.rows]
        return "\n".join(lines) + "\n"

    def _mark(self, cells: Cells, before: str, after: str) -> Cells:
        best = self.best
        return tuple(f"{before}{cell}{after}" if row is best else cell for row, cell in zip(self.rows, cells, strict=True))

    # ---- what is kept ----------------------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Return the figures by name, for JSON: a number that is not finite is None."""
        best = self.best
        return {"budget": self.budget, "seeds": self.seeds, "best": best.name if best else None, "by": self.figure, "notes": self.notes,
                "rows": [plain(asdict(row)) for row in self.rows]}  # fmt: skip

    def save(self, root: Path = Path("runs")) -> Path:
        """Write root/compare-001.md and .json, counting up.   -> the Markdown file. Raises `ConfigError` if they cannot be written."""
        try:
            root.mkdir(parents=True, exist_ok=True)
            taken = [re.fullmatch(r"compare-(\d{3,})\.(md|json)", entry.name) for entry in root.iterdir()]
            number = max((int(match[1]) for match in taken if match), default=0) + 1
            path = root / f"compare-{number:03d}.md"
            with path.open("x", encoding="utf-8") as file:
                file.write(self.markdown())
            path.with_suffix(".json").write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{root}: the comparison cannot be written: {error.strerror}") from error
        return path


def compared(row: Row, by_bytes: bool) -> Spread:
    """Return the figure by which a model is compared with others."""
    return row.bits_per_byte if by_bytes and row.bits_per_byte is not None else row.val_loss


def count(number: float) -> str:
    """1234 -> 1,234; 1234567 -> 1.23 M"""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number:,}"


def plain(value: Any) -> Any:
    """Replace NaN and infinity by None, also inside lists and dicts."""
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, list):
        return [plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
