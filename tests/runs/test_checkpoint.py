"""Checkpoints: what is saved is what is read, a kill at any moment leaves one whole, and damage is found and named."""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from killed_calls import Killed, die_at

from minimoe.errors import CheckpointError
from minimoe.runs import checkpoint as cp

FILES = ["MANIFEST.sha256", "config.json", "model.safetensors", "optimizer.safetensors", "state.json", "tokenizer.json"]


def save(parent: Path, step: int, value: float = 0.0, tokenizer: str | None = '{"version": "1.0"}') -> Path:
    folder = parent / cp.step_name(step)
    model = {"embed.weight": np.full((5, 3), value, np.float32), "norm.weight": np.arange(3.0)}
    moments = {"m": np.full(8, value + 1), "step": np.array(step, np.int32)}
    cp.save_checkpoint(
        folder, model=model, optimizer=moments, state={"step": step, "lr": 0.1 + 0.2}, config={"name": "t"}, tokenizer_json=tokenizer
    )
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in folder.iterdir()}


# ---- round trips -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "int64", "int32", "uint8", "bool"])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0), (4, 5), (2, 3, 4)])
def test_arrays_of_every_dtype_and_shape_come_back_to_the_bit(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    array = np.asarray(np.random.default_rng(0).normal(size=shape) * 9).astype(dtype)
    cp.save_checkpoint(tmp_path / "step-000001", model={"a": array}, optimizer={}, state={"step": 1}, config={}, tokenizer_json=None)
    back = cp.load_checkpoint(tmp_path / "step-000001").model["a"]
    assert (back.dtype, back.shape, back.tobytes()) == (array.dtype, array.shape, array.tobytes())
    assert back.flags.writeable and back.flags.c_contiguous


@pytest.mark.parametrize(
    "view",
    [lambda a: a.T, lambda a: a[::2], lambda a: a[::-1], lambda a: a[:, ::2], lambda a: a[:, 1], lambda a: np.asfortranarray(a)],
    ids=["transposed", "every second row", "reversed", "every second column", "a column", "fortran order"],
)
def test_views_that_are_not_contiguous_are_saved_with_their_own_values(tmp_path: Path, view: Callable[[Any], Any]) -> None:
    array = view(np.arange(42, dtype=np.float32).reshape(6, 7))
    cp.save_checkpoint(
        tmp_path / "step-000001", model={"a": array}, optimizer={"a": array}, state={"step": 1}, config={}, tokenizer_json=None
    )
    back = cp.load_checkpoint(tmp_path / "step-000001")
    np.testing.assert_array_equal(back.model["a"], array)
    np.testing.assert_array_equal(back.optimizer["a"], array)


def test_numbers_special_values_and_byte_order_survive(tmp_path: Path) -> None:
    special = np.array([np.nan, np.inf, -np.inf, -0.0, 5e-324])
    state = {"step": 7, "third": 1 / 3, "best": np.float64(0.1), "big": 2**63, "losses": np.array([1.5, 2.5]), "never": float("inf")}
    model = {"a": special, "b": np.arange(4, dtype=">f4")}
    cp.save_checkpoint(tmp_path / "step-000007", model=model, optimizer={}, state=state, config={}, tokenizer_json=None)
    back = cp.load_checkpoint(tmp_path / "step-000007")
    assert back.model["a"].tobytes() == special.tobytes()
    np.testing.assert_array_equal(back.model["b"], np.arange(4))
    assert back.state == {"step": 7, "third": 1 / 3, "best": 0.1, "big": 2**63, "losses": [1.5, 2.5], "never": float("inf")}


def test_everything_else_comes_back_too(tmp_path: Path) -> None:
    back = cp.load_checkpoint(save(tmp_path, 300, value=2.0))
    assert (back.step, back.folder.name, back.config) == (300, "step-000300", {"name": "t"})
    assert back.state == {"step": 300, "lr": 0.1 + 0.2}
    assert back.tokenizer_path is not None and json.loads(back.tokenizer_path.read_text()) == {"version": "1.0"}
    assert cp.load_checkpoint(save(tmp_path, 301, tokenizer=None)).tokenizer_path is None


def test_equal_contents_give_equal_bytes_whatever_the_order_of_names(tmp_path: Path) -> None:
    a, b = np.zeros(3), np.ones((2, 2), np.float32)
    for place, arrays in (("one", {"a": a, "b": b}), ("two", {"b": b, "a": a})):
        state = {"x": 1, "step": 1} if place == "one" else {"step": 1, "x": 1}
        folder = tmp_path / place / "step-000001"
        cp.save_checkpoint(folder, model=arrays, optimizer=arrays, state=state, config={}, tokenizer_json=None)
    assert contents(tmp_path / "one" / "step-000001") == contents(tmp_path / "two" / "step-000001")


def test_the_manifest_is_one_that_sha256sum_reads(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    lines = (folder / "MANIFEST.sha256").read_text().splitlines()
    assert lines == [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}" for name in FILES[1:]]
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "MANIFEST.sha256"], cwd=folder, check=True)


