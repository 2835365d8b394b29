"""The level "curve" trains a tiny Mixture of Experts for 20 steps; "repeatability" runs everything twice and compares the bytes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache, partial
from typing import Any

import numpy as np

from minimoe.backend import Backend, kernel_names
from minimoe.testing.conformance import Case, is_array, leaves, require, to_device, tree_map
from minimoe.testing.dense_examples import Example, reference
from minimoe.testing.kernels import EXAMPLES, Run
from minimoe.testing.quick import quick_examples
from minimoe.testing.tolerances import CURVE

STEPS = 20


def curve_cases(backend: Backend) -> Iterator[Case]:
    """Return a case for each dtype in which whole models are trained."""
    for dtype in backend.dtypes:
        if dtype in CURVE:
            check = partial(check_curve, backend, dtype)
            yield Case(f"{STEPS} training steps [{dtype}]", "curve", "training", check, dtype == backend.dtypes[0])


def check_curve(backend: Backend, dtype: str) -> None:
    got, expected = np.array(train(backend, dtype)), np.array(expected_curve())
    error = np.abs(got - expected) / expected
    step = int(np.argmax(~(error <= CURVE[dtype])))
    what = f"the loss is {got[step]:.12g}, NumPy's float64 has {expected[step]:.12g}, tolerance {CURVE[dtype]:.3g} (relative)"
    todo = "If the levels below pass, an optimizer or the order of a sum differs"
    require(bool(np.all(error <= CURVE[dtype])), "training", f"step {step} of {STEPS} [{dtype}]", what, todo)


@lru_cache(maxsize=1)
def expected_curve() -> tuple[float, ...]:
    return tuple(train(reference(), "float64"))


def tiny_model(backend: Backend, dtype: str) -> Any:
    """Return a model of two layers, one dense and one with four experts, two for each token."""
    from minimoe.config import ModelConfig, MoEConfig
    from minimoe.model.transformer import Transformer

    moe = MoEConfig(n_experts=4, top_k=2, d_hidden=12, layers=(1,))
    config = ModelConfig(d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, d_hidden=24, max_seq_len=12, vocab_size=19, moe=moe)
    return Transformer(config, seed=0, dtype=dtype, backend=backend)


def batch(step: int) -> Any:
    """Return sequences that count up by one or two, which a model can learn.   -> [4,13] int32"""
    rng = np.random.default_rng([5, step])
    starts, strides = rng.integers(0, 19, (4, 1)), rng.integers(1, 3, (4, 1))
    return ((starts + strides * np.arange(13)) % 19).astype(np.int32)


def train(backend: Backend, dtype: str) -> list[float]:
    """Return the loss before each of 20 steps."""
    from minimoe.training import optim

    model = tiny_model(backend, dtype)
    optimizer = optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for step in range(STEPS):
        tokens = batch(step)
        inputs, targets = (backend.from_host(np.ascontiguousarray(part)) for part in (tokens[:, :-1], tokens[:, 1:]))
        parts = model.loss(inputs, targets, rng=None)
        parts.total.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(parts.total.item()))
    return losses


# ---- repeatability ----------------------------------------------------------------------------------------------------------------------

REPEAT = "Equal inputs give equal bytes: no atomics on floats, and sums in a fixed order"


def repeatability_cases(backend: Backend) -> Iterator[Case]:
    """Return a case for each kernel, and one for training."""
    for kernel in kernel_names():
        check = partial(check_repeats, backend, kernel)
        yield Case(f"{kernel}, twice", "repeatability", kernel, check, run_quick=partial(check, quick=True))
    yield Case("training, twice", "repeatability", "training", partial(check_training_repeats, backend))


def check_repeats(backend: Backend, kernel: str, quick: bool = False) -> None:
    examples = list(EXAMPLES[kernel]())
    with np.errstate(all="ignore"):
        for example in quick_examples(examples) if quick else examples[:12]:
            same = run_bytes(backend, kernel, example) == run_bytes(backend, kernel, example)
            require(same, kernel, example.label, "two calls with equal inputs differ in their bytes", REPEAT)


def run_bytes(backend: Backend, kernel: str, example: Example) -> list[bytes]:
    """Return the bytes of what a kernel returned or wrote."""
    args, options = to_device(backend, (example.args, example.options), backend.dtypes[0])
    result = Run(backend, kernel, backend.dtypes[0], example).call(backend, args, options)
    hosts = example.trim(to_host_exact(backend, result))
    return [np.ascontiguousarray(array).tobytes() if is_array(array) else repr(array).encode() for _, array in leaves(hosts)]


def to_host_exact(backend: Backend, result: Any) -> Any:
    return tree_map(lambda value: np.array(backend.to_host(value)) if is_array(value) else value, result)


def check_training_repeats(backend: Backend) -> None:
    dtype = backend.dtypes[0]
    require(train(backend, dtype) == train(backend, dtype), "training", f"{STEPS} steps [{dtype}]", "two runs differ", REPEAT)
