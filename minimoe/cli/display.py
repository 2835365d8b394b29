"""What a user sees while a model trains: a live picture on a terminal, plain lines elsewhere; and tables."""

from __future__ import annotations

import math
import sys
import time
from typing import TYPE_CHECKING, Any

from minimoe.training.listener import Listener

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

    from minimoe.training.listener import Training
from minimoe.study.tables import BARS, duration, load_table, number, percent


def listener(quiet: bool) -> Listener:
    """The watcher that suits where the output goes."""
    if quiet:
        return Listener()
    return LiveProgress() if sys.stderr.isatty() else PlainProgress()


def describe(trainer: Training) -> str:
    """What is about to be trained, in one line."""
    from minimoe.config.cost import cost

    config, counted = trainer.config, cost(trainer.config.model, trainer.config.train.seq_len)
    size = f"{counted.total / 1e6:.2f} M parameters"
    if counted.active != counted.total:
        size += f", {counted.active / 1e6:.2f} M active"
    return (
        f"{config.name}: {size}; {trainer.task.source}: {trainer.task.size()}; {config.train.steps} steps of {trainer.task.step_size()} "
        f"on {trainer.backend.name}"
    )


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

    def started(self, trainer: Training) -> None:
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

    def started(self, trainer: Training) -> None:
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

    def ended(self, trainer: Training) -> None:
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
