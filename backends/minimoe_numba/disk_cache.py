"""Compiled functions on disk: Numba's cache, with a seal on each file, in folders that no other user can write.

Numba keeps pickles: an index (.nbi) for each function, and a file of machine code (.nbc) for each of its signatures. Unpickling runs code,
and machine code runs as it is, so neither is read from where others could have put it, and neither is read if a byte of it has changed.

    file = pickle | MAGIC | SHA-256 of what it is for | SHA-256 of all before

A file without a whole seal is removed, and what it held is compiled again. A file that is whole but for something else, such as an older
source, is only passed over: a process that ended between two writes leaves one.
"""

import contextlib
import hashlib
import inspect
import io
import itertools
import os
import pickle
import secrets
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from numba.core import config
from numba.core.caching import (
    CacheImpl,
    CompileResultCacheImpl,
    FunctionCache,
    IndexDataCacheFile,
    NullCache,
    _CacheLocator,
    _SourceFileBackedLocatorMixin,
)
from numba.core.registry import cpu_target

from minimoe.caches import can_be_written, open_to_others, private_folder, written_by_others
from minimoe.files import reason
from minimoe_numba.news import news

MAGIC = b"minimoe1"
DIGEST = hashlib.sha256().digest_size
SEAL = len(MAGIC) + 2 * DIGEST  # bytes
NEW_FILE = os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_BINARY", 0)


def digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


@cache
def folder_for(source: Path, named: str) -> Path | None:
    """Return the folder for the compiled functions of a source file; None if no folder can be written.

    It is in `named` (NUMBA_CACHE_DIR), else beside the source, else, or if others can write there, in the user's cache.
    """
    name = _CacheLocator.get_suitable_cache_subpath(str(source))
    for folder in ([Path(named) / name] if named else []) + [source.parent / "__pycache__"]:
        if not can_be_written(folder):
            continue
        if not open_to_others(folder, {source.stat().st_uid}):  # whoever owns the source runs code as it is
            return folder
        private = private_folder(name)
        where = f"kept in {private}" if private else "not kept"
        news.tell(f"{folder} can be written by other users, who could run code through it: compiled kernels are {where}")
        return private
    return private_folder(name)


class KernelLocator(_SourceFileBackedLocatorMixin, _CacheLocator):  # type: ignore[misc]
    """Tells Numba the folder of a function."""

    def __init__(self, function: Callable[..., Any], file: str, folder: Path) -> None:
        self._py_file, self._lineno, self._folder = file, function.__code__.co_firstlineno, folder

    def get_cache_path(self) -> str:
        return str(self._folder)

    def ensure_cache_path(self) -> None:
        """Do nothing: `folder_for` has made the folder."""

    @classmethod
    def from_function(cls, function: Callable[..., Any], file: str) -> "KernelLocator | None":
        folder = folder_for(Path(file), config.CACHE_DIR) if os.path.exists(file) else None
        return None if folder is None else cls(function, file, folder)


