"""Draws the next token: repetition penalty, temperature, top-k, top-p, then chance, in this order."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from minimoe.engine.random import host_bits
from minimoe.errors import ConfigError

Floats = npt.NDArray[Any]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn, and what ends a text. temperature 0 takes the likeliest; top_k 0, top_p 1, repetition_penalty 1 do nothing."""

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    repetition_penalty: float = 1.0  # above 1: tokens of the text become less likely
    stop: tuple[str, ...] = ()  # a text ends before the first of these
    end: tuple[int, ...] = ()  # and before these tokens; by default those that the model's files name

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature ({self.temperature}) must be a number from 0 up")
        if self.top_k < 0:
            raise ConfigError(f"top_k ({self.top_k}) must not be negative")
        if not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"top_p ({self.top_p}) must lie between 0 and 1")
        if not 0 <= self.seed < 2**64:
            raise ConfigError(f"seed ({self.seed}) must lie between 0 and 2**64 - 1")
        if not 0.0 < self.repetition_penalty < math.inf:
            raise ConfigError(f"repetition_penalty ({self.repetition_penalty}) must be a number above 0: 1 for none")
        if isinstance(self.stop, str) or "" in self.stop:
            raise ConfigError(f"stop = {self.stop!r} must be a tuple of strings, none of them empty")


def draw(logits: Floats, how: Sampling, position: int, row: int = 0, seen: Flags | None = None) -> int:
    """Draw a token from one position's logits [V]: of the k likeliest the fewest that hold top_p, then by chance (Holtzman et al. 2020).

    `seen` [V] flags the tokens of the text so far, for the penalty. The random number depends on seed, `row` and `position`.
    """
    z = np.asarray(logits, dtype=np.float64)
    if seen is not None:
        z = penalised(z, seen, how.repetition_penalty)
    if how.temperature == 0.0:
        return int(np.argmax(z))
    order = likeliest(z, how.top_k)
    with np.errstate(all="ignore"):  # overflow gives -inf, which has probability 0
        p = np.exp((z[order] - z[order[0]]) / how.temperature)
    p /= p.sum()
    held = np.cumsum(p)
    kept = int(np.searchsorted(held, how.top_p)) + 1
    u = float(host_bits(1, how.seed, "generate", row, position)[0]) * 2.0**-32 * float(held[:kept][-1])
    return int(order[min(int(np.searchsorted(held[:kept], u, side="right")), kept - 1)])


def penalised(z: Floats, seen: Flags, penalty: float) -> Floats:
    """Divide the logits of seen tokens by the penalty if they are positive, multiply them if negative (Keskar et al. 2019)."""
    return np.where(seen, np.where(z < 0.0, z * penalty, z / penalty), z)


def likeliest(z: Floats, k: int) -> npt.NDArray[np.int64]:
    """Return the k likeliest tokens (0: all) in descending order of their logits; equal logits keep the order of the ids."""
    if not 0 < k < len(z):
        return np.argsort(-z, kind="stable")
    candidates = np.flatnonzero(z >= np.partition(z, len(z) - k)[len(z) - k])
    return candidates[np.argsort(-z[candidates], kind="stable")[:k]]
