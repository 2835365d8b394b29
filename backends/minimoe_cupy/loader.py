"""Loads kernels: a `Source` names a CUDA C file and the kernels to compile from it, and a `Loader` compiles it.

On a card the loader is NVRTC through CuPy (`CupyLoader`); the tests compile the same files with g++ and run them on the processor.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from minimoe_cupy.cubins import kept_cubin

KERNELS = Path(__file__).parent / "kernels"

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
    """NVRTC, for the current device. The machine code is cached on disk (`cubins.py`), and CuPy loads it from there."""

    def __init__(self) -> None:
        self.listener: Callable[[str], None] = to_stderr  # is told once that kernels are being compiled
        self.announced = False

    def __call__(self, path: Path, names: Sequence[str], architecture: str | None = None) -> Callable[[str], Launch]:
        import cupy

        target = architecture or f"sm_{cupy.cuda.Device().compute_capability}"
        cubin = kept_cubin(cupy.cuda.nvrtc, path, names, target, self._tell)
        module = cupy.RawModule(path=str(cubin.path))

        def launcher(name: str) -> Launch:
            function = module.get_function(cubin.lowered[name])
            allowed = function.max_dynamic_shared_size_bytes  # at first 48 KB less the kernel's static shared memory

            def launch(grid: tuple[int, ...], block: tuple[int, ...], args: Sequence[Any], shared_mem: int = 0) -> None:
                nonlocal allowed
                if shared_mem > allowed:
                    function.max_dynamic_shared_size_bytes = allowed = shared_mem
                function(grid, block, tuple(args), shared_mem=shared_mem)

            return launch

        return launcher

    def _tell(self) -> None:
        if not self.announced:
            self.announced = True
            self.listener("compiling kernels for this card: once, for a minute or so")


def to_stderr(text: str) -> None:
    """Prints to standard error; the default listener."""
    print(f"minimoe: {text}", file=sys.stderr, flush=True)
