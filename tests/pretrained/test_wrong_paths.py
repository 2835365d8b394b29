"""What people give in place of a model, and what lies in place of its files: each message says what it is and what to do."""

import json
import os
from pathlib import Path

import pytest
from command_line import call, one_line
from model_folders import small, write

import minimoe as mm
from minimoe.errors import CheckpointError, UserError
from minimoe.pretrained.loading import open_model

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 99\n"
POINTER = "is a git-lfs pointer, since the file itself was not fetched: run `git lfs install && git lfs pull` in its folder"
PAGE = "is a web page, perhaps one to log in, that was downloaded in place of the file"
LOOKALIKES = [
    (LFS, POINTER),
    (b"<!DOCTYPE html>\n<html><head><title>Sign in</title>", PAGE),
    (b"\xef\xbb\xbf\n <HTML>", PAGE),
    (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', PAGE),
    (b"", "is empty: its download did not begin; fetch it again: hf download ORG/NAME --local-dir FOLDER"),
    (b"Entry not found", "is a server's error message in place of the file: log in (hf auth login)"),
    (b'{"error":"Access to model a/b is restricted"}', "is a server's error message in place of the file"),
    (b"Invalid username or password.", "is a server's error message in place of the file"),
    (bytes(4096), "begins with nothing but zeros: its download did not end"),
    (b"GGUF\x03\x00\x00\x00" + bytes(64), "is GGUF, the format of llama.cpp"),
    (b"\x89HDF\r\n\x1a\n" + bytes(64), "is HDF5, TensorFlow's format"),
    (b"\x1f\x8b\x08" + bytes(64), "is an archive: unpack it"),
    (b"\x28\xb5\x2f\xfd" + bytes(64), "is an archive: unpack it"),
    (b"a.txt".ljust(257, b"\x00") + b"ustar" + bytes(250), "is an archive: unpack it"),
]


def refusal(path: Path | str) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_model(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- files that are not what their name says -----------------------------------------------------------------------------------


@pytest.mark.parametrize("data, says", LOOKALIKES, ids=lambda value: str(value[:12]))
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_of_a_model_that_is_something_else_is_said_to_be_that(tmp_path: Path, name: str, data: bytes, says: str) -> None:
    folder = write(tmp_path / "m", small("llama"))
    (folder / name).write_bytes(data)
    assert refusal(folder).startswith(f"{folder / name}: {says}")


@pytest.mark.parametrize("name", ["model-00002-of-00003.safetensors", "model.safetensors.index.json"])
def test_a_shard_or_index_that_is_a_pointer_is_named(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path / "m", small("llama"), shard_bytes=20_000)
    assert (folder / name).exists()
    (folder / name).write_bytes(LFS)
    assert refusal(folder) == f"{folder / name}: {POINTER}"


@pytest.mark.parametrize("data, says", LOOKALIKES, ids=lambda value: str(value[:12]))
def test_a_tokenizer_that_is_something_else_is_said_to_be_that_and_the_model_opens(tmp_path: Path, data: bytes, says: str) -> None:
    folder = write(tmp_path / "m", small("llama"))
    (folder / "tokenizer.json").write_bytes(data)
    loaded = open_model(folder)
    with pytest.raises(UserError) as caught:
        _ = loaded.text
    assert str(caught.value).startswith(f"{folder / 'tokenizer.json'}: {says}")


def test_a_short_header_and_a_description_that_mention_such_words_are_read(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", small("llama", description="<html> GGUF version https://git-lfs.github.com/spec/v1"))
    assert open_model(folder).model.config.n_layers == 2


# ---- names on the hub, and the hub's cache ---------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, and an empty cache of the hub."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name in ("HF_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return tmp_path / "here"


def cached(home: Path, name: str = "org/Some-Model_1.5", *revisions: str, main: str | None = "1111") -> Path:
    """A model in the hub's cache, as huggingface_hub lays it out.   -> its folder"""
    top = home / "hub" / f"models--{name.replace('/', '--')}"
    for revision in revisions or ("1111",):
        write(top / "snapshots" / revision, small("llama"))
    if main is not None:
        (top / "refs").mkdir()
        (top / "refs" / "main").write_text(main)
    return top


@pytest.mark.parametrize("verb", ["generate", "eval", "inspect", "convert"])
@pytest.mark.parametrize(
    "given", ["org/Some-Model_1.5", "https://huggingface.co/org/Some-Model_1.5", "https://huggingface.co/org/Some-Model_1.5/tree/main"]
)
def test_a_name_on_the_hub_is_answered_with_the_command_that_downloads_it(
    here: Path, capsys: pytest.CaptureFixture[str], verb: str, given: str
) -> None:
    code, _, err = call(capsys, verb, given, *(["out"] if verb == "convert" else []))
    assert code == 2
    assert one_line(err) == (
        f"{given}: no such folder or run; if it is a model on the Hugging Face hub, download it first, since minimoe reads folders: "
        "hf download org/Some-Model_1.5 --local-dir Some-Model_1.5"
    )


def test_a_name_that_the_hubs_cache_has_is_answered_with_its_folder(here: Path, tmp_path: Path) -> None:
    top = cached(tmp_path / "hf")
    says = f"the hub's cache on this machine has org/Some-Model_1.5: give its folder, {top}/snapshots/1111"
    assert refusal("org/Some-Model_1.5").endswith(says)
    assert mm.load(top / "snapshots" / "1111").config.n_layers == 2


@pytest.mark.parametrize("given", ["runs/none", "none", "a/b/c", "folder/none", "../a/b", "/a/b", "a/b.toml", "a /b", "a\0/b", "./a"])
def test_a_path_that_is_no_name_on_the_hub_is_a_run_that_is_missing(here: Path, given: str) -> None:
    (here / "folder").mkdir()
    with pytest.raises((CheckpointError, ValueError)) as caught:
        open_model(given)
    assert "hub" not in str(caught.value)


def test_a_folder_of_the_hubs_cache_is_answered_with_the_snapshot_in_it(tmp_path: Path) -> None:
    top = cached(tmp_path, "a/b", "1111", "2222", main="1111\n")
    os.utime(top / "snapshots" / "1111", (0, 0))
    answer = f"is a model's folder in the hub's cache: give the snapshot in it, {top}/snapshots"
    assert refusal(top) == f"{top}: {answer}/1111"
    assert refusal(top / "snapshots") == f"{top / 'snapshots'}: {answer}/1111"
    hub = tmp_path / "hub"
    assert refusal(hub) == f"{hub}: is the hub's cache: give the snapshot of a model in it, such as {top}/snapshots/1111"
    for main in ("gone", "../snapshots/1111", "\xff" * 300, ""):
        (top / "refs" / "main").write_text(main, encoding="latin-1")
        assert refusal(top) == f"{top}: {answer}/2222"
    (top / "refs" / "main").unlink()
    assert refusal(top) == f"{top}: {answer}/2222"


def test_a_cached_model_without_a_snapshot_and_a_data_set_are_said_to_be_that(tmp_path: Path) -> None:
    (tmp_path / "models--a--b" / "blobs").mkdir(parents=True)
    assert "is a model's folder in the hub's cache, and has no snapshot: its download did not end" in refusal(tmp_path / "models--a--b")
    (tmp_path / "datasets--a--b" / "snapshots" / "1111").mkdir(parents=True)
    assert "is a data set or space in the hub's cache, not a model" in refusal(tmp_path / "datasets--a--b")


def test_a_snapshot_whose_weights_are_still_being_downloaded_is_said_to_be_that(tmp_path: Path) -> None:
    top = cached(tmp_path)
    (top / "snapshots" / "1111" / "model.safetensors").unlink()
    (top / "blobs").mkdir()
    (top / "blobs" / "4d7a.incomplete").write_bytes(b"")
    says = "an unfinished download: let it end, or fetch the model again (hf download ORG/NAME)"
    assert refusal(top / "snapshots" / "1111").endswith(f"has no model.safetensors, and has '4d7a.incomplete', {says}")


# ---- other files and folders -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, data, says",
    [
        ("m.gguf", b"GGUF\x03", "is GGUF, the format of llama.cpp"),
        ("m.gguf", b"", "is GGUF, the format of llama.cpp"),
        ("model.zip", b"PK\x03\x04", "is an archive: unpack it, and name the folder in it"),
        ("model.safetensors", LFS, POINTER),
        ("model.safetensors", b"x", "weights alone are not a model"),
        ("model.safetensors.incomplete", b"x", "is an unfinished download"),
        ("model.part", b"x", "is an unfinished download"),
        ("model.crdownload", b"x", "is an unfinished download"),
        ("model.bin", b"x", "is a pickle, which runs"),
        ("config.json", b"{}", "is one file of a model: name its folder"),
        ("model.safetensors.index.json", b"{}", "is one file of a model: name its folder"),
    ],
)
def test_a_single_file_is_answered_with_what_it_is(tmp_path: Path, name: str, data: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(data)
    assert refusal(tmp_path / name).startswith(f"{tmp_path / name}: {says}")


@pytest.mark.parametrize("config", [True, False], ids=["with config.json", "without"])
@pytest.mark.parametrize(
    "name, says",
    [
        ("q4_k_m.gguf", "has 'q4_k_m.gguf', which is GGUF, the format of llama.cpp: minimoe reads the folder that it was made of"),
        ("tf_model.h5", "has 'tf_model.h5', which is HDF5, TensorFlow's format"),
        ("model.safetensors.part", "has 'model.safetensors.part', an unfinished download"),
        ("adapter_config.json", "is an adapter (LoRA), not a whole model: merge it into its base model"),
        ("model_index.json", "is a pipeline of diffusers"),
    ],
)
def test_a_folder_with_something_else_than_weights_is_answered_with_what_it_has(tmp_path: Path, name: str, says: str, config: bool) -> None:
    (tmp_path / name).write_bytes(b"{}")
    if config:
        (tmp_path / "config.json").write_text(json.dumps(small("llama")))
    assert refusal(tmp_path).startswith(f"{tmp_path}: has no {'model.safetensors' if config else 'config.json'}, and {says}")


def test_inspect_names_the_fault_of_a_folder_without_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (write(tmp_path / "m", small("llama")) / "config.json").unlink()
    code, _, err = call(capsys, "inspect", str(tmp_path / "m"))
    assert code == 2 and one_line(err).startswith(f"{tmp_path / 'm'}: a model folder needs config.json and model.safetensors")
