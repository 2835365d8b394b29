"""Tables and texts that fit the terminal: a table that is too wide for it becomes a list, and no word or number is divided."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich.measure import Measurement

from minimoe.errors import printable
from minimoe.figures import file_size, number, percent

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
    from rich.table import Table
    from rich.text import Text

    from minimoe.data.store import Stored
    from minimoe.study.cached import Cached
    from minimoe.study.classify import ClassGuess
    from minimoe.study.fill import Guess


def wrapped(text: str, width: int) -> str:
    """Return a text with its lines broken between words, and going on two columns further in. A word that is too long stays whole."""
    lines = []
    for line in text.split("\n"):
        indent = " " * (len(line) - len(line.lstrip()))
        parts = textwrap.wrap(line, width, subsequent_indent=indent + "  ", break_long_words=False, break_on_hyphens=False)
        lines += parts if len(line) > width else [line]
    return "\n".join(lines)


def flow(items: Iterable[str | Text], width: int, indent: str = "") -> list[Text]:
    """Return the items side by side in lines that are shorter than the width. An item is never divided."""
    from rich.text import Text

    lines: list[Text] = []
    for item in items:
        if lines and len(lines[-1]) + 3 + len(item) < width:
            lines[-1].append("   ").append(item)
        else:
            lines.append(Text(indent).append(item))
    return lines


@dataclass
class Rows:
    """A table or, on a terminal that is too narrow for it, a list: the first cell of each row, and below it the others with their columns.

    `by_column`: the list has an entry for each column instead, and the first cells are the names.
    """

    columns: Sequence[str]
    left: int = 1  # so many columns are aligned to the left, the others to the right
    title: str = ""
    caption: str = ""
    by_column: bool = False
    cells: list[Sequence[str | Text]] = field(default_factory=list)
    styles: list[str] = field(default_factory=list)
    sections: list[bool] = field(default_factory=list)  # whether a line follows

    def add(self, *cells: str | Text, style: str = "", section: bool = False) -> None:
        """Add a row."""
        self.cells.append(cells)
        self.styles.append(style)
        self.sections.append(section)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.text import Text

        if self.title:
            yield Text(self.title, style="table.title")
        if self.__rich_measure__(console, options).maximum <= options.max_width:
            yield self._table()
        else:
            yield from self._list(options.max_width)
        if self.caption:
            yield Text(self.caption, style="table.caption")

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        """Return the width of the whole table."""
        width = Measurement.get(console, options.update(max_width=10_000), self._table()).maximum
        return Measurement(width, width)

    def _table(self) -> Table:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
        for at, name in enumerate(self.columns):
            table.add_column(Text(name), justify="left" if at < self.left else "right", no_wrap=True)
        for cells, style, section in zip(self.cells, self.styles, self.sections, strict=True):
            table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in cells), style=style, end_section=section)
        return table

    def _list(self, width: int) -> Iterator[Text]:
        from rich.text import Text

        names, rows = self.columns, self.cells
        if self.by_column:
            names, *rows = zip(self.columns, *self.cells, strict=True)  # type: ignore[assignment]
        for head, *cells in rows:
            indent = " " * (2 + len(head) - len(str(head).lstrip()))
            yield Text(str(head), style="bold")
            named = ((str(name).strip(), cell) for name, cell in zip(names[1:], cells, strict=True) if cell)
            items = (Text(f"{name}: " if name.isdigit() else f"{name} ").append(cell) for name, cell in named)
            yield from flow(items, width, indent)


def console() -> Console:
    """Return the terminal or, if output goes to a file, a console of 120 columns, unless COLUMNS says otherwise."""
    from rich.console import Console

    terminal = sys.stdout is not None and sys.stdout.isatty()
    return Console() if terminal or "COLUMNS" in os.environ else Console(width=120, force_jupyter=False)


def show(what: RenderableType) -> None:
    """Print a table; or a text, on a terminal with its lines broken between words. A file gets tables as wide as they are."""
    screen = console()
    if isinstance(what, str):
        print(wrapped(what, screen.width) if screen.is_terminal else what)
        return
    if isinstance(what, Rows) and not screen.is_terminal and "COLUMNS" not in os.environ:
        screen.width = max(screen.width, what.__rich_measure__(screen, screen.options).maximum)
    screen.print(what)


def timings_table(title: str, caption: str, columns: Sequence[str]) -> Rows:
    """Return an empty table of timings: kernels to the left, numbers to the right."""
    return Rows(columns, left=sum(name in ("kernel", "kind") for name in columns), title=title, caption=caption)


def domains_table(loads: dict[str, list[list[float]]]) -> Rows:
    """Return each expert's share of the tokens of each domain. Experts whose shares differ between domains have specialised."""
    experts = len(next(iter(loads.values()))[0])
    shown = min(experts, 16)
    table = Rows(["", *(str(expert) for expert in range(shown))], title="expert load by domain")
    for layer in range(len(next(iter(loads.values())))):
        for domain, shares in loads.items():
            table.add(f"layer {layer} {domain}", *(f"{share:.0%}" for share in shares[layer][:shown]))
    if shown < experts:
        table.caption = f"the first {shown} of {experts} experts; --json has all"
    return table


