"""Data as they are given on the command line: SRC, or several, each with =WEIGHT."""

from collections.abc import Sequence
from typing import TypeAlias

from msgspec.structs import replace

from minimoe.config.data_names import split_weight
from minimoe.config.tables import DataConfig, SourceConfig
from minimoe.errors import ConfigError

Sources: TypeAlias = str | Sequence[str]
"""SRC, or several, each perhaps with =WEIGHT."""


def with_sources(data: DataConfig, given: Sources) -> DataConfig:
    """Return the table [data] with these sources in place of its own. Raises `ConfigError` for a weight that is none."""
    names = [given] if isinstance(given, str) else list(given)
    if not names:
        return data
    parts = [split_weight(name) for name in names]
    for source, weight in parts:
        if weight is not None and not weight > 0.0:
            raise ConfigError(f"--data {source}={weight:g}: a weight must be above 0: it is the share of windows drawn from the source")
    if len(parts) == 1:
        if parts[0][1] is not None:
            raise ConfigError(f"--data {names[0]}: a single source needs no weight: leave out ={parts[0][1]:g}, or give a second --data")
        return replace(data, source=parts[0][0], sources=())
    return replace(data, sources=tuple(SourceConfig(source=source, weight=weight) for source, weight in parts))
