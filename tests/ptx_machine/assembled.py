"""What NVIDIA's assembler says of each kernel of a `.cu` file: registers, spills, local memory; and the PTX that it was given.

NVRTC calls the assembler, ptxas, for a real architecture (`sm_90a`), without a card or a driver.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ptx_machine.nvrtc import STANDARD, Program, loaded, newest

OPTIONS = (STANDARD, "--ptxas-options=-v", "--ptxas-options=-warn-lmem-usage")
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


def compile_for(path: Path, names: Sequence[str], architecture: str, library: Path | None = None) -> dict[str, Made]:
    """The kernels of a `.cu` file by their C++ names, made by the newest compiler that is installed, or by `library`.

    Raises RuntimeError with the compiler's message if it rejects them.
    """
    compiled = loaded(library or newest()).compile(Program.of(path, names), (f"--gpu-architecture={architecture}", *OPTIONS))
    bodies = dict(re.findall(r"\.entry (\w+)\(.*?\)(.*?^\})", compiled.ptx, re.S | re.M))
    found = {entry[0]: entry for entry in ENTRY.findall(compiled.log)}
    made = {}
    for name, lowered in compiled.lowered.items():
        _, stack, stores, loads, registers = found[lowered]
        remarks = tuple(line for line in compiled.log.splitlines() if "Potential Performance Loss" in line and lowered in line)
        made[name] = Made(lowered, int(stack), int(stores) + int(loads), int(registers), bodies[lowered], remarks)
    return made
