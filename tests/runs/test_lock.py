"""One process at a time trains in a folder: by a lock that the kernel holds, or by a file where the file system has none."""

import errno
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
from command_line import environment

from minimoe.config import Config
from minimoe.errors import CheckpointError
from minimoe.runs import lock as module
from minimoe.runs.listing import list_runs
from minimoe.runs.lock import LOCK, Lock, Owner, is_lock, is_taken, read_owner
from minimoe.runs.run import Run

GONE = 2**22 + 1  # above the highest process number of Linux
HOLD = """
import sys, time
from pathlib import Path
from minimoe.runs.run import Run
run = Run(Path(sys.argv[1]))
run.start()
print("ready", flush=True)
"""


@pytest.fixture
def no_kernel_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system such as Lustre mounted without flock."""

    def refuse(descriptor: int, shared: bool = False) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(module, "lock_in_kernel", refuse)


both = pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "file"])


def choose(kernel: bool, request: pytest.FixtureRequest) -> None:
    if not kernel:
        request.getfixturevalue("no_kernel_locks")


@contextmanager
def process(code: str, *arguments: str, prefix: tuple[str, ...] = ()) -> "Iterator[subprocess.Popen[str]]":
    """A process that has said that it is ready; killed at the end."""
    command = [*prefix, sys.executable, "-c", code, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment(), start_new_session=True) as child:
        try:
            assert child.stdout is not None and child.stdout.readline() == "ready\n"
            yield child
        finally:
            os.killpg(child.pid, 9)


def wait_until_free(folder: Path) -> bool:
    deadline = time.monotonic() + 20
    while is_taken(folder) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not is_taken(folder)


# ---- taking and releasing ------------------------------------------------------------------------------------------------------


@both
def test_a_lock_names_its_owner_and_leaves_no_file(tmp_path: Path, kernel: bool, request: pytest.FixtureRequest) -> None:
    choose(kernel, request)
    lock = Lock(tmp_path)
    assert is_taken(tmp_path) is False
    lock.take()
    lock.take()  # again: it is held already
    owner = read_owner(tmp_path / LOCK)
    assert owner is not None and (owner.pid, owner.kernel) == (os.getpid(), kernel) and not owner.is_dead()
    assert is_taken(tmp_path) is True and [path.name for path in tmp_path.iterdir()] == [LOCK]
    with pytest.raises(CheckpointError, match=rf"this process \({os.getpid()}\) is still training this run"):
        Lock(tmp_path).take()
    lock.release()
    lock.release()
    assert list(tmp_path.iterdir()) == [] and is_taken(tmp_path) is False
    Lock(tmp_path).take()


def test_an_error_of_the_disk_when_the_lock_is_given_back_ends_nothing(tmp_path: Path) -> None:
    """All that counts is written by then; and it must not hide the error that ended the run."""

    class Full:
        def __init__(self, file: Any) -> None:
            self.file, self.closed = file, False

        def fileno(self) -> int:
            return self.file.fileno()

        def close(self) -> None:
            self.file.close()
            raise OSError(errno.ENOSPC, "No space left on device")

    lock = Lock(tmp_path)
    lock.take()
    lock.file = Full(lock.file)  # type: ignore[assignment]
    lock.release()
    assert not lock.held and lock.file is None and list(tmp_path.iterdir()) == []


@both
def test_only_one_at_a_time_has_the_lock_however_often_it_changes_hands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: bool, request: pytest.FixtureRequest
) -> None:
    """Owners remove the file while others open it: a lock on a file that has lost its name is none."""
    choose(kernel, request)
    monkeypatch.setattr(module, "PAUSE", 0.0005)
    inside, most, taken = [0], [0], [0]

    def often() -> None:
        for _ in range(60):
            lock = Lock(tmp_path)
            try:
                lock.take()
            except CheckpointError:
                continue
            inside[0] += 1
            most[0], taken[0] = max(most[0], inside[0]), taken[0] + 1
            time.sleep(0.0002)
            inside[0] -= 1
            lock.release()

    threads = [threading.Thread(target=often) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most[0] == 1 and taken[0] > 20 and list(tmp_path.iterdir()) == []


@both
def test_a_dead_owners_file_is_replaced_by_one_of_those_who_try(tmp_path: Path, kernel: bool, request: pytest.FixtureRequest) -> None:
    choose(kernel, request)
    for attempt in range(10):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        write_owner(folder, pid=GONE, kernel=kernel)
        locks = [Lock(folder) for _ in range(6)]
        barrier = threading.Barrier(6)

        def attempt_to_take(lock: Lock, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            with suppress(CheckpointError):
                lock.take()

        threads = [threading.Thread(target=attempt_to_take, args=(lock,)) for lock in locks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(lock.held for lock in locks) == 1
        assert [path.name for path in folder.iterdir()] == [LOCK]


def test_without_kernel_locks_one_who_was_quicker_is_not_replaced(
    tmp_path: Path, no_kernel_locks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process replaces the dead owner's file after this one has judged it."""
    write_owner(tmp_path, pid=GONE)
    quicker, judged = Lock(tmp_path), Owner.is_dead

    def judge(owner: Owner) -> bool:
        dead = judged(owner)
        if not quicker.held and owner.pid == GONE:
            monkeypatch.setattr(Owner, "is_dead", judged)
            quicker.take()
        return dead

    monkeypatch.setattr(Owner, "is_dead", judge)
    with pytest.raises(CheckpointError, match="still training"):
        Lock(tmp_path).take()
    assert quicker.held and read_owner(tmp_path / LOCK) == Owner.here(False)


