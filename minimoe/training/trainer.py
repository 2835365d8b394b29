"""Training: the loop, its metrics, evaluations and checkpoints, and going on where a run stopped.

What is learnt, and from what, is the task's affair (`tasks/`): the loop is the same for text, for text with blanks and for images.
A step is one function of arrays (`_work`), which a backend may record once and repeat (`recording.py`). It reads nothing back from the
device: the verdict on non-finite values, the counts and the losses stay there, and leave packed in one array every `log_every` steps.
Data, noise and dropout are functions of (seed, step), so a checkpoint needs no generator's state, and a run that was stopped ends with the
same bytes as one that never was.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from msgspec.structs import replace

from minimoe.backend import Array, Backend, load, use_backend
from minimoe.config import Config, config_from_tables, load_config
from minimoe.data.corpus import IMAGE_SOURCES, Corpus
from minimoe.engine.random import Rng
from minimoe.engine.recording import Recorded
from minimoe.errors import CheckpointError, ConfigError, Diverged, Interrupted, UserError
from minimoe.layers.balance import uniform_aux_loss
from minimoe.model.loss import LossParts
from minimoe.pretrained.transformer import PretrainedTransformer
from minimoe.runs.checkpoint import Checkpoint
from minimoe.runs.environment import check_memory
from minimoe.runs.run import Run
from minimoe.training.evaluation import Evaluation
from minimoe.training.optim import learning_rate, make_optimizer
from minimoe.training.tasks import Task, load_task

SKIPS_ALLOWED = 10  # so many non-finite steps in a row stop a run


class Listener:
    """Who watches a run. Every method may be left as it is."""

    def started(self, trainer: Trainer) -> None:
        """Before the first step."""

    def stepped(self, step: int) -> None:
        """After a step; nothing is known of it yet but its number."""

    def logged(self, rows: list[dict[str, Any]]) -> None:
        """Metrics of the last steps have left the device."""

    def said(self, text: str) -> None:
        """Something that a user should see."""

    def ended(self, trainer: Trainer) -> None:
        """After the last step, or the one at which the run stopped, whatever stopped it."""


@dataclass
class TrainedRun:
    """What `minimoe.train` gives back."""

    run: Run
    model: PretrainedTransformer
    task: Task
    metrics: list[dict[str, Any]]

    @property
    def path(self) -> Path:
        """The run's folder."""
        return self.run.path

    @property
    def config(self) -> Config:
        return self.run.config

    @property
    def corpus(self) -> Corpus:
        """The text that it was trained on. Raises `UserError` where it was images."""
        if self.task.corpus is None:
            raise UserError(f"{self.path}: trained on {self.task.source}, which is no text")
        return self.task.corpus

    @property
    def val_loss(self) -> float:
        """Cross-entropy over the whole validation split at the end, nats a token (a masked token, an image)."""
        last = self.metrics[-1]["val_loss"]  # null in the file where it was not finite
        return float("nan") if last is None else float(last)

    @property
    def val_accuracy(self) -> float | None:
        """The share of hidden tokens or of images that is told right, over the whole validation split; None for a language model."""
        accuracy: float | None = self.metrics[-1].get("val_accuracy")
        return accuracy


def train(
    source: str | Path | Config = "tiny-moe", *, data: str | None = None, steps: int | None = None, out: str | Path | None = None,
    backend: str | None = None, seed: int | None = None, threads: int | None = None, overrides: Iterable[str] = (),
    root: str | Path = "runs", listener: Listener | None = None,
) -> TrainedRun:  # fmt: skip
    """Train a preset, a TOML file or a Config from the start, in a new run's folder under `root` (or in `out`).

    Raises `UserError` for what cannot be trained, `Diverged` after ten non-finite steps in a row, `Interrupted` after a signal.
    """
    if isinstance(source, Config) and list(overrides):
        raise ConfigError("train: overrides go with a preset or a file; a Config is changed with msgspec.structs.replace")
    config = source if isinstance(source, Config) else load_config(source, overrides)
    config = with_options(config, data=data, steps=steps, backend=backend, seed=seed, threads=threads)
    trainer = Trainer(config, listener=listener)
    run = Run.create(trainer.config, None if out is None else Path(out), Path(root), extra=trainer.environment())
    return trainer.run(run)


