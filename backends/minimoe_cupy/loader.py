"""Where kernels come from: CUDA C files and the names of what to make of them, compiled by whoever can run the result.

On a card that is NVRTC through CuPy (`CupyLoader`); the tests compile the same files with g++ and run them on the processor.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

KERNELS = Path(__file__).parent / "kernels"
STATIC_LIMIT = 48 * 1024  # bytes of shared memory that a launch may have without being asked for

Launch: TypeAlias = Callable[..., None]
"""A compiled kernel: (grid, block, args, shared_mem=0), sizes as tuples."""


@dataclass(frozen=True)
class Source:
    """A `.cu` file of `kernels/` and the kernels wanted of it, by C++ name: `combine<float, 4>`; `architecture`: the only one it is for."""

    file: str
    names: tuple[str, ...]
    architecture: str | None = None

    @property
    def path(self) -> Path:
        return KERNELS / self.file


class Loader(Protocol):
    """Compiles the kernels of a source."""

    def __call__(self, path: Path, names: Sequence[str], architecture: str | None = None) -> Callable[[str], Launch]:
        """-> what gives the launcher of each of those names."""


def architecture_options(architecture: str | None) -> tuple[str, ...]:
    """What asks NVRTC for one architecture and no other."""
    return () if architecture is None else (f"-arch={architecture}",)


class CupyLoader:
    """NVRTC, for the current device; CuPy keeps the machine code on disk.

    CuPy asks for the device's plain architecture (`-arch=sm_90`) behind our options. NVRTC 13 makes one target of that and sm_90a, NVRTC 12
    refuses the second option: see `device.wgmma_wanted`.
    """

    def __call__(self, path: Path, names: Sequence[str], architecture: str | None = None) -> Callable[[str], Launch]:
        import cupy

        options = ("-std=c++17", f"-I{path.parent}", *architecture_options(architecture))
        module = cupy.RawModule(code=path.read_text(encoding="utf-8"), options=options, name_expressions=tuple(names))

        def launcher(name: str) -> Launch:
            function = module.get_function(name)

            def launch(grid: tuple[int, ...], block: tuple[int, ...], args: Sequence[Any], shared_mem: int = 0) -> None:
                if shared_mem > max(STATIC_LIMIT, function.max_dynamic_shared_size_bytes):
                    function.max_dynamic_shared_size_bytes = shared_mem
                function(grid, block, tuple(args), shared_mem=shared_mem)

            return launch

        return launcher
