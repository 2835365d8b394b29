"""Experts that died, and what to do about it: the remedies that docs/losses-and-collapse.md measured and that made the load even.

An expert is dead if its load is below 1 / (20 E) on average over the last 10 steps: a twentieth of an even share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from minimoe.config import Config, MoEConfig, apply_override, config_from_tables, to_tables
from minimoe.errors import ConfigError

LAST = 10  # steps at the end over which the load is averaged
DEAD = 20  # an expert with a load below 1 / (20 E) is dead


class Remedy(NamedTuple):
    """Keys that make the load even, what they turn on, and for which configurations they are new."""

    keys: tuple[str, ...]
    what: str
    is_new: Callable[[MoEConfig], bool]


REMEDIES = (
    Remedy(
        ("moe.aux_loss_coef=0.05",), "a balance loss",
        lambda moe: moe.router not in ("noisy_topk", "sigmoid_bias", "expert_choice") and (moe.aux_loss_coef or 0.0) < 0.05,
    ),
    Remedy(
        ("moe.router=sigmoid_bias", "moe.bias_rate=0.02"), "bias updates",
        lambda moe: moe.router != "sigmoid_bias" or moe.bias_rate < 0.02,
    ),
    Remedy(
        ("moe.router=noisy_topk", "moe.aux_loss_coef=0.1"), "noise with its losses",
        lambda moe: moe.router != "noisy_topk" or (moe.aux_loss_coef or 0.0) < 0.1,
    ),
)  # fmt: skip


def count_dead(load: npt.NDArray[Any]) -> int:
    """Return how many experts are dead, over all layers.   load [L,E]: the mean over the last steps"""
    return int((load < 1 / (DEAD * load.shape[1])).sum())


def remedies(config: Config) -> list[Remedy]:
    """Return the remedies that a configuration does not have yet and can be trained with."""
    moe = config.model.moe
    return [] if moe is None else [remedy for remedy in REMEDIES if remedy.is_new(moe) and _can_be_trained(config, remedy)]


def _can_be_trained(config: Config, remedy: Remedy) -> bool:
    tables = to_tables(config)
    for key in remedy.keys:
        apply_override(tables, key)
    try:
        config_from_tables(tables, config.name).check_trainable()
    except ConfigError:
        return False
    return True


def remedies_text(config: Config, rows: list[dict[str, Any]]) -> Iterator[str]:
    """Say, if experts are dead at the end of a run, how many, and what to set. `rows`: its metrics."""
    last = [row["expert_load"] for row in rows[-LAST:]]
    if not last or not last[-1]:
        return
    load = np.array(last, dtype=float).mean(axis=0)  # [L,E]; NaN where it is not known
    dead, found = count_dead(load), remedies(config)
    if not dead:
        return
    yield f"dead experts: {dead} of {load.size} had less than 1/{DEAD} of an even share in the last {len(last)} steps"
    if found:
        options = [" ".join(f"--set {key}" for key in remedy.keys) for remedy in found]
        width = max(map(len, options))
        yield "what helps, in a new run (docs/losses-and-collapse.md):"
        yield from (f"  {option:{width}}  {remedy.what}" for option, remedy in zip(options, found, strict=True))
