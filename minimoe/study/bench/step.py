"""One whole training step on random tokens or images, and backends whose kernels can be watched."""

from __future__ import annotations

import copy
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
from msgspec.structs import replace

from minimoe.backend import Array, Backend, kernel_names, load, use_backend
from minimoe.config import Config
from minimoe.engine.random import Rng, host_bits
from minimoe.engine.recording import Recorded
from minimoe.model.transformer import Transformer
from minimoe.runs.environment import check_memory
from minimoe.training.optim import learning_rate, make_optimizer
from minimoe.training.trainer import limited_threads

Watch = Callable[[str, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""Called in a kernel's place with its name, the kernel and its arguments; calls the kernel and returns what it gave."""

BYTES_VOCABULARY = 256  # where the configuration leaves the vocabulary to a tokenizer


class TrainingStep:
    """One whole training step as the trainer does it, on the same random inputs each time, without metrics and checkpoints."""

    def __init__(self, config: Config, backend: Backend) -> None:
        config.check_trainable()
        if config.model.vocab_size is None and not config.model.image_size:
            config = replace(config, model=replace(config.model, vocab_size=BYTES_VOCABULARY))
        check_memory(config.model)
        self.config, self.backend, self.done = config, backend, 0
        t = config.train
        self.tokens_a_step = t.accumulate * t.batch_size * (config.model.n_patches + 1 if config.model.image_size else t.seq_len)
        self.model = Transformer(config.model, seed=t.seed, dtype=t.dtype, backend=backend)
        self.optimizer = make_optimizer(self.model.parameters(), t)
        self.batch = random_images(config) if config.model.image_size else random_tokens(config, self.model.vocab_size)
        self.recorded = Recorded(self.work, backend, lambda why: print(f"minimoe: {why}", file=sys.stderr))

    def __call__(self) -> None:
        """Forward and backward over every micro-batch, the gradient's norm, clipping, the update; recorded where the backend records."""
        wide = np.float64 if self.config.train.dtype == "float64" else np.float32
        rate = np.asarray(learning_rate(self.done, self.config.train), wide)
        inputs = np.asarray(self.done, np.int32), rate, *self.batch
        self.recorded(*map(self.backend.from_host, inputs))
        self.backend.synchronize()
        self.done += 1

    def work(self, step: Array, lr: Array, inputs: Array, targets: Array) -> Array:
        """The step from arrays.   tokens, targets [accumulate,B,T], or images and classes -> the gradient's norm"""
        t, xp = self.config.train, self.backend.xp
        counts: list[Any] = []
        self.optimizer.zero_grad()
        for micro in range(t.accumulate):
            rng = Rng(t.seed, step, micro)
            parts = self.model.loss(inputs[micro, ...], targets[micro, ...], rng=rng, recompute_blocks=t.recompute)
            parts.total.backward(xp.full((), 1.0 / t.accumulate, dtype=parts.total.dtype))
            new = [stats.counts for stats in parts.stats]
            counts = new if not counts else [a + c for a, c in zip(counts, new, strict=True)]
        norm = self.optimizer.grad_norm()
        ok, scale = xp.isfinite(norm), self.optimizer.clip_scale(norm, t.grad_clip)
        self.optimizer.step(lr=lr, scale=scale, ok=ok)
        self.model.update_balance(counts, ok)
        return norm


Drawn = npt.NDArray[Any]


def random_tokens(config: Config, vocab_size: int) -> tuple[Drawn, Drawn]:
    """-> tokens, targets [accumulate,B,T]"""
    t = config.train
    bits = host_bits(t.accumulate * t.batch_size * (t.seq_len + 1), t.seed, "bench.tokens") % vocab_size
    rows = bits.astype(np.int32).reshape(t.accumulate, t.batch_size, t.seq_len + 1)
    return rows[:, :, :-1].copy(), rows[:, :, 1:].copy()


def random_images(config: Config) -> tuple[Drawn, Drawn]:
    """-> images [accumulate,B,channels,S,S], classes [accumulate,B]"""
    t, m = config.train, config.model
    shape = (t.accumulate, t.batch_size, m.n_channels, m.image_size, m.image_size)
    pixels = host_bits(math.prod(shape), t.seed, "bench.images").astype(np.float32).reshape(shape) * np.float32(2.0**-32)
    classes = host_bits(t.accumulate * t.batch_size, t.seed, "bench.classes") % m.n_classes
    return pixels, classes.astype(np.int32).reshape(shape[:2])


@contextmanager
def as_in_training(config: Config, backend: Backend) -> Iterator[None]:
    """The trainer's surroundings: backend, threads, no warnings about overflow."""
    with use_backend(backend), limited_threads(config.train.threads, backend), np.errstate(all="ignore"):
        yield


def seconds_of(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def step_seconds(config: Config, backend: str | Backend, steps: int = 3, warmup: int = 1) -> list[float]:
    """The wall time of each of so many whole training steps, after `warmup` others and those that come before a recording is played.

    Raises `ConfigError` for what cannot be trained.
    """
    chosen = load(backend) if isinstance(backend, str) else backend
    with as_in_training(config, chosen):
        step = TrainingStep(config, chosen)
        warmup = max(warmup, chosen.warm_up + 1)
        return [seconds_of(step) for _ in range(warmup + steps)][warmup:]


def watched(backend: Backend, watch: Watch) -> Backend:
    """A copy of the backend whose kernels, also those that kernels call, go through `watch`, and are all called in each step."""
    twin = copy.copy(backend)
    twin.record = Backend.record.__get__(twin)  # type: ignore[method-assign]
    for name in kernel_names():
        setattr(twin, name, _through(watch, name, getattr(type(twin), name).__get__(twin)))
    return twin


def _through(watch: Watch, name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **options: watch(name, kernel, args, options)
