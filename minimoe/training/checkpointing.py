"""The state of training as checkpoints keep it, and how evaluations compare: which is the best, and how many since then were not better.

A checkpoint has the weights, the optimizer's arrays and a few figures (`state.json`). Data, noise and dropout are functions of
(seed, step), so no generator's state is among them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from minimoe.config.trained import is_adapter
from minimoe.model.transformer import Transformer
from minimoe.runs.base import base_of
from minimoe.runs.checkpoint import Arrays, Checkpoint, first_not_finite
from minimoe.runs.run import Run
from minimoe.training.optim import Optimizer
from minimoe.training.resuming import tokenizer_json
from minimoe.training.step import Step
from minimoe.training.tasks import Task
from minimoe.training.validation import compared_loss


class Checkpointer:
    """Saves and restores the state of one training."""

    def __init__(self, task: Task, model: Transformer, optimizer: Optimizer, one_step: Step) -> None:
        self.task, self.model, self.optimizer, self.one_step = task, model, optimizer, one_step
        self.to_host = model.backend.to_host
        self.adapts = task.config.lora is not None
        self.base_sha256: str | None = None  # of the file that holds the base of the adapters
        self.saved: int | None = None  # the newest step whose state is saved
        self.best: float | None = None  # the lowest validation loss so far
        self.best_step: int | None = None
        self.stale: list[int] = []  # steps of the evaluations since the best one, or since a run that had ended early was resumed

    def weights(self) -> Arrays:
        """Return on the host what a checkpoint has of the model's arrays: all or, if it has adapters, these alone."""
        return self._arrays(lambda name: not self.adapts or is_adapter(name))

    def base(self) -> Arrays:
        """Return on the host the frozen arrays of a model with adapters; none of another."""
        return self._arrays(lambda name: self.adapts and not is_adapter(name))

    def _arrays(self, wanted: Callable[[str], bool]) -> Arrays:
        return {name: self.to_host(array) for name, array in self.model.state_dict().items() if wanted(name)}

    def bad_steps(self) -> int:
        """Return how many steps in a row were skipped, up to the last."""
        return int(self.to_host(self.one_step.bad_steps))

    def is_better(self, row: dict[str, Any]) -> bool:
        """Return True if a row's evaluation is better than all before it."""
        loss = compared_loss(row)
        return math.isfinite(loss) and (self.best is None or loss < self.best)

    def judge(self, step: int, row: dict[str, Any]) -> bool:
        """Take note of the evaluation of a step.   -> whether it is better than all before it

        It may be told of the same evaluation again, as when a run is resumed where it was killed.
        """
        better = self.is_better(row)
        if better:
            self.best, self.best_step, self.stale = compared_loss(row), step, []
        elif step not in (self.best_step, *self.stale):
            self.stale.append(step)
        return better

    def has_judged(self, step: int) -> bool:
        """Return True if the evaluation of a step is in the saved state, as far as that matters later."""
        return not self.patience or step in (self.best_step, *self.stale)

    @property
    def patience(self) -> int:
        """How many evaluations in a row may bring nothing; 0: any number."""
        return self.task.config.train.patience

    @property
    def exhausted(self) -> bool:
        """True if so many evaluations in a row were not better that the run ends early."""
        return 0 < self.patience <= len(self.stale)

    def restore(self, saved: Checkpoint) -> None:
        """Take over the state that a checkpoint keeps, and the base of its adapters."""
        if self.adapts:
            self.base_sha256 = saved.state.get("base_sha256")
        self.model.load_state_dict({**base_of(saved), **saved.model} if self.adapts else saved.model)
        self.optimizer.load_state_dict(saved.optimizer)
        self.one_step.bad_steps[...] = saved.state["bad"]
        self.saved, self.best, self.best_step = saved.step, saved.state["best"], saved.state["best_step"]
        self.stale = list(saved.state.get("stale") or ())

    def save(self, run: Run, step: int, elapsed: float, best: bool = False, prune: bool = True) -> str | None:
        """Save the state after a step.   -> the name of an array that is not finite, and then nothing is saved; else None

        best: whether its evaluation is the best so far. Older checkpoints stay while steps are being skipped, since the state
        may then be the one that makes their loss infinite.
        """
        model = self.weights()
        optimizer = {name: self.to_host(array) for name, array in self.optimizer.state_dict().items()}
        bad = first_not_finite({**model, **optimizer})
        if bad is not None:
            return bad
        run.save(
            step,
            model=model,
            optimizer=optimizer,
            state=self._figures(run, elapsed),
            tokenizer_json=tokenizer_json(self.task),
            best=best,
            prune=prune and not self.bad_steps(),
        )
        self.saved = step
        return None

    def add_evaluation(self, run: Run, step: int, elapsed: float, row: dict[str, Any]) -> None:
        """Write the result of an evaluation into the checkpoint of its step, which was saved before it."""
        self.judge(step, row)
        run.replace_state(step, self._figures(run, elapsed), step == self.best_step)
        run.prune()

    def _figures(self, run: Run, elapsed: float) -> dict[str, Any]:
        """Return the fields of state.json but for the step."""
        return {
            "elapsed_s": elapsed,
            "best": self.best,
            "best_step": self.best_step,
            "bad": self.bad_steps(),
            **({"stale": self.stale} if self.patience else {}),
            "data": {"source": run.short(run.config.data.name), "sha256": self.task.sha256},
            "metrics_sha256": run.metrics_file.sha256(),
            **({} if self.base_sha256 is None else {"base_sha256": self.base_sha256}),
        }
