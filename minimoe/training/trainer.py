"""The training loop: steps, and after them metrics, evaluations and checkpoints.

A task (`tasks/`) defines what is learned and from which data; `step.py` defines what one step does. Data, noise and dropout
are functions of (seed, step), so a checkpoint needs no generator's state: a run that was stopped and resumed ends with the same bytes as
one that never stopped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from msgspec.structs import replace

from minimoe.backend import Backend, load
from minimoe.config import Config, load_config
from minimoe.config.sources import BUILT_IN
from minimoe.data.pipes import is_pipe
from minimoe.engine.recording import Recorded
from minimoe.errors import ConfigError, Diverged, Interrupted, UserError
from minimoe.layers.balance import uniform_aux_loss
from minimoe.machine import usable_processors
from minimoe.pretrained.transformer import PretrainedTransformer
from minimoe.runs.checkpoint import Arrays, not_finite
from minimoe.runs.environment import check_memory
from minimoe.runs.run import RUNS, Run
from minimoe.training.listener import Listener, PythonWarnings
from minimoe.training.metrics import Backlog
from minimoe.training.optim import learning_rate, make_optimizer
from minimoe.training.resuming import checkpoint_to_resume, tokenizer_json
from minimoe.training.step import MAX_BAD_STEPS, Step
from minimoe.training.surroundings import explain_memory_errors, save_signals, stop_signals, training_backend
from minimoe.training.tasks import load_task
from minimoe.training.trained_run import TrainedRun
from minimoe.training.validation import Stopped, compared_loss, validate


def train(
    source: str | Path | Config = "tiny-moe", *, data: str | None = None, steps: int | None = None, out: str | Path | None = None,
    backend: str | None = None, seed: int | None = None, threads: int | None = None, overrides: Iterable[str] = (),
    root: str | Path = "runs", listener: Listener | None = None,
) -> TrainedRun:  # fmt: skip
    """Train a preset, a TOML file or a Config from the start, in a new folder under `root` (or in `out`).

    Raises `UserError` for what cannot be trained, `Diverged` after ten non-finite steps in a row, `Interrupted` after a signal.
    """
    if isinstance(source, Config) and list(overrides):
        raise ConfigError("train: overrides go with a preset or a file; change a Config with msgspec.structs.replace")
    config = source if isinstance(source, Config) else load_config(source, overrides)
    config = with_options(config, data=data, steps=steps, backend=backend, seed=seed, threads=threads)
    trainer = Trainer(config, listener=listener)
    return trainer.run(trainer.create(None if out is None else Path(out), Path(root)))


def resume(
    path: str | Path | None = None, *, steps: int | None = None, root: str | Path = "runs", listener: Listener | None = None
) -> TrainedRun:
    """Continue a run from its newest whole checkpoint (or from the one named), up to `steps` in all; its metrics are cut back to it.

    Raises `CheckpointError` if the run, its configuration or its data do not fit, or if it is finished.
    """
    run = Run.open(path, Path(root))
    with run.claimed():
        config = run.config if steps is None else replace(run.config, train=replace(run.config.train, steps=steps))
        trainer = Trainer(config, listener=listener, sha256=run.data_sha256())
        trainer.restore(run)
        return trainer.run(run)


def with_options(
    config: Config, *, data: str | None = None, steps: int | None = None, backend: str | None = None, seed: int | None = None,
    threads: int | None = None,
) -> Config:  # fmt: skip
    """Return the configuration with the command line's options in it; its paths become absolute, so that a run resumes from any folder.

    A pipe keeps its name: /dev/fd/63 leads to what has no path.
    """
    given = {"steps": steps, "backend": backend, "seed": seed, "threads": threads}
    settings = replace(config.train, **{key: value for key, value in given.items() if value is not None})
    text = config.data if data is None else replace(config.data, source=data)
    if Path(text.source).exists() and text.source not in BUILT_IN["source"] and not is_pipe(Path(text.source)):
        text = replace(text, source=str(Path(text.source).resolve()))
    if Path(text.tokenizer).exists() and text.tokenizer not in BUILT_IN["tokenizer"]:
        text = replace(text, tokenizer=str(Path(text.tokenizer).resolve()))
    return replace(config, train=settings, data=text)


class Trainer:
    """A model, its optimizer and its data, and the loop over them."""

    def __init__(self, config: Config, listener: Listener | None = None, sha256: str | None = None) -> None:
        """`sha256`: the digest of the data that the run to be resumed has recorded."""
        config.check_trainable()
        self.backend: Backend = load(config.train.backend)
        self.backend.prepare(config)
        self.listener = listener or PythonWarnings()
        self.task = load_task(config, sha256=sha256)
        config = self.task.config
        check_memory(config.model, config.train)
        self.config = config = replace(config, train=replace(config.train, backend=self.backend.name))
        settings = config.train
        with explain_memory_errors(self.backend):
            self.model = PretrainedTransformer(config.model, settings.seed, settings.dtype, self.backend, self.task.tokenizer)
            self.optimizer = make_optimizer(self.model.parameters(), settings)
        self.one_step = Step(
            self.model, self.optimizer, seed=settings.seed, grad_clip=settings.grad_clip, recompute=settings.recompute
        )
        self.recorded_step = Recorded(self.one_step, self.backend, self.listener.said)
        self.layers = len(config.model.moe_layers())
        self.backlog = Backlog(self.backend, self.layers, config.model.moe.n_experts if config.model.moe else 0)
        self.step = 0  # steps done
        self.elapsed = 0.0  # seconds of training, over all sessions
        self.saved: int | None = None  # the newest step whose state is saved
        self.best: float | None = None  # the lowest validation loss so far
        self.best_step: int | None = None
        self.resumed = False
        self.metrics_sha256: str | None = None  # of the metrics up to the checkpoint that was resumed
        self.stops: list[int] = []  # signals that ask for an end
        self.saves: list[int] = []  # signals that ask for a checkpoint

    @property
    def uniform_aux_loss(self) -> float:
        """The balance loss of an even load, without its coefficient."""
        moe = self.config.model.moe
        return uniform_aux_loss(moe, self.layers) if moe is not None and self.layers else 0.0

    def environment(self) -> dict[str, Any]:
        """Return what env.json records besides the machine."""
        threads = self.config.train.threads or usable_processors()
        data = {"source": self.task.source, "sha256": self.task.sha256}
        return {"backend": self.backend.name, "threads": threads, "data": data}

    def create(self, out: Path | None, root: Path = RUNS) -> Run:
        """Make a run's folder. What came through a pipe is kept in it, since a pipe cannot be read again when the run is resumed."""
        run = Run.create(self.config, out, root, extra=self.environment(), kept=self._kept, say=self.listener.warned)
        self.config = replace(self.config, data=run.config.data)
        return run

    @property
    def _kept(self) -> bytes | None:
        return None if self.task.corpus is None else self.task.corpus.kept

    def begin(self, out: Path, weights: str) -> Run:
        """Make a run's folder with checkpoint step-000000 and no step done: `resume` starts there. `weights`: where they come from.

        The folder becomes a run when its weights are on the disk: they could not be drawn again.
        """
        bad = not_finite(self._weights())
        if bad is not None:
            raise UserError(f"{bad}: holds a number that is not finite: no training can start from it")
        fields = {**self.environment(), "weights": weights}
        run = self.folder = Run.prepare(self.config, out, extra=fields, kept=self._kept, say=self.listener.warned)
        self.config = replace(self.config, data=run.config.data)
        with run.claimed():
            self._save()
            run.write_status("interrupted", **self._sizes())
            run.publish()
        return run

    def restore(self, run: Run) -> None:
        """Take over a run's checkpoint; a run that has none yet starts anew. Raises `CheckpointError` if it does not fit."""
        self.resumed = True
        saved = checkpoint_to_resume(run, self.config, self.task, self.environment(), self.listener)
        if saved is None:
            return
        self.model.load_state_dict(saved.model)
        self.optimizer.load_state_dict(saved.optimizer)
        self.step, self.saved, self.elapsed = saved.step, saved.step, saved.state["elapsed_s"]
        self.best, self.best_step = saved.state["best"], saved.state["best_step"]
        self.one_step.bad_steps[...] = saved.state["bad"]
        self.metrics_sha256 = saved.state.get("metrics_sha256")

    # ---- the loop ----------------------------------------------------------------------------------------------------------------

    def run(self, run: Run) -> TrainedRun:
        """Train from the current step to the last, in this run's folder."""
        self.folder = run
        with run.training(lambda: self.step):
            self._start(run)
            if self.resumed:
                if run.config != self.config:
                    run.replace_config(self.config)
                for problem in run.go_back(self.step, self.best_step, self.metrics_sha256):
                    self.listener.warned(problem)
            self._warn()
            self.listener.started(self)
            self.backend.tell(self.listener.waiting)
            try:
                self._loop()
            finally:
                self.backend.tell(None)
                self.listener.ended(self)
        return TrainedRun(run, self.model, self.task, run.metrics())

    def _start(self, run: Run) -> None:
        run.start(**self._sizes())

    def _sizes(self) -> dict[str, int]:
        return {"parameters": sum(p.size for p in self.model.parameters()), "steps": self.config.train.steps, "step": self.step}

    def _warn(self) -> None:
        notes = () if self.task.corpus is None else self.task.corpus.notes
        hints = self.config.train.warnings()  # of what the configuration itself shows: not for those who asked for no progress
        for text in (*notes, *self.config.warnings()):
            (self.listener.said if text in hints else self.listener.warned)(f"warning: {text}")

    def _loop(self) -> None:
        """Run steps up to the last or to a signal, each with what follows it."""
        settings = self.config.train
        with (
            training_backend(self.backend, settings.threads),
            explain_memory_errors(self.backend),
            stop_signals(self.listener.stopping) as self.stops,
            save_signals() as self.saves,
        ):
            try:
                if self.folder.newest_checkpoint() is None:
                    self._save()
                self._catch_up()
                while self.step < settings.steps:
                    self._step()
                    self.listener.stepped(self.step)
                    self._after_step()
                self.folder.write_status("finished", step=self.step)
            except KeyboardInterrupt:  # by the second interrupt: whatever is saved stays
                if self.saved is not None:
                    self.folder.write_status("interrupted", step=self.saved)
                raise

    def _catch_up(self) -> None:
        """Do what a run that was stopped left undone after the step of its checkpoint: an evaluation, the removal of old checkpoints."""
        if not self.resumed:
            return
        if self.step and self._evaluates():
            row = self.folder.last_row() or {}
            row = row if row.get("step") == self.step else {"step": self.step}
            if self._is_last() or "val_loss" not in row:
                row = {key: value for key, value in row.items() if not key.startswith("val_")}
                if not self._measure(row):
                    self._stop()
                if row.get("loss") is not None:
                    self.listener.logged([row])
                self._settle(row)
            elif self._is_better(row):  # a kill came before the checkpoint was told
                self._settle(row)
        if not self._bad_steps():
            self.folder.prune()

    def _step(self) -> None:
        """Draw the micro-batches and do one step; nothing is read back from the device."""
        settings, began = self.config.train, time.perf_counter()
        rate = learning_rate(self.step, settings)
        drawn = [self.task.batch(self.step, micro) for micro in range(settings.accumulate)]
        inputs, targets = (np.stack(part) for part in zip(*drawn, strict=True))  # [A,B,T] each
        packed = self.recorded_step(*self.one_step.arrays(self.step, rate, inputs, targets))
        self.step += 1
        took = time.perf_counter() - began
        self.elapsed += took
        speed = self.task.tokens_per_step / took
        self.backlog.add(packed, step=self.step, lr=rate, step_ms=took * 1e3, tokens_per_s=speed, elapsed_s=self.elapsed)

    # ---- after a step: metrics, evaluation, checkpoint ---------------------------------------------------------------------------

    def _is_last(self) -> bool:
        return self.step == self.config.train.steps

    def _evaluates(self) -> bool:
        """Whether an evaluation belongs to the step that was done last."""
        every = self.config.train.eval_every
        return self._is_last() or (every > 0 and self.step % every == 0)

    def _after_step(self) -> None:
        """Read the metrics, evaluate and save, as far as it is time for it. Raises `Interrupted` after a signal."""
        settings, step = self.config.train, self.step
        if self._is_last():
            self._end()
            return
        saves = settings.checkpoint_every > 0 and step % settings.checkpoint_every == 0
        if not (saves or self.stops or self.saves or self._evaluates() or step % settings.log_every == 0):
            return
        rows = self._fetch()
        better = self._evaluates() and self._measure(rows[-1]) and self._is_better(rows[-1])
        self._write(rows)
        stopping, asked = bool(self.stops), bool(self.saves)
        self.saves.clear()
        if better or stopping or asked or (saves and not rows[-1]["skipped"]):  # a run that diverges keeps its last good state
            self._save(rows[-1] if better else None)
        if stopping:
            self._stop()
        if asked:
            self.listener.said(f"a signal asked for it: the state of step {step} is saved")

    def _end(self) -> None:
        """Save the last step before its validation, which may take long and may be stopped: `_catch_up` does it again."""
        rows = self._fetch()
        self.folder.append_metrics(rows)
        self._save(prune=False)
        done = self._measure(rows[-1])
        self.listener.logged(rows)
        if not done:
            self._stop()
        self._settle(rows[-1])

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
        self.folder.append_metrics(rows)
        self.listener.logged(rows)

    def _diverged(self, step: int, why: str) -> NoReturn:
        """End a run whose numbers are no longer finite."""
        kept = self.folder.drop_bad(before=step)
        self.folder.write_status("diverged", step=step)
        state = "no good state is left" if kept is None else f"the last good state is kept in {kept}"
        raise Diverged(f"diverged: {why}; {state}: try a lower train.lr (now {self.config.train.lr})")

    def _stop(self) -> NoReturn:
        """End a run after a signal, once its state is saved."""
        self.folder.write_status("interrupted", step=self.step)
        raise Interrupted(self.stops[0])

    def _refuse(self, name: str) -> NoReturn:
        """End a run whose state is not finite, which no later step can mend, without saving it."""
        why = f"{name} is not finite after step {self.step}"
        if not self.stops or self._is_last():
            self._diverged(self.step, why)
        self.folder.write_status("interrupted", step=self.step)
        raise Interrupted(self.stops[0], f"{why} and was not saved: the last good state is kept in {self.folder.newest_checkpoint()}")

    # ---- evaluations -------------------------------------------------------------------------------------------------------------

    def _measure(self, row: dict[str, Any]) -> bool:
        """Measure held-out data into a row.   -> False if a signal ended it"""
        try:
            row |= validate(self.task, self.model, self.config.train, self._is_last(), self.stops, self.listener.validating)
        except Stopped:
            return False
        return True

    def _is_better(self, row: dict[str, Any]) -> bool:
        loss = compared_loss(row)
        return math.isfinite(loss) and (self.best is None or loss < self.best)

    def _settle(self, row: dict[str, Any]) -> None:
        """Write what an evaluation found after the metrics and the checkpoint of its step had been written."""
        self.folder.replace_last_row(row)
        if self._is_last() and not math.isfinite(row["val_loss"]):
            self._diverged(self.step, f"the validation loss is not finite after the last step, {self.step}")
        better = self._is_better(row)
        if better:
            self.best, self.best_step = compared_loss(row), self.step
        self.folder.replace_state(self.step, self._state(), better)
        self.folder.prune()

    # ---- checkpoints -------------------------------------------------------------------------------------------------------------

    def _weights(self) -> Arrays:
        return {name: self.backend.to_host(array) for name, array in self.model.state_dict().items()}

    def _bad_steps(self) -> int:
        """Return how many steps in a row were skipped, up to the last."""
        return int(self.backend.to_host(self.one_step.bad_steps))

    def _state(self) -> dict[str, Any]:
        return {
            "elapsed_s": self.elapsed,
            "best": self.best,
            "best_step": self.best_step,
            "bad": self._bad_steps(),
            "data": {"source": self.folder.short(self.config.data.source), "sha256": self.task.sha256},
            "metrics_sha256": self.folder.metrics_sha256(),
        }

    def _save(self, best: dict[str, Any] | None = None, prune: bool = True) -> None:
        """Save the state; if it is not finite, the run ends, and the states before it stay.

        best: the row of metrics if its evaluation is the best so far. Older checkpoints stay while steps are being skipped, since the state
        may then be the one that makes their loss infinite.
        """
        model = self._weights()
        optimizer = {name: self.backend.to_host(array) for name, array in self.optimizer.state_dict().items()}
        bad = not_finite({**model, **optimizer})
        if bad is not None:
            self._refuse(bad)
        if best is not None:
            self.best, self.best_step = compared_loss(best), self.step
        self.folder.save(
            self.step,
            model=model,
            optimizer=optimizer,
            state=self._state(),
            tokenizer_json=tokenizer_json(self.task),
            best=best is not None,
            prune=prune and not self._bad_steps(),
        )
        self.saved = self.step
