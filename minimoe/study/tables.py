"""Tables and bars as the terminal shows them."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from minimoe.data.pipes import size_text
from minimoe.errors import printable
from minimoe.figures import BARS, number, percent

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table
    from rich.text import Text

    from minimoe.data.store import Stored
    from minimoe.study.cached import Cached


def console() -> Console:
    """Return the terminal or, if output goes to a file, a console that is wide enough for every table."""
    from rich.console import Console

    return Console() if sys.stdout is not None and sys.stdout.isatty() else Console(width=120, force_jupyter=False)


def show(what: RenderableType) -> None:
    """Print a table, or a text as it is."""
    if isinstance(what, str):
        print(what)
    else:
        console().print(what)


def timings_table(title: str, caption: str, columns: Sequence[str]) -> Table:
    """Return an empty table of timings: kernels to the left, numbers to the right."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, caption=caption, caption_justify="left", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in columns:
        table.add_column(name, justify="left" if name in ("kernel", "kind") else "right", no_wrap=True)
    return table


def load_table(loads: list[list[float]], uniform: float, row: dict[str, Any] | None = None) -> RenderableType:
    """Return a row for each routed layer with a bar and share per expert (an even load is half a bar), above the balance of a metrics row.

    loads [layer][expert]; `uniform` is the balance loss of an even load.
    """
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 1), show_header=True)
    table.add_column("expert load", style="dim", no_wrap=True)
    experts = len(loads[0])
    if experts <= 8:
        for expert in range(experts):
            table.add_column(str(expert), justify="right", style="dim", no_wrap=True)
        for layer, shares in enumerate(loads):
            table.add_row(f"layer {layer}", *(_bar(share * experts).append(f"{share:4.0%}") for share in shares))
    else:  # bars alone, side by side
        table.add_column(f"0 to {experts - 1}", style="dim", overflow="fold")
        table.add_column("least", justify="right", no_wrap=True)
        table.add_column("most", justify="right", no_wrap=True)
        for layer, shares in enumerate(loads):
            bars = Text().join(_bar(share * experts) for share in shares)
            table.add_row(f"layer {layer}", bars, f"{min(shares):.1%}", f"{max(shares):.1%}")
    if row is None:
        return table
    balance = f"balance loss {number(row['aux_loss'], 3)} (even: {uniform:g}"
    if 1 < len(loads) <= 16:
        balance += f"; layers: {' '.join(number(own, 2) for own in row['aux_loss_layers'])}"
    entropy = f"load entropy {number(row['router_entropy'], 3)} (even: {math.log(experts):.3f})"
    return Group(table, Text(f"{balance})", style="dim"), Text(f"{entropy}   dropped {percent(row['dropped'])}", style="dim"))


def _bar(relative: float) -> Text:
    """Return the load of one expert over the even load, as a bar."""
    from rich.text import Text

    colour = "red" if relative < 0.05 else "yellow" if relative < 0.5 or relative > 2.0 else "green"
    return Text(BARS[min(8, round(relative * 4))], style=colour)


def domains_table(loads: dict[str, list[list[float]]]) -> Table:
    """Return each expert's share of the tokens of each domain. Experts whose shares differ between domains have specialised."""
    from rich.table import Table

    table = Table(title="expert load by domain", box=None, padding=(0, 1))
    table.add_column("", no_wrap=True)
    experts = len(next(iter(loads.values()))[0])
    shown = min(experts, 16)
    for expert in range(shown):
        table.add_column(str(expert), justify="right", style="dim", no_wrap=True)
    for layer in range(len(next(iter(loads.values())))):
        for domain, shares in loads.items():
            table.add_row(f"layer {layer} {domain}", *(f"{share:.0%}" for share in shares[layer][:shown]))
    if shown < experts:
        table.caption = f"the first {shown} of {experts} experts; --json has all"
    return table


def runs_table(rows: list[dict[str, Any]]) -> Table:
    """Return a row for each run, as `minimoe runs` prints them; a narrow terminal breaks a name, but cuts none off."""
    from rich.table import Table
    from rich.text import Text

    measured = any(row["val_accuracy"] is not None for row in rows)  # of texts, nothing but a loss is
    table = Table(show_edge=False, pad_edge=False)
    for name in ("run", "state", "step", "loss", "validation", "best", *(["accuracy"] if measured else []), "parameters"):
        table.add_column(name, justify="left" if name in ("run", "state") else "right", overflow="fold")
    for row in rows:
        count, name = row["parameters"], row["name"]
        table.add_row(
            Text(name if name.isprintable() else ascii(name)), row["state"], f"{row['step']}/{row['steps'] or '?'}",
            number(row["loss"]), number(row["val_loss"]), number(row["best_val_loss"]),
            *([percent(row["val_accuracy"])] if measured else []), "-" if count is None else f"{count:,}",
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
        tokenizer, count = ("-", "-") if header is None else (header.tokenizer, f"{header.columns['tokens'].count:,}")
        text = f"damaged: {one.problem}" if header is None else header.source
        table.add_row(one.name, Text(printable(tokenizer)), count, size_text(one.size), Text(printable(text)))
    return table


def cache_table(found: Sequence[Cached]) -> Table:
    """Return a row for each kind of what is kept outside of runs, and each folder that it is in."""
    from rich.table import Table
    from rich.text import Text

    table = Table(show_edge=False, pad_edge=False)
    for name in ("what", "files", "size", "folder"):
        table.add_column(name, justify="right" if name in ("files", "size") else "left", overflow="fold", no_wrap=name in ("files", "size"))
    for one in found:
        table.add_row(one.what, f"{one.files:,}", size_text(one.size), Text(printable(one.folder)))
    return table
