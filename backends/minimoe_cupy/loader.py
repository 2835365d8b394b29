"""Loads kernels: a `Source` names a CUDA C file and the kernels to compile from it, and a `Loader` compiles it.

On a card the loader is NVRTC through CuPy (`CupyLoader`); the tests compile the same files with g++ and run them on the processor.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeAlias, TypeVar

from minimoe_cupy.cubins import kept_cubin
from minimoe_cupy.device import current_architecture, current_device

KERNELS = Path(__file__).parent / "kernels"
T = TypeVar("T")

Launch: TypeAlias = Callable[..., None]
"""A compiled kernel: (grid, block, args, shared_mem=0), sizes as tuples."""


@dataclass(frozen=True)
class Source:
    """A `.cu` file of `kernels/` and the kernels to compile from it, by C++ name (`combine<float, 2, 4>`), for any architecture or one."""

    file: str
    names: tuple[str, ...]
    architecture: str | None = None

    @property
    def path(self) -> Path:
        return KERNELS / self.file


class Loader(Protocol):
    """Compiles the kernels of a source."""

    def __call__(self, path: Path, names: Sequence[str], architecture: str | None = None) -> Callable[[str], Launch]:
        """Returns a function that returns the launcher of each of those names."""


class CupyLoader:
    """NVRTC, for the device that is current at a launch. The machine code is cached on disk (`cubins.py`), and CuPy loads it from there.

    A process may have cards of several architectures: each has its own machine code, modules, functions and settings of functions.
    """

    def __init__(self) -> None:
        self.listener: Callable[[str], None] = to_stderr  # is told once for each architecture that kernels are being compiled
        self.announced: set[str] = set()

    def __call__(self, path: Path, names: Sequence[str], architecture: str | None = None) -> Callable[[str], Launch]:
        module = PerDevice(partial(self._load, path, names, architecture))
        module.here()

        def launcher(name: str) -> Launch:
            functions = PerDevice(lambda: module.here().function(name))

            def launch(grid: tuple[int, ...], block: tuple[int, ...], args: Sequence[Any], shared_mem: int = 0) -> None:
                functions.here().launch(grid, block, args, shared_mem)

            return launch

        return launcher

    def _load(self, path: Path, names: Sequence[str], architecture: str | None) -> "Module":
        """Returns the kernels of a source for the current device."""
        import cupy

        target = architecture or current_architecture()
        cubin = kept_cubin(cupy.cuda.nvrtc, path, names, target, partial(self._tell, target))
        return Module(cupy.RawModule(path=str(cubin.path)), cubin.lowered)

    def _tell(self, target: str) -> None:
        if target not in self.announced:
            self.announced.add(target)
            self.listener("compiling kernels for this card: once, for a minute or so")


class PerDevice(Generic[T]):
    """What is made anew for each device, when it is first asked for there."""

    def __init__(self, make: Callable[[], T]) -> None:
        self.make = make
        self.made: dict[int, T] = {}

    def here(self) -> T:
        """Returns what the current device has."""
        device = current_device()
        if device not in self.made:
            self.made[device] = self.make()
        return self.made[device]


class Module(NamedTuple):
    """Machine code that is loaded on one device, and the names of its kernels."""

    loaded: Any
    lowered: dict[str, str]

    def function(self, name: str) -> "Function":
        return Function(self.loaded.get_function(self.lowered[name]))


class Function:
    """A kernel on one device, and how much shared memory its launches may ask for there."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self.allowed = function.max_dynamic_shared_size_bytes  # at first 48 KB less the kernel's static shared memory

    def launch(self, grid: tuple[int, ...], block: tuple[int, ...], args: Sequence[Any], shared_mem: int) -> None:
        if shared_mem > self.allowed:
            self.function.max_dynamic_shared_size_bytes = self.allowed = shared_mem
        self.function(grid, block, tuple(args), shared_mem=shared_mem)


def to_stderr(text: str) -> None:
    """Prints to standard error; the default listener."""
    print(f"minimoe: {text}", file=sys.stderr, flush=True)
