"""Inputs for comparing the kernels of loss, embedding, randomness and optimizers with their references."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from minimoe.config import TrainConfig
from minimoe.reference.optimizers import OPTIMIZERS, Step
from minimoe.reference.random import Draw
from minimoe.testing.conformance import Wide
from minimoe.testing.dense_examples import Example, Examples, Floats, another, floats, generator, gradients_of, outputs_of, reference

# ---- loss, embedding, random ------------------------------------------------------------------------------------------------------------


def loss_inputs() -> Iterator[tuple[str, Floats, npt.NDArray[np.int32]]]:
    for n, v in [(1, 1), (31, 33), (33, 32), (2, 257), (0, 5)]:
        targets = generator(n, v).integers(0, v, n).astype(np.int32)
        yield f"logits [{n},{v}]", 3.0 * floats(1, n, v), targets
        targets = targets.copy()
        targets[::2] = -100
        yield f"logits [{n},{v}], every other target ignored", 3.0 * floats(1, n, v), targets
    yield "logits [3,5], no target", floats(1, 3, 5), np.full(3, -100, dtype=np.int32)
    large = np.array([[1e4, 0.0, -1e4], [80.0, 90.0, 100.0]])
    yield "logits [2,3], large", large, np.array([0, 1], dtype=np.int32)
    yield "logits [1,3], one -inf", np.array([[0.5, -np.inf, 1.0]]), np.array([2], dtype=np.int32)


OTHER = 3, "logits [31,33], target 3 ignored"  # instead of -100


def other_ignored() -> tuple[Floats, npt.NDArray[np.int32]]:
    """-> logits [31,33], targets, among which are the first and the ignored class"""
    return 3.0 * floats(1, 31, 33), (np.arange(31) % 5).astype(np.int32)


def cross_entropy() -> Iterator[Example]:
    for label, logits, targets in loss_inputs():
        yield Example(label, (logits, targets))
    yield Example(OTHER[1], (*other_ignored(), OTHER[0]))


def cross_entropy_backward() -> Iterator[Example]:
    for label, logits, targets in loss_inputs():
        _, _, lse = reference().cross_entropy(logits, targets)
        yield Example(label, (Wide(np.array(0.7)), logits, targets, Wide(lse)))
    logits, targets = other_ignored()
    _, _, lse = reference().cross_entropy(logits, targets, OTHER[0])
    yield Example(OTHER[1], (Wide(np.array(0.7)), logits, targets, Wide(lse), OTHER[0]))


def linear_cross_entropy() -> Iterator[Example]:
    for label, logits, targets in loss_inputs():
        weight = floats(2, logits.shape[1], 9)
        yield Example(label, (floats(3, logits.shape[0], 9), weight, targets), call=outputs_of("linear_cross_entropy"))
    args = floats(3, 31, 9), floats(2, 33, 9), other_ignored()[1]
    yield Example(OTHER[1], args, call=outputs_of("linear_cross_entropy", OTHER[0]))


def linear_cross_entropy_backward() -> Iterator[Example]:
    call = gradients_of("linear_cross_entropy", 3)
    for label, logits, targets in loss_inputs():
        args = floats(3, logits.shape[0], 9), floats(2, logits.shape[1], 9), targets, Wide(np.array(0.7))
        yield Example(label, args, call=call)
    last = floats(3, 31, 9), floats(2, 33, 9), other_ignored()[1], Wide(np.array(0.7))
    yield Example(OTHER[1], last, call=gradients_of("linear_cross_entropy", 3, OTHER[0]))


def embedding_inputs() -> Iterator[tuple[str, tuple[int, ...], int, int]]:
    for shape, v, d in [((1,), 1, 1), ((31,), 7, 33), ((2, 33), 40, 32), ((0,), 3, 4)]:
        yield f"ids {list(shape)}, weight [{v},{d}]", shape, v, d


def embedding() -> Iterator[Example]:
    for label, shape, v, d in embedding_inputs():
        ids = generator(v).integers(0, v, shape).astype(np.int32)
        yield Example(label, (ids, floats(1, v, d)))


def embedding_backward() -> Iterator[Example]:
    for label, shape, v, d in embedding_inputs():
        ids = generator(v).integers(0, v, shape).astype(np.int32)
        yield Example(label, (floats(1, *shape, d), ids, v, None))
        yield Example(f"{label}, padding 0", (floats(1, *shape, d), ids, v, 0))


def draws() -> tuple[Draw, ...]:
    found = Draw(0, 0, 0, 0), Draw(2**64 - 1, 2**32 - 1, 3, 1000), Draw(0x123456789ABCDEF0, 0x9E3779B9, 1, 2**31)
    return tuple(another(draw) for draw in found)


def random_numbers() -> Iterator[Example]:
    for count in (0, 1, 3, 4, 31, 33, 1000):
        for draw in draws():
            yield Example(f"count {count}, {draw}", (count, draw))


def dropout() -> Iterator[Example]:
    for shape in [(1,), (31, 3), (2, 33), (0, 4)]:
        for rate in (0.1, 0.5):
            yield Example(f"x {list(shape)}, rate {rate}", (floats(1, *shape), rate, draws()[1]))


# ---- optimizer --------------------------------------------------------------------------------------------------------------------------


def sum_of_squares() -> Iterator[Example]:
    for shape in [(0,), (1,), (33,), (31, 32), (1000,)]:
        yield Example(f"x {list(shape)}", (floats(1, *shape),))


FLAT: list[tuple[int, ...]] = [(1,), (31,), (33,), (1000,), (0,)]
MATRICES: list[tuple[int, ...]] = [(1, 1), (3, 4), (33, 5), (2, 8, 8)]
STEPS: list[tuple[str, float, bool, str]] = [
    ("taken", 1.0, True, "numbers"),
    ("clipped", 0.3, True, "numbers"),
    ("taken without a gradient", 1.0, True, "zeros"),
    ("skipped, with a finite gradient", 0.5, False, "numbers"),
    ("skipped, with a NaN in the gradient", 0.5, False, "a NaN"),
]
"""What a step does, its scale, its ok, and what is in its gradient."""
LATE_EPS = 0.1  # at late steps, where an optimizer has eps: its default is lost in the rounding of the gradients here


def gradient(holds: str, seed: int, shape: tuple[int, ...]) -> Floats:
    """Return a gradient of which the step's `holds` is true."""
    grad = np.zeros(shape) if holds == "zeros" else floats(seed, *shape)
    if holds == "a NaN":
        grad.reshape(-1)[:1] = np.nan
    return grad


