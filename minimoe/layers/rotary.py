"""Rotary frequencies, and how they are stretched so that a model can read longer texts than it was pretrained on.

theta_i = base^(-2i/C), i < C/2; the wavelength is 2 pi / theta_i.
linear    divides every frequency by `factor`                                                    (Chen et al. 2023)
llama3    divides those of long waves by `factor`, keeps those of short ones, blends linearly between   (Llama 3.1, 2024)
yarn      does the same by the number of turns within the pretrained length, on a ramp from `beta_fast` to `beta_slow` turns; queries and
          keys are also scaled up, because attention gets flatter over more keys                 (Peng et al. 2023)
"""

import math

import numpy as np
import numpy.typing as npt

from minimoe.config import RopeConfig

Floats = npt.NDArray[np.float64]


def frequencies(base: float, width: int, rope: RopeConfig | None, max_seq_len: int) -> tuple[Floats, float]:
    """Return the angles per position [width/2] and the factor on rotated coordinates.

    `max_seq_len` is the pretrained length if `rope` does not set one.
    """
    plain = np.asarray([base ** (-2 * i / width) for i in range(width // 2)])
    if rope is None:
        return plain, 1.0
    if rope.type == "linear":
        return plain / rope.factor, 1.0
    pretrained = rope.original_max_seq_len or max_seq_len
    if rope.type == "llama3":
        return _llama3(plain, rope, pretrained), 1.0
    return _yarn(plain, base, rope, pretrained), yarn_scale(rope)


def _llama3(plain: Floats, rope: RopeConfig, pretrained: int) -> Floats:
    turns = pretrained * plain / (2.0 * math.pi)  # within the pretrained length
    keep = np.clip((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0.0, 1.0)
    return keep * plain + (1.0 - keep) * plain / rope.factor


def _yarn(plain: Floats, base: float, rope: RopeConfig, pretrained: int) -> Floats:
    pairs = len(plain)

    def pair_of(turns: float) -> float:
        """Return the pair, as a real number, that makes `turns` turns within the pretrained length."""
        return pairs * math.log(pretrained / (turns * 2.0 * math.pi)) / math.log(base)

    low, high = pair_of(rope.beta_fast), pair_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0.0), min(high, 2.0 * pairs - 1.0)
    ramp = np.clip((np.arange(pairs) - low) / (high - low if high != low else 0.001), 0.0, 1.0)
    return plain / rope.factor * ramp + plain * (1.0 - ramp)


def yarn_scale(rope: RopeConfig) -> float:
    """Return the factor on rotated queries, and on rotated keys."""
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return sharpening(rope.factor, rope.mscale) / sharpening(rope.factor, rope.mscale_all_dim)
    return sharpening(rope.factor, 1.0)


def sharpening(factor: float, mscale: float) -> float:
    """Return 0.1 m ln(factor) + 1: how much sharper attention must be over `factor` times the keys."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1.0 else 1.0
