"""A model folder as Hugging Face lays it out: config.json, and model.safetensors or its shards with model.safetensors.index.json.

The folder is not trusted: opening it checks the index against every shard's header, and that no name leads out of the folder. Only headers
are read then; tensors are views of memory maps (`file.py`). minimoe's own checkpoints have files of the same names with other contents:
`is_model_folder` tells them apart.
"""

import contextlib
import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

from minimoe.errors import CheckpointError, notice
from minimoe.files import HIDDEN, reason, sync_folder, to_json, write_synced
from minimoe.pretrained.file import Array, Specs, TensorFile, TensorInfo, fill, stream, temporary_sibling
from minimoe.pretrained.header import PICKLE, PICKLES, STORED, shown
from minimoe.pretrained.wrong_paths import instead_of_weights
from minimoe.runs.checkpoint import MANIFEST, TOKENIZER
from minimoe.signatures import what_it_is
from minimoe.untrusted import MOST_JSON, Malformed, parse_json_object

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MOST_INDEX = 100_000_000  # bytes


class _Index(msgspec.Struct):
    """The part of model.safetensors.index.json that is used; other members are skipped."""

    weight_map: dict[str, str]


def is_model_folder(path: Path | str) -> bool:
    """Return True for a Hugging Face model folder: it has a config.json, and is neither a run of minimoe nor a checkpoint."""
    return os.path.isfile(os.path.join(path, CONFIG)) and not any(
        os.path.lexists(os.path.join(path, name)) for name in ("config.toml", MANIFEST)
    )


class ModelFolder:
    """An open model folder. `config`: the object in config.json; `files`: the weight files by name.

    Raises `CheckpointError`, in one line, if a file is missing, is a pickle or contradicts itself, or if index and shards differ.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.files: dict[str, TensorFile] = {}
        self._file_of: dict[str, TensorFile] = {}
        self.config = read_config(self.path)
        try:
            self._open()
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise CheckpointError(f"{shown(self.path)}: cannot be read: {reason(error)}") from error
            raise

    def _open(self) -> None:
        """Open every weight file, and note which tensor is in which. model.safetensors takes precedence over shards, as in transformers."""
        if os.path.lexists(self.path / WEIGHTS):
            self._add(WEIGHTS)
            return
        if not os.path.lexists(self.path / INDEX):
            raise CheckpointError(_why_no_weights(self.path))
        weight_map = _read_index(self.path)
        for name in sorted(set(weight_map.values())):
            self._add(name)
        _check_index(self.path, weight_map, self._file_of)

    def _add(self, name: str) -> None:
        file = self.files[name] = TensorFile(_inside(self.path, name))
        for key in file.entries:
            if key in self._file_of:
                other = self._file_of[key].path.name
                raise CheckpointError(f"{shown(self.path)}: tensor {shown(key)} is in two files: {other} and {name}")
            self._file_of[key] = file

    def keys(self) -> set[str]:
        """Return the names of all tensors."""
        return set(self._file_of)

    def file_of(self, name: str) -> TensorFile:
        """Return the file that a tensor is in. Raises `CheckpointError` if there is no such tensor."""
        if name not in self._file_of:
            raise CheckpointError(f"{shown(self.path)}: has no tensor {shown(name)}")
        return self._file_of[name]

    def entry(self, name: str) -> TensorInfo:
        """Return a tensor's dtype, in safetensors' words, and its shape."""
        return self.file_of(name).entry(name)

    def raw(self, name: str) -> Array:
        """Return a tensor as it is stored: a read-only view (see `TensorFile.raw`)."""
        return self.file_of(name).raw(name)

    def fill(self, name: str, out: Array) -> None:
        """Write a tensor's numbers into `out`: float32 or float64, of the same shape, any strides. Raises `CheckpointError`."""
        try:
            fill(out, self.raw(name), self.entry(name).dtype)
        except CheckpointError as error:
            raise CheckpointError(f"{shown(self.path)}: tensor {shown(name)}: {error}") from None

    def release(self, name: str) -> None:
        """Let the system drop a tensor's pages."""
        self.file_of(name).release(name)

    def close(self) -> None:
        """Close the maps; existing views stay valid."""
        for file in self.files.values():
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


# ---- what the folder's files say of each other -------------------------------------------------------------------------------


