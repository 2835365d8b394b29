"""Saves a model as a folder that transformers opens, with the names of a family.

Tensors are written one at a time, so a model that is larger than the memory can be saved. A tensor that was loaded and not changed keeps
its bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minimoe.config import ModelConfig
from minimoe.data.tokenizer import BUILT_IN, Tokenizer
from minimoe.errors import ConfigError, notice
from minimoe.files import to_json
from minimoe.layers.module import Parameter
from minimoe.model.transformer import Transformer
from minimoe.pretrained.families.family import Family, essence
from minimoe.pretrained.families.layout import Array, Layout, StoredTensor
from minimoe.pretrained.families.table import family_for
from minimoe.pretrained.file import pack
from minimoe.pretrained.folder import ModelFolder, write_model_folder
from minimoe.pretrained.on_demand import DenseSource, ExpertSource
from minimoe.pretrained.other_files import OtherFiles, other_files
from minimoe.pretrained.rounding import losses
from minimoe.runs.checkpoint import TOKENIZER

WORDS = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # config.json's words, and those of safetensors
OF_A_TOKENIZER = re.compile(r"(tokenizer|special_tokens|added_tokens|vocab|merges|spiece|sentencepiece|chat_template)|.*\.tiktoken$")
TOKENIZER_CONFIG = "tokenizer_config.json"
AS_IT_IS = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
"""With this content AutoTokenizer runs tokenizer.json unchanged; without a class it would rebuild the tokenizer usual for the family."""
KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "id2label", "label2id")  # of a config.json whose model was changed


@dataclass(frozen=True)
class Provenance:
    """The folder that a model was opened from, and how it was read."""

    folder: ModelFolder
    family: Family
    config: ModelConfig
    kept: dict[str, str]  # tensors that are not computed with, by the family's names: the folder's keys

    def other_files(self) -> OtherFiles:
        """Return the folder's other files: those that are saved with the model, and those that are not."""
        return other_files(self.folder.path, self.folder.files)


def save_pretrained(
    model: Transformer, path: Path | str, dtype: str | None = None, tokenizer: Tokenizer | None = None,
    provenance: Provenance | None = None, classes: tuple[str, ...] | None = None,
) -> Family:  # fmt: skip
    """Write a model as a folder that transformers opens.   -> the family that it is written as

    `dtype` of the file: float32, bfloat16, float16 or float64; a tensor that transformers computes in float32 stays so in the narrower
    ones. By default a tensor that was loaded and not changed keeps its own dtype; others are float32. Numbers that a dtype cannot hold give
    a `Notice`. Other files (`other_files.py`) and unused tensors of `provenance`, the folder that the model came from, are written too.
    `classes` are the names of a classifier's classes. A tokenizer that did not come with that folder is named so that transformers'
    AutoTokenizer runs it as it is.
    Raises ConfigError if no family can express the model, CheckpointError if the folder is taken or cannot be written.
    """
    if dtype is not None and dtype not in WORDS:
        raise ConfigError(f"dtype {dtype!r}: a folder holds {', '.join(WORDS)}")
    same = provenance is not None and essence(provenance.config) == essence(model.config)
    found = provenance.family if provenance is not None and same else family_for(model.config)
    tensors = FamilyTensors(model, found, dtype)
    config = dict(provenance.folder.config) if provenance is not None and same else found.config_json(model.config)
    if not same:
        kept = {key: provenance.folder.config[key] for key in KEPT if key in provenance.folder.config} if provenance is not None else {}
        unset = dict.fromkeys(("bos_token_id", "eos_token_id") if model.config.head == "lm" else ())  # else transformers fills them in
        config = {**unset, **kept, **config}
    if classes is not None:
        config |= {"id2label": {str(i): name for i, name in enumerate(classes)}, "label2id": {name: i for i, name in enumerate(classes)}}
    config.pop("quantization_config", None)
    config.pop("torch_dtype", None)
    config["dtype"] = dtype or tensors.main_dtype
    if provenance is not None and same:
        tensors.keep(provenance)
    files = provenance.other_files().copied if provenance is not None else {}
    texts = {}
    if tokenizer is not None and not _holds(files.get(TOKENIZER), tokenizer):
        texts[TOKENIZER] = tokenizer.to_json()
        if TOKENIZER in files:
            files = {name: file for name, file in files.items() if not OF_A_TOKENIZER.match(name)}
    reader = tokenizer or getattr(model, "tokenizer", None)
    if reader is not None and TOKENIZER_CONFIG not in files and (TOKENIZER in texts or reader.name in BUILT_IN):
        texts[TOKENIZER_CONFIG] = to_json(AS_IT_IS)
    write_model_folder(path, config, tensors.specs, tensors.produce, texts=texts, files=files)
    return found


