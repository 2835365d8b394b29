"""NVRTC, NVIDIA's compiler of CUDA C, called in its library by ctypes: any number of versions in one process, without a card or a driver.

    ptx, lowered = compile_ptx(Path("combine.cu"), ["combine<float, 4>"], "sm_90a")     # PTX, and the kernel's name in it
    Nvrtc(Path(".../libnvrtc.so.12")).compile(source, ["--gpu-architecture=sm_80"])     # also machine code, and the compiler's words

`cuda.bindings` loads one version for each process, and only the one that it finds first. The functions are those of NVRTC's documentation
(https://docs.nvidia.com/cuda/nvrtc); every one that is called has its types in FUNCTIONS.
"""

import ctypes
import hashlib
import json
import os
import re
from collections.abc import Sequence
from ctypes import CDLL, POINTER, byref, c_char_p, c_int, c_size_t, c_void_p
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, NamedTuple

from .build import folder

WHEELS = ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12")  # CUDA 13 and newer, and CUDA 12
STANDARD = "-std=c++17"
FILE = re.compile(r'^(\s*\.file\s+\d+ ")[^"]*/', re.M)  # NVRTC puts the folder of the moment before the file names that it was given

SIZE, TEXTS = POINTER(c_size_t), POINTER(c_char_p)
FUNCTIONS: dict[str, tuple[Any, ...]] = {  # each returns 0, or the number of an error
    "nvrtcVersion": (POINTER(c_int), POINTER(c_int)),
    "nvrtcGetNumSupportedArchs": (POINTER(c_int),),
    "nvrtcGetSupportedArchs": (POINTER(c_int),),
    "nvrtcCreateProgram": (POINTER(c_void_p), c_char_p, c_char_p, c_int, TEXTS, TEXTS),
    "nvrtcAddNameExpression": (c_void_p, c_char_p),
    "nvrtcCompileProgram": (c_void_p, c_int, TEXTS),
    "nvrtcGetProgramLogSize": (c_void_p, SIZE),
    "nvrtcGetProgramLog": (c_void_p, c_char_p),
    "nvrtcGetPTXSize": (c_void_p, SIZE),
    "nvrtcGetPTX": (c_void_p, c_char_p),
    "nvrtcGetCUBINSize": (c_void_p, SIZE),
    "nvrtcGetCUBIN": (c_void_p, c_char_p),
    "nvrtcGetLoweredName": (c_void_p, c_char_p, POINTER(c_char_p)),
    "nvrtcDestroyProgram": (POINTER(c_void_p),),
}


class Program(NamedTuple):
    """A source, the headers that it includes by name, and the C++ names of its kernels (`combine<float, 4>`)."""

    file: str
    text: str
    headers: dict[str, str]
    names: tuple[str, ...]

    @classmethod
    def of(cls, path: Path, names: Sequence[str], include: Path | None = None) -> "Program":
        """A `.cu` file and all headers beside it, or in `include`, so that what is compiled does not depend on the folder."""
        headers = {header.name: header.read_text(encoding="utf-8") for header in sorted((include or path.parent).glob("*.*h"))}
        return cls(path.name, path.read_text(encoding="utf-8"), headers, tuple(names))


class Compiled(NamedTuple):
    """What NVRTC made of a program."""

    log: str  # warnings, and ptxas's report if it was asked for
    ptx: str
    cubin: bytes  # machine code; empty for a virtual architecture (`compute_90`), for which ptxas does not run
    lowered: dict[str, str]  # each kernel's mangled name, by its C++ name


