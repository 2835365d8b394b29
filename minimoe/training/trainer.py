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
from typing import Any

import numpy as np
from msgspec.structs import replace

from minimoe.backend import Backend, load
from minimoe.config import Config, load_config
from minimoe.data.corpus import IMAGE_SOURCES
from minimoe.engine.recording import Recorded
from minimoe.errors import ConfigError, Diverged, Interrupted
from minimoe.layers.balance import uniform_aux_loss
from minimoe.pretrained.transformer import PretrainedTransformer
from minimoe.runs.environment import check_memory, usable_processors
from minimoe.runs.run import Run
from minimoe.training.listener import Listener, Notices
from minimoe.training.metrics import Backlog
from minimoe.training.optim import learning_rate, make_optimizer
from minimoe.training.resuming import checkpoint_to_resume, tokenizer_json
from minimoe.training.step import MAX_BAD_STEPS, Step
from minimoe.training.surroundings import explain_memory_errors, stop_signals, training_backend
from minimoe.training.tasks import load_task
from minimoe.training.trained_run import TrainedRun


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
    folder = None if out is None else Path(out)
    run = Run.create(trainer.config, folder, Path(root), extra=trainer.environment(), say=trainer.listener.warned)
    return trainer.run(run)


def resume(
    path: str | Path | None = None, *, steps: int | None = None, root: str | Path = "runs", listener: Listener | None = None
) -> TrainedRun:
    """Continue a run from its newest whole checkpoint (or from the one named), up to `steps` in all; its metrics are cut back to it.

    Raises `CheckpointError` if the run, its configuration or its data do not fit, or if it is finished.
    """
    run = Run.open(path, Path(root))
    with run.claimed():
        config = run.config if steps is None else replace(run.config, train=replace(run.config.train, steps=steps))
        trainer = Trainer(config, listener=listener)
        trainer.restore(run)
        return trainer.run(run)


def with_options(
    config: Config, *, data: str | None = None, steps: int | None = None, backend: str | None = None, seed: int | None = None,
    threads: int | None = None,
) -> Config:  # fmt: skip
    """Return the configuration with the command line's options in it; its paths become absolute, so that a run resumes from any folder."""
    given = {"steps": steps, "backend": backend, "seed": seed, "threads": threads}
    settings = replace(config.train, **{key: value for key, value in given.items() if value is not None})
    text = config.data if data is None else replace(config.data, source=data)
    if Path(text.source).exists() and not text.source.startswith("python-") and text.source not in IMAGE_SOURCES:
        text = replace(text, source=str(Path(text.source).resolve()))
    if Path(text.tokenizer).exists() and text.tokenizer not in ("byte", "char"):
        text = replace(text, tokenizer=str(Path(text.tokenizer).resolve()))
    return replace(config, train=settings, data=text)


class Trainer:
    """A model, its optimizer and its data, and the loop over them."""

    def __init__(self, config: Config, listener: Listener | None = None) -> None:
        config.check_trainable()
        self.backend: Backend = load(config.train.backend)
        self.backend.prepare(config)
        self.listener = listener or Notices()
        self.task = load_task(config)
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
        self.best: float | None = None  # the lowest validation loss so far
        self.best_step: int | None = None
        self.resumed = False
        self.metrics_sha256: str | None = None  # of the metrics up to the checkpoint that was resumed

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

    def begin(self, out: Path, weights: str) -> Run:
        """Make a run's folder with checkpoint step-000000 and no step done: `resume` starts there. `weights`: where they come from.

        The folder becomes a run when its weights are on the disk: they could not be drawn again.
        """
        run = self.folder = Run.prepare(self.config, out, extra={**self.environment(), "weights": weights}, say=self.listener.warned)
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
        self.step, self.elapsed = saved.step, saved.state["elapsed_s"]
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
        moe = self.config.model.moe
        for text in [] if moe is None else moe.warnings(self.config.model.causal):
            self.listener.warned(f"warning: {text}")

    def _loop(self) -> None:
        """Run steps up to the last or to a signal, each with what follows it."""
        settings = self.config.train
        with (
            training_backend(self.backend, settings.threads),
            explain_memory_errors(self.backend),
            stop_signals(self.listener.stopping) as signals,
        ):
            if self.folder.newest_checkpoint() is None:
                self._save()
            while self.step < settings.steps:
                self._step()
                self.listener.stepped(self.step)
                stopping = bool(signals) and self.step < settings.steps
                self._after_step(stopping)
                if stopping:
                    self.folder.write_status("interrupted", step=self.step)
                    raise Interrupted(signals[0])
        self.folder.write_status("finished", step=self.step)

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

    def _after_step(self, stopping: bool) -> None:
        settings, step = self.config.train, self.step
        last = step == settings.steps
        evaluates = last or (settings.eval_every > 0 and step % settings.eval_every == 0)
        saves = last or stopping or (settings.checkpoint_every > 0 and step % settings.checkpoint_every == 0)
        if not (evaluates or saves or step % settings.log_every == 0):
            return
        rows = self._fetch()
        improved = self._evaluate(rows[-1], whole=last) if evaluates else False
        self._write(rows)
        if improved or (saves and (last or stopping or not rows[-1]["skipped"])):  # a run that diverges keeps its last good state
            self._save(improved)

    def _fetch(self) -> list[dict[str, Any]]:
        """Read the metrics of the last steps from the device. Raises `Diverged` at the tenth bad step in a row."""
        rows = []
        for row, bad_steps in self.backlog.take():
            rows.append(row)
            if bad_steps >= MAX_BAD_STEPS:
                self._diverged(rows)
        return rows

    def _write(self, rows: list[dict[str, Any]]) -> None:
        self.folder.append_metrics(rows)
        self.listener.logged(rows)

    def _diverged(self, rows: list[dict[str, Any]]) -> None:
        self._write(rows)
        self.folder.write_status("diverged", step=rows[-1]["step"])
        raise Diverged(
            f"diverged: {MAX_BAD_STEPS} steps in a row with a non-finite loss or gradient, up to step {rows[-1]['step']}; "
            f"the last good state is kept in {self.folder.newest_checkpoint()}: try a lower train.lr (now {self.config.train.lr})"
        )

    def _evaluate(self, row: dict[str, Any], whole: bool) -> bool:
        """Measure the whole validation split, or `eval_batches` fixed batches of it, into a row.   -> True if it is the best so far"""
        found = self.task.measure(self.model, whole)
        row["val_loss"] = found.loss
        if found.accuracy is not None:
            row["val_accuracy"] = found.accuracy
        improved = math.isfinite(found.loss) and (self.best is None or found.loss < self.best)
        if improved:
            self.best, self.best_step = found.loss, self.step
        return improved

    def _save(self, best: bool = False) -> None:
        to_host = self.backend.to_host
        self.folder.save(
            self.step,
            model={name: to_host(array) for name, array in self.model.state_dict().items()},
            optimizer={name: to_host(array) for name, array in self.optimizer.state_dict().items()},
            state={
                "elapsed_s": self.elapsed,
                "best": self.best,
                "best_step": self.best_step,
                "bad": int(to_host(self.one_step.bad_steps)),
                "data": self.environment()["data"],
                "metrics_sha256": self.folder.metrics_sha256(),
            },
            tokenizer_json=tokenizer_json(self.task),
            best=best,
        )
