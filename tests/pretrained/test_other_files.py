"""What stands beside the weights is carried to the byte when a folder is converted; what is left out is listed, with the reason."""

import os
import tracemalloc
from pathlib import Path

import pytest
from command_line import call
from model_folders import small, tensors, write

import minimoe as mm
from minimoe.data.tokenizer import ByteTokenizer, CharTokenizer
from minimoe.errors import CheckpointError
from minimoe.pretrained.other_files import OtherFiles, other_files
from minimoe.study.convert import convert

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4241003\n"
CARRIED = {
    "chat_template.jinja": b"{% for m in messages %}\r\n{{ m }}\n{% endfor %}", "tokenizer.model": bytes(range(256)),
    "added_tokens.json": b"{}", "preprocessor_config.json": b'{"do_resize":true}', "generation_config.json": b'{ "eos_token_id": 2 }',
    "tokenizer_config.json": b"{}\r\n", "README.md": "Modèle\n".encode("latin-1"), "LICENSE": b"", "next_year.toml": b"a = 1",
    "vocab.txt": b"a\nb", "params.json": b"{}", "example.png": b"\x89PNG\r\n\x1a\n",
    "tokenizer.json": b'{"version":"1.0","model":{"type":"WordLevel","vocab":{"a":0},"unk_token":"a"}}',
}  # fmt: skip
LEFT = {
    "hidden": [".gitattributes"],
    "weights": [
        "consolidated.safetensors", "flax_model.msgpack", "model.ckpt.data-00000-of-00001", "model.onnx", "model.onnx_data", "q4.GGUF",
        "tf_model.h5", "training_args.bin", "unnamed", "weights.pkl",
    ],
    "indices of weights": ["pytorch_model.bin.index.json"],
    "unfinished downloads": ["model-00001.safetensors.incomplete"],
    "code": ["modeling_llama.py", "run"],
    "archives": ["all.zip"],
    "of quantised weights": ["hf_quant_config.json", "quantize_config.json"],
    "of an adapter": ["adapter_config.json"],
    "checksums and signatures": ["SHA256SUMS", "model.sig"],
    "git-lfs pointers, which `git lfs pull` turns into files": ["spiece.model"],
}  # fmt: skip
CONTENT = {"unnamed": b"\x80\x02}q", "run": b"#!/bin/sh\n", "spiece.model": LFS_POINTER}


def furnished(folder: Path) -> Path:
    """A model folder with everything in it."""
    write(folder, small("llama", eos_token_id=1))
    for name, data in CARRIED.items():
        (folder / name).write_bytes(data)
    for names in LEFT.values():
        for name in names:
            (folder / name).write_bytes(CONTENT.get(name, b"x"))
    (folder / "original").mkdir()
    (folder / "original" / "params.json").write_bytes(b"{}")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in folder.iterdir()}


def test_files_beside_the_weights_are_carried_to_the_byte_and_others_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = furnished(tmp_path / "m")
    code, out, err = call(capsys, "convert", str(source), str(tmp_path / "out"), "--dtype", "bfloat16")
    found = contents(tmp_path / "out")
    assert (code, err) == (0, "") and found.keys() == CARRIED.keys() | {"config.json", "model.safetensors"}
    assert {name: found[name] for name in CARRIED} == CARRIED
    first, second = out.splitlines()
    listed = {reason: names.split(", ") for reason, names in (part.split(": ") for part in second.split(": ", 1)[1].split("; "))}
    assert first.startswith(f"{tmp_path / 'out'}: llama, ") and second.startswith(f"not copied from {source}: ")
    assert listed == LEFT | {"folders": ["original"]}


def test_nothing_is_listed_if_nothing_is_left_out(tmp_path: Path) -> None:
    write(tmp_path / "m", small("llama"), shard_bytes=20_000, tokenizer=True)
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 1
    assert "\n" not in convert(tmp_path / "m", tmp_path / "out")
    own = "tokenizer_config.json"  # for minimoe's own tokenizers, where there is none
    assert sorted(contents(tmp_path / "out")) == ["config.json", "model.safetensors", "tokenizer.json", own]


def test_many_files_of_one_kind_are_counted(tmp_path: Path) -> None:
    for n in range(13):
        (tmp_path / f"{n:02}.py").write_text("")
    assert other_files(tmp_path, ()).what_is_left() == f"code: {', '.join(f'{n:02}.py' for n in range(10))}, and 3 more"


