"""Compiles a Numba-CUDA kernel by NVIDIA's compilers, without a card or a driver: registers, spills, local memory, instructions.

Numba-CUDA makes PTX with libNVVM, the same that the machine executes, and nvJitLink makes machine code of it, as on a card. It needs the
wheels `nvidia-nvvm`, `nvidia-nvjitlink` and `cuda-bindings`.
"""

from typing import Any

from .assembled import ENTRY, Made
from .numba_on_ptx import compile_ptx

ARCHITECTURES = {"sm_80": (8, 0), "sm_90a": (9, 0, "a")}


def compile_for(kernel: Any, kinds: tuple[Any, ...], architecture: str) -> Made:
    """A kernel for the argument types `kinds`, which are Numba's. Raises RuntimeError with the linker's message if it rejects the code."""
    ptx = compile_ptx(kernel.py_func, kinds, capability=ARCHITECTURES[architecture])
    words = assemble(ptx, architecture)
    ((name, stack, stores, loads, registers),) = ENTRY.findall(words)
    return Made(name, int(stack), int(stores) + int(loads), int(registers), ptx)


def assemble(ptx: str, architecture: str) -> str:
    """Assembles PTX.   -> the assembler's log"""
    from cuda.bindings import nvjitlink

    options, code = [f"-arch={architecture}", "-Xptxas=-v"], ptx.encode()
    linker = nvjitlink.create(len(options), options)
    try:
        nvjitlink.add_data(linker, nvjitlink.InputType.PTX, code, len(code), "kernel")
        nvjitlink.complete(linker)
        return _text(nvjitlink.get_info_log_size, nvjitlink.get_info_log, linker)
    except nvjitlink.nvJitLinkError as error:
        raise RuntimeError(f"{architecture}: {_text(nvjitlink.get_error_log_size, nvjitlink.get_error_log, linker)}") from error
    finally:
        nvjitlink.destroy(linker)


def _text(size_of: Any, read: Any, linker: int) -> str:
    log = bytearray(size_of(linker))
    read(linker, log)
    return log.decode(errors="replace").strip("\0 \n")