def resume(
    path: str | Path | None = None, *, steps: int | None = None, root: str | Path = "runs", listener: Listener | None = None
) -> TrainedRun:
    """Go on with a run from its newest whole checkpoint (or the one named), up to `steps` in all; the metrics are cut back to it.

    Raises `CheckpointError` where the run, its configuration or its text do not fit, or it is finished already.
    """
    run = Run.open(path, Path(root))
    config = run.config if steps is None else replace(run.config, train=replace(run.config.train, steps=steps))
    trainer = Trainer(config, listener=listener)
    trainer.restore(run)
    return trainer.run(run)


def with_options(
    config: Config, *, data: str | None = None, steps: int | None = None, backend: str | None = None, seed: int | None = None,
    threads: int | None = None,
) -> Config:  # fmt: skip
    """A configuration with the command line's options laid over it; paths become absolute, so that a run can be resumed from anywhere."""
    given = {"steps": steps, "backend": backend, "seed": seed, "threads": threads}
    settings = replace(config.train, **{key: value for key, value in given.items() if value is not None})
    text = config.data if data is None else replace(config.data, source=data)
    if Path(text.source).exists() and not text.source.startswith("python-") and text.source not in IMAGE_SOURCES:
        text = replace(text, source=str(Path(text.source).resolve()))
    if Path(text.tokenizer).exists() and text.tokenizer not in ("byte", "char"):
        text = replace(text, tokenizer=str(Path(text.tokenizer).resolve()))
    return replace(config, train=settings, data=text)


@dataclass
class Pending:
    """Metrics of steps that have not left the device: an array each, and what the host knew."""

    arrays: list[Array] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)


