"""A learning-rate range test (Smith 2015): the rate grows exponentially from step to step, and the loss shows where learning ends.

    find_lr(mm.load_config("tiny-moe")).suggested

The suggestion is a third of the rate at which the smoothed loss has fallen by 95% of its whole fall. The rate of the lowest loss says less,
since the loss hardly changes over a decade of rates before training diverges. The test trains a model of its own, and leaves no run behind.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from msgspec.structs import replace

from minimoe.config import Config
from minimoe.errors import Diverged, UserError
from minimoe.training.listener import Listener
from minimoe.training.surroundings import explain_memory_errors, training_backend
from minimoe.training.trainer import Trainer
from minimoe.training.weights import Weights

STEPS = 200
LOW, HIGH = 1e-6, 10.0  # the rates of the first step and the last
WINDOW = 20  # the loss is smoothed over about the steps over this: 10 of 200, a third of a decade of rates
ENDS = 2.0  # the test ends when the smoothed loss is this many times the lowest so far
REACHED, MARGIN = 0.95, 3.0  # the suggestion: the rate at which so much of the fall was reached, over the margin
LEAST_FALL = 0.01  # of the first loss
FEWEST = 20  # steps
BAR, MOST_BINS = 40, 15  # characters, and lines of the chart


@dataclass(frozen=True)
class RangeTest:
    """The rate of each step, its loss, and the smoothed loss after it; `diverged` if that ended the test before its last step."""

    rates: list[float]
    losses: list[float]
    smoothed: list[float]
    diverged: bool

    @property
    def lowest(self) -> int:
        """The number of the step with the lowest smoothed loss, from 0."""
        return min(range(len(self.smoothed)), key=self.smoothed.__getitem__)

    @property
    def reached(self) -> int:
        """The number of the first step after which 95% of the fall from the first loss to the lowest was reached."""
        wanted = self.smoothed[0] - REACHED * (self.smoothed[0] - self.smoothed[self.lowest])
        return next(i for i, loss in enumerate(self.smoothed) if loss <= wanted)

    @property
    def suggested(self) -> float:
        """A rate to train with, of two digits."""
        return float(f"{self.rates[self.reached] / MARGIN:.1e}")

    def chart(self, now: float) -> str:
        """Return the smoothed loss over the rate as lines of at most 80 columns. `now`: the rate of the configuration, which is marked."""
        count = min(MOST_BINS, len(self.rates))
        edges = [(i + 1) * len(self.rates) // count - 1 for i in range(count)]  # the last step of each line
        low, high = min(self.smoothed), max(self.smoothed[0], min(self.smoothed) + 1e-9)
        lines = ["    rate     loss"]
        before = 0.0
        for edge in edges:
            rate, loss = self.rates[edge], self.smoothed[edge]
            bar = "█" * max(1, round(min(1.0, (loss - low) / (high - low)) * BAR)) if math.isfinite(loss) else ""
            here = {"suggested": self.suggested, "train.lr": now, "lowest": self.rates[self.lowest]}
            marks = ", ".join(name for name, at in here.items() if before < at <= rate)
            lines.append(f"{rate:8.1e}  {loss:7.4f}  {bar}{f'  < {marks}' if marks else ''}")
            before = rate
        return "\n".join(lines)


def find_lr(config: Config, steps: int = STEPS, listener: Listener | None = None, weights: Weights | None = None) -> RangeTest:
    """Train for up to `steps` steps with rates from 1e-6 to 10, until the loss diverges. `weights`: those to start from.

    Raises `Diverged` if the first loss is not finite, and `UserError` if there are fewer than 20 steps, or if no rate made the loss fall.
    """
    if steps < FEWEST:
        raise UserError(f"--find-lr: needs {FEWEST} steps or more, got {steps}: {STEPS} are usual")
    listener = listener or Listener()
    trainer = Trainer(replace(config, train=replace(config.train, steps=steps)), listener=listener, weights=weights)
    with training_backend(trainer.backend, config.train.threads), explain_memory_errors(trainer.backend):
        listener.started(trainer)
        trainer.backend.tell(listener.waiting)
        try:
            found = _tested(trainer, steps, listener)
        finally:
            trainer.backend.tell(None)
            listener.ended(trainer)
    if not found.losses:
        raise Diverged(f"diverged: the first loss is not finite, at a rate of {LOW:g}: no rate can be found")
    if found.smoothed[found.lowest] > found.losses[0] * (1 - LEAST_FALL):
        raise UserError(f"--find-lr: no rate made the loss fall in {len(found.losses)} steps: give more with --steps")
    return found


def _tested(trainer: Trainer, steps: int, listener: Listener) -> RangeTest:
    rates: list[float] = []
    losses: list[float] = []
    smoothed: list[float] = []
    mean, smoothing = 0.0, 1 - WINDOW / steps  # the share of the mean so far; with fewer steps rates grow faster, so the mean is shorter
    for step in range(steps):
        rate = LOW * (HIGH / LOW) ** (step / (steps - 1))
        trainer.do_step(rate)
        listener.stepped(trainer.step)
        ((row, _),) = trainer.backlog.take()
        if trainer.step % trainer.config.train.log_every == 0:
            listener.logged([row])
        if row["skipped"] or not math.isfinite(row["loss"]):
            return RangeTest(rates, losses, smoothed, True)
        mean = smoothing * mean + (1 - smoothing) * row["loss"]
        rates.append(rate)
        losses.append(row["loss"])
        smoothed.append(mean / (1 - smoothing ** (step + 1)))  # without the weight of the zero that it began with
        if smoothed[-1] > ENDS * min(smoothed):
            return RangeTest(rates, losses, smoothed, True)
    return RangeTest(rates, losses, smoothed, False)
