"""The progress of training in a notebook: one cell that is updated, with the loss as a curve and the load of every expert as a colour."""

from __future__ import annotations

import sys
from html import escape
from time import monotonic as now
from typing import Any

from minimoe.figures import duration, number, percent
from minimoe.training.listener import Listener, PythonWarnings, Training
from minimoe.training.progress import Evaluating, Pace, describe

OFTEN = 0.5  # seconds between two updates
WIDTH, HEIGHT = 420, 80  # of the curve, in pixels
STRETCHES = 140  # points of the curve: each is the mean of a stretch of steps


def default_listener() -> Listener:
    """Return the listener of training that is called without one: a cell's display in a notebook, elsewhere Python's warnings alone."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return NotebookProgress() if hasattr(shell, "kernel") else PythonWarnings()


class NotebookProgress(PythonWarnings):
    """Shows progress in the output of the cell that trains."""

    def started(self, trainer: Training) -> None:
        self.trainer, self.step = trainer, trainer.step
        self.pace, self.evaluating = Pace(trainer.config.train.steps), Evaluating()
        self.losses: list[float | None] = trainer.earlier_losses()
        self.row: dict[str, Any] = {}
        self.val, self.wait = trainer.best, "waiting for the first step"
        self.began = self.drawn = now()
        self.before = trainer.elapsed  # seconds of earlier sessions
        from IPython.display import HTML, display  # type: ignore[import-not-found]  # pyright: ignore[reportMissingImports]

        self.html = HTML
        self.cell = display(self.html(self.draw()), display_id=True)

    def stepped(self, step: int) -> None:
        self.step, self.wait = step, ""
        self.pace.stepped(step)
        self._update()

    def logged(self, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            self.losses.append(row["loss"])
            self.val = row.get("val_loss", self.val)
            self.row = row
            self.pace.logged(row["step"])
        self._update()

    def validating(self, done: int, batches: int) -> None:
        if not done:
            self.evaluating = Evaluating(batches)
        self.evaluating.done = done
        self._update()

    def waiting(self, text: str) -> None:
        if hasattr(self, "cell"):
            self.wait = text
            self._update()

    def ended(self, trainer: Training) -> None:
        self.step, self.wait, self.evaluating = trainer.step, "", Evaluating()
        self._update(at_once=True)

    def _update(self, at_once: bool = False) -> None:
        if at_once or now() - self.drawn >= OFTEN:
            self.drawn = now()
            self.cell.update(self.html(self.draw()))

    # ---- drawing -----------------------------------------------------------------------------------------------------------------

    def draw(self) -> str:
        """Return the display as it is now, as HTML."""
        steps, left = self.pace.steps, self.pace.left(self.step)
        known = left is not None and not self.wait and self.step < steps
        time = f"{duration(left)} left" if left is not None and known else f"{duration(self.before + now() - self.began)} elapsed"
        lines = [
            f"<b>{escape(describe(self.trainer))}</b>",
            f"step {self.step}/{steps} <progress value={self.step} max={steps}></progress> {time}",
        ]
        if self.row:
            loss = f"loss {number(self.row['loss'])} &nbsp; validation {number(self.val)}"
            lines.append(f"{loss} &nbsp; {self.row['tokens_per_s']:,.0f} tokens/s")
            lines.append(curve(self.losses))
            lines += [load_row(layer, shares) for layer, shares in enumerate(self.row["expert_load"])]
        if self.evaluating.shows:
            lines.append(f"validating {self.evaluating.done:,}/{self.evaluating.batches:,}, {self.evaluating.left()}")
        if self.wait:
            lines.append(f"<i>{escape(self.wait)}</i>")
        return "".join(f"<div>{line}</div>" for line in lines if line)


def curve(losses: list[float | None]) -> str:
    """Return the loss so far as a line in SVG, from its lowest to its highest value; nothing before the second step."""
    width = min(STRETCHES, len(losses))
    stretches = [losses[i * len(losses) // width : (i + 1) * len(losses) // width] for i in range(width)]
    known = [[loss for loss in stretch if loss is not None and abs(loss) < float("inf")] for stretch in stretches]
    points = [(i, sum(stretch) / len(stretch)) for i, stretch in enumerate(known) if stretch]
    low, high = min((y for _, y in points), default=0.0), max((y for _, y in points), default=0.0)
    if len(points) < 2 or not high > low:
        return ""
    line = " ".join(f"{i * WIDTH / (width - 1):.1f},{(high - y) / (high - low) * (HEIGHT - 4) + 2:.1f}" for i, y in points)
    return (
        f'<svg width="{WIDTH + 60}" height="{HEIGHT}" role="img" aria-label="training loss from {high:.3f} to {low:.3f}">'
        f'<polyline points="{line}" fill="none" stroke="#1f77b4" stroke-width="1.5"/>'
        f'<text x="{WIDTH + 4}" y="11" font-size="11" fill="currentColor">{high:.3f}</text>'
        f'<text x="{WIDTH + 4}" y="{HEIGHT - 2}" font-size="11" fill="currentColor">{low:.3f}</text></svg>'
    )


def load_row(layer: int, shares: list[float]) -> str:
    """Return the load of a layer's experts as coloured boxes, the darker the fuller; an even load is half dark."""
    boxes = "".join(
        f'<span title="layer {layer}, expert {expert}: {percent(share)}" style="display:inline-block;width:1em;height:1em;'
        f'border:1px solid #8884;background:rgba(31,119,180,{min(1.0, share * len(shares) / 2):.2f})"></span>'
        for expert, share in enumerate(shares)
    )
    return f"layer {layer} {boxes} {percent(min(shares))} to {percent(max(shares))}"
