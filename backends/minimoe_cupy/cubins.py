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

from minimoe.caches import can_be_written, open_to_others, user_caches
from minimoe.untrusted import MOST_JSON, Malformed, parse_json_object, read_bounded

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
    name = f"{path.stem}-{architecture}-{hashlib.sha256(repr(inputs).encode()).hexdigest()[:20]}"
    kept = whole(folder() / f"{name}.cubin")
    if kept is not None:
        return kept
    compiling()
    machine_code, lowered = compiled(nvrtc, source, path, names, architecture)
    try:
        return save(folder() / f"{name}.cubin", machine_code, lowered)
    except OSError:  # such as a full disk; CuPy loads a file, so there must be one
        return save(own_folder() / f"{name}.cubin", machine_code, lowered)


def whole(code: Path) -> Cubin | None:
    """Returns what was saved; None if it is absent, or if a byte of it has changed."""
    try:
        about = parse_json_object(read_bounded(code.with_suffix(".json"), MOST_JSON))
        lowered = about["lowered"]
        return Cubin(code, lowered) if about["sha256"] == digest(code.read_bytes(), lowered) else None
    except (OSError, Malformed, KeyError):
        return None


def save(code: Path, machine_code: bytes, lowered: dict[str, str]) -> Cubin:
    """Writes machine code and, beside it, its kernels' names and a checksum of both. Raises OSError."""
    write(code, machine_code)
    write(code.with_suffix(".json"), json.dumps({"lowered": lowered, "sha256": digest(machine_code, lowered)}).encode())
    return Cubin(code, lowered)


def digest(machine_code: bytes, lowered: Any) -> str:
    return hashlib.sha256(machine_code + json.dumps(lowered, sort_keys=True).encode()).hexdigest()


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
    """Returns the user's cache, or a temporary folder of this process if the cache cannot be written or if other users can write to it."""
    place = next(user_caches(), None)
    return place if place is not None and can_be_written(place) and not open_to_others(place) else own_folder()


def own_folder() -> Path:
    """Returns a temporary folder of this process."""
    if not _own:
        _own.append(tempfile.TemporaryDirectory(prefix="minimoe-"))
    return Path(_own[0].name)


_own: list["tempfile.TemporaryDirectory[str]"] = []


def write(path: Path, data: bytes) -> None:
    """Writes a file so that it is whole or absent, even if two processes write it at once."""
    partial = path.with_suffix(f"{path.suffix}.{os.getpid()}")
    partial.write_bytes(data)
    os.replace(partial, path)
