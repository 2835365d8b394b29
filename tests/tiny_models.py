"""A tiny routed model and its batches, for tests that write their own training loop."""

from typing import Any

import numpy as np

from minimoe.backend import Backend
from minimoe.config import ModelConfig, MoEConfig
from minimoe.model.transformer import Transformer


def tiny_model(backend: Backend, dtype: str) -> Transformer:
    """Return a model of two layers, one dense and one with four experts, two for each token."""
    moe = MoEConfig(n_experts=4, top_k=2, d_hidden=12, layers=(1,))
    config = ModelConfig(d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, d_hidden=24, max_seq_len=12, vocab_size=19, moe=moe)
    return Transformer(config, seed=0, dtype=dtype, backend=backend)


def batch(step: int) -> Any:
    """Return sequences that count up by one or two, which a model can learn.   -> [4,13] int32"""
    rng = np.random.default_rng([5, step])
    starts, strides = rng.integers(0, 19, (4, 1)), rng.integers(1, 3, (4, 1))
    return ((starts + strides * np.arange(13)) % 19).astype(np.int32)
