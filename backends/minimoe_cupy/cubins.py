"""Machine code of `.cu` files, kept on disk: compiled once by NVRTC for each architecture, and anew when a source or the compiler changes.

CuPy's own cache goes by a source's text and options: it would give old code where a header has changed.
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
    """A file of machine code, and the names in it of the kernels that were asked for by C++ name."""

    path: Path
    lowered: dict[str, str]


def kept_cubin(nvrtc: Any, path: Path, names: Sequence[str], architecture: str, compiling: Callable[[], None]) -> Cubin:
    """The kernels of a file for `sm_..`, from disk or compiled and put there; `compiling` is called before that.

    `nvrtc` is `cupy.cuda.nvrtc`. Raises RuntimeError with the compiler's words.
    """
    source = path.read_text(encoding="utf-8")
    headers = [header.read_text(encoding="utf-8") for header in sorted(path.parent.glob("*.cuh"))]
    told = (source, headers, list(names), architecture, OPTIONS, nvrtc.getVersion())
    place = folder() / f"{path.stem}-{architecture}-{hashlib.sha256(repr(told).encode()).hexdigest()[:20]}"
    code, lowered = place.with_suffix(".cubin"), place.with_suffix(".json")
    if not (code.exists() and lowered.exists()):
        compiling()
        machine_code, mapping = compiled(nvrtc, source, path, names, architecture)
        write(code, machine_code)
        write(lowered, json.dumps(mapping).encode())
    return Cubin(code, json.loads(lowered.read_text(encoding="utf-8")))


def compiled(nvrtc: Any, source: str, path: Path, names: Sequence[str], architecture: str) -> tuple[bytes, dict[str, str]]:
    """-> machine code, lowered names by C++ names"""
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
    """Where it is kept: MINIMOE_CACHE_DIR, else the user's cache; one of the process's own where that cannot be written."""
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
    """A file that is there whole or not at all, also where two processes make it."""
    partial = path.with_suffix(f"{path.suffix}.{os.getpid()}")
    partial.write_bytes(data)
    os.replace(partial, path)
