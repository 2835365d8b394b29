"""Model folders: one file or shards, errors between index and shards named, nothing read outside the folder, no half-written folder."""

import errno
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from model_folders import small, write

import minimoe as mm
from minimoe.errors import CheckpointError, Notice
from minimoe.pretrained.file import write_tensor_file
from minimoe.pretrained.folder import ModelFolder, is_model_folder, write_model_folder

CONFIG = {"model_type": "llama", "hidden_size": 8}
ONE, TWO, INDEX = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"
ARRAYS = {f"layer.{i}": np.full((4, 2), i, np.float32) for i in range(4)}


def folder_of(path: Path, files: dict[str, Any], config: Any = CONFIG) -> Path:
    """A folder with files: a dict of arrays is a safetensors file, other values are JSON, bytes are themselves."""
    path.mkdir(exist_ok=True)
    for name, content in {"config.json": config, **files}.items():
        if isinstance(content, bytes):
            (path / name).write_bytes(content)
        elif content is not None and name.endswith(".json"):
            (path / name).write_text(json.dumps(content))
        elif content is not None:
            (path / name).write_bytes(safetensors.numpy.save(content))
    return path


def sharded(path: Path, weight_map: dict[str, Any] | None = None, **changes: Any) -> Path:
    """layer.0 and layer.1 in one file, the others in a second; `changes` to the index's map."""
    names = list(ARRAYS)
    shards = {ONE: {name: ARRAYS[name] for name in names[:2]}, TWO: {name: ARRAYS[name] for name in names[2:]}}
    listed = weight_map if weight_map is not None else {name: shard for shard, arrays in shards.items() for name in arrays}
    return folder_of(path, {**shards, INDEX: {"metadata": {"total_size": 128}, "weight_map": {**listed, **changes}}})


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        ModelFolder(path)
    assert str(caught.value).isprintable()
    return str(caught.value)


