"""Converts quantised weights to numbers: float8, float8 with a scale per block (DeepSeek-V3), and MXFP4 (gpt-oss).

A float8 number is a byte, and there are 256 of them: each format is a table of 256 float32 numbers, computed here from sign, exponent and
mantissa (Micikevicius et al. 2022, "FP8 formats for deep learning"; Open Compute Project, "Microscaling formats v1.0", 2023). All of them
are exact in float32. Results are written piece by piece, with about 1 MB of memory besides `out`. A product too large for `out` becomes
inf, and a format's NaN becomes NaN.
"""

from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from minimoe.errors import CheckpointError

Array: TypeAlias = NDArray[Any]

PIECE = 1 << 16  # numbers per piece: together with the table indices they stay in a processor's cache


def _float8(exponent_bits: int, mantissa_bits: int) -> Array:
    """Return the 256 numbers of sign, exponent and mantissa if no exponent is reserved for inf or NaN: float32 [256].

    (1 + m / 2^mantissa_bits) * 2^(e - bias), or m / 2^mantissa_bits * 2^(1 - bias) if e = 0, with bias = 2^(exponent_bits - 1) - 1.
    """
    code = np.arange(256)
    mantissa = (code & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    exponent = code >> mantissa_bits & ((1 << exponent_bits) - 1)
    significand = np.where(exponent == 0, mantissa, 1 + mantissa)
    sign = np.where(code & 0x80, -1.0, 1.0)
    return (sign * np.ldexp(significand, np.maximum(exponent, 1) - (1 << exponent_bits - 1) + 1)).astype(np.float32)


def _e4m3() -> Array:
    """E4M3 has no infinities; it is NaN if exponent and mantissa are all ones. The largest number is 448."""
    table = _float8(4, 3)
    table[[0x7F, 0xFF]] = np.nan
    return table


def _e5m2() -> Array:
    """E5M2 follows IEEE 754: an exponent of all ones is inf, or NaN with a mantissa."""
    table = _float8(5, 2)
    table[[0x7C, 0xFC]] = np.inf, -np.inf
    table[[0x7D, 0x7E, 0x7F, 0xFD, 0xFE, 0xFF]] = np.nan
    return table


def _e8m0() -> Array:
    """E8M0 is 2^(s - 127), the scale of a microscaling block; 0xFF is NaN."""
    table = np.ldexp(1.0, np.minimum(np.arange(256), 254) - 127).astype(np.float32)
    table[0xFF] = np.nan
    return table


# By safetensors' dtype: float32 [256], the number that each byte means.
FLOAT8 = {"F8_E4M3": _e4m3(), "F8_E5M2": _e5m2(), "F8_E8M0": _e8m0()}

# E2M1: sign, two bits of exponent (bias 1), one of mantissa.
FLOAT4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
# The two numbers of a byte, the low four bits first: float32 [256, 2].
FLOAT4_PAIRS = np.stack([FLOAT4[np.arange(256) & 15], FLOAT4[np.arange(256) >> 4]], axis=1)


def pieces(shape: tuple[int, ...], most: int = PIECE) -> Iterator[tuple[slice, ...]]:
    """Yield tuples of slices, one per axis, that cover an array once, in order, with at most `most` numbers each. A scalar gives ()."""
    if 0 in shape:
        return
    if not shape:
        yield ()
        return
    inner = 1
    for size in shape[1:]:
        inner *= size
    rows = max(1, most // inner)
    for start in range(0, shape[0], rows):
        first = slice(start, min(start + rows, shape[0]))
        for rest in pieces(shape[1:], most):
            yield (first, *rest)


def fill_float8(out: Array, raw: Array, dtype: str) -> None:
    """out = the numbers of float8 bytes.   raw uint8 [...], dtype a key of `FLOAT8` -> out float32 or float64 [...], any strides"""
    _same_shape(out, raw.shape)
    table = FLOAT8[dtype]
    for at in pieces(raw.shape):
        out[at] = table.take(raw[at])


def fill_fp8_blocks(out: Array, raw: Array, scale: Array, block: tuple[int, int] = (128, 128)) -> None:
    """out[o,i] = e4m3(raw[o,i]) * scale[o // 128, i // 128]   (DeepSeek-AI 2024, DeepSeek-V3, section 3.3: `weight_scale_inv`)

    raw uint8 [O,I], scale float [ceil(O / block[0]), ceil(I / block[1])] -> out float32 or float64 [O,I], any strides. Raises
    `CheckpointError` if the shapes do not fit.
    """
    _same_shape(out, raw.shape)
    expected = [-(-size // length) for size, length in zip(raw.shape, block, strict=False)]
    if raw.ndim != 2 or list(scale.shape) != expected:
        raise CheckpointError(
            f"float8 weight of shape {list(raw.shape)}: expected two dimensions, and scales of shape {expected} (one for each block of "
            f"{block[0]} x {block[1]}), got {list(scale.shape)}"
        )
    table = FLOAT8["F8_E4M3"]
    for start in range(0, raw.shape[0], block[0]):
        factors = np.repeat(scale[start // block[0]], block[1])[: raw.shape[1]]
        weights, numbers = raw[start : start + block[0]], out[start : start + block[0]]
        with np.errstate(all="ignore"):
            for rows, columns in pieces(weights.shape):
                np.multiply(table.take(weights[rows, columns]), factors[columns], out=numbers[rows, columns], dtype=out.dtype)


def fill_mxfp4(out: Array, blocks: Array, scales: Array) -> None:
    """out[..., 32 g + j] = e2m1(number j of block g) * 2^(scales[..., g] - 127), two numbers per byte, the low four bits first.

    blocks uint8 [...,n,16], scales uint8 [...,n] -> out float32 or float64 [..., n * 32], any strides   (OCP Microscaling v1.0, section
    5.4; OpenAI 2025, gpt-oss). A scale of 255 is NaN. Raises `CheckpointError` if the shapes do not fit.
    """
    if blocks.shape != (*scales.shape, 16) or not scales.shape:
        raise CheckpointError(f"MXFP4 weight: blocks of shape {list(blocks.shape)} need 16 bytes for each scale of {list(scales.shape)}")
    _same_shape(out, (*scales.shape[:-1], scales.shape[-1] * 32))
    numbers = out.reshape(*blocks.shape, 2, copy=False)
    with np.errstate(all="ignore"):
        for at in pieces(scales.shape, PIECE // 32):
            factors = FLOAT8["F8_E8M0"].take(scales[at])[..., None, None]
            np.multiply(FLOAT4_PAIRS.take(blocks[at], axis=0), factors, out=numbers[at], dtype=out.dtype)


def _same_shape(out: Array, shape: tuple[int, ...]) -> None:
    if out.shape != shape:
        raise CheckpointError(f"a weight of shape {list(shape)} where {list(out.shape)} is expected")