def test_a_dtype_that_could_not_be_read_back_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"^head\.weight: dtype complex128 could not be read back"):
        cp.save_checkpoint(
            tmp_path / "step-000001", model={"head.weight": np.zeros(2, complex)}, optimizer={}, state={}, config={}, tokenizer_json=None
        )
    assert list(tmp_path.iterdir()) == []


def test_without_the_optimizer_its_file_is_not_read(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    (folder / "optimizer.safetensors").unlink()
    back = cp.load_checkpoint(folder, optimizer=False)
    assert back.optimizer == {} and set(back.model) == {"embed.weight", "norm.weight"}


# ---- damage ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole() -> Iterator[dict[str, bytes]]:
    with tempfile.TemporaryDirectory() as parent:
        yield contents(save(Path(parent), 200))


@settings(deadline=None, max_examples=80)
@given(name=st.sampled_from(FILES), position=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_anywhere_is_found_and_named(whole: dict[str, bytes], name: str, position: float, bit: int) -> None:
    data = bytearray(whole[name])
    data[int(position * len(data))] ^= 1 << bit
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "step-000200"
        folder.mkdir()
        for other, good in whole.items():
            (folder / other).write_bytes(bytes(data) if other == name else good)
        with pytest.raises(CheckpointError) as caught:
            cp.load_checkpoint(folder)
    message = str(caught.value)
    if name == "MANIFEST.sha256":  # a wrong digest in it looks like damage to its file
        assert message.startswith("step-000200/") and "(damaged)" in message
    else:
        assert message == f"step-000200/{name}: its SHA-256 does not match the manifest (damaged)"


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_truncated_file_is_found_and_named(tmp_path: Path, name: str, share: float) -> None:
    path = save(tmp_path, 200) / name
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(CheckpointError, match=rf"^step-000200/{name}: .*\(damaged\)$"):
        cp.load_checkpoint(path.parent)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    folder = save(tmp_path, 200)
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"^step-000200/{name}: is missing$"):
        cp.load_checkpoint(folder)


@pytest.mark.parametrize("line", range(5))
def test_a_manifest_that_lost_a_line_is_found(tmp_path: Path, line: int) -> None:
    path = save(tmp_path, 200) / "MANIFEST.sha256"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:line] + lines[line + 1 :]))
    with pytest.raises(CheckpointError, match=rf"^step-000200/MANIFEST\.sha256: does not list {FILES[1 + line]} \(damaged\)$"):
        cp.load_checkpoint(path.parent)


@pytest.mark.parametrize("extra", ["x\n", f"{'0' * 64}  state.json", f"{'0' * 64}  ../secret\n"])
@pytest.mark.parametrize("before", [True, False])
def test_a_manifest_with_something_added_is_found(tmp_path: Path, extra: str, before: bool) -> None:
    path = save(tmp_path, 200) / "MANIFEST.sha256"
    path.write_text(extra + path.read_text() if before else path.read_text() + extra)
    with pytest.raises(CheckpointError, match=r"^step-000200/MANIFEST\.sha256: .*\(damaged\)$"):
        cp.load_checkpoint(path.parent)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "config.json"])
