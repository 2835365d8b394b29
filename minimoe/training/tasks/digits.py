"""Handwritten digits: 1797 images of 8 x 8 pixels in 10 classes, which come with scikit-learn (Alpaydin & Kaynak 1998, UCI).

No download: the extra `digits` installs scikit-learn, which is imported only here.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from minimoe.engine.random import host_bits
from minimoe.errors import UserError
from minimoe.hints import install

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]

CLASSES = 10
SIDE = 8  # pixels
SHADES = 16  # the darkest of a pixel's values 0 .. 16


@dataclass(frozen=True, eq=False)
class Digits:
    """Images [n,1,8,8] with pixels from 0 (paper) to 1 (ink), and their classes [n]."""

    train: Floats
    train_classes: Ints
    val: Floats
    val_classes: Ints
    sha256: str  # digest of the pixels and then the classes, a byte each


def load_digits(val_fraction: float = 0.2) -> Digits:
    """Load the digits, split by a permutation that is the same for every seed. Raises `UserError` if scikit-learn is missing."""
    try:
        from sklearn.datasets import load_digits as load
    except ImportError:
        raise UserError(f"data.source = 'digits' comes with scikit-learn, which is not installed: {install('digits')}") from None
    pixels, classes = load(return_X_y=True)
    raw, labels = pixels.astype(np.uint8), classes.astype(np.uint8)
    order = np.argsort(host_bits(len(raw), 0, "data.digits.split"), kind="stable")
    images = (raw[order].astype(np.float32) / np.float32(SHADES)).reshape(-1, 1, SIDE, SIDE)
    labels = labels[order]
    n = int(len(raw) * (1 - val_fraction))
    return Digits(
        train=images[:n],
        train_classes=labels[:n].astype(np.int32),
        val=images[n:],
        val_classes=labels[n:].astype(np.int32),
        sha256=hashlib.sha256(raw.tobytes() + classes.astype(np.uint8).tobytes()).hexdigest(),
    )


def shifted(images: Floats, words: npt.NDArray[np.int64]) -> Floats:
    """Move each image sideways by -1, 0 or 1 pixels, and fill in paper.   images [B,1,side,side], words [B] below 2^32

    Images are not moved up or down: the digits fill their height, and would lose ink.
    """
    padded = np.pad(images, ((0, 0), (0, 0), (0, 0), (1, 1)))
    columns = np.arange(SIDE) + (words * 3 >> 32)[:, None]  # [B,side]
    moved: Floats = np.take_along_axis(padded, columns[:, None, None, :], axis=3)
    return moved


def from_picture(pixels: npt.NDArray[np.uint8]) -> Floats:
    """Return grey pictures as digits are: ink is 1, and paper, which is what most of the border shows, is 0.   [B,1,side,side]"""
    border = np.concatenate([pixels[..., 0, :], pixels[..., -1, :], pixels[..., 0], pixels[..., -1]], axis=-1)  # [B,1,4 side]
    light = np.median(border, axis=-1)[..., None, None] > 127  # [B,1,1,1]
    ink = np.where(light, 255 - pixels, pixels)
    return np.asarray(ink / np.float32(255), np.float32)
