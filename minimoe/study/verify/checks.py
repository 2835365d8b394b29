"""What a check of one thing finds, and how stored numbers are searched for those that are not finite."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from minimoe.pretrained.quantised import FLOAT8

PIECE = 1 << 22  # numbers that are searched at a time
FNUZ_NAN = 0x80  # the one code of float8's FNUZ formats that is NaN

Array = npt.NDArray[Any]
Tell = Callable[[str], None]
"""Called with what is being read, again and again while it takes."""


class Check(NamedTuple):
    """What was found about one thing. `state`: "ok", a "problem", or "skipped" where it cannot be checked here, which `text` explains."""

    what: str
    state: Literal["ok", "problem", "skipped"]
    text: str


def ok(what: str, text: str) -> Check:
    """Return the check of a thing that is whole."""
    return Check(what, "ok", text)


def problem(what: str, text: object) -> Check:
    """Return the check of a thing that is not."""
    return Check(what, "problem", " ".join(str(text).split()))


def skipped(what: str, text: object) -> Check:
    """Return the check of a thing that cannot be judged here."""
    return Check(what, "skipped", " ".join(str(text).split()))


def count_not_finite(array: Array, dtype: str = "", tell: Callable[[], None] = lambda: None) -> int:
    """Return how many numbers of an array are NaN or infinite. `dtype`: in safetensors' words, where NumPy lacks it.

    `tell` is called after each piece of a large array.
    """
    flat = array.reshape(-1)
    count = 0
    for start in range(0, flat.size, PIECE):
        piece = flat[start : start + PIECE]
        count += int(piece.size - np.count_nonzero(_finite(piece, dtype)))
        tell()
    return count


def _finite(piece: Array, dtype: str) -> Array:
    if dtype == "BF16":
        return piece & 0x7F80 != 0x7F80  # an exponent of all ones is inf or NaN
    if dtype in FLOAT8:
        return np.isfinite(FLOAT8[dtype])[piece]
    if dtype.endswith("FNUZ"):
        return piece != FNUZ_NAN
    return np.isfinite(piece)


def named(names: list[str], most: int = 3) -> str:
    """Return the first names, and how many there are besides."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def describe_not_finite(counts: dict[str, int]) -> Iterator[str]:
    """Yield a sentence for the tensors that hold numbers which are not finite: {name: how many}."""
    wrong = [f"{name} ({count:,})" for name, count in counts.items() if count]
    if wrong:
        yield f"numbers that are not finite in {named(wrong)}"
