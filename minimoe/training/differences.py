"""What changed since a checkpoint was written or a run began: the configuration, the learning rate, the machine; a line for each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from minimoe.config import Config, TrainConfig, to_tables
from minimoe.training.optim import learning_rate

LAST_BITS = "from here on the numbers may differ in the last bits"
RATE_KEYS = ("steps", "lr", "min_lr", "warmup_steps", "schedule")
UNSET = "unset"


# ---- the configuration -----------------------------------------------------------------------------------------------------------


def configuration_differences(before: Config, now: Config) -> dict[str, str]:
    """Return a line for each key that differs, by the key: {"train.lr": "train.lr 0.003 -> 0.002"}."""
    old, new = flat(to_tables(before)), flat(to_tables(now))
    changed = [key for key in (*old, *(key for key in new if key not in old)) if old.get(key) != new.get(key)]
    return {key: f"{key} {shown(old, key)} -> {shown(new, key)}{_consequence(key, before)}" for key in changed}


def flat(table: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Return the values of a table and of those below it by their dotted key."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        found |= flat(value, f"{path}{key}.") if isinstance(value, dict) else {f"{path}{key}": value}
    return found


def shown(values: Mapping[str, Any], key: str) -> str:
    return _text(values[key]) if key in values else UNSET


def _text(value: Any) -> str:
    """Return a value as a message shows it: text without quotes, unless it has characters that break a line."""
    return value if isinstance(value, str) and value.isprintable() and value else json.dumps(value, default=str)


def _consequence(key: str, before: Config) -> str:
    if key == "train.optimizer":
        return f": the optimizer's state was made by {before.train.optimizer}"
    return f": {LAST_BITS}" if key == "train.backend" else ""


def rate_line(before: TrainConfig, now: TrainConfig, step: int) -> str | None:
    """Return what the learning rate does at the step where training goes on; None if no change of the configuration moves it."""
    changed = {key for key in RATE_KEYS if getattr(before, key) != getattr(now, key)}
    if now.schedule == "constant":
        changed -= {"steps", "min_lr"}
    if not changed or not 0 < step < now.steps:
        return None
    rates = f"learning rate: {learning_rate(step - 1, before):.4g} at step {step}, {learning_rate(step, now):.4g} at step {step + 1}"
    moved = "steps" in changed or before.schedule != now.schedule
    return f"{rates}; the {now.schedule} now ends at step {now.steps}" if moved and now.schedule != "constant" else rates


# ---- the machine -----------------------------------------------------------------------------------------------------------------


def machine_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return a line for each version, processor or number of threads after which equal bytes are no longer promised.

    before: env.json of the run's start; an older one lacks some fields, which are then not compared. now: the same fields here.
    """
    backend = str(now.get("backend"))
    fields = ["minimoe", "python", "numpy", "libc", "processor"]
    fields += ["numba"] if backend.startswith("numba") else []
    fields += ["threads"] if backend == "numpy" else []  # its BLAS may divide a sum by them; Numba's kernels do not
    pairs = [(name, before.get(name), now.get(name)) for name in fields]
    old_blas, new_blas = _libraries(before), _libraries(now)
    if not set(old_blas) & set(new_blas):  # a process may load more libraries than it uses
        pairs.append(("blas", ", ".join(old_blas), ", ".join(new_blas)))
    return [f"{name} {_text(old)} -> {_text(new)}: {LAST_BITS}" for name, old, new in pairs if old and new and old != new]


def _libraries(environment: Mapping[str, Any]) -> list[str]:
    """Return the BLAS libraries of a process by name and version."""
    given = environment.get("blas")
    entries = [entry for entry in given if isinstance(entry, dict)] if isinstance(given, list) else []
    return [f"{entry.get('name')} {entry.get('version')}" for entry in entries]
