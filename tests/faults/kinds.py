"""The kinds of file that others may have written: whole samples, how they are damaged, and what reads them."""

import contextlib
import hashlib
import io
import json
import math
import shutil
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import numpy as np
import safetensors
from faults.mutations import mutate_bytes, mutate_json, mutate_lines, mutate_toml, mutate_value, to_bytes
from model_folders import SMALL, small, write
from safetensors.numpy import save
from tiny_runs import tiny, write_text

import minimoe as mm
from minimoe.config import load_config, preset_names, preset_text, to_toml
from minimoe.data.content import Content
from minimoe.data.encoding import Stretch
from minimoe.data.store import expected_header
from minimoe.data.token_files import Damaged, mapped, read_header, write_columns
from minimoe.data.tokenizer import ByteTokenizer, CharTokenizer, load_tokenizer
from minimoe.errors import UserError
from minimoe.files import to_json
from minimoe.pretrained.expert_usage import _file as usage_file
from minimoe.pretrained.expert_usage import recall
from minimoe.pretrained.file import TensorFile
from minimoe.runs.listing import list_runs
from minimoe.runs.run import Run
from minimoe.study.dry_run import show_plan
from minimoe.study.inspect import inspect
from minimoe.study.tables import runs_table, show
from minimoe.study.verify import Check, verify
from minimoe.training.trainer import Trainer
from minimoe.training.weights import open_weights

Json = dict[str, Any]


def write_file(path: Path, data: bytes) -> None:
    path.write_bytes(data)


@dataclass(frozen=True)
class Kind:
    """A kind of file. `file` is the path of the one that is damaged, and `use` reads it as a command would."""

    name: str
    file: str
    samples: tuple[bytes, ...]
    mutate: Callable[[Random, bytes], bytes]
    use: Callable[[Path], None]
    weight: int = 1
    put: Callable[[Path, bytes], None] = field(default=write_file)

    def place(self, folder: Path, data: bytes) -> None:
        """Write the file."""
        self.put(folder / self.file, data)

    def restore(self, folder: Path) -> None:
        """Write the first sample, so that other kinds find a whole file."""
        self.place(folder, self.samples[0])


def make_kinds(folder: Path) -> list[Kind]:
    """Write whole folders and runs into a folder, and return every kind of file in them."""
    weights, tokenizer = safetensors_kind(folder), tokenizer_kind(folder)
    runs = [*config_kinds(folder), *run_kinds(folder), *adapter_kinds(folder)]
    return [weights, *family_kinds(folder), *folder_kinds(folder), tokenizer, *runs, tokens_kind(folder)]


# ---- weights -----------------------------------------------------------------------------------------------------------------

ARRAYS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(3, np.int64), "e": np.zeros((0, 4), np.float16)}


def safetensors_kind(folder: Path) -> Kind:
    whole = save(ARRAYS, metadata={"format": "pt"})
    (folder / "a.safetensors").write_bytes(whole)
    return Kind("safetensors", "a.safetensors", (whole, save({"x": np.zeros(2, np.float32)})), mutate_tensors, use_tensors, weight=8)


def mutate_tensors(draw: Random, data: bytes) -> bytes:
    """Damage the bytes, or the header's JSON, whose length is then corrected."""
    length = struct.unpack("<Q", data[:8])[0] if len(data) >= 8 else 0
    try:
        header = json.loads(data[8 : 8 + length])
    except (ValueError, RecursionError):
        header = None
    if header is None or draw.random() < 0.5:
        return mutate_bytes(draw, data)
    text = to_bytes(mutate_value(draw, header))
    text += b" " * draw.choice((0, -len(text) % 8))
    wrong = draw.choice((1, -1, 8)) if draw.random() < 0.1 else 0
    return struct.pack("<Q", len(text) + wrong) + text + data[8 + length :]


def use_tensors(folder: Path) -> None:
    """Read every tensor. The format's own library must agree on whether the file can be opened."""
    path = folder / "a.safetensors"
    try:
        with TensorFile(path) as file:
            for name in file.entries:
                file.raw(name).sum()
            ours = ""
    except UserError as error:
        ours = str(error)
    try:
        safetensors.deserialize(path.read_bytes())
        theirs = ""
    except safetensors.SafetensorError as error:
        theirs = str(error)
    if bool(ours) != bool(theirs) and not (ours and is_stricter(path.read_bytes())):
        raise AssertionError(f"minimoe says {ours or 'that it is whole'!r}, the library {theirs or 'that it is whole'!r}")
    if ours:
        raise UserError(ours)