# ---- owners that end, and owners that cannot be seen ---------------------------------------------------------------------------


def test_the_lock_of_a_killed_process_is_free_though_programs_it_started_live_on(tmp_path: Path) -> None:
    """Neither a program that was started nor a fork keeps the lock."""
    start_others = HOLD.replace(
        "print(", "import os, subprocess\nsubprocess.Popen(['sleep', '60'])\nif os.fork() == 0: time.sleep(60)\nprint("
    )
    with process(start_others + "time.sleep(60)", str(tmp_path)) as child:
        assert is_taken(tmp_path) is True
        os.kill(child.pid, 9)
        child.wait()
        assert wait_until_free(tmp_path), "held by what it started"
        Lock(tmp_path).take()


def test_a_fork_that_ends_leaves_its_parents_lock_alone(tmp_path: Path) -> None:
    lock = Lock(tmp_path)
    lock.take()
    child = os.fork()
    if child == 0:
        lock.release()
        os._exit(0)
    os.waitpid(child, 0)
    assert is_taken(tmp_path) is True and (tmp_path / LOCK).exists()


def other_namespace() -> tuple[str, ...]:
    """The command that starts a process with process numbers of its own, if this system allows that."""
    command = ("unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child")
    try:
        return command if subprocess.run([*command, "true"], capture_output=True).returncode == 0 else ()
    except OSError:
        return ()


def test_a_run_that_trains_in_another_container_is_running_and_refused(tmp_path: Path) -> None:
    """Its number means another process here, or none. Where no namespace can be made, the process only says that it has one."""
    run = Run.create(Config(name="tiny"), root=tmp_path)
    run.release()
    prefix = other_namespace()
    pretend = "" if prefix else "from minimoe.runs import lock\nlock.namespace = lambda: 'pid:[1]'\n"
    with process(pretend + HOLD + "time.sleep(60)", str(run.path), prefix=prefix):
        assert run.status()["state"] == "running" and list_runs(tmp_path)[0]["state"] == "running"
        with pytest.raises(CheckpointError, match=r"process \d+ of another container \(host .+\) is still training this run: wait for it"):
            run.start()
    assert wait_until_free(run.path) and run.status()["state"] == "killed"
    run.start()


def write_owner(folder: Path, **changes: object) -> Path:
    owner = msgspec.structs.replace(Owner.here(False), **changes)
    (folder / LOCK).write_bytes(msgspec.json.encode(owner))
    return folder / LOCK


UNSEEN: dict[str, dict[str, object]] = {
    "another host": {"host": "elsewhere", "boot": "another"},
    "an earlier boot": {"boot": "another"},
    "another container": {"namespace": "pid:[1]"},
}


