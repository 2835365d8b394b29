"""Counts the machine instructions that a warp of bf16 attention executes for one tile that every query of the block sees, without a card.

    python -m benchmarks.attention_tiles --nvdisasm PATH [--nvrtc PATH ...] [--architecture sm_90a ...] [--width 128 ...]

Each kernel is compiled by NVRTC (`pip install nvidia-cuda-nvrtc`; or by others, given the paths of their libraries) and disassembled by
nvdisasm (`pip install nvidia-cuda-nvdisasm`). The loop over tiles is the innermost one with a barrier and products. The count is that of
the shortest way around it that leaves out no product (HMMA) and no copy (LDGSTS): it passes no mask, and rescales no sums.
"""

import argparse
import ctypes
import heapq
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from ctypes import byref, c_char_p, c_size_t, c_void_p
from importlib.metadata import files
from pathlib import Path
from typing import NamedTuple

from minimoe_cupy.attention import DKV, DQ, FORWARD, WIDTHS, Tiled
from minimoe_cupy.launch import BFLOAT16

OPTIONS = ("-std=c++17", "--ptxas-options=-v", "--ptxas-options=-warn-lmem-usage")
FACTS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers", re.S)
LABEL, INSTRUCTION = re.compile(r"^(\.L\w+):"), re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);")
TARGET = re.compile(r"`\((\.L\w+)\)")
NEEDED = ("HMMA", "LDGSTS")


class Count(NamedTuple):
    """One kernel, as one compiler makes it for one architecture."""

    instructions: int
    products: int
    registers: int
    spilled: int  # bytes, those of local memory included


class Program(NamedTuple):
    """The instructions of a kernel, by name, and where each may go on: the next one, the target of a jump, or both."""

    names: list[str]
    after: list[list[int]]


def count(kernel: Tiled, architecture: str, nvrtc: ctypes.CDLL, nvdisasm: str) -> Count:
    """Compiles and counts one kernel. Raises RuntimeError with the compiler's words if it rejects the source."""
    cubin, log = compiled(kernel.source.path, kernel.name, architecture, nvrtc)
    found = FACTS.search(log)
    assert found, log
    stack, stores, loads, registers = map(int, found.groups())
    program = disassembled(cubin, nvdisasm)
    way = around(program, *tile_loop(program))
    return Count(len(way), sum(program.names[i] == "HMMA" for i in way), registers, stack + stores + loads)


def compiled(path: Path, name: str, architecture: str, nvrtc: ctypes.CDLL) -> tuple[bytes, str]:
    """The machine code of a kernel, and what the compiler says of it."""
    program, size = c_void_p(), c_size_t()
    nvrtc.nvrtcCreateProgram(byref(program), path.read_bytes(), path.name.encode(), 0, None, None)
    nvrtc.nvrtcAddNameExpression(program, name.encode())
    options = [option.encode() for option in (f"--gpu-architecture={architecture}", f"-I{path.parent}", *OPTIONS)]
    failed = nvrtc.nvrtcCompileProgram(program, len(options), (c_char_p * len(options))(*options))
    nvrtc.nvrtcGetProgramLogSize(program, byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    if failed:
        raise RuntimeError(f"{path.name} for {architecture}: {log.value.decode()}")
    nvrtc.nvrtcGetCUBINSize(program, byref(size))
    cubin = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetCUBIN(program, cubin)
    nvrtc.nvrtcDestroyProgram(byref(program))
    return cubin.raw, log.value.decode()


def disassembled(cubin: bytes, nvdisasm: str) -> Program:
    """The program of the one kernel in a file of machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = subprocess.run([nvdisasm, "-c", file.name], capture_output=True, text=True, check=True).stdout
    labels: dict[str, int] = {}
    lines: list[tuple[str, str, str]] = []
    for line in listing.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(lines)
        elif instruction := INSTRUCTION.match(line):
            lines.append((instruction[1] or "", instruction[2].partition(".")[0], instruction[3]))
    after = []
    for i, (predicate, name, operands) in enumerate(lines):
        target = TARGET.search(operands) if name in ("BRA", "CALL") else None  # CALL.REL: a jump to a place in the kernel
        ends = name in ("EXIT", "RET") or target is not None
        after.append([*([labels[target[1]]] if target else []), *([i + 1] if predicate or not ends else [])])
    return Program([name for _, name, _ in lines], after)


def tile_loop(program: Program) -> tuple[int, int]:
    """The first and the last instruction of the loop over tiles."""
    backward = [(place, i) for i, places in enumerate(program.after) for place in places if place <= i]
    loops = [(first, last) for first, last in backward if {"BAR", "HMMA"} <= set(program.names[first : last + 1])]
    return min(loops, key=lambda loop: loop[1] - loop[0])


def around(program: Program, first: int, last: int) -> Sequence[int]:
    """The instructions of the shortest way from the first to the last that jumps over none of NEEDED."""
    before: dict[int, int] = {}
    waiting = [(1, first, -1)]
    while waiting:
        length, at, came_from = heapq.heappop(waiting)
        if at in before:
            continue
        before[at] = came_from
        if at == last:
            break
        for place in program.after[at]:
            if place > first and not set(NEEDED).intersection(program.names[at + 1 : place]):
                heapq.heappush(waiting, (length + 1, place, at))
    way = [last]
    while way[-1] != first:
        way.append(before[way[-1]])
    return way[::-1]


def load(path: Path) -> ctypes.CDLL:
    """An NVRTC by the path of its library, after the builtins beside it, which it looks for by name."""
    for builtins in path.parent.glob("libnvrtc-builtins.so*"):
        ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(path))


def version(nvrtc: ctypes.CDLL) -> str:
    major, minor = ctypes.c_int(), ctypes.c_int()
    nvrtc.nvrtcVersion(byref(major), byref(minor))
    return f"{major.value}.{minor.value}"


def installed() -> list[Path]:
    """The library of the NVRTC that is installed as a wheel."""
    found = [Path(str(file.locate())) for file in files("nvidia-cuda-nvrtc") or ()]
    return [path for path in found if re.fullmatch(r"libnvrtc\.so\.\d+", path.name)]


def report(nvrtcs: Iterable[Path], architectures: Sequence[str], widths: Sequence[int], nvdisasm: str) -> None:
    """Prints a row for each kernel."""
    print("| kernel | architecture | NVRTC | instructions | HMMA | registers | spilled, bytes | shared memory, bytes |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    libraries = [load(path) for path in nvrtcs]
    for kernels in (FORWARD, DQ, DKV):
        for kernel in (kernels[BFLOAT16, width] for width in widths):
            for architecture in architectures:
                for nvrtc in libraries:
                    made = count(kernel, architecture, nvrtc, nvdisasm)
                    row = (kernel.name, architecture, version(nvrtc), *made, kernel.shared)
                    print("|", " | ".join(map(str, row)), "|", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nvdisasm", default="nvdisasm", help="its path, unless it is on PATH")
    parser.add_argument("--nvrtc", type=Path, nargs="+", default=installed(), help="libraries; default: the one installed as a wheel")
    parser.add_argument("--architecture", nargs="+", default=["sm_80", "sm_90a"])
    parser.add_argument("--width", type=int, nargs="+", choices=WIDTHS, default=list(WIDTHS))
    options = parser.parse_args()
    report(options.nvrtc, options.architecture, options.width, os.fspath(options.nvdisasm))


if __name__ == "__main__":
    main()
