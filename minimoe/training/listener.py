"""The interface of objects that watch a training run, such as a progress display."""

from __future__ import annotations

from typing import Any, Protocol

from minimoe.backend import Backend
from minimoe.config import Config
from minimoe.errors import notice
from minimoe.training.tasks import Task


class Training(Protocol):
    """What a listener may read of the `Trainer` that it watches."""

    config: Config
    backend: Backend
    task: Task
    step: int  # steps done
    stops: list[int]  # signals that ask for an end

    @property
    def saved(self) -> int | None: ...

    @property
    def best(self) -> float | None: ...

    @property
    def elapsed(self) -> float: ...

    def earlier_losses(self) -> list[float | None]: ...

    @property
    def uniform_aux_loss(self) -> float: ...


class Listener:
    """Its methods are called during training, and do nothing unless a subclass overrides them."""

    def started(self, trainer: Training) -> None:
        """Called before the first step."""

    def stepped(self, step: int) -> None:
        """Called after step number `step`, counted from 1; its metrics have not left the device yet."""

    def logged(self, rows: list[dict[str, Any]]) -> None:
        """Called when the metrics of the last steps have left the device."""

    def validating(self, done: int, batches: int) -> None:
        """Called before the first batch of an evaluation, with 0, and after each, with the number of those done and of all."""

    def sampled(self, step: int, text: str) -> None:
        """Called every `train.sample_every` steps with what the model does after that step, under a line that names it."""
        self.said(text)

    def sampled_last(self, step: int, text: str) -> None:
        """Called in its place if that step is the run's last. What shows the model at the end of a run need not show it twice."""
        self.sampled(step, text)

    def said(self, text: str) -> None:
        """Called with a message that a user should see."""

    def warned(self, text: str) -> None:
        """Called with a message about something lost or changed that a user must see, also one who asked for no progress."""
        self.said(text)

    def waiting(self, text: str) -> None:
        """Called with the reason for a wait, such as kernels being compiled; a later text replaces an earlier one."""
        self.said(text)

    def stopping(self) -> None:
        """A signal asks for an end: the step under way is finished and saved first; an evaluation ends after its batch.

        It is called by the signal's handler, so it must not print: that may be under way already. `os.write` is safe.
        """

    def ended(self, trainer: Training) -> None:
        """Called after the last step, or after the one at which the run stopped for whatever reason."""


class PythonWarnings(Listener):
    """Shows no progress; a warning becomes a `Notice`, one of Python's. Training that is called without a listener has this one."""

    def warned(self, text: str) -> None:
        notice(text.removeprefix("warning: "))
