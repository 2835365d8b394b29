"""Who watches a training run."""

from __future__ import annotations

from typing import Any, Protocol

from minimoe.backend import Backend
from minimoe.config import Config
from minimoe.training.tasks import Task


class Training(Protocol):
    """What a listener may read of the `Trainer` that it watches."""

    config: Config
    backend: Backend
    task: Task
    step: int  # steps done
    best: float | None  # the lowest validation loss so far

    @property
    def uniform_aux_loss(self) -> float: ...


class Listener:
    """Is called as training goes on. Every method may be left as it is."""

    def started(self, trainer: Training) -> None:
        """Before the first step."""

    def stepped(self, step: int) -> None:
        """After step number `step`, counted from 1; its metrics have not left the device yet."""

    def logged(self, rows: list[dict[str, Any]]) -> None:
        """The metrics of the last steps have left the device."""

    def said(self, text: str) -> None:
        """Something that a user should see."""

    def waiting(self, text: str) -> None:
        """Why the backend keeps a user waiting, such as kernels being compiled; a later text replaces an earlier one."""
        self.said(text)

    def ended(self, trainer: Training) -> None:
        """After the last step, or after the one at which the run stopped for whatever reason."""
