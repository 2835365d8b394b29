"""What a user sees while a model trains: a live picture on a terminal, plain lines elsewhere; and tables."""

from __future__ import annotations

import math
import sys
import time
from typing import TYPE_CHECKING, Any

from minimoe.trainer import Listener

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table
    from rich.text import Text

    from minimoe.trainer import Trainer

BARS = " ▁▂▃▄▅▆▇█"


def console() -> Console:
    """The terminal; where output goes to a file, wide enough for every table."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=120)


def show(what: RenderableType) -> None:
    """Print a table, or a text as it is."""
    if isinstance(what, str):
        print(what)
    else:
        console().print(what)


def listener(quiet: bool) -> Listener:
    """The watcher that suits where the output goes."""
    if quiet:
        return Listener()
    return LiveProgress() if sys.stderr.isatty() else PlainProgress()


def describe(trainer: Trainer) -> str:
    """What is about to be trained, in one line."""
    from minimoe.cost import cost

    config, counted = trainer.config, cost(trainer.config.model, trainer.config.train.seq_len)
    size = f"{counted.total / 1e6:.2f} M parameters"
    if counted.active != counted.total:
        size += f", {counted.active / 1e6:.2f} M active"
    return (
        f"{config.name}: {size}; {trainer.task.source}: {trainer.task.size()}; {config.train.steps} steps of {trainer.task.step_size()} "
        f"on {trainer.backend.name}"
    )


def duration(seconds: float) -> str:
    """95 -> 1:35"""
    whole = round(max(0.0, seconds))
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


def number(value: float | None, digits: int = 4) -> str:
    """1.23456 -> 1.2346; what the file has as null (it was not finite) as a dash."""
    return "-" if value is None else f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


class Pace:
    """The time left, from the steps of this sitting but for its first, which may have compiled kernels."""

    def __init__(self, steps: int) -> None:
        self.steps, self.first, self.began = steps, 0, 0.0

    def stepped(self, step: int) -> None:
        if not self.began:
            self.first, self.began = step, time.monotonic()

    def left(self, step: int) -> float:
        """Seconds; 0 where nothing is known yet."""
        done = step - self.first
        return (time.monotonic() - self.began) / done * (self.steps - step) if done and self.began else 0.0


class PlainProgress(Listener):
    """A line every `log_every` steps."""

    def started(self, trainer: Trainer) -> None:
        self.pace = Pace(trainer.config.train.steps)
        print(describe(trainer), file=sys.stderr, flush=True)
        if trainer.step:
            print(f"going on at step {trainer.step}", file=sys.stderr, flush=True)

    def stepped(self, step: int) -> None:
        self.pace.stepped(step)

    def logged(self, rows: list[dict[str, Any]]) -> None:
        if not rows:
            return
        row = rows[-1]
        text = f"step {row['step']:>5}/{self.pace.steps}  loss {number(row['loss'])}"
        if "val_loss" in row:
            text += f"  val {number(row['val_loss'])}"
        if "val_accuracy" in row:
            text += f"  accuracy {percent(row['val_accuracy'])}"
        text += f"  {row['tokens_per_s']:,.0f} tokens/s  left {duration(self.pace.left(row['step']))}"
        loads = [share for layer in row["expert_load"] for share in layer]
        if loads:
            text += f"  expert load {min(loads):.1%} to {max(loads):.1%}"
        skipped = sum(r["skipped"] for r in rows)
        print(text + (f"  SKIPPED {skipped}" if skipped else ""), file=sys.stderr, flush=True)

    def said(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


class LiveProgress(Listener):
    """A bar, the latest measures, and the load of every expert, drawn anew as training goes on."""

    def started(self, trainer: Trainer) -> None:
        from rich.console import Console
        from rich.live import Live

        self.trainer, self.step = trainer, trainer.step
        self.pace = Pace(trainer.config.train.steps)
        self.row: dict[str, Any] = {}
        self.val: float | None = trainer.best
        self.accuracy: float | None = None
        self.skipped = 0
        self.losses: list[float] = []
        screen = Console(stderr=True)
        screen.print(describe(trainer), style="bold")
        self.live = Live(console=screen, refresh_per_second=4, get_renderable=self._draw)
        self.live.start()

    def stepped(self, step: int) -> None:
        self.step = step
        self.pace.stepped(step)

    def logged(self, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            self.losses.append(row["loss"])
            self.skipped += bool(row["skipped"])
            self.val, self.accuracy = row.get("val_loss", self.val), row.get("val_accuracy", self.accuracy)
            self.row = row

    def said(self, text: str) -> None:
        if hasattr(self, "live"):
            self.live.console.print(text, style="yellow")
        else:
            print(text, file=sys.stderr)

    def ended(self, trainer: Trainer) -> None:
        self.step = trainer.step
        self.live.stop()

    def _draw(self) -> RenderableType:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        row, steps = self.row, self.pace.steps
        top = Table.grid(padding=(0, 2))
        top.add_row(
            f"step {self.step}/{steps}",
            ProgressBar(total=steps, completed=self.step, width=40),
            f"{duration(self.pace.left(self.step))} left",
        )
        if not row:
            return Group(top)
        measures = Table.grid(padding=(0, 2))
        measures.add_row(
            f"[bold]loss {number(row['loss'])}[/]", f"validation {number(self.val)}",
            *([] if self.accuracy is None else [f"accuracy {percent(self.accuracy)}"]), f"{row['tokens_per_s']:,.0f} tokens/s",
            f"lr {row['lr']:.2e}", f"gradient norm {number(row['grad_norm'], 2)}",
            f"[red]skipped {self.skipped}[/]" if self.skipped else "",
        )  # fmt: skip
        parts: list[Any] = [top, measures, _curve(self.losses)]
        if row["expert_load"]:
            parts.append(load_table(row["expert_load"], self.trainer.uniform_aux_loss, row))
        return Group(*parts)


def _curve(losses: list[float]) -> Text:
    """The loss so far as a line of bars, the mean of each stretch, between its lowest and highest."""
    from rich.text import Text

    width = min(60, len(losses))
    cuts = [losses[i * len(losses) // width : (i + 1) * len(losses) // width] for i in range(width)]
    means = [sum(cut) / len(cut) for cut in cuts]
    finite = [mean for mean in means if math.isfinite(mean)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    if not high > low:
        return Text("")
    bars = [BARS[1 + round((mean - low) / (high - low) * 7)] if math.isfinite(mean) else "?" for mean in means]
    return Text("loss  " + "".join(bars), style="cyan", no_wrap=True)


def load_table(loads: list[list[float]], uniform: float, row: dict[str, Any] | None = None) -> RenderableType:
    """A row for each routed layer, a bar and a share for each expert (even load is half a bar); below it the balance of a metrics row."""
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
    """The load of one expert, 1 where even: half a bar."""
    from rich.text import Text

    colour = "red" if relative < 0.05 else "yellow" if relative < 0.5 or relative > 2.0 else "green"
    return Text(BARS[min(8, round(relative * 4))], style=colour)


def domains_table(loads: dict[str, list[list[float]]]) -> Table:
    """Each expert's share of the tokens of each domain; where a row differs between domains, its experts have specialised."""
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
    """What `minimoe runs` prints."""
    from rich.table import Table

    table = Table(title=None)
    for name, justify in (
        ("run", "left"),
        ("state", "left"),
        ("step", "right"),
        ("loss", "right"),
        ("validation", "right"),
        ("best", "right"),
        ("accuracy", "right"),
        ("parameters", "right"),
    ):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for row in rows:
        count = row["parameters"]
        table.add_row(
            row["name"], row["state"], f"{row['step']}/{row['steps'] or '?'}", number(row["loss"]), number(row["val_loss"]),
            number(row["best_val_loss"]), percent(row["val_accuracy"]), "-" if count is None else f"{count:,}",
        )  # fmt: skip
    return table
