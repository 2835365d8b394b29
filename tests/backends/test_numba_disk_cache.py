"""The kernels that `numba` keeps on disk: damage is found before anything is unpickled; nothing is read that others could write."""

import importlib.util
import os
import pickle
import stat
import threading
from types import SimpleNamespace

import pytest
from fresh_process import first_words
from numba.core import config, types
from numba.core.caching import FunctionCache

from minimoe import caches
from minimoe_numba import disk_cache
from minimoe_numba.compiling import function_of, is_cached
from minimoe_numba.disk_cache import KernelCache
from minimoe_numba.news import COMPILING, news

SIGNATURE = types.int64(types.int64)


class Kept:
    """A function of a source file of its own, with a folder for what it is compiled to, and what is said about that."""

    def __init__(self, folder):
        self.source, self.cache, self.private, self.said = folder / "source.py", folder / "cache", folder / "private", []
        self.write("def twice(x):\n    return x * 2\n")

    def write(self, text):
        self.source.write_text(text)
        spec = importlib.util.spec_from_file_location("source", self.source)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self.function = module.twice

    def begin(self):
        """Forget what a process knows, as a new one does."""
        disk_cache.folder_for.cache_clear()
        news.sent.clear()
        self.said.clear()

    def run(self):
        """Return twice(21), and whether it was loaded."""
        self.begin()
        made = function_of(self.function, SIGNATURE)
        return made(21), bool(made.stats.cache_hits)

    def file(self, kind, under=None):
        (found,) = (under or self.cache).rglob(f"*.{kind}")
        return found

    def file_exists(self, kind):
        return bool(list(self.cache.rglob(f"*.{kind}")))


@pytest.fixture
def kept(tmp_path, monkeypatch):
    made = Kept(tmp_path)
    monkeypatch.setattr(config, "CACHE_DIR", str(made.cache))
    monkeypatch.setattr(news, "listener", made.said.append)
    monkeypatch.setattr(news, "sent", set())
    monkeypatch.setenv("MINIMOE_CACHE_DIR", str(made.private))
    yield made
    disk_cache.folder_for.cache_clear()


def test_what_is_kept_is_loaded(kept):
    assert kept.run() == (42, False)
    assert kept.run() == (42, True) and kept.said == [] and is_cached(kept.function, SIGNATURE)
    assert sorted(path.suffix for path in kept.cache.rglob("*") if path.is_file()) == [".nbc", ".nbi"]


# ---- damage ------------------------------------------------------------------------------------------------------------------------------


def flipped(data, place):
    return data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :]


def removed(folder):
    return f"{folder}: removed files that were damaged or from an older minimoe: their kernels are compiled again"


