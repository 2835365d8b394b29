"""Generation: one token after the other, each drawn from the model's prediction after all before it.

Keys and values of earlier positions are kept, so that a token costs one position's work. When the context is full, the older half is
forgotten and the rest is read again.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from minimoe.autograd import no_grad
from minimoe.errors import ConfigError, UserError
from minimoe.model import Cache, Transformer
from minimoe.random import host_bits
from minimoe.tokenizer import Tokenizer

Floats = npt.NDArray[Any]


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn. temperature 0: the likeliest. top_k 0 and top_p 1: no cut."""

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature ({self.temperature}) must be a number from 0 up")
        if self.top_k < 0:
            raise ConfigError(f"top_k ({self.top_k}) must not be negative")
        if not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"top_p ({self.top_p}) must lie between 0 and 1")
        if not 0 <= self.seed < 2**64:
            raise ConfigError(f"seed ({self.seed}) must lie between 0 and 2**64 - 1")


def draw(logits: Floats, how: Sampling, position: int) -> int:
    """A token from one position's logits [V]: of the k likeliest the fewest that hold top_p, then by chance (Holtzman et al. 2020)."""
    z = np.asarray(logits, dtype=np.float64)
    if how.temperature == 0.0:
        return int(np.argmax(z))
    order = np.argsort(-z, kind="stable")[: how.top_k or None]
    p = np.exp((z[order] - z[order[0]]) / how.temperature)
    p /= p.sum()
    held = np.cumsum(p)
    kept = int(np.searchsorted(held, how.top_p)) + 1
    u = float(host_bits(1, how.seed, "generate", step=position)[0]) * 2.0**-32 * float(held[:kept][-1])
    return int(order[min(int(np.searchsorted(held[:kept], u, side="right")), kept - 1)])


def generate_ids(model: Transformer, prompt: npt.ArrayLike, tokens: int, how: Sampling | None = None) -> Iterator[int]:
    """`tokens` ids that go on from a prompt [T] (one id or more)."""
    how = how or Sampling()
    if model.config.head != "lm" or not model.config.causal:
        given = f"head = {model.config.head!r}, causal = {str(model.config.causal).lower()}"
        raise ConfigError(f"generation needs a causal language model: this one has {given}")
    context = [int(i) for i in np.asarray(prompt).reshape(-1)]
    if not context:
        raise ConfigError("the prompt is empty: give at least one character")
    limit = model.config.max_seq_len
    new, cache = context[-limit:], Cache(model)
    for position in range(tokens):
        with no_grad(), np.errstate(all="ignore"):
            if cache.length + len(new) > limit:
                new, cache = context[-max(1, limit // 2) :], Cache(model)
            logits = model(np.asarray([new], dtype=np.int32), cache=cache)
            last = model.backend.to_host(logits.data[0, -1, :])
            if not np.isfinite(last).all():
                raise ConfigError("the model's predictions are not finite numbers: it was trained into NaN or infinity")
            token = draw(last, how, position)
        context.append(token)
        new = [token]
        yield token


def generate(model: Transformer, tokenizer: Tokenizer, prompt: str, tokens: int = 200, how: Sampling | None = None) -> Iterator[str]:
    """The text that goes on from a prompt, piece by piece as characters become complete."""
    stream = tokenizer.stream()
    for token in generate_ids(model, tokenizer.encode(prompt, "prompt"), tokens, how):
        piece = stream.push(token)
        if piece:
            yield piece
    rest = stream.flush()
    if rest:
        yield rest


def default_prompt(tokenizer: Tokenizer) -> str:
    """A line's end, where the tokenizer knows it; else its first token."""
    try:
        if len(tokenizer.encode("\n")):
            return "\n"
    except UserError:  # a char tokenizer without a line's end
        pass
    return tokenizer.decode([0])
