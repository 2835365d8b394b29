"""What a user sees while a model trains: a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import os
import sys
from contextlib import suppress
from time import monotonic as now
from typing import TYPE_CHECKING, Any

from minimoe.errors import printable
from minimoe.figures import BARS, duration, number, percent
from minimoe.study.tables import load_table
from minimoe.training.listener import Listener, Training
from minimoe.training.progress import Evaluating, Pace, describe

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table
    from rich.text import Text


OFTEN = 10.0  # seconds between the lines about one


def listener(quiet: bool) -> Listener:
    """Return the listener that suits where the output goes."""
    if quiet:
        return WarningsOnly()
    return LiveProgress() if sys.stderr.isatty() else PlainProgress()


class WarningsOnly(Listener):
    """Shows no progress, and prints warnings to standard error: what --quiet asks for."""

    def warned(self, text: str) -> None:
        with suppress(OSError):
            print(printable(text, keep="\n"), file=sys.stderr, flush=True)


def stopping_text(trainer: Training, evaluating: bool) -> str:
    """Return what a run does after the first interrupt, and what a second one would do."""
    if evaluating and trainer.saved == trainer.step:
        return f"stopping: the state of step {trainer.step} is saved; Ctrl-C again stops at once"
    if evaluating:
        return "stopping after this batch; Ctrl-C again stops at once, without saving the step"
    return "stopping after this step; Ctrl-C again stops at once, without saving it"


class PlainProgress(Listener):
    """Prints a line every `log_every` steps."""

    def started(self, trainer: Training) -> None:
        self.trainer, self.evaluating, self.reported = trainer, Evaluating(), 0.0
        self.pace = Pace(trainer.config.train.steps)
        self.said(describe(trainer))
        if trainer.step:
            self.said(f"continuing at step {trainer.step}")

    def stepped(self, step: int) -> None:
        self.pace.stepped(step)

    def validating(self, done: int, batches: int) -> None:
        if not done:
            self.evaluating = Evaluating(batches)
        self.evaluating.done = done
        if self.evaluating.shows and now() - self.reported >= OFTEN:
            self.reported = now()
            self.said(f"validating: {done:,} of {batches:,} batches  {self.evaluating.left()}")

    def stopping(self) -> None:
        text = stopping_text(self.trainer, self.evaluating.done < self.evaluating.batches)
        with suppress(OSError, AttributeError, ValueError):  # standard error is not a file
            os.write(sys.stderr.fileno(), f"{text}\n".encode())

    def logged(self, rows: list[dict[str, Any]]) -> None:
        if not rows:
            return
        row = rows[-1]
        self.pace.logged(row["step"])
        text = f"step {row['step']:>5}/{self.pace.steps}  loss {number(row['loss'])}"
        if "val_loss" in row:
            text += f"  val {number(row['val_loss'])}"
        if "val_accuracy" in row:
            text += f"  accuracy {percent(row['val_accuracy'])}"
        text += f"  {row['tokens_per_s']:,.0f} tokens/s"
        if row["step"] < self.pace.steps:
            left = self.pace.left(row["step"])
            text += f"  left {'unknown' if left is None else duration(left)}"
        loads = [share for layer in row["expert_load"] for share in layer]
        if loads:
            text += f"  expert load {min(loads):.1%} to {max(loads):.1%}"
        skipped = sum(r["skipped"] for r in rows)
        self.said(text + (f"  SKIPPED {skipped}" if skipped else ""))

    def said(self, text: str) -> None:
        with suppress(OSError):  # the terminal or the pipe's reader went away, and the run goes on without it
            print(printable(text, keep="\n"), file=sys.stderr, flush=True)


class LiveProgress(Listener):
    """A bar, the latest metrics, and the load of every expert, redrawn as training goes on.

    Until the first step is done, and whenever the backend says why it keeps the user waiting, a spinner shows the last such text and how
    long the wait has taken.
    """

    def __init__(self, screen: Console | None = None) -> None:
        self.screen = screen
        self.wait_text, self.wait_began = "", 0.0
        self.ends = False
        self.evaluating = Evaluating()

    def started(self, trainer: Training) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.spinner import Spinner

        self.trainer, self.step = trainer, trainer.step
        self.pace = Pace(trainer.config.train.steps)
        self.row: dict[str, Any] = {}
        self.val: float | None = trainer.best
        self.accuracy: float | None = None
        self.skipped = 0
        self.losses: list[float] = []
        self.spinner, self.began = Spinner("dots", style="yellow"), now()
        self.wait_text, self.wait_began = "waiting for the first step" if self.step < self.pace.steps else "", self.began
        screen = self.screen or Console(stderr=True)
        screen.print(describe(trainer), style="bold")
        self.live = Live(console=screen, refresh_per_second=4, get_renderable=self.draw)
        self.live.start()

    def stepped(self, step: int) -> None:
        self.step, self.wait_text = step, ""
        self.pace.stepped(step)

    def validating(self, done: int, batches: int) -> None:
        if not done:
            self.evaluating = Evaluating(batches)
        else:
            self.wait_text = ""  # a run that is resumed for its last validation has no step to wait for
        self.evaluating.done = done

    def logged(self, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            self.losses.append(row["loss"])
            self.skipped += bool(row["skipped"])
            self.val, self.accuracy = row.get("val_loss", self.val), row.get("val_accuracy", self.accuracy)
            self.row = row
            self.pace.logged(row["step"])

    def said(self, text: str) -> None:
        with suppress(OSError):  # the terminal went away, and the run goes on without it
            if hasattr(self, "live"):
                self.live.console.print(printable(text, keep="\n"), style="yellow", markup=False)
            else:
                print(printable(text, keep="\n"), file=sys.stderr)

    def waiting(self, text: str) -> None:
        if not hasattr(self, "live"):
            self.said(text)
            return
        if not self.wait_text:
            self.wait_began = now()
        self.wait_text = text

    def stopping(self) -> None:
        self.ends = True

    def ended(self, trainer: Training) -> None:
        self.ends = False
        self.step, self.wait_text, self.evaluating = trainer.step, "", Evaluating()
        with suppress(OSError):
            self.live.stop()

    # ---- drawing -----------------------------------------------------------------------------------------------------------------

    def draw(self) -> RenderableType:
        """Return the display as it is now."""
        from rich.console import Group
        from rich.text import Text

        parts: list[RenderableType] = [self._progress()]
        if self.row:
            parts += [self._measures(), loss_curve(self.losses)]
            if self.row["expert_load"]:
                parts.append(load_table(self.row["expert_load"], self.trainer.uniform_aux_loss, self.row))
        if self.wait_text:
            parts.append(self._wait())
        if self.evaluating.shows:
            parts.append(self._validation())
        if self.ends:
            evaluating = self.evaluating.done < self.evaluating.batches
            parts.append(Text(stopping_text(self.trainer, evaluating), style="yellow"))
        return Group(*parts)

    def _progress(self) -> Table:
        """Return steps, a bar, and the time left or, while that is unknown and after the last step, the time since the start."""
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        steps, left = self.pace.steps, self.pace.left(self.step)
        known = left is not None and not self.wait_text and self.step < steps
        time = f"{duration(left)} left" if left is not None and known else f"{duration(now() - self.began)} elapsed"
        table = Table.grid(padding=(0, 2))
        table.add_row(f"step {self.step}/{steps}", ProgressBar(total=steps, completed=self.step, width=40), time)
        return table

    def _validation(self) -> Table:
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        done, batches, table = self.evaluating.done, self.evaluating.batches, Table.grid(padding=(0, 2))
        table.add_row(f"validating {done:,}/{batches:,}", ProgressBar(total=batches, completed=done, width=32), self.evaluating.left())
        return table

    def _wait(self) -> Table:
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 1))
        for no_wrap in (True, False, True):
            table.add_column(no_wrap=no_wrap)
        table.add_row(self.spinner, Text(self.wait_text), duration(now() - self.wait_began), style="yellow")
        return table

    def _measures(self) -> Table:
        from rich.table import Table

        row, table = self.row, Table.grid(padding=(0, 2))
        table.add_row(
            f"[bold]loss {number(row['loss'])}[/]", f"validation {number(self.val)}",
            *([] if self.accuracy is None else [f"accuracy {percent(self.accuracy)}"]), f"{row['tokens_per_s']:,.0f} tokens/s",
            f"lr {row['lr']:.2e}", f"gradient norm {number(row['grad_norm'], 2)}",
            f"[red]skipped {self.skipped}[/]" if self.skipped else "",
        )  # fmt: skip
        return table


def loss_curve(losses: list[float]) -> Text:
    """Return the loss so far as a line of bars: the mean of each stretch, between the lowest and the highest."""
    from rich.text import Text

    width = min(60, len(losses))
    stretches = [losses[i * len(losses) // width : (i + 1) * len(losses) // width] for i in range(width)]
    means = [sum(stretch) / len(stretch) for stretch in stretches]
    finite = [mean for mean in means if math.isfinite(mean)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    if not high > low:
        return Text("")
    bars = [BARS[1 + round((mean - low) / (high - low) * 7)] if math.isfinite(mean) else "?" for mean in means]
    return Text("loss  " + "".join(bars), style="cyan", no_wrap=True)
