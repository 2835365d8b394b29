"""Loads a model, ready to predict: a run, a checkpoint, or a folder of one of transformers' families."""

import os
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

from minimoe.backend import Backend, current_backend
from minimoe.config import Config, config_from_tables
from minimoe.config.files import saved_names
from minimoe.data.tokenizer import Tokenizer, load_tokenizer
from minimoe.errors import CheckpointError, UserError
from minimoe.model.adapters import merged
from minimoe.pretrained.folder import INDEX, is_model_folder
from minimoe.pretrained.header import PICKLES
from minimoe.pretrained.opening import open_folder
from minimoe.pretrained.transformer import PretrainedTransformer
from minimoe.pretrained.wrong_paths import instead_of_weights, refuse_wrong_path
from minimoe.runs.base import base_of
from minimoe.runs.checkpoint import TOKENIZER, Checkpoint, load_checkpoint, run_of
from minimoe.runs.run import RUNS, Run


@dataclass(frozen=True)
class Loaded:
    """A model, and where it was found."""

    model: PretrainedTransformer
    config: Config
    folder: Path  # of the checkpoint, or of the model
    step: int
    problems: list[str]  # damaged checkpoints that were passed over
    no_tokenizer: str = ""  # why it has no tokenizer
    data_sha256: str | None = None  # the digest of the data that it was trained on

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer."""
        return self.model.tokenizer

    @property
    def text(self) -> Tokenizer:
        """The model's tokenizer. Raises UserError, with the reason, if it has none."""
        if self.tokenizer is None:
            raise UserError(self.no_tokenizer or f"{self.folder}: has no {TOKENIZER}: text cannot be turned into its tokens")
        return self.tokenizer


def open_model(
    path: str | os.PathLike[str] | None = None, root: str | Path = RUNS, backend: Backend | None = None, *, dtype: str = "float32",
    max_memory: int | None = None,
) -> Loaded:  # fmt: skip
    """Open the model of a run (its newest whole checkpoint), of a checkpoint's folder, or of a model folder. None: the newest run.

    `dtype` and `max_memory` (bytes of weights) apply to model folders only. Raises `UserError` if there is no model or it is damaged.
    """
    folder = None if path is None else model_folder(path)
    if folder is not None:
        return _open_folder(folder, dtype, backend, max_memory)
    if max_memory is not None:
        raise UserError("max_memory bounds what is read of a model folder; a run's checkpoint is read as a whole")
    saved, config, problems = open_checkpoint(path, root)
    model = PretrainedTransformer(config.model, dtype=config.train.dtype, backend=backend or current_backend())
    model.load_state_dict(saved.model)
    model.tokenizer = load_tokenizer(saved.tokenizer_path) if saved.tokenizer_path is not None else None
    return Loaded(model, config, saved.folder, saved.step, problems, data_sha256=(saved.state.get("data") or {}).get("sha256"))


def open_checkpoint(path: str | os.PathLike[str] | None = None, root: str | Path = RUNS) -> tuple[Checkpoint, Config, list[str]]:
    """Read the newest whole checkpoint of a run, or a checkpoint's folder.   -> it, its configuration, and what is wrong with newer ones

    Its arrays have the names and shapes of the configuration's model; adapters are merged into the weights. Raises as `open_model` does.
    """
    saved, problems = _find(path, Path(root))
    with saved_names(saved.folder):
        config = config_from_tables(saved.config, saved.folder.name)
    config = Run(run_of(saved.folder)).with_kept_text(config)
    if config.lora is not None:
        saved = replace(saved, model=merged({**base_of(saved), **saved.model}, config.model, config.lora))
    PretrainedTransformer(config.model, seed=None).check_state(saved.model)  # before anything of the sizes that it claims is made
    return saved, config, problems


def model_folder(given: str | os.PathLike[str]) -> Path | None:
    """Return the path if it is a model folder, or one whose fault `ModelFolder` will name; else None.

    Raises `CheckpointError` for what is known not to be a model: a file of weights, a folder of the hub's cache, a name on the hub.
    """
    refuse_wrong_path(given)
    path = Path(given)
    names = os.listdir(path) if path.is_dir() else []
    weights = any(Path(name).suffix in (".safetensors", *PICKLES) or name == INDEX for name in names) or bool(instead_of_weights(names))
    foreign = weights and not (path / "state.json").exists() and not (path / "config.toml").exists()
    return path if foreign or is_model_folder(path) else None


def _open_folder(path: Path, dtype: str, backend: Backend | None, max_memory: int | None) -> Loaded:
    model = open_folder(path, dtype, backend, max_memory)
    no_tokenizer = ""
    if (path / TOKENIZER).is_file():
        try:
            model.tokenizer = load_tokenizer(path / TOKENIZER)
        except UserError as error:  # the model works without it
            no_tokenizer = str(error)
    config = Config(model=model.config, name=path.resolve().name or "model")
    return Loaded(model, config, path, 0, [], no_tokenizer)


def _find(path: str | os.PathLike[str] | None, root: Path) -> tuple[Checkpoint, list[str]]:
    if path is not None and (Path(path) / "model.safetensors").is_file():
        return load_checkpoint(Path(path), optimizer=False), []
    run = Run.open(path, root)
    if run.newest_checkpoint() is None:
        raise CheckpointError(f"{run.path}: has no checkpoint yet")
    return run.load(optimizer=False)


def load(
    path: str | os.PathLike[str] | None = None, *, dtype: str = "float32", max_memory: int | None = None
) -> PretrainedTransformer:  # fmt: skip
    """Load the model of a run, a checkpoint, or a Hugging Face model folder: `logits = load("runs/last")(tokens)`.

    The path may be a run itself, as `minimoe.train` returns it.

    `model.tokenizer` is None if there is none, or if the extra `hf` is missing. For `dtype` and `max_memory` see `open_model`. Several
    threads may predict and generate with the model under `no_grad()`, each with a `Cache` of its own; docs/models.md says what they share.
    """
    loaded = open_model(path, dtype=dtype, max_memory=max_memory)
    for problem in loaded.problems:
        warnings.warn(f"damaged: {problem}; step {loaded.step} is loaded", stacklevel=2)
    return loaded.model