def fill_table(guesses: Iterable[Guess], title: str) -> Rows:
    """Return a row for each token that may fill a blank; a space or a line's end in it is visible."""
    table = Rows(["token", "probability"], title=title)
    for guess in guesses:
        table.add(repr(guess.token), percent(guess.probability))
    return table


def runs_table(rows: list[dict[str, Any]]) -> Rows:
    """Return a row for each run, as `minimoe runs` prints them; no name is ever shortened or broken."""
    measured = any(row["val_accuracy"] is not None for row in rows)  # of texts, nothing but a loss is
    tagged = any(row["tags"] for row in rows)
    accuracy, tags = (["accuracy"] if measured else []), (["tags"] if tagged else [])
    table = Rows(["run", "state", "step", "loss", "val loss", "best", *accuracy, "params", "size", *tags], left=2)
    for row in rows:
        count, name = row["parameters"], row["name"]
        table.add(
            name if name.isprintable() else ascii(name), row["state"], f"{row['step']}/{row['steps'] or '?'}",
            number(row["loss"]), number(row["val_loss"]), number(row["best_val_loss"]),
            *([percent(row["val_accuracy"])] if measured else []), "-" if count is None else f"{count:,}",
            file_size(row["bytes"]), *([" ".join(row["tags"])] if tagged else []),
        )  # fmt: skip
    return table


def tokens_table(found: Sequence[Stored]) -> Table:
    """Return a row for each folder of kept tokens: its name, tokenizer, number of tokens, size and source, or what is wrong with it."""
    from rich.table import Table
    from rich.text import Text

    table = Table(show_edge=False, pad_edge=False)
    for name in ("name", "tokenizer", "tokens", "size", "source"):
        right = name in ("tokens", "size")
        table.add_column(name, justify="right" if right else "left", overflow="fold", no_wrap=name in ("name", "tokens", "size"))
    for one in found:
        header = one.header
        tokenizer, count = ("-", "-") if header is None else (header.tokenizer, f"{header.count:,}")
        text = f"damaged: {one.problem}" if header is None else header.source
        table.add_row(one.name, Text(printable(tokenizer)), count, file_size(one.size), Text(printable(text)))
    return table


def cache_table(found: Sequence[Cached]) -> Table:
    """Return a row for each kind of what is kept outside of runs, and each folder that it is in."""
    from rich.table import Table
    from rich.text import Text

    table = Table(show_edge=False, pad_edge=False)
    for name in ("what", "files", "size", "folder"):
        table.add_column(name, justify="right" if name in ("files", "size") else "left", overflow="fold", no_wrap=name in ("files", "size"))
    for one in found:
        table.add_row(one.what, f"{one.files:,}", file_size(one.size), Text(printable(one.folder)))
    return table


def classes_table(found: Mapping[str, Sequence[ClassGuess]]) -> Rows:
    """Return a row for each likely class of each image; the first row of an image has its name."""
    table = Rows(["image", "class", "probability"], left=2)
    for name, guesses in found.items():
        for place, guess in enumerate(guesses):
            table.add("" if place else printable(name), printable(guess.name), f"{guess.probability:.1%}")
    return table
