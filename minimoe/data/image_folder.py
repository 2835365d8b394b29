"""A folder of images, in which each folder is a class: what is there, decoded once, and which images are held out.

    pets/cat/1.jpg        pets/cat/more/2.png        pets/dog/a.webp

Classes are sorted by the names of their folders, images by their paths. The images of a large folder are kept in the user's cache and
mapped from there (image_store.py), so that memory does not grow with the folder; those of a small one are decoded at each start.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from minimoe.data.pictures import NotAnImage, Pixels, check_channels, pillow_version, read_picture
from minimoe.data.progress import Progress
from minimoe.data.text import file_state, files_below
from minimoe.engine.random import host_bits
from minimoe.errors import UserError, printable

Ids = npt.NDArray[np.int64]
Classes = npt.NDArray[np.int32]

NAMED, COUNTED = 3, 8  # files that a note names; classes whose images it counts


@dataclass(frozen=True, eq=False)
class Images:
    """The images of a folder, in memory or mapped from a file."""

    pixels: Pixels  # [n,channels,side,side]
    classes: Classes  # [n]
    names: tuple[str, ...]  # of the classes, by number
    files: bytes  # the path of each image within the folder, ended by NUL
    sha256: str  # of all of this but the paths
    notes: tuple[str, ...]  # what was read, and what was left out and why

    def path(self, i: int) -> Path:
        """Return the path of an image within the folder."""
        return Path(os.fsdecode(self.files.split(b"\0")[i]))


@dataclass(frozen=True)
class Listing:
    """The files of a folder of images, before any is opened."""

    root: Path
    classes: dict[str, list[Path]]  # all files that are not hidden, by the folder that they are below
    loose: list[Path]  # beside the folders: they have no class
    states: list[Any] = field(default_factory=list)  # what changes with their contents

    @classmethod
    def of(cls, root: Path) -> "Listing":
        """List a folder. Raises `UserError` if no folder is in it."""
        entries = sorted((entry for entry in root.iterdir() if not entry.name.startswith(".")), key=lambda entry: entry.name)
        classes = {entry.name: files_below(entry) for entry in entries if entry.is_dir()}
        if not classes:
            raise UserError(f"{root}: has no folders: put the images of each class into a folder of its name, such as {root / 'cat'}")
        for name in classes:
            if not name.isprintable():
                raise UserError(f"{root}: the folder {name!r} cannot be a class: its name has characters that cannot be printed")
        states = [file_state(path) for files in classes.values() for path in files]
        return cls(root, classes, [entry for entry in entries if not entry.is_dir()], states)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(state[3] for state in self.states)

    @property
    def count(self) -> int:
        return len(self.states)

    def identity(self, side: int, channels: int) -> str:
        """Return a digest of what the pixels depend on, known without opening a file."""
        what = [str(self.root.absolute()), list(self.classes), len(self.loose), side, channels, pillow_version(), self.states]
        return hashlib.sha256(json.dumps(what, default=os.fsdecode).encode("utf-8", "surrogatepass")).hexdigest()


class Decoding:
    """One pass over the images of a folder; what it found is known when it has ended."""

    def __init__(self, listing: Listing, name: str, side: int, channels: int) -> None:
        check_channels(channels)
        self.listing, self.name, self.side, self.channels = listing, name, side, channels
        self.names: list[str] = []
        self.counts: list[int] = []
        self.animated = 0
        self.left: dict[str, list[Path]] = {}
        self._sha256 = hashlib.sha256(f"{side} {channels}\n".encode())

    def __iter__(self) -> Iterator[tuple[int, Path, Pixels]]:
        """Yield the class, the path and the pixels [channels,side,side] of each image. Raises `UserError` if there are not two classes."""
        progress = Progress(f"reading {self.name}", self.listing.size)
        try:
            for name, files in self.listing.classes.items():
                count = 0
                for path in files:
                    found = self._read(path)
                    if found is not None:
                        count += 1
                        self._sha256.update(f"{len(self.names)}\n".encode() + found.tobytes())
                        yield len(self.names), path, found
                    progress.add(path.stat().st_size if path.exists() else 0)
                if count:
                    self.names.append(name)
                    self.counts.append(count)
        finally:
            progress.close()
        self._sha256.update(json.dumps(self.names).encode())
        if len(self.names) < 2:
            raise UserError(f"{self.name}: {self._too_few()}: a classifier needs two classes, each a folder with images")
        if max(self.counts) < 2:
            raise UserError(f"{self.name}: every class has one image, so that none can be held out: give at least two of one class")

    def _read(self, path: Path) -> Pixels | None:
        try:
            found = read_picture(path, self.side, self.channels)
        except NotAnImage as error:
            self.left.setdefault(str(error).partition(": ")[0].partition(" (")[0], []).append(path)
            return None
        self.animated += found.animated
        return found.pixels

    def _too_few(self) -> str:
        found = f"images of one class ({self.names[0]})" if self.names else "no image"
        return "; ".join([found, *(f"{_named(paths)} left out: {why}" for why, paths in self.left.items())])

    @property
    def sha256(self) -> str:
        return self._sha256.hexdigest()

    def notes(self) -> tuple[str, ...]:
        """Return what was read, and what was left out and why."""
        each = [f"{printable(name)} {count:,}" for name, count in zip(self.names[:COUNTED], self.counts[:COUNTED], strict=True)]
        each += [f"and {len(self.names) - COUNTED} more"] if len(self.names) > COUNTED else []
        size = f"{self.side} x {self.side} pixels {'in colour' if self.channels == 3 else 'in grey'}"
        lines = [
            f"{sum(self.counts):,} images of {len(self.names)} classes: {', '.join(each)}",
            f"of each image the middle square is taken, as {size} (model.image_size, model.n_channels)",
        ]
        without = [name for name in self.listing.classes if name not in self.names]
        lines += [f"{len(without)} folder{'s' * (len(without) > 1)} without images ({_some(without)}) left out"] if without else []
        lines += [f"{_named(self.listing.loose)} left out: beside the folders, so of no class"] if self.listing.loose else []
        lines += [f"{_named(paths)} left out: {why}" for why, paths in self.left.items()]
        lines += [f"{self.animated:,} animated: the first frame of each is taken"] if self.animated else []
        single = [name for name, count in zip(self.names, self.counts, strict=True) if count == 1]
        lines += [f"classes of one image, which is not held out: {_some(single)}"] if single else []
        return tuple(f"{self.name}: {line}" for line in lines)


def _some(names: list[str]) -> str:
    more = [f"and {len(names) - NAMED} more"] if len(names) > NAMED else []
    return ", ".join([*(printable(name) for name in names[:NAMED]), *more])


def _named(paths: list[Path]) -> str:
    return f"{len(paths):,} file{'s' * (len(paths) > 1)} ({_some([path.name for path in paths])})"


def in_memory(decoding: Decoding) -> Images:
    """Decode a folder into memory."""
    found = list(decoding)
    return Images(
        np.stack([pixels for _, _, pixels in found]) if found else np.zeros((0, 1, 1, 1), np.uint8),
        np.array([number for number, _, _ in found], np.int32),
        tuple(decoding.names), b"".join(within(path, decoding) for _, path, _ in found), decoding.sha256, decoding.notes(),
    )  # fmt: skip


def within(path: Path, decoding: Decoding) -> bytes:
    """Return an image's path within its folder, ended by NUL."""
    return os.fsencode(path.relative_to(decoding.listing.root)) + b"\0"


def divided(classes: Classes, val_fraction: float) -> tuple[Ids, Ids]:
    """Return which images are trained on and which are held out, the same for every seed.   [n] -> [n_train], [n_val]

    Of each class that share is held out, at least one image and at most all but one; of a class of one image, none.
    """
    train, val = [], []
    for number in np.unique(classes):
        members = np.flatnonzero(classes == number)
        order = members[np.argsort(host_bits(len(members), 0, "data.images.split", int(number)), kind="stable")]
        held = min(len(order) - 1, max(1, round(len(order) * val_fraction)))
        train.append(order[held:])
        val.append(order[:held])
    return np.sort(np.concatenate(train)), np.sort(np.concatenate(val))
