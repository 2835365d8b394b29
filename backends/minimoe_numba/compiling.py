"""Compiles functions and keeps them on disk."""

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from numba import njit
from numba.core.caching import NullCache
from numba.core.ccallback import CFunc
from numba.core.event import Listener, register
from numba.core.sigutils import normalize_signature

from minimoe_numba.codegen import optimised_names
from minimoe_numba.disk_cache import cache_for
from minimoe_numba.helpers import wait_for
from minimoe_numba.news import COMPILING, news

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


def function_of(function: Callable[..., Any], signature: Any, **options: Any) -> Any:
    """Compile a function for one signature, or load it.   -> a callable"""
    made = njit(**options)(function)
    made._cache = cache_for(function)
    made.compile(signature)
    made.disable_compile()
    return made


def callback_of(function: Callable[..., Any], signature: Any, **options: Any) -> Any:
    """Compile a function as one of C, or load it. Its address is the attribute `address`."""
    made: Any = CFunc(function, normalize_signature(signature), locals={}, options=options)
    made._cache = cache_for(function)
    made.compile()
    return made


def is_cached(function: Callable[..., Any], signature: Any) -> bool:
    """True if the cache has this function, or if there is none."""
    cache = cache_for(function)
    return isinstance(cache, NullCache) or cache.holds(signature)


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
