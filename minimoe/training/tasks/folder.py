"""Image classification on a folder of images, in which each folder is a class.

Pixels from 0 to 255 become numbers from -1 to 1, as for the published ViT. In training each image is moved by up to a sixteenth of its
side (at least a pixel) across and down, and what that leaves empty repeats the edge. Images are not mirrored: letters and digits would be
others.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from msgspec.structs import replace

from minimoe.config import Config
from minimoe.config.data_names import BUILT_IN
from minimoe.data.image_folder import Ids, divided
from minimoe.data.image_store import load_images
from minimoe.data.pictures import Pixels
from minimoe.data.tokenizer import Tokenizer
from minimoe.engine.grad_mode import no_grad
from minimoe.engine.random import host_bits
from minimoe.errors import UserError, printable
from minimoe.hints import command
from minimoe.model.transformer import Transformer
from minimoe.training.evaluation import Batches
from minimoe.training.tasks.digits import Floats
from minimoe.training.tasks.images import ImageTask
from minimoe.training.tasks.task import Array

SHOWN = 8  # images named at the end of a run


class FolderClassification(ImageTask):
    """Inputs are images [B,channels,side,side], targets their classes [B]: numbers in `data.classes`, the sorted names of the folders."""

    def __init__(self, config: Config, tokenizer: Tokenizer | None = None, whole: bool = False, sha256: str | None = None) -> None:
        self.source, self.root = config.data.name, folder_of(config)
        m = config.model
        self.images = load_images(self.root, self.source, m.image_size, m.n_channels)
        self.sha256 = self.images.sha256
        self.notes = [*self.images.notes]
        self.config = config = self._with_classes(config, whole, resumed=sha256 is not None)
        self.classes = config.data.classes or self.images.names
        numbers = np.array([self.classes.index(name) for name in self.images.names], np.int32)
        self.labels = numbers[self.images.classes]
        self.train, self.val = divided(self.images.classes, config.data.val_fraction)
        if whole:
            self.val = np.arange(len(self.labels))
        self.chance = float(np.bincount(self.labels[self.val]).max() / len(self.val))

    def _with_classes(self, config: Config, whole: bool, resumed: bool) -> Config:
        """Return the configuration with the folder's classes and their number. Raises `UserError` if those of a trained model differ."""
        names, known = self.images.names, config.data.classes
        if whole and known is None and len(names) != config.model.n_classes:
            raise UserError(f"{self.source}: has {len(names)} classes, the model {config.model.n_classes}")
        if known is not None:
            strange = [name for name in names if name not in known]
            lacking = [] if whole else [name for name in known if name not in names]
            found = [f"{what} {', '.join(map(printable, these[:4]))}" for what, these in (("has", strange), ("lacks", lacking)) if these]
            if found and resumed:
                raise UserError(
                    f"the data of {self.source} have changed since the run began: among its classes it {' and '.join(found)}: "
                    "resume needs the same data"
                )
            if found:
                raise UserError(f"{self.source}: its classes are not those of data.classes: among them it {' and '.join(found)}")
        classes, before = known or names, config.model.n_classes
        if before != len(classes):
            self.notes.append(f"model.n_classes {before} -> {len(classes)}: the classes of {self.source}")
        data = config.data if whole and known is None else replace(config.data, classes=classes)
        settings = replace(config.train, seq_len=config.model.n_patches + 1)
        return replace(config, model=replace(config.model, n_classes=len(classes)), data=data, train=settings)

    def read(self) -> list[str]:
        return self.notes

    # ---- training and measuring ------------------------------------------------------------------------------------------------------

    @property
    def counts(self) -> tuple[int, int]:
        return len(self.train), len(self.val)

    def batch(self, step: int, micro: int) -> tuple[Array, Array]:
        """images [B,channels,side,side], classes [B]"""
        t = self.config.train
        words = host_bits(2 * t.batch_size, t.seed, "data.images", micro, step).reshape(t.batch_size, 2)
        chosen = self.train[words[:, 0] * len(self.train) >> 32]
        return moved(scaled(self.images.pixels[chosen]), words[:, 1]), self.labels[chosen]

    def held_out(self, n: int | None = None) -> Batches:
        """images [B,channels,side,side], classes [B]; the last batch is smaller"""
        for part in self._parts(n):
            yield scaled(self.images.pixels[part]), self.labels[part]

    def _parts(self, n: int | None = None) -> Iterator[Ids]:
        size = self.config.train.batch_size
        for start in range(0, len(self.val) if n is None else min(len(self.val), n * size), size):
            yield self.val[start : start + size]

    # ---- what a user sees ----------------------------------------------------------------------------------------------------------

    def show(self, model: Transformer) -> Iterator[str]:
        """Name held-out images, first those that the model gets wrong."""
        with no_grad():
            parts = [model.backend.to_host(model(images).data) for images, *_ in self.held_out()]
        predicted = np.argmax(np.concatenate(parts), axis=-1)
        wrong = predicted != self.labels[self.val]
        yield f"Held-out images, {wrong.sum():,} of {len(self.val):,} taken for another:"
        for place in [*np.flatnonzero(wrong)[: SHOWN - 2], *np.flatnonzero(~wrong)][:SHOWN]:
            yield f"\n  {self._verdict(int(self.val[place]), int(predicted[place]))}"

    def sample(self, model: Transformer, number: int) -> Iterator[str]:
        """Name a held-out image, each in turn, and say what it is taken for."""
        i = int(self.val[number % len(self.val)])
        with no_grad():
            logits = model.backend.to_host(model(scaled(self.images.pixels[i : i + 1])).data)  # [1,classes]
        yield self._verdict(i, int(np.argmax(logits)))

    def _verdict(self, i: int, predicted: int) -> str:
        true = int(self.labels[i])
        found = "right" if predicted == true else f"taken for {printable(self.classes[predicted])}"
        return f"{printable(self.images.path(i).as_posix())}: {found}"

    def next_command(self, run: Path) -> str:
        path = self.root / self.images.path(int(self.val[0]))
        return command("classify", run, min(path, Path(os.path.relpath(path)), key=lambda path: len(str(path))))


def folder_of(config: Config) -> Path:
    """Return the folder of images that a configuration names. Raises `UserError` if it is none."""
    path = Path(os.path.expanduser(config.data.name))
    if len(config.data.parts) > 1 or not path.is_dir():
        missing = len(config.data.parts) == 1 and config.data.name not in BUILT_IN and not path.exists()
        raise UserError(
            f"data.source = {config.data.name!r} {'does not exist' if missing else 'is not images'}, {config.name!r} classifies images: "
            "give digits (--data digits), or a folder with a folder of images for each class"
        )
    return path


def scaled(pixels: Pixels) -> Floats:
    """Return pixels from 0 to 255 as numbers from -1 to 1."""
    return pixels.astype(np.float32) / np.float32(127.5) - np.float32(1.0)


def moved(images: Floats, words: npt.NDArray[np.int64]) -> Floats:
    """Move each image down and across by its word's two halves.   images [B,channels,side,side], words [B] below 2^32"""
    side = images.shape[-1]
    reach = max(1, side // 16)
    padded = np.pad(images, ((0, 0), (0, 0), (reach, reach), (reach, reach)), mode="edge")
    down, across = ((half * (2 * reach + 1) >> 16)[:, None] + np.arange(side) for half in (words >> 16, words & 0xFFFF))  # [B,side]
    each = np.arange(len(images))[:, None, None]
    return np.ascontiguousarray(padded[each, :, down[:, :, None], across[:, None, :]].transpose(0, 3, 1, 2))