def test_garbage_is_one_clear_line_even_unverified(tmp_path: Path, name: str) -> None:
    folder = save(tmp_path, 200)
    (folder / name).write_bytes(b"\xff[]garbage")
    with pytest.raises(CheckpointError, match=f"^step-000200/{name}: not ") as caught:
        cp.load_checkpoint(folder, verify=False)
    assert "\n" not in str(caught.value)


def test_no_such_checkpoint_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="step-000001: no such checkpoint"):
        cp.load_checkpoint(tmp_path / "step-000001")


# ---- which checkpoint --------------------------------------------------------------------------------------------------------


def test_checkpoints_are_listed_by_step_and_nothing_else_is(tmp_path: Path) -> None:
    for name in ("step-1000000", "step-000020", "step-000003", "step-12", "other", ".step-000004.tmp-00000000"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-000005").write_text("a file")
    assert [path.name for path in cp.checkpoints(tmp_path)] == ["step-000003", "step-000020", "step-1000000"]
    assert cp.checkpoints(tmp_path / "absent") == []


def test_the_newest_whole_one_is_found_and_the_damage_of_newer_ones_told(tmp_path: Path) -> None:
    for step in (100, 200, 300):
        save(tmp_path, step, value=step)
    (tmp_path / "step-000300" / "state.json").unlink()
    (tmp_path / "step-000200" / "model.safetensors").write_bytes(b"")
    found, problems = cp.newest_whole(tmp_path)
    assert found.step == 100 and found.model["embed.weight"][0, 0] == 100
    assert problems == [
        "step-000300/state.json: is missing",
        "step-000200/model.safetensors: its SHA-256 does not match the manifest (damaged)",
    ]
    (tmp_path / "step-000100" / "MANIFEST.sha256").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint is whole: step-000300/.*; step-000200/.*; step-000100/MANIFEST"):
        cp.newest_whole(tmp_path)


def test_no_checkpoint_at_all_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        cp.newest_whole(tmp_path / "checkpoints")


def test_pruning_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5):
        save(tmp_path, step)
    cp.prune(tmp_path, keep=2, best=2)
    assert [cp.step_of(path) for path in cp.checkpoints(tmp_path)] == [2, 4, 5]
    cp.prune(tmp_path, keep=0, best=None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000005"]


def test_the_best_is_named_in_a_text_file(tmp_path: Path) -> None:
    assert cp.read_best(tmp_path) is None
    save(tmp_path, 40)
    cp.write_best(tmp_path, 40)
    assert (tmp_path / "best").read_text() == "step-000040\n" and cp.read_best(tmp_path) == 40
    cp.write_best(tmp_path, 41)
    assert cp.read_best(tmp_path) is None, "it is not there"
    (tmp_path / "best").write_bytes(b"\xff\xfe")
    assert cp.read_best(tmp_path) is None


# ---- kills and full disks ----------------------------------------------------------------------------------------------------


def save_200(parent: Path) -> None:
    save(parent, 200, value=2.0)


def save_100_again(parent: Path) -> None:
    save(parent, 100, value=3.0)


def save_and_prune(parent: Path) -> None:
    save(parent, 200, value=2.0)
    cp.write_best(parent, 200)
    cp.prune(parent, keep=1, best=200)


@pytest.mark.parametrize("action", [save_200, save_100_again, save_and_prune])
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path, action: Callable[[Path], None]) -> None:
    for moment in range(200):
        parent = tmp_path / str(moment)
        save(parent, 100, value=1.0)
        with pytest.MonkeyPatch.context() as monkeypatch:
            die_at(monkeypatch, moment)
            try:
                action(parent)
                finished = True
            except Killed:
                finished = False
        found, problems = cp.newest_whole(parent)
        assert problems == [], f"killed at call {moment}"
        assert all(cp.load_checkpoint(path) for path in cp.checkpoints(parent)), "none that is listed is half removed"
        assert found.model["embed.weight"][0, 0] in {1.0, 2.0, 3.0}
        assert found.optimizer["m"][0] == found.model["embed.weight"][0, 0] + 1
        save(parent, 300)
        assert not [entry.name for entry in parent.iterdir() if entry.name.startswith(".")], "the next save clears what the dead one left"
        if finished:
            break
    assert moment > 9, "the kills were spread over the whole save"