class Noted:
    """Takes the place of a backend in an optimizer's update, and keeps the kernel calls with their arguments and options."""

    xp = np

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, kernel: str) -> Callable[..., None]:
        return lambda *args, **options: self.calls.append((kernel, args, options))


def optimizer_steps(name: str, flat: list[tuple[int, ...]] = FLAT, matrices: list[tuple[int, ...]] = MATRICES) -> Iterator[Example]:
    """Return calls of the kernel of an optimizer in the table, at the first step and at late ones."""
    facts = OPTIMIZERS[name]
    settings = facts.settings(TrainConfig(optimizer=name))
    given = {key: settings[key] for key in (*facts.reads, *facts.options)}
    for shape in flat if facts.flat else matrices:
        for count in (1, 100, 2000):
            late = {"eps": LATE_EPS} if "eps" in given and count > 1 else {}
            when = f"step {count}, eps {LATE_EPS}" if late else f"step {count}"
            for what, scale, ok, holds in STEPS:
                grad = gradient(holds, 9, shape)
                states = {state: np.abs(floats(2 + i, *shape)) for i, state in enumerate(facts.states)}
                if holds == "zeros":  # as the rows of tokens that do not occur, and experts without a token in the first step, have
                    states.update({state: np.zeros_like(grad) for state in facts.states[:1]})
                step = Step(np.array(0.01), np.array(scale), np.array(ok), np.array(count, dtype=np.int32))
                noted = Noted()
                facts.update(noted, floats(1, *shape), states, grad, step, weight_decay=0.1, **{**given, **late})
                for _, args, options in noted.calls:
                    held = {key: np.asarray(value) if isinstance(value, np.generic) else value for key, value in options.items()}
                    wide = {key: Wide(value) if key in ("lr", "scale") else value for key, value in held.items()}
                    yield Example(f"param {list(shape)}, {when}, {what}", args, wide, exact=not ok)


TRAINING: dict[str, Examples] = {
    "cross_entropy": cross_entropy, "cross_entropy_backward": cross_entropy_backward, "linear_cross_entropy": linear_cross_entropy,
    "linear_cross_entropy_backward": linear_cross_entropy_backward, "embedding": embedding, "embedding_backward": embedding_backward,
    "random_bits": random_numbers, "uniform": random_numbers, "normal": random_numbers, "dropout": dropout, "dropout_backward": dropout,
    "sum_of_squares": sum_of_squares, **{name: partial(optimizer_steps, name) for name in OPTIMIZERS},
}  # fmt: skip