class Trainer:
    """A model, its optimizer and its data, and the loop over them."""

    def __init__(self, config: Config, listener: Listener | None = None) -> None:
        config.check_trainable()
        self.backend: Backend = load(config.train.backend)
        self.listener = listener or Listener()
        self.task = load_task(config)
        config = self.task.config
        check_memory(config.model)
        self.config = config = replace(config, train=replace(config.train, backend=self.backend.name))
        with told_of_memory(self.backend):
            self.model = PretrainedTransformer(config.model, config.train.seed, config.train.dtype, self.backend, self.task.tokenizer)
            self.optimizer = make_optimizer(self.model.parameters(), config.train)
        self.step = 0  # steps done
        self.elapsed = 0.0  # seconds of training, over all sittings
        self.best: float | None = None  # lowest validation loss of an evaluation
        self.best_step: int | None = None
        self.bad = self.backend.from_host(np.zeros((), dtype=np.int32))  # non-finite steps in a row, up to now
        self.pending = Pending()
        self.work = Recorded(self._work, self.backend, self.listener.said)
        self.layers = len(config.model.moe_layers())
        self.resumed = False

    def environment(self) -> dict[str, Any]:
        """What env.json says beyond the machine."""
        return {"backend": self.backend.name, "data": {"source": self.task.source, "sha256": self.task.sha256}}

    def begin(self, out: Path | None) -> Run:
        """A run's folder with its first checkpoint and no step done: `resume` goes on from there."""
        run = self.folder = Run.create(self.config, out, extra=self.environment())
        run.start(parameters=sum(p.size for p in self.model.parameters()), steps=self.config.train.steps, step=0)
        self._save()
        run.write_status("interrupted", step=0)
        return run

    # ---- the loop ----------------------------------------------------------------------------------------------------------------

    def run(self, run: Run) -> TrainedRun:
        """Train from here to the last step, in this run's folder."""
        run.start(parameters=sum(p.size for p in self.model.parameters()), steps=self.config.train.steps, step=self.step)
        self.folder = run
        if self.resumed:
            if run.config != self.config:
                run.replace_config(self.config)
            run.go_back(self.step, self.best_step)
        self._warn()
        self.listener.started(self)
        self.backend.tell(self.listener.said)
        try:
            self._loop(run)
        finally:
            self.backend.tell(None)
            self.listener.ended(self)
        return TrainedRun(run, self.model, self.task, run.metrics())

    def _loop(self, run: Run) -> None:
        """Steps up to the last, or to a signal, with what follows each."""
        settings = self.config.train
        threads = limited_threads(settings.threads, self.backend)
        memory = told_of_memory(self.backend)
        with use_backend(self.backend), threads, np.errstate(all="ignore"), memory, stop_signals() as stopped:
            if run.newest_checkpoint() is None:
                self._save()
            while self.step < settings.steps:
                self._step()
                self.listener.stepped(self.step)
                stopping = bool(stopped) and self.step < settings.steps
                self._after_step(stopping)
                if stopping:
                    run.write_status("interrupted", step=self.step)
                    raise Interrupted(stopped[0])
        run.write_status("finished", step=self.step)

    def _warn(self) -> None:
        moe = self.config.model.moe
        for text in [] if moe is None else moe.warnings(self.config.model.causal):
            self.listener.said(f"warning: {text}")

    def _step(self) -> None:
        """One optimizer step over all micro-batches; nothing is read back from the device."""
        settings, began = self.config.train, time.perf_counter()
        rate = learning_rate(self.step, settings)
        wide = np.float64 if settings.dtype == "float64" else np.float32
        drawn = [self.task.batch(self.step, micro) for micro in range(settings.accumulate)]
        inputs, targets = (np.stack(part) for part in zip(*drawn, strict=True))
        arrays = np.asarray(self.step, dtype=np.int32), np.asarray(rate, dtype=wide), inputs, targets
        self.pending.arrays.append(self.work(*map(self.backend.from_host, arrays)))
        self.step += 1
        took = time.perf_counter() - began
        self.elapsed += took
        speed = self.task.tokens_a_step / took
        self.pending.rows.append({"step": self.step, "lr": rate, "step_ms": took * 1e3, "tokens_per_s": speed, "elapsed_s": self.elapsed})

    def _work(self, step: Array, lr: Array, inputs: Array, targets: Array) -> Array:
        """The step on the device, from arrays to the packed metrics; what it keeps it keeps in place.

        inputs, targets [accumulate,B,T], of images [accumulate,B,channels,S,S] and [accumulate,B]
        """
        settings, xp = self.config.train, self.backend.xp
        gathered: list[Array] = []
        counts: list[Array] = []
        self.optimizer.zero_grad()  # here, so that a step that was given up half way can be done again
        for micro in range(settings.accumulate):
            rng = Rng(settings.seed, step, micro)
            parts = self.model.loss(inputs[micro, ...], targets[micro, ...], rng=rng, recompute_blocks=settings.recompute)
            weight = xp.full((), 1.0 / settings.accumulate, dtype=parts.total.dtype)
            parts.total.backward(weight)
            gathered.append(self._measures(parts))
            new = [stats.counts for stats in parts.stats]
            counts = new if not counts else [a + c for a, c in zip(counts, new, strict=True)]
        measures = gathered[0]
        for more in gathered[1:]:
            measures = measures + more
        measures = measures * (1.0 / settings.accumulate)
        norm = self.optimizer.grad_norm()
        layers = self._layers(parts, counts, norm.dtype)
        ok = xp.isfinite(measures[0]) & xp.isfinite(norm) & (self.bad < SKIPS_ALLOWED)
        self.optimizer.step(lr=lr, scale=self.optimizer.clip_scale(norm, settings.grad_clip), ok=ok)
        self.model.update_balance(counts, ok)
        self.bad[...] = xp.where(ok, xp.zeros_like(self.bad), self.bad + 1)
        verdict = xp.stack([norm, xp.astype(ok, norm.dtype), xp.astype(self.bad, norm.dtype)])
        return xp.concat([verdict, xp.astype(measures, norm.dtype), *layers])

    def _measures(self, parts: LossParts) -> Array:
        """Loss, auxiliary losses, dropped fraction and load entropy of a micro-batch, in one array.   -> [6]"""
        xp = self.backend.xp
        zero = xp.zeros_like(parts.total.data)
        values = [parts.cross_entropy.data, *(zero if t is None else t.data for t in (parts.aux_loss, parts.z_loss, parts.router_loss))]
        if parts.stats:
            values.append(sum(stats.dropped for stats in parts.stats) / len(parts.stats))
            values.append(sum(stats.entropy for stats in parts.stats) / len(parts.stats))
        else:
            values += [zero, zero]
        return xp.stack([xp.astype(v, zero.dtype) for v in values])

    def _layers(self, parts: LossParts, counts: list[Array], dtype: Any) -> list[Array]:
        """Of each routed layer its own balance loss (of the last micro-batch) and the load before capacity.   -> [1+E] each"""
        xp = self.backend.xp
        rows = []
        for stats, count in zip(parts.stats, counts, strict=True):
            share = xp.astype(count, dtype)
            own = xp.reshape(xp.astype(stats.aux_loss.data, dtype), (1,))
            rows.append(xp.concat([own, share / xp.clip(xp.sum(share), min=1.0)]))
        return rows

    # ---- after a step: metrics, evaluation, checkpoints ------------------------------------------------------------------------------

    def _after_step(self, stopping: bool) -> None:
        settings, step = self.config.train, self.step
        last = step == settings.steps
        evaluates = last or (settings.eval_every > 0 and step % settings.eval_every == 0)
        saves = last or stopping or (settings.checkpoint_every > 0 and step % settings.checkpoint_every == 0)
        if not (evaluates or saves or step % settings.log_every == 0):
            return
        rows = self._fetch()
        better = False
        if evaluates:
            found = self._evaluate(whole=last)
            rows[-1]["val_loss"] = loss = found.loss
            if found.accuracy is not None:
                rows[-1]["val_accuracy"] = found.accuracy
            better = np.isfinite(loss) and (self.best is None or loss < self.best)
            self.best, self.best_step = (loss, step) if better else (self.best, self.best_step)
        self.folder.append_metrics(rows)
        self.listener.logged(rows)
        if better or (saves and (last or stopping or not rows[-1]["skipped"])):  # a run that diverges keeps what came before
            self._save(better)

    def _fetch(self) -> list[dict[str, Any]]:
        """The metrics of the pending steps, read from the device in one piece. Raises `Diverged` at the tenth bad step in a row."""
        pending, self.pending = self.pending, Pending()
        if not pending.arrays:
            return []
        packed = np.asarray(self.backend.to_host(self.backend.xp.stack(pending.arrays)), dtype=np.float64)
        e = 0 if self.config.model.moe is None else self.config.model.moe.n_experts
        rows = []
        for known, values in zip(pending.rows, packed.tolist(), strict=True):
            norm, ok, bad, loss, aux, z, router, dropped, entropy = values[:9]
            layers = [values[9 + i * (e + 1) : 9 + (i + 1) * (e + 1)] for i in range(self.layers)]
            rows.append({
                "step": known["step"], "loss": loss, "aux_loss": aux, "z_loss": z, "router_loss": router, "lr": known["lr"],
                "grad_norm": norm, "step_ms": known["step_ms"], "tokens_per_s": known["tokens_per_s"], "elapsed_s": known["elapsed_s"],
                "expert_load": [layer[1:] for layer in layers], "aux_loss_layers": [layer[0] for layer in layers], "dropped": dropped,
                "router_entropy": entropy, "skipped": not ok,
            })  # fmt: skip
            if bad >= SKIPS_ALLOWED:
                self._diverged(rows)
        return rows

    def _diverged(self, rows: list[dict[str, Any]]) -> None:
        self.folder.append_metrics(rows)
        self.listener.logged(rows)
        self.folder.write_status("diverged", step=rows[-1]["step"])
        kept = self.folder.newest_checkpoint()
        raise Diverged(
            f"diverged: {SKIPS_ALLOWED} steps in a row with a non-finite loss or gradient, up to step {rows[-1]['step']}; "
            f"the last good state is kept in {kept}: try a lower train.lr (now {self.config.train.lr})"
        )

    def _evaluate(self, whole: bool) -> Evaluation:
        """On held-out data: the whole split, or `eval_batches` fixed batches."""
        return self.task.measure(self.model, whole)

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
                "bad": int(to_host(self.bad)),
                "data": self.environment()["data"],
            },
            tokenizer_json=tokenizer_json(self.task),
            best=best,
        )

    # ---- going on ----------------------------------------------------------------------------------------------------------------

    def restore(self, run: Run) -> None:
        """Take over the newest whole checkpoint of a run (none yet: start anew). Raises `CheckpointError` where it does not fit."""
        self.resumed = True
        if run.newest_checkpoint() is None:
            return
        saved, problems = run.load()
        for problem in problems:
            self.listener.said(f"damaged: {problem}: going back to step {saved.step}")
        self._check_same(saved, run)
        if saved.state["data"]["sha256"] != self.task.sha256:
            raise CheckpointError(
                f"{run.path}: the data of {self.task.source} have changed since the run began (their SHA-256 differs): "
                "resume needs the same data"
            )
        done = saved.step > self.config.train.steps or (saved.step == self.config.train.steps and run.status()["state"] == "finished")
        if done:
            raise CheckpointError(f"{run.path}: {saved.step} steps are done: give --steps with a larger number to go further")
        self.model.load_state_dict(saved.model)
        self.optimizer.load_state_dict(saved.optimizer)
        self.step, self.elapsed, self.best = saved.step, saved.state["elapsed_s"], saved.state["best"]
        self.best_step = saved.state["best_step"]
        self.bad = self.backend.from_host(np.asarray(saved.state["bad"], dtype=np.int32))

    def _check_same(self, saved: Checkpoint, run: Run) -> None:
        """Refuse a config.toml that was changed where the weights, their dtype or the tokens depend on it; steps and rates may change."""
        before, now = config_from_tables(saved.config, run.name), self.config
        pairs = {
            "model": (before.model, now.model),
            "dtype": (before.train.dtype, now.train.dtype),
            "tokenizer": (saved.tokenizer_json(), tokenizer_json(self.task)),
            "val_fraction": (before.data.val_fraction, now.data.val_fraction),
        }
        for name, (old, new) in pairs.items():
            if old != new:
                raise CheckpointError(
                    f"{saved.folder}: a checkpoint of another configuration: its {name} is not that of {run.path}/config.toml"
                )

    @property
    def uniform_aux_loss(self) -> float:
        """What the raw balance loss is when the load is even."""
        moe = self.config.model.moe
        return uniform_aux_loss(moe, self.layers) if moe is not None and self.layers else 0.0


