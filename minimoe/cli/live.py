"""The live display of a training run: a bar, the latest figures, the loss so far, the load of every expert, as far as there is room."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from contextlib import suppress
from time import monotonic as now
from typing import TYPE_CHECKING, Any

from minimoe.cli.streams import tell
from minimoe.errors import printable
from minimoe.figures import BARS, duration, number, percent
from minimoe.study.load import balance_lines, load_lines
from minimoe.study.tables import flow
from minimoe.training.listener import Listener, Training
from minimoe.training.progress import Evaluating, Pace, describe, memory_text, stopping_text

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
    from rich.table import Table
    from rich.text import Text

BAR, CURVE = 40, 60  # columns at most
TEXT_LINES = 3  # of a text about a wait


class LiveProgress(Listener):
    """Draws the state of the run again and again. Every line of it fits the terminal, and so do all of them together.

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
        from rich.spinner import Spinner
        from rich.text import Text

        from minimoe.cli.screen import LiveScreen

        self.trainer, self.step = trainer, trainer.step
        self.pace = Pace(trainer.config.train.steps, trainer.elapsed)
        self.row: dict[str, Any] = {}
        self.val: float | None = trainer.best
        self.accuracy: float | None = None
        self.skipped, self.memory = 0, ""
        self.losses = [math.nan if loss is None else loss for loss in trainer.earlier_losses()]
        self.spinner = Spinner("dots", style="yellow")
        self.wait_text, self.wait_began = "waiting for the first step" if self.step < self.pace.steps else "", now()
        heading = Text(describe(trainer) + (f"\ncontinuing at step {self.step}" if self.step else ""), style="bold")
        self.live = LiveScreen(self.screen or Console(stderr=True), heading, self, self._was_stopped)
        self.live.start()

    def _was_stopped(self, seconds: float) -> None:
        self.pace.stopped += seconds
        self.evaluating.began += seconds
        self.wait_began += seconds

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
        self.memory = memory_text(self.trainer)

    def sampled_last(self, step: int, text: str) -> None:
        """Show nothing: the end of the run shows a sample, and a longer one."""

    def said(self, text: str) -> None:
        from rich.text import Text

        if not hasattr(self, "live"):
            tell(text)
            return
        with suppress(OSError):  # the terminal went away, and the run goes on without it
            self.live.say(Text(printable(text, keep="\n"), style="yellow"))

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

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from self.lines(options.max_width, options.size.height - 1)

    def lines(self, width: int, height: int) -> list[RenderableType]:
        """Return the display as it is now: at most `height` things, each of one line."""
        last: list[RenderableType] = [*self._wait(width), *self._validation(width), *self._stopping(width)]
        room = max(0, height - 1 - len(last))
        figures = [*self._measures(width), *loss_curve(self.losses, width)][:room]
        load: list[Text] = []
        if self.row and self.row["expert_load"]:
            room -= len(figures)
            balance = balance_lines(self.row["expert_load"], self.trainer.uniform_aux_loss, self.row, width) if room >= 6 else []
            load = [*load_lines(self.row["expert_load"], width, room - len(balance)), *balance]
        return [self._progress(width), *figures, *load, *last][: max(1, height)]

    def _progress(self, width: int) -> Table:
        """Return steps, a bar, the time that the run has taken and, when it is known, the time left."""
        steps, left = self.pace.steps, self.pace.left(self.step)
        time = f"{duration(self.pace.elapsed())} elapsed"
        if left is not None and not self.wait_text and self.step < steps:
            time += f"  {duration(left)} left"
        return bar(f"step {self.step}/{steps}", self.step, steps, time, width)

    def _measures(self, width: int) -> list[Text]:
        from rich.text import Text

        row = self.row
        if not row:
            return []
        accuracy = [] if self.accuracy is None else [f"accuracy {percent(self.accuracy)}"]
        return flow(
            [
                Text(f"loss {number(row['loss'])}", style="bold"), f"validation {number(self.val)}", *accuracy,
                f"{row['tokens_per_s']:,.0f} tokens/s", f"lr {row['lr']:.2e}", f"gradient norm {number(row['grad_norm'], 2)}",
                *([f"peak memory {self.memory}"] if self.memory else []),
                *([Text(f"skipped {self.skipped}", style="red")] if self.skipped else []),
            ],
            width,
        )  # fmt: skip

    def _wait(self, width: int) -> list[Text]:
        from rich.text import Text

        if not self.wait_text:
            return []
        found = self.spinner.render(now())
        frame = found if isinstance(found, Text) else Text(" ")
        time = duration(now() - self.wait_began)
        first, *more = textwrap.wrap(self.wait_text, max(10, width - 5 - len(time)), max_lines=TEXT_LINES, placeholder=" ...") or [""]
        lines = [frame.append(f" {first}"), *(Text(f"  {line}", style="yellow") for line in more)]
        lines[-1].append(f" {time}")
        return lines

    def _validation(self, width: int) -> list[Table]:
        if not self.evaluating.shows:
            return []
        done, batches = self.evaluating.done, self.evaluating.batches
        return [bar(f"validating {done:,}/{batches:,}", done, batches, self.evaluating.left(), width)]

    def _stopping(self, width: int) -> list[Text]:
        from rich.text import Text

        if not self.ends:
            return []
        text = stopping_text(self.trainer, self.evaluating.done < self.evaluating.batches)
        return [Text(line, style="yellow") for line in textwrap.wrap(text, width - 1)]


def bar(before: str, done: int, whole: int, after: str, width: int) -> Table:
    """Return one line: a text, a bar as wide as there is room for, a text."""
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    room = min(BAR, width - 1 - len(before) - len(after) - 4)
    table = Table.grid(padding=(0, 2))
    for _ in range(3):
        table.add_column(no_wrap=True)
    table.add_row(before, *([ProgressBar(total=whole, completed=done, width=room)] if room >= 6 else []), after)
    return table


def loss_curve(losses: Sequence[float], width: int) -> list[Text]:
    """Return the loss so far as a line of bars, the mean of each stretch between the lowest and the highest; nothing if they are equal."""
    from rich.text import Text

    count = min(CURVE, len(losses), max(1, width - 7))
    stretches = [losses[i * len(losses) // count : (i + 1) * len(losses) // count] for i in range(count)]
    means = [sum(stretch) / len(stretch) for stretch in stretches]
    finite = [mean for mean in means if math.isfinite(mean)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    if not high > low:
        return []
    bars = [BARS[1 + round((mean - low) / (high - low) * 7)] if math.isfinite(mean) else "?" for mean in means]
    return [Text("loss  " + "".join(bars), style="cyan")]