# ---- reading -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda path: folder_of(path, {"model.safetensors": ARRAYS}), sharded], ids=["one file", "shards"])
def test_a_folder_gives_its_config_and_every_tensor(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    with ModelFolder(make(tmp_path / "m")) as folder:
        assert folder.config == CONFIG and folder.keys() == ARRAYS.keys()
        for name, array in ARRAYS.items():
            out = np.empty((2, 4)).T
            folder.fill(name, out)
            assert np.array_equal(out, array) and np.array_equal(folder.raw(name), array)
            assert folder.entry(name)[:2] == ("F32", (4, 2)) and name in folder.file_of(name).entries
            folder.release(name)
            assert np.array_equal(folder.raw(name), array)


def test_files_are_found_from_a_string_and_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sharded(tmp_path / "m")
    monkeypatch.chdir(tmp_path)
    assert ModelFolder("m").keys() == ModelFolder("./m/").keys() == ARRAYS.keys()
    monkeypatch.chdir(tmp_path / "m")
    assert ModelFolder(".").keys() == ARRAYS.keys()


def test_a_tensor_that_is_not_there_or_does_not_fit_is_named(tmp_path: Path) -> None:
    arrays = {"a": np.zeros((2, 3), np.float32), "ids": np.zeros(2, np.int32)}
    folder = ModelFolder(folder_of(tmp_path / "m", {"model.safetensors": arrays}))
    with pytest.raises(CheckpointError, match=r"m: has no tensor 'b\\n'"):
        folder.entry("b\n")
    with pytest.raises(CheckpointError, match=r"m: tensor 'a': a tensor of shape \[2, 3\] where \[3, 2\] is expected"):
        folder.fill("a", np.empty((3, 2), np.float32))
    with pytest.raises(CheckpointError, match=r"m: tensor 'ids': dtype I32 cannot be the dtype of a weight"):
        folder.fill("ids", np.empty(2, np.float32))


def test_model_safetensors_takes_precedence_over_an_index(tmp_path: Path) -> None:
    folder_of(sharded(tmp_path / "m"), {"model.safetensors": {"a": np.zeros(1)}})
    assert ModelFolder(tmp_path / "m").keys() == {"a"}


def test_safetensors_files_that_the_index_does_not_name_are_ignored(tmp_path: Path) -> None:
    folder_of(sharded(tmp_path / "m"), {"consolidated.safetensors": {"layer.0": np.zeros(1)}, "pytorch_model.bin": b"x"})
    assert ModelFolder(tmp_path / "m").keys() == ARRAYS.keys()


# ---- what a folder lacks -----------------------------------------------------------------------------------------------------


def test_a_folder_without_a_model_is_refused_with_what_it_needs(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none").endswith("none: no such folder")
    message = refusal(folder_of(tmp_path / "m", {"model.safetensors": ARRAYS}, config=None))
    assert "needs config.json and model.safetensors (or shards with model.safetensors.index.json): no config.json there" in message
    (tmp_path / "m" / "model.safetensors").unlink()
    assert refusal(folder_of(tmp_path / "m", {})).endswith("model.safetensors.index.json): no weights there")


@pytest.mark.parametrize("names", [[ONE, TWO], [ONE]])
def test_shards_without_an_index_are_refused(tmp_path: Path, names: list[str]) -> None:
    message = refusal(folder_of(tmp_path / "m", dict.fromkeys(names, ARRAYS)))
    assert f"has '{ONE}'{' and 1 more' if len(names) > 1 else ''}, but no model.safetensors, and no {INDEX}" in message


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pth"])
def test_a_folder_of_pickles_is_refused_with_the_way_to_convert_it(tmp_path: Path, name: str) -> None:
    message = refusal(folder_of(tmp_path / "m", {name: b"PK\x03\x04"}))
    assert f"has no model.safetensors, and '{name}' is a pickle, which runs" in message and "save_pretrained" in message


def test_a_pickle_under_another_name_is_refused(tmp_path: Path) -> None:
    assert "is a pickle" in refusal(folder_of(tmp_path / "m", {"model.safetensors": b"PK\x03\x04" + bytes(60)}))


@pytest.mark.parametrize("config, message", [
    (b" ", "not JSON: Expecting value: line 1 column 2 (char 1)"), (b"{", "not JSON: Expecting property name"),
    (b"\xff\xfe\xff", "not UTF-16 text"),
    (b"[" * 200_000, "nested more than 100 deep"), (b"1" * 10_000, "has a number that is too long"),
    (b'{"model_type": "\\ud800"}', "has half of a Unicode surrogate pair in its text"),
])  # fmt: skip
def test_a_config_that_is_not_json_is_refused(tmp_path: Path, config: bytes, message: str) -> None:
    assert f"config.json: {message}" in refusal(folder_of(tmp_path / "m", {"model.safetensors": ARRAYS}, config))


@pytest.mark.parametrize("config", [b"[1]", b"1", b"null", b'"a"'])
def test_a_config_that_is_not_an_object_is_refused(tmp_path: Path, config: bytes) -> None:
    assert "config.json: expected a JSON object" in refusal(folder_of(tmp_path / "m", {"model.safetensors": ARRAYS}, config))


@pytest.mark.parametrize("text, ends", [
    ('{"eos_token_id": [3, 2, 3, "x", true]}', (3, 2)), ('{"eos_token_id": 4}', (4,)), ("{}", (1,)), ("[" * 100_000, (1,)), ("\xff", (1,)),
    ('{"eos_token_id": ' + "9" * 5000 + "}", (1,)), ("[1]", (1,)),
])  # fmt: skip
def test_the_end_tokens_are_those_of_generation_config_or_where_it_cannot_be_read_of_config(
    tmp_path: Path, text: str, ends: tuple[int, ...]
) -> None:
    folder = write(tmp_path / "m", small("llama", eos_token_id=1))
    (folder / "generation_config.json").write_bytes(text.encode("latin-1"))
    with warnings.catch_warnings(record=True) as notices:
        assert mm.load(folder).end_tokens == ends
    readable = text.startswith("{") and len(text) < 100
    said = [str(notice.message) for notice in notices]
    assert said == [] if readable else len(said) == 1 and "generation_config.json: " in said[0] and "of config.json instead" in said[0]


def test_a_config_that_is_too_large_is_refused(tmp_path: Path) -> None:
    assert "config.json: is larger than 10000000 bytes" in refusal(folder_of(tmp_path / "m", {}, b'{"a": "' + b"x" * 10_000_000 + b'"}'))


def test_a_config_that_is_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m" / "config.json").mkdir(parents=True)
    assert "config.json: is not a file" in refusal(tmp_path / "m")


# ---- index and shards --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "index",
    [b" ", b"[]", b"{}", b'{"weight_map": []}', b'{"weight_map": {"a": 1}}', b'{"weight_map": {"a": null}}',
     b'{"weight_map": {"a": ["b"]}}', b"\xff", b'{"weight_map": ' + b"[" * 200_000, b'{"metadata": ' + b"[" * 200_000,
     b'{"weight_map": null}'],
    ids=lambda index: str(index[:30]),
)  # fmt: skip
def test_an_index_that_maps_no_names_to_files_is_refused(tmp_path: Path, index: bytes) -> None:
    message = refusal(folder_of(sharded(tmp_path / "m"), {INDEX: index}))
    assert f"{INDEX}: expected JSON with a weight_map of tensor names to file names" in message


@pytest.mark.parametrize(
    "name",
    ["../other/model.safetensors", "/etc/passwd", "..", ".", "", "a/b.safetensors", "a\\b.safetensors", "C:model.safetensors",
     "C:\\model.safetensors", "model.safetensors\x00", "a\n.safetensors", "./" + ONE],
)  # fmt: skip
def test_a_file_name_that_leaves_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    folder_of(tmp_path / "other", {"model.safetensors": ARRAYS})
    message = refusal(sharded(tmp_path / "m", **{"layer.9": name}))
    assert "leaves the folder: expected a plain name" in message and repr(name)[1:-1] in message


@pytest.mark.parametrize("name", ["model.safetensors", ONE, INDEX, "config.json"])
def test_a_link_that_leaves_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    folder = sharded(tmp_path / "m")
    target = folder_of(tmp_path / "other", {"model.safetensors": ARRAYS, ONE: ARRAYS, INDEX: {"weight_map": {}}}) / name
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(target)
    assert f"{name}: is a link that leaves the folder" in refusal(folder)


def test_a_link_that_stays_in_the_folder_and_a_link_to_the_folder_are_followed(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m", {"weights.safetensors": ARRAYS})
    (folder / "model.safetensors").symlink_to("weights.safetensors")
    (tmp_path / "link").symlink_to(folder)
    assert ModelFolder(tmp_path / "link").keys() == ARRAYS.keys()


def test_a_snapshot_of_the_hubs_cache_is_read_and_its_links_reach_only_its_own_blobs(tmp_path: Path) -> None:
    home = tmp_path / "models--a--b"
    snapshot = home / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    folder_of(home / "blobs", {"model.safetensors": ARRAYS})
    folder_of(home / "other", {"model.safetensors": ARRAYS})
    for name in ("config.json", "model.safetensors"):
        (snapshot / name).symlink_to(Path("..") / ".." / "blobs" / name)
    assert ModelFolder(snapshot).keys() == ARRAYS.keys()
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(home / "other" / "model.safetensors")
    assert "leaves the folder" in refusal(snapshot)


def test_links_that_lead_to_each_other_are_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m", {})
    (folder / "model.safetensors").symlink_to("model.safetensors")
    assert "model.safetensors: cannot be read" in refusal(folder)


def test_a_shard_that_is_missing_is_named(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m")
    (folder / TWO).unlink()
    assert f"{TWO}: cannot be read: No such file or directory" in refusal(folder)


def test_a_shard_that_is_a_pickle_is_refused(tmp_path: Path) -> None:
    folder = folder_of(sharded(tmp_path / "m", **{"layer.9": "pytorch_model.bin"}), {"pytorch_model.bin": b"x"})
    assert "pytorch_model.bin: is a pickle" in refusal(folder)


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m")
    (folder / TWO).write_bytes((folder / TWO).read_bytes()[:-1])
    assert f"{TWO}: tensor 'layer.3' would end at byte" in refusal(folder)


def test_a_tensor_that_its_shard_does_not_have_is_named(tmp_path: Path) -> None:
    assert f"{INDEX}: says that tensor 'layer.9' is in {ONE}, which does not have it" in refusal(
        sharded(tmp_path / "m", **{"layer.9": ONE})
    )
    assert f"{INDEX}: says that tensor 'layer.0' is in {TWO}, which does not have it" in refusal(
        sharded(tmp_path / "m", **{"layer.0": TWO})
    )


@pytest.mark.parametrize(
    "listed, says",
    [
        ({"layer.0": ONE, "layer.2": TWO, "layer.3": TWO}, f"tensor 'layer.1' of {ONE}, which is read all the same"),
        ({"layer.0": ONE, "layer.3": TWO}, f"tensor 'layer.1' of {ONE} and 1 more, which are read all the same"),
    ],
)
def test_a_tensor_of_a_shard_that_the_index_does_not_list_is_read_and_named(tmp_path: Path, listed: dict[str, str], says: str) -> None:
    with pytest.warns(Notice, match=rf"{INDEX}: does not list {says}$"):
        folder = ModelFolder(sharded(tmp_path / "m", listed))
    assert folder.keys() == ARRAYS.keys() and np.array_equal(folder.raw("layer.1"), ARRAYS["layer.1"])


def test_a_tensor_in_two_shards_is_named(tmp_path: Path) -> None:
    folder = folder_of(sharded(tmp_path / "m"), {TWO: {**ARRAYS}})
    assert f"tensor 'layer.0' is in two files: {ONE} and {TWO}" in refusal(folder)


def test_a_message_shows_tensor_names_escaped(tmp_path: Path) -> None:
    assert "'layer\\x1b[2J\\n'" in refusal(sharded(tmp_path / "m", **{"layer\x1b[2J\n": ONE}))


# ---- what is a model folder --------------------------------------------------------------------------------------------------


def test_a_model_folder_is_distinguished_from_a_run_and_a_checkpoint(tmp_path: Path) -> None:
    assert is_model_folder(sharded(tmp_path / "m")) and is_model_folder(str(tmp_path / "m"))
    for name in ("config.toml", "MANIFEST.sha256"):
        folder = sharded(tmp_path / name[:4])
        (folder / name).write_text("")
        assert not is_model_folder(folder)
    assert not is_model_folder(tmp_path) and not is_model_folder(tmp_path / "none") and not is_model_folder("a\0b")
    assert not is_model_folder(tmp_path / "m" / "config.json")


# ---- writing -----------------------------------------------------------------------------------------------------------------


PLAN = {name: ("F32", array.shape) for name, array in ARRAYS.items()}


def names_in(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def test_a_written_folder_is_read_back(tmp_path: Path) -> None:
    write_model_folder(tmp_path / "out" / "m", CONFIG, PLAN, ARRAYS.__getitem__, tokenizer_json='{"é": 1}')
    assert names_in(tmp_path / "out") == ["m"] and is_model_folder(tmp_path / "out" / "m")
    assert names_in(tmp_path / "out" / "m") == ["config.json", "model.safetensors", "tokenizer.json"]
    assert (tmp_path / "out" / "m" / "tokenizer.json").read_bytes() == '{"é": 1}'.encode()
    with ModelFolder(tmp_path / "out" / "m") as folder:
        assert folder.config == CONFIG and folder.files["model.safetensors"].metadata == {"format": "pt"}
        assert all(np.array_equal(folder.raw(name), array) for name, array in ARRAYS.items()) and folder.keys() == ARRAYS.keys()


@pytest.mark.parametrize(
    "shard_bytes, expected",
    [(128, [4]), (127, [3, 1]), (96, [3, 1]), (64, [2, 2]), (63, [1, 1, 1, 1]), (1, [1, 1, 1, 1])],
)
def test_shards_are_filled_in_the_order_of_the_specs(tmp_path: Path, shard_bytes: int, expected: list[int]) -> None:
    write_model_folder(tmp_path / "m", CONFIG, PLAN, ARRAYS.__getitem__, shard_bytes)
    with ModelFolder(tmp_path / "m") as folder:
        assert [len(file.entries) for file in folder.files.values()] == expected
        assert [name for file in folder.files.values() for name in file.entries] == list(ARRAYS)
        assert all(np.array_equal(folder.raw(name), array) for name, array in ARRAYS.items())
        assert all(file.metadata == {"format": "pt"} for file in folder.files.values())
    if len(expected) > 1:
        assert list(folder.files) == [f"model-{i + 1:05d}-of-{len(expected):05d}.safetensors" for i in range(len(expected))]
        assert json.loads((tmp_path / "m" / INDEX).read_text())["metadata"] == {"total_size": 128}
    else:
        assert names_in(tmp_path / "m") == ["config.json", "model.safetensors"]


def test_a_model_without_tensors_is_written_as_one_file(tmp_path: Path) -> None:
    write_model_folder(tmp_path / "m", CONFIG, {}, ARRAYS.__getitem__)
    assert ModelFolder(tmp_path / "m").keys() == set()


def test_a_folder_that_is_taken_is_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "mine").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("m", "file", "link"):
        with pytest.raises(CheckpointError, match=rf"{name}: exists already: name a folder that is new or empty"):
            write_model_folder(tmp_path / name, CONFIG, PLAN, ARRAYS.__getitem__)
    assert names_in(tmp_path) == ["file", "link", "m"] and names_in(tmp_path / "m") == ["mine"]


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    write_model_folder(tmp_path / "m", CONFIG, PLAN, ARRAYS.__getitem__)
    assert ModelFolder(tmp_path / "m").keys() == ARRAYS.keys()


def test_an_error_halfway_leaves_nothing(tmp_path: Path) -> None:
    def produce(name: str) -> Any:
        if name == "layer.3":
            raise RuntimeError("stop")
        return ARRAYS[name]

    with pytest.raises(RuntimeError, match="stop"):
        write_model_folder(tmp_path / "m", CONFIG, PLAN, produce, shard_bytes=64)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_line_with_the_folders_name_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=rf"^{tmp_path}/m: cannot be written: No space left on device$"):
        write_model_folder(tmp_path / "m", CONFIG, PLAN, ARRAYS.__getitem__)
    assert not list(tmp_path.iterdir())


def test_a_parent_that_is_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file/m: cannot be written"):
        write_model_folder(tmp_path / "file" / "m", CONFIG, PLAN, ARRAYS.__getitem__)


@pytest.mark.skipif(os.name == "nt", reason="kills by signal")
def test_a_kill_leaves_no_folder_and_the_next_writer_clears_what_it_left(tmp_path: Path) -> None:
    script = f"""
import os, signal
import numpy as np
from minimoe.pretrained.folder import write_model_folder
def produce(name):
    if name == "b":
        os.kill(os.getpid(), signal.SIGKILL)
    return np.zeros(2, np.float32)
write_model_folder({str(tmp_path / "m")!r}, {{}}, {{"a": ("F32", (2,)), "b": ("F32", (2,))}}, produce, shard_bytes=8)
"""
    assert subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[2], check=False).returncode == -9
    (left,) = names_in(tmp_path)
    assert left.startswith(".m.tmp-")
    (tmp_path / ".n.tmp-12345678").mkdir()
    write_model_folder(tmp_path / "m", CONFIG, PLAN, ARRAYS.__getitem__)
    assert names_in(tmp_path) == [".n.tmp-12345678", "m"]


def test_a_written_shard_is_what_write_tensor_file_writes(tmp_path: Path) -> None:
    write_model_folder(tmp_path / "m", CONFIG, PLAN, ARRAYS.__getitem__)
    write_tensor_file(tmp_path / "a.safetensors", PLAN, ARRAYS.__getitem__, {"format": "pt"})
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == (tmp_path / "a.safetensors").read_bytes()
