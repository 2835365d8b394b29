"""Remembers how many rows each expert of a model folder was given on this machine: noted after generating, shown by `inspect`.

The notes are in the user's cache, because the folder may belong to others. When a folder's weights change, its count starts again.
"""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

from minimoe.caches import user_caches
from minimoe.files import write_atomically

Rows = list[npt.NDArray[np.int64]]


def note(folder: Path, rows: Rows) -> None:
    """Add the rows that each routed layer gave its experts [E]. If the cache cannot be written, nothing is noted."""
    if not rows or not any(layer.any() for layer in rows):
        return
    before = recall(folder) or [np.zeros_like(layer) for layer in rows]
    path = _file(folder)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps([(a + b).tolist() for a, b in zip(before, rows, strict=True)]))
    except OSError:
        return


def recall(folder: Path) -> Rows | None:
    """Return the counts that were noted for a folder, or None."""
    try:
        return [np.asarray(layer, dtype=np.int64) for layer in json.loads(_file(folder).read_text())]
    except (OSError, ValueError, TypeError):
        return None


def _file(folder: Path) -> Path:
    """Return the file with the counts of a folder, named by its path and the sizes and times of its weights."""
    home = next(user_caches(), Path(os.devnull))  # in which nothing can be written or read
    states = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(folder.glob("*.safetensors"))]
    name = hashlib.sha256(repr((str(folder.resolve()), states)).encode()).hexdigest()[:24]
    return home / "touched" / f"{name}.json"
