"""How far a training run has come, for those who show it: what is trained, the time left, an evaluation under way."""

from __future__ import annotations

import signal
from time import monotonic as now

from minimoe.config.cost import cost
from minimoe.errors import printable, signal_name
from minimoe.figures import duration, memory_size
from minimoe.machine import peak_memory
from minimoe.training.listener import Training

SOON = 2.0  # seconds that an evaluation takes if it is shown


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


def memory_text(trainer: Training) -> str:
    """Return the most memory that was held so far, by the process and by the backend's device: 412.0 MiB, device 3.1 GiB"""
    process, device = peak_memory(), trainer.backend.memory()["peak"]
    known = [] if process is None else [memory_size(process)]
    if process is None or abs(device - process) > process / 50:  # a backend without a device reports the process, a moment later
        known += [f"device {memory_size(device)}"] if device else []
    return ", ".join(known)


def stopping_text(trainer: Training, evaluating: bool) -> str:
    """Return what a run does after the first signal that asks for an end, and what a Ctrl-C would do now."""
    first = trainer.stops[0] if trainer.stops else signal.SIGINT
    why, again = ("", "Ctrl-C again stops") if first == signal.SIGINT else (f" ({signal_name(first)})", "Ctrl-C stops")
    if evaluating and trainer.saved == trainer.step:
        return f"stopping{why}: the state of step {trainer.step} is saved; {again} at once"
    if evaluating:
        return f"stopping after this batch{why}; {again} at once, without saving the step"
    return f"stopping after this step{why}; {again} at once, without saving it"


class Pace:
    """The time that a run has taken, and the time left.

    The time left follows from the steps of this session except its first, which may have compiled kernels. A device may be far behind the
    host, so only steps whose metrics were read count as done, once there are any.
    """

    def __init__(self, steps: int, elapsed: float = 0.0) -> None:
        """`elapsed`: the seconds that the steps of earlier sessions took."""
        self.steps, self.first, self.last = steps, 0, 0
        self.stopped = 0.0  # seconds in which the process was stopped
        self.start = now() - elapsed
        self.began: float | None = None  # when the first step was done
        self.until = 0.0  # when the last step that counts was done
        self.read = False

    def now(self) -> float:
        return now() - self.stopped

    def stepped(self, step: int) -> None:
        if self.began is None:
            self.first, self.began = step, self.now()
        if not self.read:
            self.last, self.until = step, self.now()

    def logged(self, step: int) -> None:
        """Note that the metrics of this step have been read, for which the device must have been done with it."""
        if self.began is not None and step > self.first:
            self.last, self.until, self.read = step, self.now(), True

    def elapsed(self) -> float:
        """Return the seconds that the run has taken, over all its sessions."""
        return self.now() - self.start

    def left(self, step: int) -> float | None:
        """Return the seconds left, at least 1; None while nothing is known yet."""
        done = self.last - self.first
        return None if self.began is None or not done else max(1.0, (self.until - self.began) / done * (self.steps - step))


class Evaluating:
    """The progress of an evaluation. It is shown if it takes more than `SOON` seconds, as soon as its first batch tells that it will."""

    def __init__(self, batches: int = 0) -> None:
        self.done, self.batches, self.began = 0, batches, now()
        self.long = False

    @property
    def shows(self) -> bool:
        spent = now() - self.began
        self.long = self.long or (spent if not self.done else spent / self.done * self.batches) >= SOON
        return self.done < self.batches and self.long

    def left(self) -> str:
        """Return the time left in words."""
        spent = now() - self.began
        return f"{duration(max(1.0, spent / self.done * (self.batches - self.done)))} left" if self.done else f"{duration(spent)} elapsed"
