"""What other packages add: entries of the tables of routers and optimizers, their settings with defaults, and backends.

A package adds a router through the entry-point group `minimoe.routers` and an optimizer through `minimoe.optimizers`. An entry names
the object, or a function without arguments that returns it. Nothing is imported before its name is used.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from minimoe.errors import ConfigError, nearest, with_toml

Value: TypeAlias = bool | int | float | str

BACKENDS = {"cupy": "minimoe_cupy", "numba-cuda": "minimoe_numba_cuda", "numba": "minimoe_numba", "numpy": "minimoe_numpy"}
"""The backends that come with minimoe, in the order in which `auto` tries them."""


class UnknownName(ConfigError):
    """Raised for a router or an optimizer that neither minimoe nor an installed package has."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        super().__init__(f"no {kind} {name!r}{nearest(name, known)}")
        self.kind, self.name, self.known = kind, name, list(known)


@dataclass(frozen=True)
class Option:
    """A setting of a router or an optimizer from another package. Its type is that of its default."""

    default: Value
    meaning: str = ""
    problem: Callable[[Any], str | None] = lambda value: None
    """Returns what is wrong with a value ("must be above 0"), or None."""


def resolve_options(options: Mapping[str, Option], given: Mapping[str, Value], path: str, owner: str) -> dict[str, Value]:
    """Return every option with its value, given or default. Raises ConfigError for an unknown name, a wrong type or an impossible value.

    `path` and `owner` are for the message: "moe.options", and "moe.router = 'switch'".
    """
    for name in given:
        if not options:
            raise ConfigError(f"{path}.{name}: {owner} has no options")
        if name not in options:
            raise ConfigError(f"{path}.{name}: unknown key{nearest(name, options)}")
    values = {}
    for name, option in options.items():
        value, kind = given.get(name, option.default), type(option.default)
        if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
            if not abs(value) <= sys.float_info.max:  # NaN, infinity, and an integer that no float holds
                raise ConfigError(f"{path}.{name} ({str(value)[:40]}) must be a finite number")
            value = float(value)
        if type(value) is not kind:
            raise ConfigError(f"{path}.{name}: {with_toml(f'expected {kind.__name__}, got {type(value).__name__}', value)}")
        problem = option.problem(value)
        if problem is not None:
            raise ConfigError(f"{path}.{name} ({value}) {problem}")
        values[name] = value
    return values


def backend_names() -> list[str]:
    """Return the names of all known backends, whether or not they run here: minimoe's, then those of installed packages."""
    from importlib.util import find_spec

    return [name for name, module in BACKENDS.items() if find_spec(module)] + sorted(set(outside_names("minimoe.backends")) - set(BACKENDS))


def outside_names(group: str) -> list[str]:
    """Return the names that installed packages add to a group of entry points."""
    from importlib.metadata import entry_points

    return sorted(entry_points(group=group).names)


def load_outside(kind: type[Any], group: str, name: str, built_in: Iterable[str]) -> Any:
    """Return the object of that name from an installed package.

    Raises UnknownName if no package has the name, ConfigError if several have it, or if its object does not load or is not of that kind.
    """
    from importlib.metadata import entry_points

    what = kind.__name__.lower()
    entries = list(entry_points(group=group, name=name))
    if not entries:
        raise UnknownName(what, name, [*built_in, *outside_names(group)])
    if len({entry.value for entry in entries}) > 1:
        packages = ", ".join(sorted(entry.dist.name for entry in entries if entry.dist is not None))
        raise ConfigError(f"{what} {name!r} comes from several packages ({packages}): uninstall all but one")
    try:
        found = entries[0].load()
        found = found if isinstance(found, kind) else found()
    except (Exception, SystemExit) as error:  # another package may raise anything
        raise ConfigError(f"{what} {name!r} ({entries[0].value}) does not load: {type(error).__name__}: {error}") from error
    if not isinstance(found, kind) or found.name != name:
        given = f"the {kind.__name__} {found.name!r}" if isinstance(found, kind) else repr(found)
        raise ConfigError(f"{what} {name!r} ({entries[0].value}) is {given}: expected minimoe's {kind.__name__} of that name")
    return found
