"""`base.safetensors` of a run with adapters: the frozen weights, written once. A checkpoint of the run has the adapters alone.

The run keeps the weights themselves, not the path of the run or folder that they came from, since that may be moved, removed or trained
further; and not in every checkpoint, since they do not change. Each checkpoint names their SHA-256.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from minimoe.errors import CheckpointError
from minimoe.runs.checkpoint import Checkpoint, read_arrays, run_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

BASE = "base.safetensors"


def read_base(run: Path, sha256: str | None) -> "dict[str, NDArray[Any]]":
    """Return the frozen weights of a run, by name. Raises `CheckpointError` if they are missing, damaged, or not those of this digest."""
    if sha256 is None:
        raise CheckpointError(f"{run}: the checkpoint does not name the SHA-256 of its {BASE}")
    return read_arrays(run, BASE, {BASE: sha256})


def base_of(saved: Checkpoint) -> "dict[str, NDArray[Any]]":
    """Return the frozen weights that belong to a checkpoint's adapters. Raises as `read_base` does."""
    return read_base(run_of(saved.folder), saved.state.get("base_sha256"))
