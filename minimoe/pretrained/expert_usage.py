"""Remembers how many rows each expert of a model folder was given on this machine: noted after generating, shown by `inspect`.

The notes are in the user's cache, because the folder may belong to others. When a folder's weights change, its count starts again.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
import numpy.typing as npt

from minimoe.caches import user_caches
from minimoe.files import write_atomically
from minimoe.untrusted import MOST_JSON, Malformed, read_bounded

Rows = list[npt.NDArray[np.int64]]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**62)]


def note(folder: Path, rows: Rows) -> None:
    """Add the rows that each routed layer gave its experts [E]. If the cache cannot be written, nothing is noted."""
    if not rows or not any(layer.any() for layer in rows):
        return
    before = recall(folder, (len(rows), len(rows[0]))) or [np.zeros_like(layer) for layer in rows]
    path = _file(folder)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps([(a + b).tolist() for a, b in zip(before, rows, strict=True)]))
    except OSError:
        return


def recall(folder: Path, shape: tuple[int, int]) -> Rows | None:
    """Return the counts that were noted for a folder, or None if there are none that fit. shape: routed layers, experts."""
    try:
        counts = msgspec.json.decode(read_bounded(_file(folder), MOST_JSON), type=list[list[Count]])
    except (OSError, Malformed, msgspec.MsgspecError):
        return None
    fit = len(counts) == shape[0] and all(len(layer) == shape[1] for layer in counts)
    return [np.array(layer, dtype=np.int64) for layer in counts] if fit else None


def _file(folder: Path) -> Path:
    """Return the file with the counts of a folder, named by its path and the sizes and times of its weights."""
    home = next(user_caches(), Path(os.devnull))  # in which nothing can be written or read
    states = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(folder.glob("*.safetensors"))]
    name = hashlib.sha256(repr((str(folder.resolve()), states)).encode()).hexdigest()[:24]
    return home / "touched" / f"{name}.json"
