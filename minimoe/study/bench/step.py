"""The training step on random tokens or images, its time, and backends whose kernels can be watched."""

from __future__ import annotations

import copy
import math
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from msgspec.structs import replace

from minimoe.backend import Array, Backend, kernel_names, load
from minimoe.config import Config
from minimoe.config.trained import check_trained
from minimoe.engine.random import host_bits
from minimoe.engine.recording import Recorded
from minimoe.model.adapters import choose_trained
from minimoe.model.transformer import Transformer
from minimoe.runs.environment import check_memory
from minimoe.training.optim import learning_rate, make_optimizer
from minimoe.training.step import Step
from minimoe.training.surroundings import training_backend

Watch = Callable[[str, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""Called instead of a kernel, with its name, the kernel and its arguments; calls the kernel and returns its result."""

BYTES_VOCABULARY = 256  # for a configuration whose vocabulary comes from a tokenizer


class TrainingStep:
    """The trainer's own step on the same random inputs each time; recorded if the backend can record, and waited for."""

    def __init__(self, config: Config, backend: Backend) -> None:
        config.check_trainable()
        if config.model.vocab_size is None and not config.model.image_size:
            config = replace(config, model=replace(config.model, vocab_size=BYTES_VOCABULARY))
        check_trained(config)
        check_memory(config)
        self.config, self.backend, self.done = config, backend, 0
        t = config.train
        self.tokens_per_step = t.accumulate * t.batch_size * (config.model.n_patches + 1 if config.model.image_size else t.seq_len)
        self.model = Transformer(config.model, seed=t.seed, dtype=t.dtype, backend=backend)
        choose_trained(self.model, config)
        optimizer = make_optimizer(self.model.parameters(), t)
        self.batch = random_images(config) if config.model.image_size else random_tokens(config, self.model.vocab_size)
        self.step = Step(self.model, optimizer, seed=t.seed, grad_clip=t.grad_clip, recompute=t.recompute)
        self.recorded = Recorded(self.step, backend, lambda why: print(f"minimoe: {why}", file=sys.stderr), self.step.state)

    def __call__(self) -> Array:
        """Do the next step and wait for the device.   -> the packed figures (`training/metrics.py`)"""
        packed = self.recorded(*self.step.arrays(self.done, learning_rate(self.done, self.config.train), *self.batch))
        self.backend.synchronize()
        self.done += 1
        return packed


Drawn = npt.NDArray[Any]


def random_tokens(config: Config, vocab_size: int) -> tuple[Drawn, Drawn]:
    """Return random tokens, and those that follow them, as targets.   -> [A,B,T], [A,B,T]"""
    t = config.train
    bits = host_bits(t.accumulate * t.batch_size * (t.seq_len + 1), t.seed, "bench.tokens") % vocab_size
    rows = bits.astype(np.int32).reshape(t.accumulate, t.batch_size, t.seq_len + 1)
    return rows[:, :, :-1].copy(), rows[:, :, 1:].copy()


def random_images(config: Config) -> tuple[Drawn, Drawn]:
    """Return random images and classes.   -> [A,B,channels,side,side], [A,B]"""
    t, m = config.train, config.model
    shape = (t.accumulate, t.batch_size, m.n_channels, m.image_size, m.image_size)
    pixels = host_bits(math.prod(shape), t.seed, "bench.images").astype(np.float32).reshape(shape) * np.float32(2.0**-32)
    classes = host_bits(t.accumulate * t.batch_size, t.seed, "bench.classes") % m.n_classes
    return pixels, classes.astype(np.int32).reshape(shape[:2])


def seconds_of(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def step_seconds(config: Config, backend: str | Backend, steps: int = 3, warmup: int = 1) -> list[float]:
    """Return the wall time of each of `steps` training steps, after `warmup` untimed ones and those that record the step.

    Raises `ConfigError` for what cannot be trained.
    """
    chosen = load(backend) if isinstance(backend, str) else backend
    with training_backend(chosen, config.train.threads):
        step = TrainingStep(config, chosen)
        warmup = max(warmup, chosen.warm_up + 1)
        return [seconds_of(step) for _ in range(warmup + steps)][warmup:]


def watched(backend: Backend, watch: Watch) -> Backend:
    """Return a copy of the backend whose kernels, including those that kernels call, go through `watch`. It does not record steps."""
    twin = copy.copy(backend)
    twin.record = Backend.record.__get__(twin)  # type: ignore[method-assign]
    for name in kernel_names():
        setattr(twin, name, _through(watch, name, getattr(type(twin), name).__get__(twin)))
    return twin


def _through(watch: Watch, name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **options: watch(name, kernel, args, options)
