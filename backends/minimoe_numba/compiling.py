"""How functions are compiled and kept on disk, and the word that a user gets about it."""

import hashlib
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from numba import njit
from numba.core.event import Listener, register

T = TypeVar("T")

FAST = {"reassoc", "contract", "nsz"}  # sums may be split over a vector's lanes; NaN and infinity stay what they are
compiled = njit(error_model="numpy", fastmath=FAST, no_cpython_wrapper=True, no_cfunc_wrapper=True, forceinline=True)
"""For functions that kernels call. Always inlined: a function of its own would be taken from the process that compiled it, optimised apart,
and from the kernel's file in later ones, optimised with the kernel; and the two round differently."""


def to_stderr(text: str) -> None:
    """Where nobody else listens."""
    print(f"minimoe: {text}", file=sys.stderr, flush=True)


class News:
    """What a user should know, told once a process to whoever listens."""

    def __init__(self) -> None:
        self.listener: Callable[[str], None] = to_stderr
        self.told: set[str] = set()

    def tell(self, text: str) -> None:
        if text not in self.told:
            self.told.add(text)
            self.listener(text)


news = News()


class _Watch(Listener):  # type: ignore[misc]
    """Numba tells when it compiles rather than loads."""

    def on_start(self, event: Any) -> None:
        news.tell("compiling kernels for this processor: once, for less than a minute")

    def on_end(self, event: Any) -> None:
        """Nothing to say."""


register("numba:compile", _Watch())


def kept(compile_it: Callable[[bool], T]) -> T:
    """compile_it(cache=True), or False where no folder can be written."""
    try:
        return compile_it(True)
    except RuntimeError as error:
        if "cannot cache" not in str(error):
            raise
    news.tell("no folder for compiled kernels can be written: each run compiles them anew (NUMBA_CACHE_DIR can name one)")
    return compile_it(False)


@cache
def stamp(*files: str) -> str:
    """Short for the text of files of this folder that compiled code is made from: Numba's cache looks at a function's own file alone."""
    return hashlib.sha256(b"".join((Path(__file__).parent / f"{name}.py").read_bytes() for name in files)).hexdigest()[:12]
