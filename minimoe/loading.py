"""Opening what was trained: a run or a checkpoint as a model, ready to predict."""

import warnings
from dataclasses import dataclass
from pathlib import Path

from minimoe.autograd import current_backend
from minimoe.backend import Backend
from minimoe.checkpoint import Checkpoint, load_checkpoint
from minimoe.config import Config, config_from_tables
from minimoe.errors import CheckpointError
from minimoe.model import Transformer
from minimoe.run import RUNS, Run
from minimoe.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class Loaded:
    """A model with what belongs to it."""

    model: Transformer
    tokenizer: Tokenizer | None
    config: Config
    folder: Path  # of the checkpoint
    step: int
    problems: list[str]  # damaged checkpoints that were passed over


def open_model(path: str | Path | None = None, root: str | Path = RUNS, backend: Backend | None = None) -> Loaded:
    """The model of a run (its newest whole checkpoint) or of a checkpoint's folder; None: the newest run.

    Raises `CheckpointError` where there is none, or it is damaged.
    """
    saved, problems = _find(path, Path(root))
    config = config_from_tables(saved.config, saved.folder.name)
    model = Transformer(config.model, dtype=config.train.dtype, backend=backend or current_backend())
    model.load_state_dict(saved.model)
    tokenizer = load_tokenizer(saved.tokenizer_path) if saved.tokenizer_path is not None else None
    return Loaded(model, tokenizer, config, saved.folder, saved.step, problems)


def _find(path: str | Path | None, root: Path) -> tuple[Checkpoint, list[str]]:
    if path is not None and (Path(path) / "model.safetensors").is_file():
        return load_checkpoint(Path(path), optimizer=False), []
    run = Run.open(path, root)
    if run.newest_checkpoint() is None:
        raise CheckpointError(f"{run.path}: has no checkpoint yet")
    return run.load(optimizer=False)


def load(path: str | Path | None = None) -> Transformer:
    """The model of a run or a checkpoint: `logits = load("runs/last")(tokens)`. Its tokenizer is `model.tokenizer`."""
    loaded = open_model(path)
    for problem in loaded.problems:
        warnings.warn(f"damaged: {problem}; step {loaded.step} is loaded", stacklevel=2)
    loaded.model.tokenizer = loaded.tokenizer
    return loaded.model