def tokenizer_json(task: Task) -> str | None:
    """The tokenizer.json that a checkpoint keeps; None where the task reads no text."""
    return None if task.tokenizer is None else task.tokenizer.to_json()


@contextmanager
def told_of_memory(backend: Backend) -> Iterator[None]:
    """Where the device's memory does not do: one line with what was asked for, what is free, and what needs less."""
    try:
        yield
    except Exception as error:
        found = backend.out_of_memory(error)
        if found is None:
            raise
        asked, free = (f"{size / 1e6:,.0f} MB" for size in found)
        raise UserError(
            f"backend {backend.name}: out of memory: {asked} asked for, {free} free; less is needed with a smaller train.batch_size "
            '(and train.accumulate), with train.recompute = true, or with train.dtype = "bfloat16" where the backend has it'
        ) from error


@contextmanager
def limited_threads(threads: int, backend: Backend) -> Iterator[None]:
    """BLAS and the backend's own kernels with this many threads; 0: as it is."""
    if not threads:
        yield
        return
    from threadpoolctl import threadpool_limits

    backend.use_threads(threads)
    try:
        with threadpool_limits(limits=threads):
            yield
    finally:
        backend.use_threads(0)


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that fills when SIGINT or SIGTERM arrives, so that a step can be finished and saved; a second SIGINT ends at once."""
    received: list[int] = []

    def note(number: int, _: Any) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread, where Python allows no handlers
        yield received
        return
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