def _inside(folder: Path, name: str) -> Path:
    """Return the path of a file of the folder. Raises `CheckpointError` if its name, or a link, leads out of the folder.

    The hub's cache is allowed: its snapshots/REVISION/ has links to the files in blobs/ next to snapshots/.
    """
    if name in ("", ".", "..") or any(mark in name for mark in "/\\:") or not name.isprintable():
        raise CheckpointError(f"{shown(folder)}: the file name {shown(name)} leaves the folder: expected a plain name")
    real, home = Path(os.path.realpath(folder / name)), Path(os.path.realpath(folder))
    if real.parent != home and real.parent != _blobs(home):
        raise CheckpointError(f"{shown(folder / name)}: is a link that leaves the folder")
    return folder / name


def _blobs(home: Path) -> Path | None:
    """Return the folder of the files that a snapshot of the hub's cache links to; None for any other folder."""
    return home.parent.parent / "blobs" if home.parent.name == "snapshots" else None


def real_file(folder: Path, name: str) -> Path | None:
    """Return the path of an entry of a folder or, for a link into the hub's cache, that of the blob; None for other links."""
    if not (folder / name).is_symlink():
        return folder / name
    real = Path(os.path.realpath(folder / name))
    return real if real.parent == _blobs(Path(os.path.realpath(folder))) and real.is_file() else None