@pytest.mark.skipif(os.name == "nt", reason="links, pipes and such names need rights or do not exist")
def test_links_pipes_and_names_that_other_systems_refuse_are_left_out(tmp_path: Path) -> None:
    source, secret = write(tmp_path / "m", small("llama")), tmp_path / "secret.txt"
    secret.write_text("secret")
    (source / "out.txt").symlink_to(secret)
    (source / "in.txt").symlink_to("config.json")
    (source / "broken.txt").symlink_to("nowhere")
    os.mkfifo(source / "pipe.txt")
    for name in ("a:b.txt", "line\nbreak.txt", "Config.json"):
        (source / name).write_text("{}")
    line = convert(source, tmp_path / "out").splitlines()[1]
    assert "links: broken.txt, in.txt, out.txt" in line and "neither files nor folders: pipe.txt" in line
    assert "names that not every system can have beside the others: Config.json, a:b.txt, 'line\\nbreak.txt'" in line
    assert sorted(contents(tmp_path / "out")) == ["config.json", "model.safetensors"]


@pytest.mark.skipif(os.name == "nt", reason="links need rights")
def test_a_snapshot_of_the_hubs_cache_is_carried_through_its_links_into_its_own_blobs(tmp_path: Path) -> None:
    home = tmp_path / "models--a--b"
    snapshot = home / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    write(home / "blobs", small("llama"))
    (home / "blobs" / "77").write_bytes(b"{{ messages }}")
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("0123abcd")
    for name, blob in {"config.json": "config.json", "model.safetensors": "model.safetensors", "chat_template.jinja": "77"}.items():
        (snapshot / name).symlink_to(Path("..") / ".." / "blobs" / blob)
    (snapshot / "main.txt").symlink_to(home / "refs" / "main")
    assert convert(snapshot, tmp_path / "out").endswith("links: main.txt")
    found = contents(tmp_path / "out")
    assert found.keys() == {"config.json", "model.safetensors", "chat_template.jinja"}
    assert found["chat_template.jinja"] == b"{{ messages }}" and not (tmp_path / "out" / "chat_template.jinja").is_symlink()


def test_a_file_that_cannot_be_read_is_named_and_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "m", small("llama"), texts={"vocab.txt": "a"})
    gone = OtherFiles({"vocab.txt": source / "gone"}, {})
    monkeypatch.setattr("minimoe.pretrained.saving.other_files", lambda folder, read: gone)
    with pytest.raises(CheckpointError, match=r"gone: cannot be read: No such file or directory$"):
        convert(source, tmp_path / "out")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["m"]


def test_a_large_file_is_not_read_at_once(tmp_path: Path) -> None:
    source = write(tmp_path / "m", small("llama"))
    with open(source / "large.txt", "wb") as file:
        file.truncate(50_000_000)
    tracemalloc.start()
    convert(source, tmp_path / "out")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 25_000_000
    assert (tmp_path / "out" / "large.txt").stat().st_size == 50_000_000


# ---- the tokenizer -----------------------------------------------------------------------------------------------------------


def test_a_tokenizer_that_was_not_changed_keeps_its_bytes_when_a_model_is_saved(tmp_path: Path) -> None:
    config = small("llama", vocab_size=256)
    source = write(tmp_path / "m", config, tensors(config), texts={"tokenizer_config.json": "{}"})
    odd = ByteTokenizer().to_json().replace("\n", "\r\n").encode()
    (source / "tokenizer.json").write_bytes(odd)
    mm.load(source).save_pretrained(tmp_path / "out")
    assert contents(tmp_path / "out")["tokenizer.json"] == odd and "tokenizer_config.json" in contents(tmp_path / "out")


def test_files_of_a_tokenizer_that_was_replaced_are_left_out(tmp_path: Path) -> None:
    texts = {"tokenizer_config.json": "{}", "tokenizer.model": "x", "vocab.json": "{}", "generation_config.json": "{}"}
    model = mm.load(write(tmp_path / "m", small("llama"), tokenizer=True, texts=texts))
    model.tokenizer = CharTokenizer("ab")
    model.save_pretrained(tmp_path / "out")
    found = contents(tmp_path / "out")
    own = "tokenizer_config.json"  # of the new tokenizer
    assert found.keys() == {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json", own} and found[own] != b"{}"
    assert found["tokenizer.json"].decode() == CharTokenizer("ab").to_json()