class Nvrtc:
    """One version of the compiler, by the path of its library; the library of its built-in headers lies beside it."""

    def __init__(self, path: Path) -> None:
        # NVRTC asks for its builtins by file name alone, and has no search path of its own: the loader knows them once they are loaded.
        self.builtins = [CDLL(str(builtins)) for builtins in path.parent.glob("libnvrtc-builtins.so.*")]
        self.path, self.library = path, CDLL(str(path))
        for name, types in FUNCTIONS.items():
            getattr(self.library, name).argtypes = types
        self.library.nvrtcGetErrorString.argtypes, self.library.nvrtcGetErrorString.restype = [c_int], c_char_p

    @property
    def version(self) -> tuple[int, int]:
        """Such as (13, 0)."""
        major, minor = c_int(), c_int()
        self._call("nvrtcVersion", byref(major), byref(minor))
        return major.value, minor.value

    @property
    def architectures(self) -> list[int]:
        """The compute capabilities that it compiles for, times ten: 80, 86, and so on; 90 includes 90a."""
        number = c_int()
        self._call("nvrtcGetNumSupportedArchs", byref(number))
        found = (c_int * number.value)()
        self._call("nvrtcGetSupportedArchs", found)
        return list(found)

    def compile(self, program: Program, options: Sequence[str]) -> Compiled:
        """Compiles a program. Raises RuntimeError with the compiler's message if it rejects it."""
        handle = c_void_p()
        self._call(
            "nvrtcCreateProgram", byref(handle), program.text.encode(), program.file.encode(), len(program.headers),
            texts(program.headers.values()), texts(program.headers),
        )  # fmt: skip
        try:
            for name in program.names:
                self._call("nvrtcAddNameExpression", handle, name.encode())
            error = self.library.nvrtcCompileProgram(handle, len(options), texts(options))
            log = self._read("ProgramLog", handle).decode(errors="replace").strip("\0 \n")
            if error:
                version = ".".join(map(str, self.version))
                raise RuntimeError(f"NVRTC {version}: {program.file} with {' '.join(options)}: {self._said(error)}\n{log}")
            ptx = self._read("PTX", handle).decode().rstrip("\0")
            return Compiled(log, ptx, self._read("CUBIN", handle), {name: self._lowered(handle, name) for name in program.names})
        finally:
            self._call("nvrtcDestroyProgram", byref(handle))

    def _read(self, what: str, handle: c_void_p) -> bytes:
        size = c_size_t()
        self._call(f"nvrtcGet{what}Size", handle, byref(size))
        data = ctypes.create_string_buffer(max(1, size.value))
        if size.value:
            self._call(f"nvrtcGet{what}", handle, data)
        return data.raw[: size.value]

    def _lowered(self, handle: c_void_p, name: str) -> str:
        found = c_char_p()
        self._call("nvrtcGetLoweredName", handle, name.encode(), byref(found))
        return (found.value or b"").decode()

    def _call(self, function: str, *arguments: Any) -> None:
        error = getattr(self.library, function)(*arguments)
        if error:
            raise RuntimeError(f"{function} of {self.path.name}: {self._said(error)}")

    def _said(self, error: int) -> str:
        text: bytes = self.library.nvrtcGetErrorString(error)
        return text.decode()


def texts(values: Any) -> Any:
    """An array of C strings."""
    encoded = [value.encode() for value in values]
    return (c_char_p * len(encoded))(*encoded)


# ---- the installed compiler --------------------------------------------------------------------------------------------------------------


def installed() -> list[Path]:
    """The libraries of the installed wheels, the newest first; a release of CUDA 13 and one of CUDA 12 can be installed together."""
    return [path for wheel in WHEELS for path in libraries_of(wheel)]


def libraries_of(wheel: str) -> list[Path]:
    """The compiler's library in an installed wheel, wherever the wheel puts it; none if it is not installed."""
    try:
        files = distribution(wheel).files or []
    except PackageNotFoundError:
        return []
    return [Path(str(file.locate())).resolve() for file in files if file.name.startswith("libnvrtc.so.")]


def installed_release(wheel: str) -> str | None:
    """The release in an installed wheel, such as 13.0; None if it is not installed."""
    try:
        return ".".join(distribution(wheel).version.split(".")[:2])
    except PackageNotFoundError:
        return None


def newest() -> Path:
    """The newest compiler that is installed. Raises RuntimeError if there is none."""
    for library in installed():
        return library
    raise RuntimeError("NVRTC is needed to compile CUDA C: pip install nvidia-cuda-nvrtc")


@cache
def loaded(path: Path) -> Nvrtc:
    """The compiler at a path, loaded once."""
    return Nvrtc(path)


# ---- PTX, kept on disk -------------------------------------------------------------------------------------------------------------------


def compile_ptx(
    path: Path, names: Sequence[str], architecture: str, lineinfo: bool = True, library: Path | None = None, include: Path | None = None
) -> tuple[str, dict[str, str]]:
    """The PTX of a `.cu` file for an architecture (`sm_90a` or `compute_90a`), and the kernels' names in it, by C++ name.

    With `lineinfo` the PTX names the line of each instruction (`.loc`). It is kept on disk, by sources, options and compiler.
    library: the compiler; by default the newest that is installed. Raises RuntimeError without one, and if it rejects the source.
    """
    library = library or newest()
    nvrtc, program = loaded(library), Program.of(path, names, include)
    options = (f"--gpu-architecture={architecture.replace('sm_', 'compute_')}", STANDARD, *(("-lineinfo",) if lineinfo else ()))
    inputs = (program, options, nvrtc.version, library.stat().st_size)  # the size: releases of one version differ
    kept = ptx_folder() / f"{path.stem}-{architecture}-{hashlib.sha256(repr(inputs).encode()).hexdigest()[:20]}.json"
    if not kept.exists():
        made = nvrtc.compile(program, options)
        ptx = FILE.sub(r"\1", made.ptx)
        partial = kept.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps([ptx, made.lowered]), encoding="utf-8")
        os.replace(partial, kept)  # a process that dies while it writes leaves no half of a file
    ptx, lowered = json.loads(kept.read_text(encoding="utf-8"))
    return ptx, lowered


@cache
def ptx_folder() -> Path:
    """A folder of this user alone in the system's temporary folder."""
    return folder("ptx")