def is_stricter(data: bytes) -> bool:
    """Return True for what minimoe refuses on purpose, and the library opens."""
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    metadata, entries = header.pop("__metadata__", {}), header.values()
    further = any(entry.keys() - {"dtype", "shape", "data_offsets"} for entry in entries)
    overflows = any(0 in entry["shape"] and math.prod(size or 1 for size in entry["shape"]) > 2**58 for entry in entries)
    return metadata is None or further or overflows


# ---- model folders -----------------------------------------------------------------------------------------------------------


def family_kinds(folder: Path) -> list[Kind]:
    kinds = []
    for name in SMALL:
        write(folder / name, small(name))
        sample = (folder / name / "config.json").read_bytes()

        def use(at: Path, name: str = name) -> None:
            use_model(at / name)

        kinds.append(Kind(f"config-{name}", f"{name}/config.json", (sample,), mutate_json, use, weight=2))
    return kinds


def use_model(path: Path) -> None:
    """Verify a model's folder, open it, compute with it, with a cache if it can have one, look at it, and convert it."""
    say_all(verify(str(path)).checks)
    model = mm.load(path)
    if model.config.image_size:
        size = model.config.image_size
        model(np.zeros((1, model.config.n_channels, size, size), np.float32))
    else:
        tokens = np.arange(4)[None] % model.vocab_size
        if model.config.max_seq_len >= 4:
            model(tokens)
            if model.config.causal:
                model(tokens, cache=mm.Cache(model, capacity=8))
    report = inspect(str(path))
    json.dumps(report.to_dict())
    report.show()
    out = path.with_name("converted")
    shutil.rmtree(out, ignore_errors=True)
    model.save_pretrained(out)


def say_all(checks: Iterable[Check]) -> None:
    """Do all checks, and put their findings in words."""
    for check in checks:
        str(check)


def folder_kinds(folder: Path) -> list[Kind]:
    """The other files of a model folder: an index of shards, how to generate, and which experts were used."""
    texts = {"generation_config.json": json.dumps({"eos_token_id": [2, 3], "bos_token_id": 1, "do_sample": True, "temperature": 0.6})}
    shards = write(folder / "shards", small("mixtral"), shard_bytes=20_000, texts=texts)
    index, generation = ((shards / name).read_bytes() for name in ("model.safetensors.index.json", "generation_config.json"))
    usage = usage_file(shards)
    usage.parent.mkdir(parents=True, exist_ok=True)
    usage.write_text(json.dumps([[1, 2, 3, 4], [5, 6, 7, 8]]))

    def use_usage(at: Path) -> None:
        inspect(str(at / "shards")).show()
        recall(at / "shards", (2, 4))

    def use_shards(at: Path) -> None:
        say_all(verify(str(at / "shards")).checks)
        assert mm.load(at / "shards").tokenizer is None
        inspect(str(at / "shards")).show()

    where = str(usage.relative_to(folder))
    return [
        Kind("index", "shards/model.safetensors.index.json", (index,), mutate_json, use_shards, weight=3),
        Kind("generation-config", "shards/generation_config.json", (generation,), mutate_json, use_shards),
        Kind("expert-usage", where, (usage.read_bytes(),), mutate_json, use_usage),
    ]


# ---- tokenizers --------------------------------------------------------------------------------------------------------------


def tokenizer_kind(folder: Path) -> Kind:
    chars, some_bytes = (json.loads(tokenizer.to_json()) for tokenizer in (CharTokenizer("abc \n"), ByteTokenizer()))
    some_bytes["model"]["vocab"] = dict(list(some_bytes["model"]["vocab"].items())[:20])
    template = {
        "type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
    }  # fmt: skip
    replace = {"type": "Replace", "pattern": {"Regex": "a+"}, "content": "b"}
    rich = {
        **some_bytes,
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFKC"}, replace]},
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": r"\s+"}, "behavior": "Isolated", "invert": False},
        "added_tokens": [
            {"id": 0, "content": "<s>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        ],
        "post_processor": template,
    }
    words = {
        **rich, "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100,
                          "vocab": {"[UNK]": 0, "abc": 1, "##b": 2, "a": 3, "[MASK]": 4}},
        "pre_tokenizer": {"type": "BertPreTokenizer"}, "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
    }  # fmt: skip
    scores = [["<unk>", 0.0], ["a", -1.0], ["\u2581b", -2.0]]
    pieces = {
        **rich, "model": {"type": "Unigram", "unk_id": 0, "byte_fallback": False, "vocab": scores},
        "pre_tokenizer": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True},
        "decoder": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True},
    }  # fmt: skip
    samples = tuple(json.dumps(table).encode() for table in (chars, some_bytes, rich, words, pieces))
    (folder / "tokenizer.json").write_bytes(samples[0])
    return Kind("tokenizer", "tokenizer.json", samples, mutate_json, use_tokenizer, weight=8)