@pytest.mark.parametrize("kernel", [True, False], ids=["kernel here", "file here"])
@pytest.mark.parametrize("changes", UNSEEN.values(), ids=UNSEEN)
def test_without_kernel_locks_an_owner_that_is_not_provably_dead_keeps_the_folder(
    tmp_path: Path, changes: dict[str, object], kernel: bool, request: pytest.FixtureRequest
) -> None:
    choose(kernel, request)
    path = write_owner(tmp_path, pid=GONE, **changes)
    text = path.read_bytes()
    with pytest.raises(CheckpointError, match=rf"process {GONE} o.*cannot be seen from here.*remove {re.escape(str(path))}, then resume"):
        Lock(tmp_path).take()
    assert is_taken(tmp_path) is True and path.read_bytes() == text
    path.unlink()
    Lock(tmp_path).take()


@pytest.mark.parametrize("text", [b"", b"{", b"[" * 100_000, b'{"pid": 1e20}'], ids=["empty", "torn", "deep", "forged"])
def test_without_kernel_locks_a_file_that_names_nobody_keeps_the_folder(tmp_path: Path, no_kernel_locks: None, text: bytes) -> None:
    (tmp_path / LOCK).write_bytes(text)
    with pytest.raises(CheckpointError, match=rf"another process is still training.*remove {re.escape(str(tmp_path / LOCK))}, then"):
        Lock(tmp_path).take()


def test_without_kernel_locks_a_replacement_that_was_killed_is_named(tmp_path: Path, no_kernel_locks: None) -> None:
    write_owner(tmp_path, pid=GONE)
    (tmp_path / f"{LOCK}.turn").write_text("")
    with pytest.raises(CheckpointError, match=rf"remove .*{LOCK} and .*{LOCK}\.turn, then resume"):
        Lock(tmp_path).take()


def test_with_kernel_locks_any_text_of_a_dead_owner_is_replaced(tmp_path: Path) -> None:
    """The kernel knows: a power cut, another host's number, a torn text do not matter."""
    (tmp_path / LOCK).write_bytes(b"[" * 100_000)
    lock = Lock(tmp_path)
    lock.take()
    lock.release()
    write_owner(tmp_path, boot="another", host="elsewhere", kernel=True)
    lock.take()
    assert read_owner(tmp_path / LOCK) == Owner.here(True)


def test_a_lock_that_is_no_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / LOCK)
    assert is_taken(tmp_path) is None


@both
@pytest.mark.parametrize("kind", ["link", "dangling link", "folder", "pipe"])
def test_what_is_no_file_is_not_taken_for_the_lock(tmp_path: Path, kind: str, kernel: bool, request: pytest.FixtureRequest) -> None:
    """A folder may come from anywhere: a link in it must not lead minimoe to write over a file elsewhere."""
    choose(kernel, request)
    folder, outside = tmp_path / "run", tmp_path / "outside"
    folder.mkdir()
    if kind == "folder":
        (folder / LOCK).mkdir()
    elif kind == "pipe":
        os.mkfifo(folder / LOCK)
    else:
        (folder / LOCK).symlink_to(outside)
    if kind == "link":
        outside.write_text("mine")
    with pytest.raises(
        CheckpointError, match=rf"{re.escape(str(folder / LOCK))}: is not a file that minimoe wrote: remove it, then resume"
    ):
        Lock(folder).take()
    assert [path.name for path in folder.iterdir()] == [LOCK] and outside.exists() == (kind == "link")
    assert kind != "link" or outside.read_text() == "mine"


@pytest.mark.parametrize("size", [0, 1, 5, 7, 20, 60])
def test_a_lock_whose_text_a_kill_cut_short_is_known_as_one(tmp_path: Path, size: int) -> None:
    whole = msgspec.json.encode(Owner.here(True)) + b"\n"
    (tmp_path / LOCK).write_bytes(whole[:size])
    assert is_lock(tmp_path / LOCK)
    (tmp_path / LOCK).write_bytes(b"something else"[: size or 1])
    assert not is_lock(tmp_path / LOCK)
