"""Image classification: the class of an image is predicted from its patches (Dosovitskiy et al. 2020). Here: of digits.

In training each digit is moved sideways by up to a pixel, so that a small set of them is harder to memorise.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from msgspec.structs import replace

from minimoe.config import Config
from minimoe.data.tokenizer import Tokenizer
from minimoe.engine.grad_mode import no_grad
from minimoe.engine.random import host_bits
from minimoe.errors import ConfigError, UserError
from minimoe.hints import command
from minimoe.model.transformer import Transformer
from minimoe.training.evaluation import Batches
from minimoe.training.tasks.digits import CLASSES, SIDE, Floats, load_digits, shifted
from minimoe.training.tasks.task import Array, Task

INK = " \u2591\u2592\u2593\u2588"  # from paper to ink
ACROSS, DOWN = 4, 2  # images shown at the end of a run


class ImageTask(Task):
    """What tasks on images have in common."""

    unit = "image"
    chance: float

    @property
    @abstractmethod
    def counts(self) -> tuple[int, int]:
        """The numbers of images to train on, and of those held out."""

    def size(self) -> str:
        train, val = self.counts
        return f"{train:,} + {val:,} images"

    def passes(self) -> float:
        return self.config.train.steps * self.images_per_step / self.counts[0]

    @property
    def images_per_step(self) -> int:
        return self.config.train.accumulate * self.config.train.batch_size

    def step_size(self) -> str:
        return f"{self.images_per_step:,} images ({self.tokens_per_step:,} tokens)"

    @property
    def held_out_batches(self) -> int:
        return -(-self.counts[1] // self.config.train.batch_size)

    def accuracy(self, value: float | None) -> str:
        return f"accuracy {'-' if value is None else f'{value:.1%}'} (guessing the most common class: {self.chance:.1%})"


class ImageClassification(ImageTask):
    """Digits: inputs are images [B,1,8,8], targets their classes [B]."""

    def __init__(self, config: Config, tokenizer: Tokenizer | None = None, whole: bool = False, sha256: str | None = None) -> None:
        source = config.data.name
        if config.data.classes is not None:
            raise UserError(f"data.source = {source!r}: digits have their own classes, not those of data.classes")
        check_shape(config)
        self.source, self.data = source, load_digits(config.data.val_fraction)
        self.sha256 = self.data.sha256
        self.val, self.val_classes = self.data.val, self.data.val_classes
        if whole:
            self.val = np.concatenate([self.data.train, self.val])
            self.val_classes = np.concatenate([self.data.train_classes, self.val_classes])
        if not len(self.data.train):
            raise ConfigError(f"data.val_fraction ({config.data.val_fraction}) leaves no image to train on: 0.2 holds out a fifth")
        self.chance = float(np.bincount(self.val_classes).max() / len(self.val_classes))
        self.config = replace(config, train=replace(config.train, seq_len=config.model.n_patches + 1))

    def batch(self, step: int, micro: int) -> tuple[Array, Array]:
        """images [B,1,side,side], classes [B]"""
        t = self.config.train
        words = host_bits(2 * t.batch_size, t.seed, "data.images", micro, step).reshape(t.batch_size, 2)
        chosen = words[:, 0] * len(self.data.train) >> 32
        return shifted(self.data.train[chosen], words[:, 1]), self.data.train_classes[chosen]

    @property
    def counts(self) -> tuple[int, int]:
        return len(self.data.train), len(self.val)

    # ---- measuring -----------------------------------------------------------------------------------------------------------------

    def held_out(self, n: int | None = None) -> Batches:
        """images [B,1,side,side], classes [B]; the last batch is smaller"""
        t = self.config.train
        stop = len(self.val) if n is None else min(len(self.val), n * t.batch_size)
        for start in range(0, stop, t.batch_size):
            part = slice(start, min(stop, start + t.batch_size))
            yield self.val[part], self.val_classes[part]

    # ---- what a user sees ----------------------------------------------------------------------------------------------------------

    def show(self, model: Transformer) -> Iterator[str]:
        """Draw held-out digits, first those that the model gets wrong."""
        predicted = self._predict(model)
        wrong, right = np.flatnonzero(predicted != self.val_classes), np.flatnonzero(predicted == self.val_classes)
        shown = [*wrong[: ACROSS * DOWN // 2], *right][: ACROSS * DOWN]
        yield f"Held-out digits, {len(wrong)} of {len(self.val)} taken for another:"
        for first in range(0, len(shown), ACROSS):
            row = shown[first : first + ACROSS]
            yield "\n\n" + side_by_side([drawn(self.val[i, 0]) for i in row])
            yield "\n" + side_by_side([[caption(int(self.val_classes[i]), int(predicted[i]))] for i in row])

    def sample(self, model: Transformer, number: int) -> Iterator[str]:
        """Draw a held-out digit, each in turn, and say what it is taken for."""
        i = number % len(self.val)
        with no_grad():
            logits = model.backend.to_host(model(self.val[i : i + 1]).data)  # [1,classes]
        yield "\n".join(line.rstrip() for line in drawn(self.val[i, 0]))
        yield f"\n{self.val_classes[i]}, taken for {int(np.argmax(logits))}"

    def _predict(self, model: Transformer) -> npt.NDArray[np.int64]:
        """Predict the class of each held-out image."""
        with no_grad():
            parts = [model.backend.to_host(model(images).data) for images, *_ in self.held_out()]
        return np.argmax(np.concatenate(parts), axis=-1)

    def next_command(self, run: Path) -> str:
        return command("eval", run)


def check_shape(config: Config) -> None:
    """Refuse a model for other images or other classes. Raises `ConfigError`."""
    m = config.model
    expected = {"image_size": SIDE, "n_channels": 1, "n_classes": CLASSES}
    wrong = [f"model.{key} = {value} (not {getattr(m, key)})" for key, value in expected.items() if getattr(m, key) != value]
    if wrong:
        raise ConfigError(f"digits are grey images of 8 x 8 pixels in 10 classes: {config.name!r} needs {', '.join(wrong)}")


def drawn(image: Floats) -> list[str]:
    """Draw an image [side,side] as lines of shades, two characters per pixel, so that it looks square."""
    shades = np.rint(np.clip(image, 0.0, 1.0) * (len(INK) - 1)).astype(int)
    return ["".join(INK[shade] * 2 for shade in row) for row in shades.tolist()]


def caption(true: int, predicted: int) -> str:
    return f"{true}" if true == predicted else f"{true}, taken for {predicted}"


def side_by_side(pictures: list[list[str]]) -> str:
    """Set pictures of equal height in one row."""
    return "\n".join("  " + "  ".join(line.ljust(2 * SIDE) for line in lines).rstrip() for lines in zip(*pictures, strict=True))
