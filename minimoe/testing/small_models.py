"""The models, batches and steps with which the levels "curve", "repeatability", "host reads" and "recording" train."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from minimoe.backend import Backend

if TYPE_CHECKING:
    from minimoe.training.step import Step

VOCABULARY, LENGTH, SEQUENCES = 19, 8, 3


def small_step(
    backend: Backend, dtype: str = "float32", *, moe: Mapping[str, Any] | None = None, routed: bool = True, optimizer: str = "adamw",
    seed: int = 0, **settings: Any,
) -> Step:  # fmt: skip
    """Return a training step of a model of one dense layer and, if `routed`, one with four experts. `moe`, `settings`: further keys."""
    from minimoe.config import ModelConfig, MoEConfig, TrainConfig
    from minimoe.model.transformer import Transformer
    from minimoe.training.optim import make_optimizer
    from minimoe.training.step import Step

    layers = settings.pop("n_layers", 2)
    table = MoEConfig(**{"n_experts": 4, "d_hidden": 8, "layers": tuple(range(1, layers, 2)), **(moe or {})}) if routed else None
    sizes = {"d_model": 16, "n_layers": layers, "n_heads": 4, "n_kv_heads": 2, "d_hidden": 24, "vocab_size": VOCABULARY}
    model = Transformer(ModelConfig(**sizes, max_seq_len=LENGTH, moe=table, **settings), seed=seed, dtype=dtype, backend=backend)
    return Step(model, make_optimizer(model.parameters(), TrainConfig(optimizer=optimizer)), seed=seed)


def micro_batches(step: int, count: int = 2) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Return sequences that count up by one or two, which a model can learn.   -> inputs, targets [A,B,T] int32"""
    rng = np.random.default_rng([5, step])
    starts, strides = rng.integers(0, VOCABULARY, (count, SEQUENCES, 1)), rng.integers(1, 3, (count, SEQUENCES, 1))
    tokens = ((starts + strides * np.arange(LENGTH + 1)) % VOCABULARY).astype(np.int32)
    return np.ascontiguousarray(tokens[..., :-1]), np.ascontiguousarray(tokens[..., 1:])