def _holds(file: Path | None, tokenizer: Tokenizer) -> bool:
    """Return True if a tokenizer.json is that of this tokenizer, however it is spaced."""
    if file is None:
        return False
    text = tokenizer.to_json()
    try:
        given = file.read_text(encoding="utf-8")
        return given == text or bool(json.loads(given) == json.loads(text))
    except (OSError, ValueError, RecursionError):
        return False


class FamilyTensors:
    """The tensors of a model under a family's names: `specs` {name: (dtype, shape)}, and `produce(name)`."""

    def __init__(self, model: Transformer, found: Family, dtype: str | None) -> None:
        self.model = model
        self.parameters = dict(model.named_state())
        self.specs: dict[str, tuple[str, tuple[int, ...]]] = {}
        self.makers: dict[str, Callable[[], Array]] = {}
        self.last: tuple[str, int | None, Array] | None = None  # the slice that was read last: several tensors may share it
        for name, layouts in found.names(model.config):
            self._add(name, self.parameters[name], layouts[0], WORDS[dtype] if dtype else None, found)

    def _add(self, name: str, parameter: Parameter, layout: Layout, dtype: str | None, found: Family) -> None:
        own = "" if dtype else _own_dtype(parameter)
        shape = parameter.shape[1:] if layout.kind != "whole" else parameter.shape
        for e in range(parameter.shape[0]) if layout.kind == "each" else (None,):
            for tensor in layout.tensors:
                key, size = tensor.key.replace("{e}", str(e)), tensor.shape(shape)
                stored = found.stored_dtype(key, dtype) if dtype else own
                self.specs[key] = (stored, (parameter.shape[0], *size) if layout.kind == "stacked" else size)

                def make(tensor: StoredTensor = tensor, e: int | None = e) -> Array:
                    if layout.kind != "stacked":
                        return np.ascontiguousarray(tensor.view(self._slice(name, e)))
                    return np.stack([tensor.view(self._slice(name, i)) for i in range(parameter.shape[0])])

                self.makers[key] = make

    def _slice(self, name: str, expert: int | None) -> Array:
        """Return a parameter, or an expert's slice of it, on the host; it is read from its file if it is in one."""
        if self.last is not None and self.last[:2] == (name, expert):
            return self.last[2]
        parameter = self.parameters[name]
        if isinstance(parameter.source, DenseSource | ExpertSource):
            array = parameter.source.read(expert, exact=True)
        else:
            array = self.model.backend.to_host(parameter.data if expert is None else parameter.data[expert, ...])
        self.last = (name, expert, array)
        return array

    def keep(self, provenance: Provenance) -> None:
        """Write the tensors that the model does not compute with as they are in its folder."""
        for name, key in provenance.kept.items():
            entry = provenance.folder.entry(key)
            self.specs[name] = (entry.dtype, tuple(entry.shape))
            self.makers[name] = lambda key=key: provenance.folder.raw(key)  # type: ignore[misc]

    def produce(self, key: str) -> Array:
        """Return a tensor in the dtype of its spec, and say what that loses."""
        dtype, shape = self.specs[key]
        array = self.makers[key]()
        if array.dtype.kind not in "f":
            return array
        packed = pack(array.reshape(shape), dtype)
        for loss in losses(key, array.reshape(shape), packed, dtype):
            notice(loss)
        return packed

    @property
    def main_dtype(self) -> str:
        """The dtype that most numbers have, in config.json's words."""
        sizes: dict[str, int] = {}
        for dtype, shape in self.specs.values():
            sizes[dtype] = sizes.get(dtype, 0) + int(np.prod(shape, dtype=np.int64))
        most = max(sizes, key=lambda dtype: sizes[dtype])
        return next((word for word, name in WORDS.items() if name == most), "float32")


def _own_dtype(parameter: Parameter) -> str:
    """Return the dtype that a parameter is saved in if none is asked for."""
    source: Any = parameter.source
    if isinstance(source, DenseSource | ExpertSource):
        return source.location.dtype
    return "F64" if str(parameter.data.dtype).endswith("float64") else "F32"
