"""Starts training and resumes it: `minimoe.train` and `minimoe.resume`, which the command line calls too."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from msgspec.structs import replace

from minimoe.config import Config, load_config
from minimoe.config.sources import BUILT_IN
from minimoe.data.pipes import is_pipe
from minimoe.errors import ConfigError
from minimoe.runs.run import Run
from minimoe.training.listener import Listener
from minimoe.training.trained_run import TrainedRun
from minimoe.training.trainer import Trainer


def train(
    source: str | Path | Config = "tiny-moe", *, data: str | None = None, steps: int | None = None, out: str | Path | None = None,
    backend: str | None = None, seed: int | None = None, threads: int | None = None, overrides: Iterable[str] = (),
    root: str | Path = "runs", listener: Listener | None = None,
) -> TrainedRun:  # fmt: skip
    """Train a preset, a TOML file or a Config from the start, in a new folder under `root` (or in `out`).

    Raises `UserError` for what cannot be trained, `Diverged` after ten non-finite steps in a row, `Interrupted` after a signal.
    """
    if isinstance(source, Config) and list(overrides):
        raise ConfigError("train: overrides go with a preset or a file; change a Config with msgspec.structs.replace")
    config = source if isinstance(source, Config) else load_config(source, overrides)
    config = with_options(config, data=data, steps=steps, backend=backend, seed=seed, threads=threads)
    trainer = Trainer(config, listener=listener)
    return trainer.run(trainer.create(None if out is None else Path(out), Path(root)))


def resume(
    path: str | os.PathLike[str] | None = None, *, steps: int | None = None, root: str | Path = "runs", listener: Listener | None = None
) -> TrainedRun:
    """Continue a run from its newest whole checkpoint (or from the one named), up to `steps` in all; its metrics are cut back to it.

    Raises `CheckpointError` if the run, its configuration or its data do not fit, or if it is finished.
    """
    run = Run.open(path, Path(root))
    with run.claimed():
        config = run.config if steps is None else replace(run.config, train=replace(run.config.train, steps=steps))
        trainer = Trainer(config, listener=listener, sha256=run.data_sha256())
        trainer.restore(run)
        return trainer.run(run)


def with_options(
    config: Config, *, data: str | None = None, steps: int | None = None, backend: str | None = None, seed: int | None = None,
    threads: int | None = None,
) -> Config:  # fmt: skip
    """Return the configuration with the command line's options in it; its paths become absolute, so that a run resumes from any folder.

    A pipe keeps its name: /dev/fd/63 leads to what has no path.
    """
    given = {"steps": steps, "backend": backend, "seed": seed, "threads": threads}
    settings = replace(config.train, **{key: value for key, value in given.items() if value is not None})
    text = config.data if data is None else replace(config.data, source=data)
    if Path(text.source).exists() and text.source not in BUILT_IN["source"] and not is_pipe(Path(text.source)):
        text = replace(text, source=str(Path(text.source).resolve()))
    if Path(text.tokenizer).exists() and text.tokenizer not in BUILT_IN["tokenizer"]:
        text = replace(text, tokenizer=str(Path(text.tokenizer).resolve()))
    return replace(config, train=settings, data=text)
