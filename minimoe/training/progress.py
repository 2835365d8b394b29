"""How far a training run has come, for those who show it: what is trained, the time left, an evaluation under way."""

from __future__ import annotations

from time import monotonic as now

from minimoe.config.cost import cost
from minimoe.errors import printable
from minimoe.figures import duration
from minimoe.training.listener import Training

SOON = 2.0  # seconds until an evaluation is shown


def describe(trainer: Training) -> str:
    """Return one line about what will be trained."""
    config, counted = trainer.config, cost(trainer.config.model, trainer.config.train.seq_len)
    size = f"{counted.total / 1e6:.2f} M parameters"
    if counted.active != counted.total:
        size += f", {counted.active / 1e6:.2f} M active"
    return (
        f"{printable(config.name)}: {size}; {printable(trainer.task.source)}: {trainer.task.size()}; "
        f"{config.train.steps} steps of {trainer.task.step_size()} on {trainer.backend.name}"
    )


class Pace:
    """The time left, from the steps of this session except its first, which may have compiled kernels.

    A device may be far behind the host, so only steps whose metrics were read count as done, once there are any.
    """

    def __init__(self, steps: int) -> None:
        self.steps, self.first, self.last = steps, 0, 0
        self.began: float | None = None  # when the first step was done
        self.until = 0.0  # when the last step that counts was done
        self.read = False

    def stepped(self, step: int) -> None:
        if self.began is None:
            self.first, self.began = step, now()
        if not self.read:
            self.last, self.until = step, now()

    def logged(self, step: int) -> None:
        """Note that the metrics of this step have been read, for which the device must have been done with it."""
        if self.began is not None and step > self.first:
            self.last, self.until, self.read = step, now(), True

    def left(self, step: int) -> float | None:
        """Return the seconds left, at least 1; None while nothing is known yet."""
        done = self.last - self.first
        return None if self.began is None or not done else max(1.0, (self.until - self.began) / done * (self.steps - step))


class Evaluating:
    """The progress of an evaluation, which is shown if it takes more than `SOON` seconds."""

    def __init__(self, batches: int = 0) -> None:
        self.done, self.batches, self.began = 0, batches, now()

    @property
    def shows(self) -> bool:
        return self.done < self.batches and now() - self.began >= SOON

    def left(self) -> str:
        """Return the time left in words."""
        spent = now() - self.began
        return f"{duration(max(1.0, spent / self.done * (self.batches - self.done)))} left" if self.done else f"{duration(spent)} elapsed"