def test_every_file_is_synced_with_all_its_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, synced = os.fsync, []

    def fsync(descriptor: int) -> None:
        synced.append((os.fstat(descriptor).st_ino, os.fstat(descriptor).st_size))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    folder = save(tmp_path, 1)
    assert {(entry.stat().st_ino, entry.stat().st_size) for entry in folder.iterdir()} <= set(synced)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("moment", [0, 3, 6])
def test_a_full_disk_is_one_line_and_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, moment: int) -> None:
    before = contents(save(tmp_path, 100))
    real, calls = os.fsync, []

    def fsync(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > moment:
            raise OSError(code, os.strerror(code))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    for step in (100, 200):
        with pytest.raises(CheckpointError) as caught:
            save(tmp_path, step, value=5.0)
        assert str(caught.value) == (
            f"{tmp_path / cp.step_name(step)}: cannot be saved: {os.strerror(code)} (earlier checkpoints are untouched)"
        )
        calls.clear()
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-000100"]
    assert contents(tmp_path / "step-000100") == before


def test_a_rename_that_fails_gives_the_replaced_checkpoint_its_name_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(save(tmp_path, 100))
    real = os.replace

    def replace(source: Path, target: Path) -> None:
        if ".tmp-" in source.name:
            raise OSError(errno.EACCES, "Permission denied")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(CheckpointError, match="Permission denied"):
        save(tmp_path, 100, value=5.0)
    assert contents(tmp_path / "step-000100") == before and len(list(tmp_path.iterdir())) == 1


def test_a_file_that_the_system_cuts_short_is_one_line(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    save(tmp_path, 100)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    big = {"a": np.zeros(100_000)}
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="step-000200: cannot be saved: File too large"):
            cp.save_checkpoint(tmp_path / "step-000200", model=big, optimizer={}, state={}, config={}, tokenizer_json=None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-000100"]


def test_a_place_that_is_no_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file.step-000001: cannot be saved: "):
        save(tmp_path / "file", 1)


def test_an_atomic_write_that_fails_keeps_the_old_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last"
    cp.write_atomically(path, "old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
        with pytest.raises(OSError, match="Input/output"):
            cp.write_atomically(path, "new")
    assert [entry.read_text() for entry in tmp_path.iterdir()] == ["old"]


def forge(folder: Path, name: str, data: bytes) -> Path:
    """Replace a file of a checkpoint, and its digest in the manifest."""
    before = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / name).write_bytes(data)
    manifest = (folder / cp.MANIFEST).read_text()
    (folder / cp.MANIFEST).write_text(manifest.replace(before, hashlib.sha256(data).hexdigest()))
    return folder


def test_a_header_without_arrays_behind_it_is_refused_within_a_second(tmp_path: Path) -> None:
    empty = b'"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    header = b"{" + b",".join(b'"%d":{%b' % (i, empty) for i in range(500_000)) + b"}"
    folder = forge(save(tmp_path, 100), "model.safetensors", len(header).to_bytes(8, "little") + header)
    began = time.process_time()
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: a header of {len(header)} bytes for 0 bytes of arrays"):
        cp.load_checkpoint(folder)
    assert time.process_time() - began < 1


def test_a_tokenizer_that_is_not_text_is_named(tmp_path: Path) -> None:
    saved = cp.load_checkpoint(forge(save(tmp_path, 100), cp.TOKENIZER, b"\xff{}"))
    with pytest.raises(CheckpointError, match=r"step-000100/tokenizer\.json: is not UTF-8 text \(damaged\)"):
        saved.tokenizer_json()
