"""A cache on disk of the machine code of `.cu` files, compiled once per architecture, and again when a source or the compiler changes.

CuPy's own cache depends on a source's text and options only: it would return old code after a header changed.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

OPTIONS = ("-std=c++17",)


class Cubin(NamedTuple):
    """A file of machine code, and the lowered (mangled) names in it of the kernels, by C++ name."""

    path: Path
    lowered: dict[str, str]


def kept_cubin(nvrtc: Any, path: Path, names: Sequence[str], architecture: str, compiling: Callable[[], None]) -> Cubin:
    """Returns the kernels of a file for `sm_..`, from disk, or compiled and saved there; calls `compiling` before it compiles.

    `nvrtc` is `cupy.cuda.nvrtc`. Raises RuntimeError with the compiler's log.
    """
    source = path.read_text(encoding="utf-8")
    headers = [header.read_text(encoding="utf-8") for header in sorted(path.parent.glob("*.cuh"))]
    inputs = (source, headers, list(names), architecture, OPTIONS, nvrtc.getVersion())
    stem = folder() / f"{path.stem}-{architecture}-{hashlib.sha256(repr(inputs).encode()).hexdigest()[:20]}"
    code, lowered = stem.with_suffix(".cubin"), stem.with_suffix(".json")
    if not (code.exists() and lowered.exists()):
        compiling()
        machine_code, mapping = compiled(nvrtc, source, path, names, architecture)
        write(code, machine_code)
        write(lowered, json.dumps(mapping).encode())
    return Cubin(code, json.loads(lowered.read_text(encoding="utf-8")))


def compiled(nvrtc: Any, source: str, path: Path, names: Sequence[str], architecture: str) -> tuple[bytes, dict[str, str]]:
    """Compiles the kernels of a source.   -> machine code, lowered names by C++ name"""
    program = nvrtc.createProgram(source, path.name, (), ())
    try:
        add = getattr(nvrtc, "addNameExpression", None) or nvrtc.addAddNameExpression  # CuPy has had both names
        for name in names:
            add(program, name)
        try:
            nvrtc.compileProgram(program, (f"--gpu-architecture={architecture}", f"-I{path.parent}", *OPTIONS))
        except Exception as error:
            raise RuntimeError(f"{path.name} for {architecture}: {nvrtc.getProgramLog(program)}") from error
        return nvrtc.getCUBIN(program), {name: nvrtc.getLoweredName(program, name) for name in names}
    finally:
        nvrtc.destroyProgram(program)


def folder() -> Path:
    """Returns the cache folder: MINIMOE_CACHE_DIR, else the user's cache; a temporary one of this process if that is not writable."""
    wanted = Path(os.environ.get("MINIMOE_CACHE_DIR") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minimoe")
    try:
        wanted.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=wanted):
            return wanted
    except OSError:
        if not _own:
            _own.append(tempfile.TemporaryDirectory(prefix="minimoe-"))
        return Path(_own[0].name)


_own: list["tempfile.TemporaryDirectory[str]"] = []


def write(path: Path, data: bytes) -> None:
    """Writes a file so that it is whole or absent, even if two processes write it at once."""
    partial = path.with_suffix(f"{path.suffix}.{os.getpid()}")
    partial.write_bytes(data)
    os.replace(partial, path)
