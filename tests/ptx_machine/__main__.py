"""Runs one kernel on the machine and shows what a warp does, or what the launch cost.

    python -m tests.ptx_machine backends/minimoe_cupy/kernels/combine.cu                                # lists its kernels and parameters
    python -m tests.ptx_machine backends/minimoe_cupy/kernels/combine.cu 'combine<float, 2, 1>' width=2 --trace
    python -m tests.ptx_machine kernel.cu 'scale<float>' x=float32[64] factor=2 --block 64 --count

Each parameter has a value: an array by its dtype and shape, which holds 0, 1, 2, .. (`x=float32[8,4]`), one of zeros (`x=float32[8,4]:0`),
or a number. What is not given is guessed: an array of 1024, a number of 8.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "backends")]  # as pytest has it

from minimoe_cupy.launch import Parameter, parameters  # noqa: E402
from minimoe_cupy.loader import Source  # noqa: E402

from .machine import Fault, Module  # noqa: E402
from .nvrtc import compile_ptx  # noqa: E402

ARRAY = re.compile(r"(\w+)\[([\d,\s]*)\](?::(\d+))?")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.ptx_machine", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="a .cu file")
    parser.add_argument("kernel", nargs="?", help="its C++ name, with template arguments; without one, the file's kernels are listed")
    parser.add_argument("values", nargs="*", metavar="NAME=VALUE", help="values of parameters")
    parser.add_argument("--grid", default="1", help="blocks, such as 4 or 4,2 (default 1)")
    parser.add_argument("--block", default="32", help="threads of a block, such as 128 or 16,8 (default 32)")
    parser.add_argument("--shared", type=int, default=0, help="bytes of dynamic shared memory")
    parser.add_argument("--arch", default="sm_90a", help="architecture to compile for (default sm_90a)")
    parser.add_argument("--seed", type=int, default=0, help="of a random schedule; 0: in order")
    parser.add_argument("--trace", action="store_true", help="show each instruction of a warp and what it writes, a value for each lane")
    parser.add_argument("--warp", default="0:0", metavar="BLOCK:WARP", help="which warp to trace (default 0:0)")
    parser.add_argument("--count", action="store_true", help="show instructions, sectors, bank conflicts, bytes")
    given = parser.parse_args(argv)
    try:
        return run(given)
    except (Fault, LookupError, ValueError, OSError, RuntimeError) as error:
        print(f"{given.file.name}: {error}", file=sys.stderr)
        return 2


def run(given: argparse.Namespace) -> int:
    if given.kernel is None:
        return show_kernels(given.file)
    source = Source(str(given.file.resolve()), (given.kernel,))
    declared = parameters(source, given.kernel)
    arguments = values_of(declared, given.values)
    ptx, lowered = compile_ptx(given.file, [given.kernel], given.arch)
    show = print if given.trace else None
    grid, block = ([int(size) for size in text.split(",")] for text in (given.grid, given.block))
    number, warp = (int(part) for part in given.warp.split(":"))
    blocks, warps = prod(grid), -(-prod(block) // 32)
    if given.trace and not (number < blocks and warp < warps):
        raise ValueError(f"--warp {given.warp}: the launch has {blocks} blocks of {warps} warps, which count from 0")
    counters = Module(ptx).launch(
        lowered[given.kernel], grid, block, list(arguments.values()), given.shared, given.seed, count=given.count, trace=show,
        traced=(number, warp), title=given.kernel, names=list(arguments),
    )  # fmt: skip
    for name, value in arguments.items():
        if isinstance(value, np.ndarray):
            print(f"{name} = {np.array2string(value.reshape(-1)[:16].astype(np.float64), max_line_width=100, threshold=16)}")
    if given.count:
        for name, count in counters.items():
            print(f"{count:12,}  {name.replace('_', ' ')}")
    return 0


def show_kernels(path: Path) -> int:
    """Print the declarations of a file."""
    bounds = r"(?:\s+__launch_bounds__\([^)]*\))?"
    declared = rf"(template\s*<[^>]*>\s*)?__global__\s+void{bounds}\s+(\w+)\s*\(([^)]*)\)"
    found = re.findall(declared, path.read_text(encoding="utf-8"))
    for template, name, listed in found:
        print(f"{name}{template.replace('template', '').strip()}({' '.join(listed.split())})")
    if not found:
        raise LookupError("it has no kernel")
    return 0


def values_of(declared: Sequence[Parameter], given: Sequence[str]) -> dict[str, Any]:
    """Return a value for each parameter, in order. Raises ValueError for one that cannot be read or is not declared."""
    texts = dict(text.partition("=")[::2] for text in given)
    unknown = texts.keys() - {parameter.name for parameter in declared}
    if unknown:
        names = ", ".join(parameter.name for parameter in declared)
        raise ValueError(f"no parameter {', '.join(sorted(unknown))}: it has {names}")
    return {parameter.name: value_of(parameter, texts.get(parameter.name)) for parameter in declared}


def value_of(parameter: Parameter, text: str | None) -> Any:
    if not parameter.pointer:
        return parameter.dtype.type(text if text is not None else 8)
    match = ARRAY.fullmatch(text or f"{parameter.dtype}[1024]")
    if match is None:
        raise ValueError(f"{parameter.name}={text}: wanted an array, such as {parameter.dtype}[8,4]")
    shape = [int(size) for size in match[2].split(",") if size.strip()]
    if match[1] != str(parameter.dtype):
        raise ValueError(f"{parameter.name} is an array of {parameter.dtype}, not {match[1]}")
    count = int(np.prod(shape))
    filled = np.full(count, int(match[3])) if match[3] else np.arange(count)
    return filled.astype(parameter.dtype).reshape(shape)


if __name__ == "__main__":
    sys.exit(main())