def use_tokenizer(folder: Path) -> None:
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    for text in ("abc ab", "a \u00e9\U0001f600"):
        with contextlib.suppress(UserError):  # a character that the vocabulary lacks
            ids = tokenizer.encode(text)
            tokenizer.decode(ids)
            tokenizer.encode_prompt(text)
    tokenizer.decode([0, 3, 10**6])
    stream = tokenizer.stream()
    "".join(map(stream.push, (0, 3, 10**6))) + stream.flush()
    tokenizer.to_json()


# ---- configurations ----------------------------------------------------------------------------------------------------------


def config_kinds(folder: Path) -> list[Kind]:
    text = write_text(folder)
    own = to_toml(tiny(text)).encode()
    (folder / "c.toml").write_bytes(own)
    (folder / "override").write_bytes(b"train.lr=3e-4")
    presets = tuple(preset_text(name).encode() for name in preset_names() if "shakespeare" not in name)  # that text is not here
    rope = b"model.rope={type = 'linear', factor = 2.0}"
    overrides = (b"train.lr=3e-4", b"moe=none", b'data.source="text.txt"', b"moe.layers=[1, 3]", rope)
    return [
        Kind("toml", "c.toml", (own, *presets), mutate_toml, use_config, weight=8),
        Kind("override", "override", overrides, mutate_override, use_override, weight=2),
    ]


def use_config(folder: Path) -> None:
    """Do what inspect and --dry-run do."""
    config = load_config(folder / "c.toml")
    to_toml(config)
    report = inspect(str(folder / "c.toml"))
    json.dumps(report.to_dict())
    report.show()
    if config.data.source.endswith("text.txt"):
        show_plan(config, None)


def mutate_override(draw: Random, data: bytes) -> bytes:
    return mutate_toml(draw, data).replace(b"\0", b"")


def use_override(folder: Path) -> None:
    text = (folder / "override").read_bytes().decode("utf-8", errors="surrogateescape")
    to_toml(load_config("tiny-moe", [text]))


# ---- runs --------------------------------------------------------------------------------------------------------------------

RUN, LAST = "runs/x", "runs/x/checkpoints/step-000002"


def run_kinds(folder: Path) -> list[Kind]:
    """The files of a run, and those of its checkpoint, whose manifest is forged to fit."""
    config = tiny(write_text(folder), model={"n_layers": 2}, steps=4, checkpoint_every=2)
    with contextlib.redirect_stdout(io.StringIO()):
        mm.train(config, root=folder / "runs", out=folder / "runs" / "x")
    kinds = [
        ("status", f"{RUN}/status.json", mutate_json, write_file, (list_all, inspect_run, resume_run)),
        ("env", f"{RUN}/env.json", mutate_json, write_file, (list_all, resume_run)),
        ("metrics", f"{RUN}/metrics.jsonl", mutate_lines, write_file, (list_all, inspect_run, resume_run)),
        ("run-config", f"{RUN}/config.toml", mutate_toml, write_file, (list_all, inspect_run, resume_run)),
        ("last", "runs/last", mutate_bytes, write_file, (find_newest,)),
        ("best", f"{RUN}/checkpoints/best", mutate_bytes, write_file, (resume_run,)),
        ("state", f"{LAST}/state.json", mutate_json, write_forged, (load_run, resume_run)),
        ("checkpoint-config", f"{LAST}/config.json", mutate_json, write_forged, (load_run, resume_run)),
        ("checkpoint-weights", f"{LAST}/model.safetensors", mutate_tensors, write_forged, (load_run, resume_run)),
        ("checkpoint-optimizer", f"{LAST}/optimizer.safetensors", mutate_tensors, write_forged, (resume_run,)),
        ("checkpoint-tokenizer", f"{LAST}/tokenizer.json", mutate_json, write_forged, (load_run, resume_run)),
        ("manifest", f"{LAST}/MANIFEST.sha256", mutate_bytes, write_file, (load_run,)),
    ]  # fmt: skip
    return [
        Kind(name, file, ((folder / file).read_bytes(),), mutate, all_of(acts), weight=2, put=put)
        for name, file, mutate, put, acts in kinds
    ]


