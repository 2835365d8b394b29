"""Compiles kernels to machine code, as a card would get it: CUDA C by NVRTC, Numba's PTX by nvJitLink. Neither needs a card.

ptxas, which both contain, says how many registers and how much shared and local memory a kernel has.
"""

import re
import struct
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks.sass.flow import Instruction
from benchmarks.sass.listing import disassemble
from minimoe_cupy.cubins import OPTIONS
from minimoe_cupy.loader import Source
from tests.ptx_machine.nvrtc import Nvrtc, Program, installed, loaded

ENTRY = re.compile(r"Compiling entry function '(\w+)'(.*?)Used (\d+) registers", re.S)
MEMORY = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
SYSTEM_PART = {"sm_90a": 1024}  # bytes of a kernel's section of shared memory that are the system's
CAPABILITIES = {"sm_80": (8, 0), "sm_90a": (9, 0, "a")}


@dataclass(frozen=True)
class Built:
    """One kernel as machine code for one architecture."""

    lowered: str  # its name there
    registers: int
    shared: int  # bytes that it declares; a launch may ask for more
    stack: int  # bytes of local memory
    spilled: int  # bytes stored to and loaded from local memory for lack of registers
    code: tuple[Instruction, ...]
    ptx: str  # of the whole source


def compiler() -> Nvrtc:
    """The newest NVRTC that is installed. Raises RuntimeError without one."""
    if not installed():
        raise RuntimeError("NVRTC is needed to compile CUDA C: pip install nvidia-cuda-nvrtc")
    return loaded(installed()[0])


def build(source: Source, names: Sequence[str], architecture: str) -> dict[str, Built]:
    """Some kernels of a `.cu` file, by their C++ names. Raises RuntimeError with the compiler's message."""
    options = [f"--gpu-architecture={architecture}", *OPTIONS, "--ptxas-options=-v"]
    made = compiler().compile(Program.of(source.path, names), options)
    found = {built.lowered: built for built in facts(made.cubin, made.log, made.ptx, architecture)}
    return {name: found[made.lowered[name]] for name in names}


def assemble(ptx: str, architecture: str) -> Built:
    """PTX with one kernel in it. Raises RuntimeError with the assembler's message."""
    from cuda.bindings import nvjitlink

    options, code = [f"-arch={architecture}", "-Xptxas=-v"], ptx.encode()
    linker = nvjitlink.create(len(options), options)
    try:
        nvjitlink.add_data(linker, nvjitlink.InputType.PTX, code, len(code), "kernel")
        nvjitlink.complete(linker)
        log, cubin = bytearray(nvjitlink.get_info_log_size(linker)), bytearray(nvjitlink.get_linked_cubin_size(linker))
        nvjitlink.get_info_log(linker, log)
        nvjitlink.get_linked_cubin(linker, cubin)
        (found,) = facts(bytes(cubin), log.decode(errors="replace"), ptx, architecture)
        return found
    except nvjitlink.nvJitLinkError as error:
        log = bytearray(nvjitlink.get_error_log_size(linker))
        nvjitlink.get_error_log(linker, log)
        raise RuntimeError(f"{architecture}: {log.decode(errors='replace')}") from error
    finally:
        nvjitlink.destroy(linker)


@cache
def numba_ptx(function: Any, kinds: tuple[Any, ...], architecture: str) -> str:
    """The PTX that Numba-CUDA and NVVM make of a kernel for arguments of those types, which are Numba's."""
    from numba import cuda
    from numba.cuda import dispatcher, types

    capability = CAPABILITIES[architecture]
    # functions of the device that a kernel calls are compiled for "the current device", of which there is none
    dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=capability)
    fast = bool(function.targetoptions.get("fastmath"))
    ptx, _ = cuda.compile(function.py_func, types.void(*kinds), device=False, fastmath=fast, cc=capability, abi="numba")
    return str(ptx)


def facts(cubin: bytes, log: str, ptx: str, architecture: str) -> list[Built]:
    """The kernels of a file of machine code."""
    with tempfile.TemporaryDirectory(prefix="minimoe-sass-") as folder:
        file = Path(folder) / "kernels.cubin"
        file.write_bytes(cubin)
        code = disassemble(file)
    found = []
    sizes = sections(cubin)
    for name, before, registers in ENTRY.findall(log):
        memory = MEMORY.search(before)
        stack, stores, loads = map(int, memory.groups()) if memory else (0, 0, 0)
        # from the section: ptxas's report leaves out arrays outside of kernels, as Numba declares them
        shared = max(0, sizes.get(f".nv.shared.{name}", 0) - SYSTEM_PART.get(architecture, 0))
        found.append(Built(name, int(registers), shared, stack, stores + loads, tuple(code[name]), ptx))
    return found


def sections(elf: bytes) -> dict[str, int]:
    """The sizes of the sections of an ELF file of 64 bits, which machine code is in, by name."""
    (first,), (size, count, names) = struct.unpack_from("<Q", elf, 0x28), struct.unpack_from("<HHH", elf, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", elf, first + size * i) for i in range(count)]  # name, type, flags, address, offset, size
    texts = headers[names][4]
    return {elf[texts + name : elf.index(b"\0", texts + name)].decode(): length for name, _, _, _, _, length in headers}
