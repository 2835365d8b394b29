"""The load of every expert, as lines that fit a terminal: bars, of which an even load fills half, and figures where they fit."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from minimoe.figures import BARS, number, percent

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.text import Text

LIMITS = "  min%  max%"
Loads = Sequence[Sequence[float]]  # [layer][expert], the share of each expert


@dataclass(frozen=True)
class LoadTable:
    """All layers and, of a metrics row, their balance. `uniform` is the balance loss of an even load."""

    loads: Loads
    uniform: float
    row: dict[str, Any] | None = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from load_lines(self.loads, options.max_width)
        if self.row is not None:
            yield from balance_lines(self.loads, self.uniform, self.row, options.max_width)


def load_lines(loads: Loads, width: int, most: int | None = None) -> list[Text]:
    """Return a head and a line, or several, for each layer.

    If there are more than `most`, layers without figures stand side by side or, if that is not enough, the least even layers are shown and
    the others counted.
    """
    from rich.text import Text

    layers = list(range(len(loads)))
    head, lines_of = _with_figures(loads, width) or _bars_alone(loads, width)
    each = len(lines_of(0))
    if most is None or 1 + len(layers) * each <= most:
        return [head, *(line for layer in layers for line in lines_of(layer))]
    together = _side_by_side(loads, width)
    if together and len(together) <= most:
        return together
    count = (most - 2) // each
    if count < 1:
        return [Text(f"expert load {_range(loads)} in {len(layers)} layers", style="dim")][: max(0, most)]
    kept = sorted(sorted(layers, key=lambda layer: _entropy(loads[layer]))[:count])
    others = [loads[layer] for layer in layers if layer not in kept]
    rest = Text(f"and {len(others)} more even layers: {_range(others)}", style="dim")
    return [head, *(line for layer in kept for line in lines_of(layer)), rest]


def _with_figures(loads: Loads, width: int) -> tuple[Text, Any] | None:
    """Return the head and the lines of a layer with the share of each expert beside its bar; None if they do not fit."""
    from rich.text import Text

    experts = len(loads[0])
    for gap, title in ((2, "expert load"), (1, "expert")):
        label = max(len(title), len(f"layer {len(loads) - 1}"))
        if label + experts * (gap + 5) < width:
            break
    else:
        return None

    def lines_of(layer: int) -> list[Text]:
        line = Text(f"layer {layer}".ljust(label), style="dim")
        for share in loads[layer]:
            line.append(" " * gap).append_text(_bars([share], experts)).append(f"{share:4.0%}")
        return [line]

    return Text(title.ljust(label) + "".join(f"{expert:>{gap + 5}}" for expert in range(experts)), style="dim"), lines_of


def _bars_alone(loads: Loads, width: int) -> tuple[Text, Any]:
    """Return the same with bars side by side, in as many lines as they need, and the lowest and the highest share."""
    from rich.text import Text

    experts, last = len(loads[0]), len(loads) - 1
    for word in ("layer ", ""):
        label = len(f"{word}{last}")
        room = max(8, width - label - 2 - len(LIMITS))
        if experts <= room:
            break
    lines = math.ceil(experts / room)
    per_line = math.ceil(experts / lines)
    title = f"expert load, 0 to {experts - 1}"
    across = max(per_line, len(title) - label - 1)

    def lines_of(layer: int) -> list[Text]:
        shares, found = loads[layer], []
        for first in range(0, experts, per_line):
            bars = _bars(shares[first : first + per_line], experts)
            bars.pad_right(across - len(bars))
            found.append(Text(("" if first else f"{word}{layer}").rjust(label) + " ", style="dim").append_text(bars))
        found[0].append(f" {min(shares) * 100:>5.1f} {max(shares) * 100:>5.1f}")
        return found

    return Text(title.ljust(label + 1 + across) + LIMITS, style="dim"), lines_of


def _side_by_side(loads: Loads, width: int) -> list[Text]:
    """Return the bars of all layers in columns; nothing if there is no room for two of them."""
    from rich.text import Text

    experts, digits = len(loads[0]), len(str(len(loads) - 1))
    columns = (width + 2) // (digits + 1 + experts + 3)
    if columns < 2:
        return []
    count = math.ceil(len(loads) / columns)
    lines = [Text(f"expert load of layers 0 to {len(loads) - 1}: {_range(loads)}", style="dim")]
    for first in range(count):
        shown = range(first, len(loads), count)
        cells = (Text(f"{layer:>{digits}} ", style="dim").append_text(_bars(loads[layer], experts)) for layer in shown)
        lines.append(Text("   ").join(cells))
    return lines


def balance_lines(loads: Loads, uniform: float, row: dict[str, Any], width: int) -> list[Text]:
    """Return the balance loss, of all layers and of each if that fits, then the entropy of the load and what capacity dropped."""
    from rich.text import Text

    own = [math.nan if value is None else value for value in row["aux_loss_layers"]]
    balance = f"balance loss {number(row['aux_loss'], 3)} (even: {uniform:g}"
    if len(own) > 1:
        each = f"{balance}; layers: {' '.join(number(value, 2) for value in own)}"
        highest = max(range(len(own)), key=lambda layer: own[layer])
        balance = each if len(each) + 1 < width else f"{balance}; highest: {number(own[highest], 2)} in layer {highest}"
    entropy = f"load entropy {number(row['router_entropy'], 3)} (even: {math.log(len(loads[0])):.3f})"
    return [Text(f"{balance})", style="dim"), Text(f"{entropy}   dropped {percent(row['dropped'])}", style="dim")]


def _range(loads: Loads) -> str:
    return f"{percent(min(min(shares) for shares in loads))} to {percent(max(max(shares) for shares in loads))}"


def _entropy(shares: Sequence[float]) -> float:
    return -sum(share * math.log(share) for share in shares if share > 0)


def _bars(shares: Iterable[float], experts: int) -> Text:
    """Return the loads of experts over the even load, each as a bar."""
    from rich.text import Text

    text = Text()
    for colour, group in groupby((share * experts for share in shares), _colour):
        text.append("".join(BARS[min(8, round(relative * 4))] for relative in group), style=colour)
    return text


def _colour(relative: float) -> str:
    return "red" if relative < 0.05 else "yellow" if relative < 0.5 or relative > 2.0 else "green"