ADAPTED = "runs/y"
ADAPTERS = f"{ADAPTED}/checkpoints/step-000001"


def adapter_kinds(folder: Path) -> list[Kind]:
    """What a run with adapters has besides, each with digests that are forged to fit."""
    mm.train(init=folder / RUN, out=folder / ADAPTED, root=folder / "runs", steps=1, overrides=["lora.rank=2"])
    kinds = [
        ("adapters-base", f"{ADAPTED}/base.safetensors", mutate_tensors, write_forged_base),
        ("adapters", f"{ADAPTERS}/model.safetensors", mutate_tensors, write_forged),
        ("adapters-config", f"{ADAPTERS}/config.json", mutate_json, write_forged),
    ]  # fmt: skip
    return [Kind(name, file, ((folder / file).read_bytes(),), mutate, use_adapted, put=put) for name, file, mutate, put in kinds]


def write_forged_base(path: Path, data: bytes) -> None:
    """Write the base of adapters, and its digest into the checkpoint that belongs to it."""
    path.write_bytes(data)
    state = path.parent / "checkpoints" / "step-000001" / "state.json"
    fields = json.loads(state.read_text()) | {"base_sha256": hashlib.sha256(data).hexdigest()}
    write_forged(state, json.dumps(fields).encode())


def use_adapted(folder: Path) -> None:
    """Load the model, start from it, and verify the run, also after a refusal."""
    refusals = []
    for act in (mm.load, open_weights, lambda path: say_all(verify(str(folder / ADAPTED)).checks)):
        try:
            act(folder / ADAPTERS)
        except UserError as error:
            refusals.append(error)
    if refusals:
        raise refusals[0]


def write_forged(path: Path, data: bytes) -> None:
    """Write a file of a checkpoint, and its digest into the manifest."""
    path.write_bytes(data)
    names = sorted(other.name for other in path.parent.iterdir() if other.name != "MANIFEST.sha256")
    lines = (f"{hashlib.sha256((path.parent / name).read_bytes()).hexdigest()}  {name}\n" for name in names)
    (path.parent / "MANIFEST.sha256").write_text("".join(lines))


def all_of(acts: tuple[Callable[[Path], None], ...]) -> Callable[[Path], None]:
    """Return a function that does all of these and `verify`, also after one that refuses; it raises the first refusal."""

    def use(folder: Path) -> None:
        refusals = []
        for act in (*acts, verify_run):
            try:
                act(folder)
            except UserError as error:
                refusals.append(error)
        if refusals:
            raise refusals[0]

    return use


def list_all(folder: Path) -> None:
    rows = list_runs(folder / "runs")
    json.dumps(rows)
    show(runs_table(rows))


def find_newest(folder: Path) -> None:
    str(Run.open(None, folder / "runs").config)


def inspect_run(folder: Path) -> None:
    report = inspect(str(folder / RUN))
    json.dumps(report.to_dict())
    report.show()


def load_run(folder: Path) -> None:
    mm.load(folder / LAST)


def resume_run(folder: Path) -> None:
    """Prepare to resume from the checkpoint in the middle, without training."""
    run = Run.open(folder / LAST)
    Trainer(run.config).restore(run)


def verify_run(folder: Path) -> None:
    say_all(verify(str(folder / RUN)).checks)


# ---- tokens of large texts -----------------------------------------------------------------------------------------------------------


def tokens_kind(folder: Path) -> Kind:
    """The header of tokens that are kept in the user's cache."""
    (folder / "kept").mkdir()
    stretches = [Stretch(np.arange(9, dtype=np.int32), 1, np.arange(9) > 4, True), Stretch(np.arange(5, dtype=np.int32), 0, None, True)]
    columns = write_columns(folder / "kept", stretches, "u1", with_domains=True)
    header = expected_header(Content("0" * 64, "1" * 64, 14), "text.txt", ByteTokenizer())
    sample = to_json(msgspec.to_builtins(msgspec.structs.replace(header, columns=columns, dropped={"\u00e9": 2}))).encode()
    (folder / "kept" / "header.json").write_bytes(sample)
    return Kind("tokens-header", "kept/header.json", (sample,), mutate_json, use_tokens)


def use_tokens(folder: Path) -> None:
    """Read every number that the header promises."""
    try:
        arrays = mapped(folder / "kept", read_header(folder / "kept"))
    except Damaged as error:
        raise UserError(str(error)) from None
    for array in (arrays.tokens, arrays.domains, arrays.learned, arrays.documents):
        if array is not None:
            array.sum()
