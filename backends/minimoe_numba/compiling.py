"""Compiles functions and keeps them on disk."""

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from numba import njit
from numba.core.caching import FunctionCache
from numba.core.event import Listener, register
from numba.core.registry import cpu_target

from minimoe_numba.codegen import optimised_names
from minimoe_numba.helpers import wait_for
from minimoe_numba.news import COMPILING, news

T = TypeVar("T")

FAST = {"reassoc", "contract", "nsz"}  # sums may be split over the lanes of a vector; NaN and infinity keep their meaning
inlined = njit(error_model="numpy", fastmath=FAST, no_cpython_wrapper=True, no_cfunc_wrapper=True, forceinline=True)
"""Compiles a function that kernels call. It is always inlined: as a function of its own it would be taken from the process that compiled
it in a first run and from the kernel's file in later ones, and the two could round differently."""


def compiled(function: Callable[..., Any]) -> Any:
    """`inlined` for a function with a sum over a loop, or a polynomial, which is optimised by itself before it is inlined.

    LLVM reorders such float sums, and how it does so may depend on the code around them.
    """
    optimised_names.add(function.__qualname__)
    return inlined(function)


class _CompileListener(Listener):  # type: ignore[misc]
    """Numba raises this event when it compiles, and not when it loads from the cache."""

    def on_start(self, event: Any) -> None:
        news.tell(COMPILING)

    def on_end(self, event: Any) -> None:
        """Nothing is reported at the end."""


register("numba:compile", _CompileListener())


def cached(compile_it: Callable[[bool], T]) -> T:
    """compile_it(cache=True), or compile_it(False) where no cache folder is writable."""
    try:
        return compile_it(True)
    except RuntimeError as error:
        if "cannot cache" not in str(error):
            raise
    news.tell("no folder for compiled kernels can be written: each run compiles them anew (NUMBA_CACHE_DIR can name one)")
    return compile_it(False)


def is_cached(function: Callable[..., Any], signature: Any) -> bool:
    """True if the cache has this function, or if there is no way to tell."""
    try:
        cache = FunctionCache(function)
        return cache._index_key(signature, cpu_target.target_context.codegen()) in cache._cache_file._load_index()
    except (RuntimeError, OSError, AttributeError):  # no folder can be written, or another version of Numba
        return True


class Functions:
    """Functions that are compiled together, when they are first called for."""

    def __init__(self, name: str, parts: list[tuple[Callable[..., Any], Any]], make: Callable[[], Any]) -> None:
        """parts: each function with its signature. make: compiles them or loads them."""
        self.name, self.parts, self.make, self.held = name, parts, make, None

    def __call__(self) -> Any:
        if self.held is None:
            wait_for(self.name)
            self.held = self.make()
        return self.held

    compile = __call__

    def is_cached(self) -> bool:
        return all(is_cached(function, signature) for function, signature in self.parts)


@cache
def stamp(*files: str) -> str:
    """A short hash of the named files of this folder: Numba's cache checks only the file of the kernel, not those that it imports from."""
    return hashlib.sha256(b"".join((Path(__file__).parent / f"{name}.py").read_bytes() for name in files)).hexdigest()[:12]