DAMAGE = {
    "empty": lambda data: b"",
    "cut to a byte": lambda data: data[:1],
    "cut in the middle": lambda data: data[: len(data) // 2],
    "cut by a byte": lambda data: data[:-1],
    "longer": lambda data: data + b"\0",
    "zeros": lambda data: bytes(len(data)),
    "first bit": lambda data: flipped(data, 0),
    "a bit within": lambda data: flipped(data, len(data) // 3),
    "a bit of the purpose": lambda data: flipped(data, len(data) - 40),
    "last bit": lambda data: flipped(data, len(data) - 1),
    "another text": lambda data: b"not a kernel\n",
}


@pytest.mark.parametrize("kind", ["nbi", "nbc"])
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_compiled_again_and_said(kept, kind, damage):
    kept.run()
    file = kept.file(kind)
    file.write_bytes(damage(file.read_bytes()))
    assert kept.run() == (42, False) and kept.said == [removed(file.parent), COMPILING]
    assert kept.run() == (42, True) and kept.said == []


@pytest.mark.parametrize("kind", ["nbi", "nbc"])
def test_a_kernel_with_a_damaged_file_is_missing_so_that_a_helper_compiles_it(kept, kind):
    kept.run()
    kept.file(kind).write_bytes(b"")
    kept.begin()
    assert not is_cached(kept.function, SIGNATURE) and not kept.file_exists(kind)


class Trap:
    """Its pickle makes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("kind", ["nbi", "nbc"])
def test_a_file_without_a_seal_is_not_unpickled(kept, tmp_path, kind):
    kept.run()
    kept.file(kind).write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    assert kept.run() == (42, False) and not (tmp_path / "sprung").exists()


def test_what_an_older_minimoe_kept_is_compiled_again(kept, monkeypatch):
    monkeypatch.setattr("minimoe_numba.compiling.cache_for", FunctionCache)
    kept.run()
    assert kept.run() == (42, True)
    monkeypatch.undo()
    monkeypatch.setattr(config, "CACHE_DIR", str(kept.cache))
    monkeypatch.setattr(news, "listener", kept.said.append)
    assert kept.run() == (42, False) and kept.said[0] == removed(kept.file("nbi").parent)
    assert kept.run() == (42, True)


def test_an_older_minimoe_loads_what_this_one_kept(kept, monkeypatch):
    kept.run()
    monkeypatch.setattr("minimoe_numba.compiling.cache_for", FunctionCache)
    assert kept.run() == (42, True)


def test_code_of_another_source_or_signature_is_passed_over_in_silence(kept):
    """As two processes leave it that write at once, or one that ended between two files."""
    kept.run()
    old = {kind: kept.file(kind).read_bytes() for kind in ("nbi", "nbc")}
    kept.write("def twice(x):\n    return x * 3\n")
    assert kept.run() == (63, False) and kept.said == [COMPILING]
    for kind in ("nbi", "nbc"):
        kept.file(kind).write_bytes(old[kind])
        assert kept.run() == (63, False) and kept.said == [COMPILING]
    assert kept.run() == (63, True)


def test_processes_that_write_at_once_leave_whole_files(kept):
    keys = [(f"signature {i}",) for i in range(4)]
    kept.run()
    caches = [KernelCache(kept.function)._cache_file for _ in keys]

    def write_and_read(i):
        for _ in range(30):
            caches[i].save(keys[i], f"code {i}")
            assert caches[i].load(keys[i]) in (f"code {i}", None)  # another may have taken its place

    threads = [threading.Thread(target=write_and_read, args=(i,)) for i in range(len(keys))]
    kept.said.clear()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert kept.said == [] and not list(kept.cache.rglob("*.tmp.*"))


def test_a_full_disk_is_named_and_the_function_computes(tmp_path):
    (tmp_path / "source.py").write_text("def twice(x):\n    return x * 2\n")
    code = (
        "import resource, signal, sys\n"
        "from numba.core import types\n"
        "from minimoe_numba.compiling import function_of\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "from source import twice\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "print('RESULT', function_of(twice, types.int64(types.int64))(21))\n"
    )
    words = first_words(code=code, NUMBA_CACHE_DIR=str(tmp_path / "cache"), PYTHONDONTWRITEBYTECODE="1")
    assert "RESULT 42" in words and words.count("cannot be kept there") == 1
    assert f"minimoe: {tmp_path}/cache/" in words and "File too large: compiled kernels cannot be kept there" in words
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


# ---- other users -------------------------------------------------------------------------------------------------------------------------

OPEN = {
    "the folder": lambda kept: kept.file("nbi").parent.chmod(0o777),
    "the folder above": lambda kept: kept.cache.chmod(0o777),
}


@pytest.mark.parametrize("open_it", OPEN.values(), ids=OPEN)
def test_a_folder_that_others_can_write_is_left_for_a_private_one(kept, open_it):
    kept.run()
    folder = kept.file("nbi").parent
    open_it(kept)
    assert kept.run() == (42, False)
    private = kept.file("nbi", kept.private).parent
    where = f"compiled kernels are kept in {private}"
    assert kept.said == [f"{folder} can be written by other users, who could run code through it: {where}", COMPILING]
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    assert kept.run() == (42, True) and kept.file("nbi", kept.private)


def test_a_sticky_folder_such_as_tmp_may_hold_ones_own(kept):
    kept.cache.mkdir()
    kept.cache.chmod(0o1777)
    kept.run()
    assert kept.run() == (42, True) and kept.said == [] and not kept.private.exists()


def test_without_a_private_folder_nothing_is_kept(kept, monkeypatch):
    kept.cache.mkdir()
    kept.cache.chmod(0o777)
    monkeypatch.setattr(disk_cache, "private_folder", lambda name: None)
    assert [kept.run() for _ in range(2)] == [(42, False)] * 2
    assert "compiled kernels are not kept" in kept.said[0] and not list(kept.cache.rglob("*.nb?"))


@pytest.mark.parametrize("kind", ["nbi", "nbc"])
def test_a_file_that_others_can_write_is_removed(kept, kind):
    kept.run()
    kept.file(kind).chmod(0o666)
    assert kept.run() == (42, False) and kept.said[0] == removed(kept.file(kind).parent)
    assert kept.run() == (42, True)


def test_new_files_are_the_users_alone_whatever_the_umask(kept):
    before = os.umask(0)
    try:
        kept.run()
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in kept.cache.rglob("*.nb?")} == {0o644}
    assert kept.run() == (42, True)


ME = os.geteuid()
OWNERS = {"own": (ME, 0o755, False), "root's": (0, 0o755, False), "another user's": (ME + 7, 0o755, True),
          "everyone may": (ME, 0o757, True), "a group may": (ME, 0o775, True), "own, a sticky one": (ME, 0o1777, True)}  # fmt: skip


@pytest.mark.parametrize("owner, mode, expected", OWNERS.values(), ids=OWNERS)
def test_whose_a_file_is(owner, mode, expected, monkeypatch):
    found = SimpleNamespace(st_uid=owner, st_gid=4321, st_mode=mode)
    assert caches.written_by_others(found) is expected
    assert not caches.written_by_others(SimpleNamespace(st_uid=ME + 7, st_gid=4321, st_mode=0o755), {ME + 7})


def test_a_group_of_one_user_is_that_user(monkeypatch):
    found = SimpleNamespace(st_uid=ME, st_gid=1000, st_mode=0o775)
    user, members = SimpleNamespace(pw_uid=1000, pw_gid=1000, pw_name="ada"), []
    monkeypatch.setattr("pwd.getpwuid", lambda number: user)
    monkeypatch.setattr("grp.getgrgid", lambda number: SimpleNamespace(gr_name="ada", gr_mem=members))
    assert not caches.written_by_others(found)
    members.append("bob")
    assert caches.written_by_others(found)
    members.clear()
    user.pw_uid = 0  # many systems have other users in root's group
    assert caches.written_by_others(found)


# ---- a whole process ---------------------------------------------------------------------------------------------------------------------

STEP = """
import numpy as np
from minimoe.backend import load
b = load("numba")
x = np.linspace(-3, 3, 64, dtype=np.float32).reshape(4, 16)
assert np.abs(b.swiglu(x) - load("numpy").swiglu(x)).max() < 1e-6
"""


def test_a_power_cut_costs_one_compilation(tmp_path):
    first_words(code=STEP, NUMBA_CACHE_DIR=str(tmp_path))
    files = sorted(tmp_path.rglob("*.nb?"))
    assert len(files) >= 8
    for file in files:
        file.write_bytes(b"")
    words = first_words(code=STEP, NUMBA_CACHE_DIR=str(tmp_path))
    assert words.count("removed files that were damaged") == 1 and words.count("\n") == 2
    assert first_words(code=STEP, NUMBA_CACHE_DIR=str(tmp_path)) == ""