class KernelFiles(IndexDataCacheFile):  # type: ignore[misc]
    """The files of one function."""

    def __init__(self, owner: int, **settings: Any) -> None:
        """owner: the user id of the source's owner: who is trusted to write the source is trusted to write its machine code."""
        super().__init__(**settings)
        self.owner = owner

    def load(self, key: Any) -> Any:
        """Return what was saved under a key, or None."""
        path = self._path(key)
        data = None if path is None else self._read(path, self._purpose(key))
        return None if data is None else self._unpickled(path, data)

    def holds(self, key: Any) -> bool:
        """Return True if what was saved under a key is there and whole."""
        path = self._path(key)
        return path is not None and self._read(path, self._purpose(key)) is not None

    def save(self, key: Any, data: Any) -> None:
        """Write the code, then the index that names it. If that is impossible, a message says so, and the code stays in memory."""
        try:
            index = self._load_index()
            free = (name for number in itertools.count(1) if (name := self._data_name(number)) not in index.values())
            name = index.get(key) or next(free)
            self._write(self._data_path(name), self._purpose(key), self._dump(data))
            if key not in index:
                self._save_index({**index, key: name})
        except OSError as error:
            news.tell(f"{self._cache_path}: {reason(error)}: compiled kernels cannot be kept there, and each run compiles them anew")

    def _path(self, key: Any) -> Any:
        name = self._load_index().get(key)
        return None if name is None else self._data_path(name)

    def _load_index(self) -> dict[Any, str]:
        data = self._read(self._index_path, self._purpose())
        found = None if data is None else self._unpickled(self._index_path, data)
        return {} if found is None else dict(found[1])

    def _save_index(self, overloads: dict[Any, str]) -> None:
        self._write(self._index_path, self._purpose(), self._dump(self._version) + self._dump((self._source_stamp, overloads)))

    def _purpose(self, *key: Any) -> bytes:
        """Return what a file is for: this version of Numba, this source and, if it holds code, this signature and processor."""
        return repr((self._version, self._source_stamp, *key)).encode()

    # ---- one file ----------------------------------------------------------------------------------------------------------------

    def _write(self, path: str, purpose: bytes, data: bytes) -> None:
        """Write a sealed file in one step, so that no reader sees a part of it."""
        data += MAGIC + digest(purpose)
        temporary = f"{path}.tmp.{secrets.token_hex(8)}"
        try:
            with open(os.open(temporary, NEW_FILE, 0o644), "wb") as file:  # writable by the user alone, whatever the umask
                file.write(data + digest(data))
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise

    def _read(self, path: str, purpose: bytes) -> bytes | None:
        """Return what a file holds; None if it is absent, cannot be read, or is for something else. Removes one without a whole seal."""
        try:
            with open(path, "rb") as file:
                foreign, data = written_by_others(os.fstat(file.fileno()), {self.owner}), file.read()
        except FileNotFoundError:
            return None
        except OSError as error:
            news.tell(f"{path}: {reason(error)}: compiled kernels cannot be read from there, and each run compiles them anew")
            return None
        seal = data[-SEAL:]
        if foreign or not seal.startswith(MAGIC) or digest(data[:-DIGEST]) != seal[-DIGEST:]:
            self._remove(path)
            return None
        return data[:-SEAL] if seal[len(MAGIC) : -DIGEST] == digest(purpose) else None

    def _unpickled(self, path: str, data: bytes) -> Any:
        """Return the last of the values that were pickled one after the other; None if they are another library's."""
        stream, value = io.BytesIO(data), None
        try:
            while stream.tell() < len(data):
                value = pickle.load(stream)
        except Exception:  # it is whole: the classes that it names have changed
            self._remove(path)
            return None
        return value

    def _remove(self, path: str) -> None:
        news.tell(f"{self._cache_path}: removed files that were damaged or from an older minimoe: their kernels are compiled again")
        with contextlib.suppress(OSError):
            os.unlink(path)


class KernelCacheImpl(CompileResultCacheImpl):  # type: ignore[misc]
    """Numba's interface for where a function's files are, and in which form its machine code is stored."""

    @property
    def _locator_classes(self) -> list[type[_CacheLocator]]:
        return [KernelLocator] if CacheImpl._locator_classes else []  # Numba disables its cache by an empty list


class KernelCache(FunctionCache):  # type: ignore[misc]
    """Numba's cache of one function. Raises RuntimeError if no folder can hold it."""

    _impl_class = KernelCacheImpl

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        place = self._impl.locator
        self._cache_file = KernelFiles(
            os.stat(inspect.getfile(function)).st_uid, cache_path=place.get_cache_path(), filename_base=self._impl.filename_base,
            source_stamp=place.get_source_stamp(),
        )  # fmt: skip

    def holds(self, signature: Any) -> bool:
        """Return True if the function is kept, compiled for a signature and this processor."""
        return bool(self._cache_file.holds(self._index_key(signature, cpu_target.target_context.codegen())))


def cache_for(function: Callable[..., Any]) -> KernelCache | NullCache:
    """Return the cache of a function, or one that stores nothing if no folder can hold it."""
    try:
        return KernelCache(function)
    except RuntimeError as error:
        if "cannot cache" not in str(error):
            raise
    news.tell("no folder for compiled kernels can be written: each run compiles them anew (NUMBA_CACHE_DIR can name one)")
    return NullCache()
