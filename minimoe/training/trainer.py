"""The training loop: steps, and after them metrics, evaluations and checkpoints.

A task (`tasks/`) defines what is learned and from which data; `step.py` defines what one step does. Data, noise and dropout
are functions of (seed, step), so a checkpoint needs no generator's state: a run that was stopped and resumed ends with the same bytes as
one that never stopped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from msgspec.structs import replace

from minimoe.backend import Backend, load, unproven
from minimoe.config import Config
from minimoe.config.trained import check_trained, trained_line
from minimoe.engine.recording import Recorded
from minimoe.errors import ConfigError, Diverged, Interrupted, UserError
from minimoe.hints import command
from minimoe.layers.balance import uniform_aux_loss
from minimoe.machine import usable_processors
from minimoe.model.adapters import choose_trained, merge_adapters
from minimoe.pretrained.transformer import PretrainedTransformer
from minimoe.runs.base import BASE
from minimoe.runs.checkpoint import first_not_finite, pack, sha256
from minimoe.runs.environment import check_memory
from minimoe.runs.run import RUNS, Run
from minimoe.training.checkpointing import Checkpointer
from minimoe.training.listener import Listener
from minimoe.training.metrics import Backlog
from minimoe.training.notebook import default_listener
from minimoe.training.optim import learning_rate, make_optimizer
from minimoe.training.resuming import checkpoint_to_resume, waits_anew
from minimoe.training.samples import shown, take_sample, told_if_slow
from minimoe.training.step import MAX_BAD_STEPS, Step
from minimoe.training.surroundings import explain_memory_errors, save_signals, stop_signals, training_backend
from minimoe.training.tasks import load_task
from minimoe.training.trained_run import TrainedRun
from minimoe.training.validation import Stopped, validate, without_evaluation
from minimoe.training.weights import Weights


def check_starts_from_seed(config: Config) -> None:
    """Refuse adapters of weights that nobody trained. Raises `ConfigError`."""
    if config.lora is not None:
        raise ConfigError("[lora] adapts weights that were trained before: name them with --init RUN|FOLDER, or --set lora=none")


class Trainer:
    """A model, its optimizer and its data, and the loop over them."""

    def __init__(
        self, config: Config, listener: Listener | None = None, sha256: str | None = None, weights: Weights | None = None
    ) -> None:
        """`sha256`: the digest of the data that the run to be resumed has recorded. `weights`: those to start from."""
        config.check_trainable()
        self.backend: Backend = load(config.train.backend)
        self.backend.prepare(config)
        self.listener = listener or default_listener()
        self.task = load_task(config, weights.tokenizer if weights else None, sha256=sha256)
        config = self.task.config
        check_trained(config)
        check_memory(config)
        self.config = config = replace(config, train=replace(config.train, backend=self.backend.name))
        settings = config.train
        with explain_memory_errors(self.backend):
            self.model = PretrainedTransformer(config.model, settings.seed, settings.dtype, self.backend, self.task.tokenizer)
            if weights is not None:
                self.model.load_state_dict(weights.arrays_for(config.model, self.model.state_dict()))
            self.parameters = sum(p.size for p in self.model.parameters())
            choose_trained(self.model, config)
            self.optimizer = make_optimizer(self.model.parameters(), settings)
        self.one_step = Step(
            self.model, self.optimizer, seed=settings.seed, grad_clip=settings.grad_clip, recompute=settings.recompute
        )
        self.recorded_step = Recorded(self.one_step, self.backend, self.listener.said, self.one_step.state)
        self.checkpointer = Checkpointer(self.task, self.model, self.optimizer, self.one_step)
        self.layers = len(config.model.moe_layers())
        experts = config.model.moe.n_experts if config.model.moe else 0
        self.backlog = Backlog(self.backend, self.layers, experts, self.task.tokens_per_step)
        self.step = 0  # steps done
        self.alone = self.backend.warm_up + 1  # steps still to be waited for one by one: they compile kernels, or record the step
        self.resumed = False
        self.metrics_sha256: str | None = None  # of the metrics up to the checkpoint that was resumed
        self.stops: list[int] = []  # signals that ask for an end
        self.saves: list[int] = []  # signals that ask for a checkpoint

    def run(self, run: Run) -> TrainedRun:
        """Train from the current step to the last, in this run's folder."""
        self.folder = run
        with run.training(lambda: self.step), self._saved_at_once():
            run.start(**self._sizes())
            if self.resumed:
                if run.config != self.config:
                    run.replace_config(self.config)
                for problem in run.go_back(self.step, self.checkpointer.best_step, self.metrics_sha256):
                    self.listener.warned(problem)
            self._warn()
            self.listener.started(self)
            if line := trained_line(self.config):
                self.listener.said(line)
            self.backend.tell(self.listener.waiting)
            try:
                self._loop()
            finally:
                self.backend.tell(None)
                self.listener.ended(self)
        if self.config.lora is not None:
            merge_adapters(self.model, self.config.lora)
        return TrainedRun(run, self.model, self.task, run.metrics())

    def _sizes(self) -> dict[str, int]:
        return {"parameters": self.parameters, "steps": self.config.train.steps, "step": self.step}

    def _warn(self) -> None:
        for line in self.task.read():
            self.listener.said(line)
        notes = () if self.task.corpus is None else self.task.corpus.notes
        hints = self.config.train.warnings()  # they follow from the configuration alone: --quiet hides them
        for text in (*notes, *self.config.warnings()):
            (self.listener.said if text in hints else self.listener.warned)(f"warning: {text}")

    def _loop(self) -> None:
        """Run steps up to the last, to a signal, or until evaluations bring nothing any more, each with what follows it."""
        settings = self.config.train
        with (
            training_backend(self.backend, settings.threads),
            explain_memory_errors(self.backend),
            stop_signals(self.listener.stopping) as self.stops,
            save_signals() as self.saves,
        ):
            if self.folder.newest_checkpoint() is None:
                self._save()
            self._catch_up()
            while not self._is_last():
                self.do_step()
                self.listener.stepped(self.step)
                self._after_step()
            self.folder.write_status("finished", step=self.step, **self._reason())

    def _reason(self) -> dict[str, str]:
        """Return what status.json says of a run that ended before its last step."""
        if self.step == self.config.train.steps:
            return {}
        n = self.config.train.patience
        return {"reason": f"no better validation loss in {n} evaluation{'s' * (n > 1)} (train.patience)"}

    @contextmanager
    def _saved_at_once(self) -> Iterator[None]:
        """Say in the status what is saved when an interrupt ends training at once: the second, or one before the first step."""
        try:
            yield
        except KeyboardInterrupt:
            if self.checkpointer.saved is not None:
                self.folder.write_status("interrupted", step=self.checkpointer.saved)
            raise

    def _catch_up(self) -> None:
        """Do what a run that was stopped left undone after the step of its checkpoint: an evaluation, the removal of old checkpoints."""
        if not self.resumed:
            return
        if self.step and self._evaluates():
            row = self.folder.metrics_file.last_row() or {}
            row = row if row.get("step") == self.step else {"step": self.step}
            rows = [row] if row.get("loss") is not None else []
            if not self._is_last():
                self._complete(row, rows)
            if self._is_last():  # also if the evaluation was one too many without a better loss
                self._measure_last(row, rows)
        if not self.checkpointer.bad_steps():
            self.folder.prune()

    def do_step(self, rate: float | None = None) -> None:
        """Draw the micro-batches and do one step, at the schedule's rate or another.

        Nothing is read back from the device, except after the first steps of a session.
        """
        settings, began = self.config.train, time.perf_counter()
        rate = learning_rate(self.step, settings) if rate is None else rate
        drawn = [self.task.batch(self.step, micro) for micro in range(settings.accumulate)]
        batch = [np.stack(part) for part in zip(*drawn, strict=True)]  # [A,B,T] each
        packed = self.recorded_step(*self.one_step.arrays(self.step, rate, *batch))
        self.step += 1
        self.backlog.add(packed, time.perf_counter() - began, step=self.step, lr=rate)
        if self.alone:
            self.alone -= 1
            self.backlog.wait()

    # ---- after a step: metrics, evaluation, checkpoint ---------------------------------------------------------------------------

    def _is_last(self) -> bool:
        return self.step == self.config.train.steps or self.checkpointer.exhausted

    def _evaluates(self) -> bool:
        """Return True if an evaluation belongs to the step that was done last."""
        every = self.config.train.eval_every
        return self._is_last() or (every > 0 and self.step % every == 0)

    def _samples(self) -> bool:
        """Return True if a sample belongs to the step that was done last."""
        every = self.config.train.sample_every
        return every > 0 and self.step % every == 0

    def _after_step(self) -> None:
        """Read the metrics, evaluate and save, as far as it is time for it. Raises `Interrupted` after a signal."""
        settings, step = self.config.train, self.step
        if self._is_last():
            self._end(self._fetch())
            return
        saves = settings.checkpoint_every > 0 and step % settings.checkpoint_every == 0
        if not (saves or self.stops or self.saves or self._evaluates() or self._samples() or step % settings.log_every == 0):
            return
        rows = self._fetch()
        better = self._evaluates() and self._measure(rows[-1]) and self.checkpointer.judge(step, rows[-1])
        if self.checkpointer.exhausted:
            self._end(rows)
            return
        self._write(rows)
        self._sample()
        stopping, asked = bool(self.stops), bool(self.saves)
        self.saves.clear()
        if better or stopping or asked or (saves and not rows[-1]["skipped"]):  # a run that diverges keeps its last good state
            self._save(better)
        if stopping:
            self._stop()
        if asked:
            self.listener.said(f"SIGUSR1: the state of step {step} is saved")

    def _end(self, rows: list[dict[str, Any]]) -> None:
        """Save the last step before its validation, which may take long and may be stopped: `_catch_up` does it again."""
        self.folder.metrics_file.append([*rows[:-1], without_evaluation(rows[-1])])
        self._sample()
        self._save(prune=False)
        self._measure_last(rows[-1], rows)

    def _fetch(self) -> list[dict[str, Any]]:
        """Read the metrics of the last steps from the device. Raises `Diverged` at the tenth bad step in a row."""
        rows = []
        for row, bad_steps in self.backlog.take():
            rows.append(row)
            if bad_steps >= MAX_BAD_STEPS:
                self._write(rows)
                why = f"{MAX_BAD_STEPS} steps in a row with a non-finite loss or gradient, up to step {row['step']}"
                self._diverged(row["step"], why)
        return rows

    def _write(self, rows: list[dict[str, Any]]) -> None:
        self.folder.metrics_file.append(rows)
        self.listener.logged(rows)

    def _diverged(self, step: int, why: str) -> NoReturn:
        """End a run whose numbers are no longer finite."""
        kept = self.folder.drop_bad(before=step)
        self.folder.write_status("diverged", step=step)
        state = "no good state is left" if kept is None else f"the last good state is kept in {kept}"
        name = self.backend.name
        check = f", or `{command('backends', 'check', name)}`, since {name} has unproven kernels" if unproven(self.backend) else ""
        raise Diverged(f"diverged: {why}; {state}: try a lower train.lr (now {self.config.train.lr}){check}")

    def _stop(self) -> NoReturn:
        """End a run after a signal, once its state is saved."""
        self.folder.write_status("interrupted", step=self.step)
        raise Interrupted(self.stops[0], f"the state was saved: {command('resume', self.folder.path)} continues")

    def _refuse(self, name: str) -> NoReturn:
        """End a run whose state is not finite, which no later step can mend, without saving it."""
        why = f"{name} is not finite after step {self.step}"
        if not self.stops or self._is_last():
            self._diverged(self.step, why)
        self.folder.write_status("interrupted", step=self.step)
        raise Interrupted(self.stops[0], f"{why} and was not saved: the last good state is kept in {self.folder.newest_checkpoint()}")

    def _sample(self) -> None:
        """Keep a sample if it is time for one: before the checkpoint of its step, so that a run that resumes from there has it."""
        if self._samples():
            with told_if_slow(self.listener.waiting):
                row = take_sample(self.task, self.model, self.step, self.step // self.config.train.sample_every)
            self.folder.samples_file.append(row)
            told = self.listener.sampled_last if self._is_last() else self.listener.sampled
            told(self.step, shown(row))

    # ---- evaluations -------------------------------------------------------------------------------------------------------------

    def _measure(self, row: dict[str, Any]) -> bool:
        """Measure held-out data into a row.   -> False if a signal ended it"""
        try:
            row |= validate(self.task, self.model, self.config.train, self._is_last(), self.stops, self.listener.validating)
        except Stopped:
            return False
        return True

    def _measure_last(self, row: dict[str, Any], rows: list[dict[str, Any]]) -> None:
        """Do the last evaluation, in place of another of the same step that may be in the row already, and log `rows`."""
        for key in row.keys() - without_evaluation(row).keys():
            del row[key]
        done = self._measure(row)
        self.listener.logged(rows)
        if not done:
            self._stop()
        self._settle(row)

    def _complete(self, row: dict[str, Any], rows: list[dict[str, Any]]) -> None:
        """Finish what was left of an evaluation that is not the last, and log `rows`. One after which the run ends is not written."""
        if "val_loss" in row:
            if self.checkpointer.is_better(row) or not self.checkpointer.has_judged(self.step):
                self._settle(row)  # a kill came before the checkpoint recorded it
            return
        if not self._measure(row):
            self._stop()
        self.checkpointer.judge(self.step, row)
        if not self.checkpointer.exhausted:
            self.listener.logged(rows)
            self._settle(row)

    def _settle(self, row: dict[str, Any]) -> None:
        """Write what an evaluation found after the metrics and the checkpoint of its step had been written."""
        self.folder.metrics_file.replace_last(row)
        if self._is_last() and not math.isfinite(row["val_loss"]):
            self._diverged(self.step, f"the validation loss is not finite after the last step, {self.step}")
        self.checkpointer.add_evaluation(self.folder, self.step, self.backlog.elapsed, row)

    def _save(self, best: bool = False, prune: bool = True) -> None:
        """Save the state; `best` if its evaluation is the best so far. A state that is not finite ends the run instead."""
        bad = self.checkpointer.save(self.folder, self.step, self.backlog.elapsed, best=best, prune=prune)
        if bad is not None:
            self._refuse(bad)

    # ---- a run's folder, new or resumed ------------------------------------------------------------------------------------------

    def environment(self) -> dict[str, Any]:
        """Return what env.json records besides the machine."""
        threads = self.config.train.threads or usable_processors()
        data = {"source": self.task.source, "sha256": self.task.sha256}
        return {"backend": self.backend.name, "threads": threads, "data": data}

    def create(self, out: Path | None, root: Path = RUNS) -> Run:
        """Make a run's folder; its weights come from the seed.

        What came through a pipe is kept in it, since a pipe cannot be read again when the run is resumed.
        """
        check_starts_from_seed(self.config)
        run = Run.create(self.config, out, root, extra=self.environment(), kept=self._kept, say=self.listener.warned)
        self.config = replace(self.config, data=run.config.data)
        return run

    @property
    def _kept(self) -> bytes | None:
        return None if self.task.corpus is None else self.task.corpus.kept

    def begin(self, out: Path | None, origin: Mapping[str, Any], root: Path = RUNS, keeps: Mapping[str, bytes] | None = None) -> Run:
        """Make a run's folder with checkpoint step-000000 and no step done: `resume` starts there.

        `origin`: where the weights come from, for env.json; `keeps`: files that the run needs, by name. The folder becomes a run when its
        weights are on the disk: they could not be drawn again.
        """
        bad = first_not_finite(self.checkpointer.weights())
        if bad is not None:
            raise UserError(f"{bad}: has a number that is not finite: training cannot start from it")
        fields, keeps = {**self.environment(), "weights": dict(origin)}, dict(keeps or {})
        if self.config.lora is not None:
            keeps[BASE] = pack(self.checkpointer.base())
            self.checkpointer.base_sha256 = sha256(keeps[BASE])
        run = self.folder = Run.prepare(self.config, out, root, fields, self._kept, self.listener.warned, keeps)
        self.config = replace(self.config, data=run.config.data)
        with run.claimed():
            self._save()
            run.write_status("interrupted", **self._sizes())
            run.publish(root)
        return run

    def restore(self, run: Run) -> None:
        """Take over a run's checkpoint; a run that has none yet starts anew. Raises `CheckpointError` if it does not fit."""
        self.resumed = True
        saved = checkpoint_to_resume(run, self.config, self.task, self.environment(), self.listener)
        if saved is None:
            return
        self.checkpointer.restore(saved)
        if waits_anew(saved, self.config):
            self.checkpointer.stale.clear()
        self.step, self.backlog.elapsed = saved.step, saved.state["elapsed_s"]
        self.metrics_sha256 = saved.state.get("metrics_sha256")

    # ---- what a listener reads ---------------------------------------------------------------------------------------------------

    @property
    def saved(self) -> int | None:
        """The newest step whose state is saved."""
        return self.checkpointer.saved

    @property
    def best(self) -> float | None:
        """The lowest validation loss so far."""
        return self.checkpointer.best

    @property
    def elapsed(self) -> float:
        """The seconds that the steps of all sessions took, up to the last whose metrics were read."""
        return self.backlog.elapsed

    def earlier_losses(self) -> list[float | None]:
        """Return the training loss of each step that earlier sessions did; None where it was not finite."""
        return self.folder.metrics_file.losses() if self.resumed and self.step else []

    @property
    def uniform_aux_loss(self) -> float:
        """The balance loss of an even load, without its coefficient."""
        moe = self.config.model.moe
        return uniform_aux_loss(moe, self.layers) if moe is not None and self.layers else 0.0
