"""What `minimoe classify` answers: the most likely classes of images, by a trained classifier."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minimoe.data.pictures import NotAnImage, Pixels, check_channels, read_picture
from minimoe.data.sources import IMAGE_SOURCES
from minimoe.engine.grad_mode import no_grad
from minimoe.errors import UserError, notice, printable
from minimoe.pretrained.loading import Loaded, open_model
from minimoe.training.tasks.digits import CLASSES, Floats, from_picture
from minimoe.training.tasks.folder import scaled
from minimoe.untrusted import MOST_JSON, Malformed, parse_json_object, read_bounded

BATCH = 32  # images that are classified together


class ClassGuess(NamedTuple):
    """A class, and how likely it is that an image is of it."""

    name: str
    probability: float


def classify(
    what: str | os.PathLike[str] | None, images: Sequence[str | os.PathLike[str]] | str | os.PathLike[str], top: int | None = None
) -> list[list[ClassGuess]]:
    """Return the classes of each image file, the most likely first; all of them, or the `top` most likely.

    `what`: a run or a checkpoint that classifies images, or a model folder of the family `vit`; None: the newest run. Raises `UserError`
    for anything else, and for a file that is not an image.
    """
    loaded = open_model(what)
    for problem in loaded.problems:
        notice(f"damaged: {problem}; using step {loaded.step}")
    given = [images] if isinstance(images, str | os.PathLike) else images
    return classified(loaded, {os.fspath(name): Path(name) for name in given}, top)


def classified(loaded: Loaded, images: Mapping[str, Path | bytes], top: int | None = None) -> list[list[ClassGuess]]:
    """Return the classes of each image, a file or its bytes by the name that errors give it, as `classify` does."""
    names, m, model = class_names(loaded), loaded.config.model, loaded.model
    check_channels(m.n_channels)
    prepared = from_picture if is_of_digits(loaded) else _normalised(loaded)
    pixels = []
    for name, source in images.items():
        try:
            pixels.append(read_picture(source, m.image_size, m.n_channels).pixels)
        except NotAnImage as error:
            raise UserError(f"{printable(name)}: {error}") from None
    found: list[list[ClassGuess]] = []
    for start in range(0, len(pixels), BATCH):
        batch = prepared(np.stack(pixels[start : start + BATCH]))
        with no_grad():
            logits = model.backend.to_host(model(batch).data).astype(np.float64)  # [B,classes]
        shares = np.exp(logits - logits.max(axis=-1, keepdims=True))
        shares /= shares.sum(axis=-1, keepdims=True)
        for row in shares:
            order = np.argsort(-row, kind="stable")[:top]
            found.append([ClassGuess(names[i], float(row[i])) for i in order])
    return found


def _normalised(loaded: Loaded) -> Callable[[Pixels], Floats]:
    """Return how pixels become numbers: as minimoe trains, or by the mean and the deviation that a model folder gives."""
    path = loaded.folder / "preprocessor_config.json"
    if loaded.model.provenance is None or not path.is_file():
        return scaled
    try:
        given = parse_json_object(read_bounded(path, MOST_JSON))
        mean, deviation = (np.array(given.get(key, [0.5]), np.float32).reshape(-1, 1, 1) for key in ("image_mean", "image_std"))
        if not (np.isfinite(mean).all() and np.isfinite(deviation).all() and (deviation > 0).all()):
            raise ValueError("image_mean and image_std are not numbers")
        np.broadcast_shapes(mean.shape, deviation.shape, (loaded.config.model.n_channels, 1, 1))
    except (OSError, Malformed, ValueError, TypeError) as error:
        raise UserError(f"{path}: cannot be used: {error}") from None
    return lambda pixels: np.asarray((pixels / np.float32(255) - mean) / deviation, np.float32)


def is_of_digits(loaded: Loaded) -> bool:
    return loaded.model.provenance is None and loaded.config.data.name in IMAGE_SOURCES


def class_names(loaded: Loaded) -> tuple[str, ...]:
    """Return the names of a classifier's classes, by number. Raises `UserError` for a model that classifies no images."""
    config = loaded.config
    if config.model.head != "classifier" or not config.model.image_size:
        raise UserError(f"{loaded.folder}: classify needs a model that classifies images: this one has head = {config.model.head!r}")
    if is_of_digits(loaded):
        return tuple(map(str, range(CLASSES)))
    return config.data.classes or _labels(loaded)


def _labels(loaded: Loaded) -> tuple[str, ...]:
    """Return the names that a model folder gives its classes; their numbers, where it gives none."""
    given: Any = {} if loaded.model.provenance is None else loaded.model.provenance.folder.config.get("id2label")
    table: dict[Any, Any] = dict(enumerate(given)) if isinstance(given, list) else given if isinstance(given, dict) else {}
    return tuple(str(table.get(str(i), table.get(i, i))) for i in range(loaded.config.model.n_classes))
