"""Starts training and resumes it: `minimoe.train` and `minimoe.resume`, which the command line calls too."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from msgspec.structs import replace

from minimoe.config import Config, load_config, preset_names
from minimoe.config.data_names import with_absolute_path
from minimoe.config.given import Sources, with_sources
from minimoe.config.sources import BUILT_IN
from minimoe.data.pipes import is_pipe
from minimoe.errors import CheckpointError, ConfigError
from minimoe.pretrained.folder import is_model_folder
from minimoe.runs.run import Run
from minimoe.training.listener import Listener
from minimoe.training.notebook import default_listener
from minimoe.training.trained_run import TrainedRun
from minimoe.training.trainer import Trainer, check_starts_from_seed
from minimoe.training.weights import Weights, open_weights


def train(
    source: str | Path | Config | None = None, *, init: str | os.PathLike[str] | None = None, data: Sources | None = None,
    steps: int | None = None, out: str | Path | None = None, backend: str | None = None, seed: int | None = None,
    threads: int | None = None, freeze: Iterable[str] = (), overrides: Iterable[str] = (), root: str | Path = "runs",
    listener: Listener | None = None,
) -> TrainedRun:  # fmt: skip
    """Train a preset (None: tiny-moe), a TOML file or a Config from the start, in a new folder under `root` (or in `out`).

    `init`: a run, a checkpoint or a model folder whose weights it starts from; without `source` its configuration is used too.
    `freeze`: patterns of parameters that keep their numbers, besides those of `train.freeze`.
    Raises `UserError` for what cannot be trained, `Diverged` after ten non-finite steps in a row, `Interrupted` after a signal.
    """
    config, weights = configured(source, init, overrides, root)
    config = with_options(config, data=data, steps=steps, backend=backend, seed=seed, threads=threads, freeze=freeze)
    listener = listener or default_listener()
    folder = None if out is None else Path(out)
    if weights is None:
        trainer = Trainer(config, listener)
        return trainer.run(trainer.create(folder, Path(root)))
    if config.data.classes is not None or not config.model.image_size:
        weights.fit(config)  # of images the number of classes is known once they are read
    trainer = Trainer(config, listener, weights=weights)
    for line in weights.lines(trainer.config, own=source is None):
        listener.said(line)
    return trainer.run(trainer.begin(folder, weights.origin, Path(root), weights.kept_tokenizer))


def configured(
    source: str | Path | Config | None, init: str | os.PathLike[str] | None = None, overrides: Iterable[str] = (), root: str | Path = "runs"
) -> tuple[Config, Weights | None]:
    """Return the configuration of a new run, and the weights that it starts from (None: they are drawn from its seed).

    Raises `UserError` if either is missing or they do not fit; where a run stands in place of a configuration, with both ways on.
    """
    weights = None if init is None else open_weights(os.fspath(init), root)
    if isinstance(source, Config):
        if list(overrides):
            raise ConfigError("train: overrides go with a preset or a file; change a Config with msgspec.structs.replace")
        return source if weights is None else weights.completed(source), weights
    if source is not None:
        refuse_run(source, Path(root))
    if weights is not None:
        return weights.configuration(source, overrides), weights
    config = load_config("tiny-moe" if source is None else source, overrides)
    check_starts_from_seed(config)
    return config, None


def refuse_run(source: str | Path, root: Path) -> None:
    """Raise `ConfigError` if what should be a configuration is a run or a model folder, and name the commands that take one."""
    text, path = str(source), Path(source)
    if text in preset_names() or (path.is_file() and path.name not in ("last", "best")):
        return
    if is_model_folder(path):
        raise ConfigError(f"{text}: is a model folder, not a configuration: minimoe train --init {text} starts from its weights")
    with suppress(CheckpointError):
        Run.open(text, root)
        raise ConfigError(
            f"{text}: is a run, not a configuration: minimoe resume {text} continues it, minimoe train --init {text} starts a new run "
            "from its weights"
        )


def resume(
    path: str | os.PathLike[str] | None = None, *, steps: int | None = None, patience: int | None = None, root: str | Path = "runs",
    listener: Listener | None = None,
) -> TrainedRun:  # fmt: skip
    """Continue a run from its newest whole checkpoint (or from the one named), up to `steps` in all; its metrics are cut back to it.

    A run that ended early goes on with more steps or another `patience`. Raises `CheckpointError` if the run, its configuration or its data
    do not fit, or if it is finished.
    """
    run = Run.open(path, Path(root))
    with run.claimed():
        given = {key: value for key, value in (("steps", steps), ("patience", patience)) if value is not None}
        config = replace(run.config, train=replace(run.config.train, **given))
        trainer = Trainer(config, listener=listener, sha256=run.data_sha256())
        trainer.restore(run)
        return trainer.run(run)


def with_options(
    config: Config, *, data: Sources | None = None, steps: int | None = None, backend: str | None = None, seed: int | None = None,
    threads: int | None = None, freeze: Iterable[str] = (),
) -> Config:  # fmt: skip
    """Return the configuration with the command line's options in it; its paths become absolute, so that a run resumes from any folder.

    A pipe keeps its name: /dev/fd/63 leads to what has no path.
    """
    given = {"steps": steps, "backend": backend, "seed": seed, "threads": threads}
    settings = replace(config.train, **{key: value for key, value in given.items() if value is not None})
    settings = replace(settings, freeze=tuple(dict.fromkeys((*settings.freeze, *freeze))))
    text = config.data if data is None else replace(with_sources(config.data, data), classes=None)  # another folder has its own classes
    if not is_pipe(Path(text.source)):
        text = replace(text, source=with_absolute_path(text.source))
    text = replace(text, sources=tuple(replace(part, source=with_absolute_path(part.source)) for part in text.sources))
    if Path(text.tokenizer).exists() and text.tokenizer not in BUILT_IN["tokenizer"]:
        text = replace(text, tokenizer=str(Path(text.tokenizer).resolve()))
    return replace(config, train=settings, data=text)
