"""Shows the plan of a run, without training: `minimoe train --dry-run`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from minimoe.config import Config, to_toml
from minimoe.config.trained import check_trained, trained_line, training_cost
from minimoe.errors import ConfigError, notice
from minimoe.figures import duration
from minimoe.runs.environment import check_memory
from minimoe.runs.folders import check_free
from minimoe.study.inspect import Report, show_cost

if TYPE_CHECKING:
    from minimoe.training.weights import Weights


def show_plan(config: Config, out: Path | None, weights: Weights | None = None, **options: Any) -> None:
    """Check everything that can be checked without training, then print the configuration, its cost, and how long it will take."""
    from minimoe.backend import load
    from minimoe.study.tables import show
    from minimoe.training.starting import with_options
    from minimoe.training.tasks import load_task

    config = with_options(config, **options)
    config.check_trainable()
    backend = load(config.train.backend)
    if config.train.dtype not in backend.dtypes:
        raise ConfigError(f"backend {backend.name} has no {config.train.dtype}: it has {', '.join(backend.dtypes)}")
    if out is not None:
        check_free(out)
    task = load_task(config, weights.tokenizer if weights else None)
    config = task.config
    lines = [] if weights is None else weights.lines(config)
    check_trained(config)
    check_memory(config)
    counted = training_cost(config, config.train.seq_len)
    tokens = config.train.steps * task.tokens_per_step
    for text in (*task.read(), *(() if task.corpus is None else task.corpus.notes), *config.warnings()):
        notice(text)
    show(to_toml(config))
    for line in (*lines, trained_line(config)):
        show(line)
    show_cost(Report(config.name, config, counted))
    flops = counted.training_flops_per_token * tokens
    show(
        f"{tokens:,} tokens to train on ({task.passes():.1f} times the training data), {flops:.3g} FLOPs on {backend.name}: "
        f"about {duration(flops / 50e9)} at 50 GFLOP/s"
    )