def _read(folder: Path, name: str, most: int) -> bytes:
    path = _inside(folder, name)
    try:
        if not path.is_file():
            raise CheckpointError(f"{shown(path)}: {'is not a file' if path.exists() else 'is missing'}")
        with open(path, "rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        raise CheckpointError(f"{shown(path)}: cannot be read: {reason(error)}") from error
    if len(data) > most:
        raise CheckpointError(f"{shown(path)}: is larger than {most} bytes")
    odd = what_it_is(data)
    if odd:
        raise CheckpointError(f"{shown(path)}: {odd}")
    return data


def read_config(folder: Path) -> dict[str, Any]:
    """Return the object in config.json. Raises `CheckpointError` if there is none."""
    if not os.path.isdir(folder):
        raise CheckpointError(f"{shown(folder)}: no such folder")
    if not os.path.lexists(folder / CONFIG):
        odd = instead_of_weights(os.listdir(folder))
        if odd:
            raise CheckpointError(f"{shown(folder)}: has no {CONFIG}, and {odd}")
        raise CheckpointError(f"{shown(folder)}: a model folder needs {CONFIG} and {WEIGHTS} (or shards with {INDEX}): no {CONFIG} there")
    try:
        return parse_json_object(_read(folder, CONFIG, MOST_JSON))
    except Malformed as error:
        raise CheckpointError(f"{shown(folder / CONFIG)}: {error}") from None


def _read_index(folder: Path) -> dict[str, str]:
    """Return the index's weight_map: which file each tensor is in."""
    try:
        index = msgspec.json.decode(_read(folder, INDEX, MOST_INDEX), type=_Index)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        raise CheckpointError(f"{shown(folder / INDEX)}: expected JSON with a weight_map of tensor names to file names") from None
    return index.weight_map


def _check_index(folder: Path, weight_map: Mapping[str, str], file_of: Mapping[str, TensorFile]) -> None:
    """Check that each tensor of the index is in the file that it names. A tensor that it does not list is read too, with a notice.

    transformers does so too: it reads whatever is in the files that the index names.
    """
    for key, name in weight_map.items():
        if key not in file_of or file_of[key].path.name != name:
            raise CheckpointError(f"{shown(folder / INDEX)}: says that tensor {shown(key)} is in {name}, which does not have it")
    unlisted = sorted(file_of.keys() - weight_map.keys())
    if unlisted:
        found = f"tensor {shown(unlisted[0])} of {file_of[unlisted[0]].path.name}"
        others = f" and {len(unlisted) - 1} more, which are read" if len(unlisted) > 1 else ", which is read"
        notice(f"{shown(folder / INDEX)}: does not list {found}{others} all the same")


def _why_no_weights(folder: Path) -> str:
    """Return the error for a folder with neither model.safetensors nor an index."""
    names = sorted(entry.name for entry in folder.iterdir())
    tensors = [shown(name) for name in names if name.endswith(".safetensors")]
    pickles = [name for name in names if os.path.splitext(name)[1].lower() in PICKLES]
    if tensors:
        several = f"{tensors[0]} and {len(tensors) - 1} more" if len(tensors) > 1 else tensors[0]
        return f"{shown(folder)}: has {several}, but no {WEIGHTS}, and no {INDEX} that says which shards belong together"
    if pickles:
        return f"{shown(folder)}: has no {WEIGHTS}, and {shown(pickles[0])} {PICKLE}"
    blobs = _blobs(Path(os.path.realpath(folder)))
    odd = instead_of_weights(names, os.listdir(blobs) if blobs is not None and blobs.is_dir() else ())
    if odd:
        return f"{shown(folder)}: has no {WEIGHTS}, and {odd}"
    return f"{shown(folder)}: a model folder needs {CONFIG} and {WEIGHTS} (or shards with {INDEX}): no weights there"


# ---- writing -----------------------------------------------------------------------------------------------------------------


def write_model_folder(
    path: Path | str,
    config: Mapping[str, Any],
    specs: Specs,
    produce: Callable[[str], Array],
    shard_bytes: int = 5_000_000_000,
    tokenizer_json: str | None = None,
    texts: Mapping[str, str] | None = None,
    files: Mapping[str, Path] | None = None,
) -> None:
    """Write a model folder that transformers reads, one tensor in memory at a time; after a kill it is complete or absent.

    specs, produce: as for `write_tensor_file`. shard_bytes: the size limit of a weight file (a larger tensor gets its own file); tensors
    are assigned to files in the order of `specs`. texts: further files by name; files: others, copied from these paths unless `texts` has
    the name. Raises `CheckpointError` if the path is taken (an empty folder is not), cannot be written, or a file cannot be read.
    """
    path = Path(os.path.abspath(path))
    temporary = temporary_sibling(path)
    try:
        if os.path.lexists(path) and (not path.is_dir() or any(path.iterdir())):
            raise CheckpointError(f"{shown(path)}: exists already: name a folder that is new or empty")
        path.parent.mkdir(parents=True, exist_ok=True)
        _clear_leftovers(path)
        temporary.mkdir()
        _write_weights(temporary, _shards(specs, shard_bytes), specs, produce)
        write_synced(temporary / CONFIG, to_json(config).encode())
        if tokenizer_json is not None:
            write_synced(temporary / TOKENIZER, tokenizer_json.encode())
        for name, text in (texts or {}).items():
            write_synced(temporary / name, text.encode())
        for name in (files or {}).keys() - (texts or {}).keys():
            _copy(files[name], temporary / name)  # type: ignore[index]
        sync_folder(temporary)
        if path.exists():
            path.rmdir()
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise CheckpointError(f"{shown(path)}: cannot be written: {reason(error)}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _copy(source: Path, target: Path) -> None:
    """Copy a file of any size; returns when it is on the disk. Raises `CheckpointError` if it cannot be read, `OSError` if written."""
    with contextlib.ExitStack() as files:
        try:
            given = files.enter_context(open(source, "rb"))
        except OSError as error:
            raise CheckpointError(f"{shown(source)}: cannot be read: {reason(error)}") from error
        file = files.enter_context(open(target, "xb"))
        shutil.copyfileobj(given, file, 1 << 20)
        file.flush()
        os.fsync(file.fileno())


def _clear_leftovers(path: Path) -> None:
    """Remove the temporary folders of writers of the same folder that were killed."""
    for entry in path.parent.iterdir():
        match = HIDDEN.fullmatch(entry.name)
        if match and (match["target"], match["kind"]) == (path.name, "tmp"):
            shutil.rmtree(entry, ignore_errors=True)


def _shards(specs: Specs, shard_bytes: int) -> list[list[str]]:
    """Return the names in each shard, in the order of `specs`; there is at least one shard."""
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for name in specs:
        size = _size(specs, name)
        if size > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= size
    return shards


def _size(specs: Specs, name: str) -> int:
    dtype, shape = specs[name]
    return math.prod(shape) * STORED[dtype].itemsize


def _write_weights(folder: Path, shards: list[list[str]], specs: Specs, produce: Callable[[str], Array]) -> None:
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file_name = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map.update(dict.fromkeys(names, file_name))
        # transformers refuses a file that does not say which framework's layout it has.
        stream(folder / file_name, {name: specs[name] for name in names}, produce, {"format": "pt"})
    if len(shards) > 1:
        total = sum(_size(specs, name) for name in specs)
        write_synced(folder / INDEX, to_json({"metadata": {"total_size": total}, "weight_map": weight_map}).encode())
