"""Chooses the examples that `backends check --quick` runs: as many as it takes to meet every value of every option, each at one size.

A backend that compiles each shape takes 20 to 100 ms for each operation of a new one. Options choose a kernel's branches, and sizes its
loops. Among examples with equal options the largest is taken, which has an odd size. Then an example is left out if earlier ones have met
each value of its options, even in other combinations ("each choice" coverage).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from minimoe.reference.gating import Rule
from minimoe.testing.conformance import Wide
from minimoe.testing.dense_examples import Example

MOST = 20_000  # numbers in an example; one with more is not taken for being the largest


def quick_examples(examples: Iterable[Example]) -> list[Example]:
    """Return examples that meet every value of an option, in their order."""
    chosen: dict[Any, Example] = {}
    for example in examples:
        key = options_of((*example.args, *example.options.items(), example.call is None))
        if key not in chosen or size(chosen[key]) < size(example) <= MOST:
            chosen[key] = example
    met: set[Any] = set()
    found = []
    for key, example in chosen.items():
        values = set(enumerate_options(key))
        if not values <= met:
            met |= values
            found.append(example)
    return found


def enumerate_options(key: Any, place: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], Any]]:
    """Yield each option with its place in nested tuples."""
    if isinstance(key, tuple):
        for i, item in enumerate(key):
            yield from enumerate_options(item, (*place, i))
    else:
        yield place, key


def options_of(value: Any) -> Any:
    """Return the part of an argument that is an option: not an array's shape and numbers, nor an integer, which is a size."""
    if isinstance(value, tuple):
        return tuple(options_of(item) for item in value)
    if isinstance(value, np.ndarray) and value.dtype == bool and not value.ndim:
        return bool(value)  # whether a step is taken
    if isinstance(value, np.ndarray | Wide):
        return "array"
    if isinstance(value, Rule):
        return value.router, value.norm, value.n_groups > 1
    if isinstance(value, bool | str | None):
        return value
    return type(value).__name__, isinstance(value, int | float) and value > 0


def size(example: Example) -> int:
    """Return how many numbers an example has, or draws."""
    return sum(_size(value) for value in (*example.args, *example.options.values()))


def _size(value: Any) -> int:
    if isinstance(value, tuple):
        return sum(_size(item) for item in value if not isinstance(item, int))
    return value if isinstance(value, int) else int(getattr(getattr(value, "array", value), "size", 0))
