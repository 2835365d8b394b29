"""Verifies a model folder: each of its files, the tensors that config.json asks for, the tokenizer's ids, and every number."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from minimoe.backend import load
from minimoe.data.tokenizer import load_tokenizer
from minimoe.errors import CheckpointError, UserError
from minimoe.files import reason
from minimoe.pretrained.file import TensorFile
from minimoe.pretrained.folder import CONFIG, INDEX, WEIGHTS, ModelFolder, read_config
from minimoe.pretrained.header import STORED, shown
from minimoe.pretrained.opening import open_folder
from minimoe.pretrained.transformer import PretrainedTransformer
from minimoe.runs.checkpoint import TOKENIZER
from minimoe.study.verify.checkpoint import beyond_embedding
from minimoe.study.verify.checks import Check, Tell, count_not_finite, describe_not_finite, ok, problem, skipped
from minimoe.untrusted import MOST_JSON, Malformed, parse_json_object, read_bounded

FLOATING = frozenset(word for word in STORED if word.startswith(("F", "BF", "C")))
GENERATION = "generation_config.json"


def checks_of_folder(path: Path, tell: Tell) -> Iterator[Check]:
    """Check everything that minimoe reads of a model folder."""
    readable = True
    try:
        yield ok(CONFIG, f"model_type {shown(read_config(path).get('model_type'))}")
    except CheckpointError as error:
        readable = False
        yield problem(CONFIG, _without(path, error))
    files, index = _weight_files(path)
    if index is not None:
        yield index
    readable = readable and bool(files) and (index is None or index.state == "ok")
    for name in files:
        found = list(_weights(path, name, tell))
        readable = readable and all(check.state == "ok" for check in found)
        yield from found
    model = None
    if readable:
        try:
            model = open_folder(path, backend=load("numpy"))
            yield ok("tensors", f"as config.json says, {model.config.n_layers} layers")
        except UserError as error:
            yield problem("tensors", _without(path, error))
    else:
        yield skipped("tensors", "not compared with config.json")
    yield from _tokenizer(path, model)
    yield from _generation(path, model)


def _without(path: Path, error: UserError) -> str:
    """Return a message without the folder's name, which the first line has."""
    return str(error).removeprefix(f"{path}/").removeprefix(f"{path}: ")


def _weight_files(path: Path) -> tuple[list[str], Check | None]:
    """Return the names of the weight files, and the check of the index, or of there being none.

    If the index or a shard is wrong, all files of weights are checked one by one.
    """
    sharded = not (path / WEIGHTS).exists()
    found = sorted(entry.name for entry in path.iterdir() if entry.suffix == ".safetensors")
    try:
        with ModelFolder(path) as folder:
            names = list(folder.files)
            tensors = len(folder.keys())
    except CheckpointError as error:
        reported = not (path / CONFIG).exists() or any(str(error).startswith(str(path / name)) for name in found)  # by that file's check
        return found, None if reported else problem(INDEX if sharded else WEIGHTS, _without(path, error))
    return names, ok(INDEX, f"{len(names)} shards have all {tensors:,} tensors") if sharded else None


def _weights(path: Path, name: str, tell: Tell) -> Iterator[Check]:
    """Read a weight file, header and numbers."""
    try:
        with TensorFile(path / name) as file:
            counts: dict[str, int] = {}
            total = max(1, sum(entry.stop - entry.start for entry in file.entries.values()))
            done = 0
            for key, entry in file.entries.items():
                if _holds_numbers(key, entry.dtype):
                    dtype = entry.dtype if entry.dtype in FLOATING else "F8_E8M0"
                    counts[key] = count_not_finite(file.raw(key), dtype, lambda done=done: tell(f"{name}: {done / total:.0%}"))  # type: ignore[misc]
                    file.release(key)
                done += entry.stop - entry.start
    except CheckpointError as error:
        yield problem(name, str(error).removeprefix(f"{path / name}: "))
        return
    except OSError as error:
        yield problem(name, f"cannot be read: {reason(error)}")
        return
    sentences = list(describe_not_finite(counts))
    yield from (problem(name, sentence) for sentence in sentences)
    if not sentences:
        yield ok(name, f"{len(file.entries):,} tensors, {total / 1e6:,.1f} MB, all finite")


def _holds_numbers(key: str, dtype: str) -> bool:
    """Return True for floats, and for the scales of MXFP4, which are float8 of type E8M0 stored as bytes."""
    return dtype in FLOATING or (dtype == "U8" and key.endswith("_scales"))


def _tokenizer(path: Path, model: PretrainedTransformer | None) -> Iterator[Check]:
    """Check that the tokenizer loads, and that the embedding has a row for each of its ids."""
    if not (path / TOKENIZER).is_file():
        if model is None or not model.config.image_size:
            yield skipped(TOKENIZER, "there is none")
        return
    try:
        tokenizer = load_tokenizer(path / TOKENIZER)
    except UserError as error:
        missing = find_spec("tokenizers") is None
        yield skipped(TOKENIZER, error) if missing else problem(TOKENIZER, _without(path / TOKENIZER, error))
        return
    rows = model.config.vocab_size if model is not None else None
    sentences = [] if rows is None else list(beyond_embedding(tokenizer, rows))
    yield from (problem(TOKENIZER, sentence.removeprefix(f"{TOKENIZER}: ")) for sentence in sentences)
    if not sentences:
        yield ok(TOKENIZER, f"{tokenizer.vocab_size:,} ids" + ("" if rows is None else f", and {rows:,} rows in the embedding"))


def _generation(path: Path, model: PretrainedTransformer | None) -> Iterator[Check]:
    """Check generation_config.json, which may be missing, and the ids that end a text."""
    file = path / GENERATION
    rows = model.config.vocab_size if model is not None else None
    if file.exists():
        try:
            fields = parse_json_object(read_bounded(file, MOST_JSON))
        except OSError as error:
            yield problem(GENERATION, f"cannot be read: {reason(error)}")
            return
        except Malformed as error:
            yield problem(GENERATION, f"is damaged: {error}")
            return
        ends = _ids(fields.get("eos_token_id"))
        wrong = [] if rows is None else [i for i in ends if not 0 <= i < rows]
        sentence = f"ends a text with id {wrong[0]}, and the embedding has {rows} rows" if wrong else ""
        yield problem(GENERATION, sentence) if wrong else ok(GENERATION, "can be read")


def _ids(given: Any) -> list[int]:
    ids = given if isinstance(given, list) else [given]
    return [i for i in ids if isinstance(i, int) and not isinstance(i, bool)]
