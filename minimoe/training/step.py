"""One training step, to be read from top to bottom. The trainer, `bench step`, the benchmarks and the examples all use this one.

    step = Step(model, optimizer, seed=0, grad_clip=1.0)
    packed = step(*step.arrays(number, lr, inputs, targets))   # metrics.py says what is in it

A step is a function of arrays: nothing in it is read on the host, and everything that it keeps (weights, moments, the count of bad steps)
is updated in place. So a backend may record it once and repeat it: `Recorded(step, backend, say, step.state)`.
"""

from __future__ import annotations

from functools import reduce
from operator import add
from typing import Any

import numpy as np

from minimoe.backend import Array
from minimoe.engine.random import Rng
from minimoe.model.transformer import Transformer
from minimoe.reference.loss import IGNORE
from minimoe.training.metrics import layer_figures, measures
from minimoe.training.optim import Optimizer

MAX_BAD_STEPS = 10  # after this many non-finite steps in a row nothing is updated any more, and the trainer ends the run


class Step:
    """Forward and backward over every micro-batch, clipping, the update, and the step's figures.

    `seed` draws dropout and the router's noise; `grad_clip` 0 does not clip; `recompute` keeps no activations inside the blocks.
    """

    def __init__(self, model: Transformer, optimizer: Optimizer, *, seed: int = 0, grad_clip: float = 1.0, recompute: bool = False) -> None:
        self.model, self.optimizer, self.backend = model, optimizer, model.backend
        self.seed, self.grad_clip, self.recompute = seed, grad_clip, recompute
        double = str(next(iter(model.parameters())).dtype).endswith("float64")
        self.rate_dtype = np.float64 if double else np.float32
        self.bad_steps = self.backend.from_host(np.zeros((), dtype=np.int32))  # non-finite steps in a row, up to now

    def __call__(self, number: Array, lr: Array, inputs: Array, targets: Array, starts: Array | None = None) -> Array:
        """Do step `number`, which counts from 0.   inputs, targets [A,B,T] (images [A,B,channels,side,side] and classes [A,B]) -> packed

        `starts` [A,B,T] keeps attention within documents: the `document_starts` of the model.

        The cross-entropy is the mean over all targets of the step, and the routers' losses are means over its A micro-batches.
        `packed` [9 + L (1+E)] is described in metrics.py.
        """
        model, optimizer, xp = self.model, self.optimizer, self.backend.xp
        share = 1.0 / inputs.shape[0]  # of one micro-batch in the step's mean

        # gradients: each backward pass adds to them
        optimizer.zero_grad()  # here and not at the end, so that a step that failed halfway can be repeated
        measured, counted = [], []
        weights = self.weights(targets) if inputs.shape[0] > 1 else None
        for micro in range(inputs.shape[0]):
            rng = Rng(self.seed, number, micro)
            parts = model.loss(
                inputs[micro, ...], targets[micro, ...], rng=rng, recompute_blocks=self.recompute,
                document_starts=None if starts is None else starts[micro, ...],
            )  # fmt: skip
            if weights is not None:
                parts = parts.weighted(weights[micro, ...])
            parts.total.backward(xp.full((), share, dtype=parts.total.dtype))
            measured.append(measures(parts, self.backend))  # [6]
            counted.append([stats.counts for stats in parts.stats])  # of each routed layer [E]
        mean = reduce(add, measured) * share  # [6], the loss first
        counts = [reduce(add, layer) for layer in zip(*counted, strict=True)]  # of each routed layer [E]

        # verdict: a step whose loss or gradient is not finite changes nothing
        norm = optimizer.grad_norm()  # []
        ok = xp.isfinite(mean[0]) & xp.isfinite(norm) & (self.bad_steps < MAX_BAD_STEPS)  # [] bool

        # update
        optimizer.step(lr=lr, scale=optimizer.clip_scale(norm, self.grad_clip), ok=ok)
        model.update_balance(counts, ok)
        self.bad_steps[...] = xp.where(ok, xp.zeros_like(self.bad_steps), self.bad_steps + 1)

        # figures
        layers = layer_figures(parts, counts, norm.dtype, self.backend)  # of each routed layer [1+E]
        verdict = xp.stack([norm, xp.astype(ok, norm.dtype), xp.astype(self.bad_steps, norm.dtype)])  # [3]
        return xp.concat([verdict, xp.astype(mean, norm.dtype), *layers])  # [9 + L (1+E)]

    def state(self) -> list[Array]:
        """Return the arrays that a step reads and updates besides its arguments, which a recording needs to know."""
        return [*self.model.state_dict().values(), *self.optimizer.arrays(), self.bad_steps]

    def weights(self, targets: Array) -> Array:
        """Return what the mean cross-entropy of each micro-batch counts for: its targets, over the mean of all.   [A,B,T] -> [A]

        Micro-batches with equally many have the weight 1 exactly, since both sides of the division are the same integer.
        """
        xp, a = self.backend.xp, targets.shape[0]
        valid = xp.astype(xp.reshape(targets, (a, -1)) != IGNORE, xp.int32)  # [A,B*T]
        counts = xp.sum(valid, axis=1, dtype=xp.int32)  # [A]
        dtype = self.backend.dtype(np.dtype(self.rate_dtype).name)
        return xp.astype(counts * a, dtype) / xp.astype(xp.clip(xp.sum(counts, dtype=xp.int32), min=1), dtype)

    def arrays(self, number: int, lr: float, *batch: Any) -> tuple[Array, ...]:
        """Copy the arguments of a step from the host to the device.   batch: inputs, targets and, if documents are kept apart, starts"""
        put, rate = self.backend.from_host, np.asarray(lr, dtype=self.rate_dtype)
        return put(np.asarray(number, dtype=np.int32)), put(rate), *map(put, batch)
