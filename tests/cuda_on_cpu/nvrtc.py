"""Compiles a `.cu` file by NVIDIA's compiler, without a card or a driver, and reports registers, spills, local memory, instructions.

It needs the wheels `nvidia-cuda-nvrtc` and `cuda-bindings`.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ARCHITECTURES = ("sm_80", "sm_90a")
OPTIONS = ("-std=c++17", "--ptxas-options=-v", "--ptxas-options=-warn-lmem-usage")
ENTRY = re.compile(
    r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
    re.S,
)


class Made(NamedTuple):
    """The facts about one compiled kernel."""

    name: str  # mangled
    stack: int  # bytes of local memory
    spilled: int  # bytes stored to and loaded from local memory, for lack of registers
    registers: int
    ptx: str
    remarks: tuple[str, ...] = ()  # of the assembler, about products that it serialised


def compile_for(path: Path, names: Sequence[str], architecture: str, more: Sequence[str] = ()) -> dict[str, Made]:
    """The kernels of a `.cu` file by their C++ names. Raises RuntimeError with the compiler's message if it rejects them."""
    from cuda.bindings import nvrtc

    options = [f"--gpu-architecture={architecture}", f"-I{path.parent}", *OPTIONS, *more]
    _, program = nvrtc.nvrtcCreateProgram(path.read_bytes(), path.name.encode(), 0, [], [])
    try:
        for name in names:
            nvrtc.nvrtcAddNameExpression(program, name.encode())
        (result,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        words = _text(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program)
        if int(result):
            raise RuntimeError(f"{path.name} for {architecture}: {words}")
        ptx = _text(nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX, program)
        bodies = dict(re.findall(r"\.entry (\w+)\(.*?\)(.*?^\})", ptx, re.S | re.M))
        found = {entry[0]: entry for entry in ENTRY.findall(words)}
        made = {}
        for name in names:
            lowered = nvrtc.nvrtcGetLoweredName(program, name.encode())[1].decode()
            _, stack, stores, loads, registers = found[lowered]
            remarks = tuple(line for line in words.splitlines() if "Potential Performance Loss" in line and lowered in line)
            made[name] = Made(lowered, int(stack), int(stores) + int(loads), int(registers), bodies[lowered], remarks)
        return made
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _text(size_of: object, read: object, program: object) -> str:
    _, size = size_of(program)  # type: ignore[operator]
    text = b" " * size
    read(program, text)  # type: ignore[operator]
    return text.decode(errors="replace").strip("\0 \n")
