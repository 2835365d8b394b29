"""What a user sees while a model trains: a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from time import monotonic as now
from typing import Any

from minimoe.cli.live import LiveProgress
from minimoe.cli.streams import redraws, tell
from minimoe.figures import duration, number, percent
from minimoe.training.listener import Listener, Training
from minimoe.training.progress import Evaluating, Pace, describe, memory_text, stopping_text

OFTEN = 10.0  # seconds between the lines about an evaluation


def listener(quiet: bool) -> Listener:
    """Return the listener that suits where the output goes."""
    if quiet:
        return WarningsOnly()
    return LiveProgress() if redraws(sys.stderr) and (sys.stderr.encoding or "").lower().startswith("utf") else PlainProgress()


class WarningsOnly(Listener):
    """Shows no progress, and prints warnings to standard error: what --quiet asks for."""

    def warned(self, text: str) -> None:
        tell(text)


class PlainProgress(Listener):
    """Prints a line every `log_every` steps. On a terminal whose lines cannot be drawn again it is broken between words."""

    def started(self, trainer: Training) -> None:
        self.trainer, self.evaluating, self.reported = trainer, Evaluating(), 0.0
        self.pace = Pace(trainer.config.train.steps, trainer.elapsed)
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
        parts = [f"step {row['step']:>5}/{self.pace.steps}", f"loss {number(row['loss'])}"]
        if "val_loss" in row:
            parts.append(f"val {number(row['val_loss'])}")
        if "val_accuracy" in row:
            parts.append(f"accuracy {percent(row['val_accuracy'])}")
        parts += [f"{row['tokens_per_s']:,.0f} tokens/s", f"elapsed {duration(self.pace.elapsed())}"]
        if row["step"] < self.pace.steps:
            left = self.pace.left(row["step"])
            parts.append(f"left {'unknown' if left is None else duration(left)}")
        else:
            parts.append(f"peak memory {memory_text(self.trainer)}")
        loads = [share for layer in row["expert_load"] for share in layer]
        if loads:
            parts.append(f"expert load {min(loads):.1%} to {max(loads):.1%}")
        skipped = sum(r["skipped"] for r in rows)
        self.said("  ".join([*parts, *([f"SKIPPED {skipped}"] if skipped else [])]))

    def sampled_last(self, step: int, text: str) -> None:
        """Show nothing: the end of the run shows a sample, and a longer one."""

    def said(self, text: str) -> None:
        tell(text)
