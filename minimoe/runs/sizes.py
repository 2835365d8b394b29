"""How many bytes a run's folder takes, and how many of them are optimizer state."""

import os
from contextlib import suppress
from pathlib import Path

from minimoe.runs.checkpoint import OPTIMIZER, checkpoints


def folder_bytes(folder: Path) -> int:
    """Return the sum of the sizes of all files below a folder; links are not followed, and what cannot be read counts as nothing."""
    total = 0
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with suppress(OSError):
                is_folder = entry.is_dir(follow_symlinks=False)
                total += folder_bytes(Path(entry.path)) if is_folder else entry.stat(follow_symlinks=False).st_size
    return total


def optimizer_bytes(run: Path) -> int:
    """Return how many bytes the optimizer state in a run's checkpoints takes, which pruning frees."""
    total = 0
    with suppress(OSError):
        for checkpoint in checkpoints(run / "checkpoints"):
            with suppress(OSError):
                total += (checkpoint / OPTIMIZER).stat().st_size
    return total
