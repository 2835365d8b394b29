"""Folders of small images, made with Pillow: each class has a colour of its own."""

import os
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"cat": (220, 40, 40), "dog": (40, 200, 60), "owl": (50, 60, 210)}


def picture(colour: tuple[int, int, int], number: int, size: tuple[int, int] = (12, 10)) -> Image.Image:
    """A colour with some noise, the same at each call."""
    noise = np.random.default_rng(number).integers(-30, 30, (size[1], size[0], 3))
    return Image.fromarray(np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8))


def write_pets(root: Path, count: int = 10, classes: tuple[str, ...] = ("cat", "dog", "owl"), size: tuple[int, int] = (12, 10)) -> Path:
    """Write `count` images of each class below root/pets."""
    folder = root / "pets"
    for name in classes:
        (folder / name).mkdir(parents=True)
        for number in range(count):
            picture(COLOURS[name], number, size).save(folder / name / f"{number:02d}.png")
    age(folder)
    return folder


def age(folder: Path) -> None:
    """Make all files an hour old, so that their state is settled."""
    for path in folder.rglob("*"):
        if path.is_file():
            os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns - 3600 * 10**9))
