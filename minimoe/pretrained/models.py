"""Models of transformers' families: opened from their folder, and written as one. What is written, transformers opens.

Opening compares every name and shape and reads no weight (`located.py`, `weights.py`). Writing goes tensor by tensor, so that a model
larger than the memory is written as well; what was loaded and not changed comes out with the bytes that it had.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minimoe.backend import Backend, current_backend
from minimoe.config import ModelConfig
from minimoe.data.tokenizer import Tokenizer
from minimoe.errors import CheckpointError, ConfigError, UserError
from minimoe.layers.module import Parameter
from minimoe.layers.moe import Experts
from minimoe.model.transformer import Transformer
from minimoe.pretrained.families.family import Family, Json, essence
from minimoe.pretrained.families.layout import Array, Layout
from minimoe.pretrained.families.table import family, family_for
from minimoe.pretrained.file import pack
from minimoe.pretrained.folder import ModelFolder, write_model_folder
from minimoe.pretrained.locating import Location, locate
from minimoe.pretrained.on_demand import DenseSource, ExpertSource, attach

WORDS = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # as config.json has them, and as safetensors
BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "vocab.json", "vocab.txt", "merges.txt")
KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "id2label", "label2id")  # of a config.json whose model was changed


@dataclass(frozen=True)
class Origin:
    """Where a model came from."""

    folder: ModelFolder
    family: Family
    config: ModelConfig
    kept: dict[str, str]  # tensors that are not computed with, by the family's names: the folder's keys


def _translated(path: Path, given: Json) -> tuple[Family, ModelConfig]:
    try:
        found = family(given.get("model_type"))
        return found, found.model_config(given)
    except UserError as error:
        raise ConfigError(f"{path}/config.json: {error}") from None


def open_folder(path: Path, dtype: str = "float32", backend: Backend | None = None, max_memory: int | None = None) -> Transformer:
    """The model of a folder. `max_memory`: bytes that its weights may take; what was not used for longest is let go.

    Raises UserError, one line, for a folder, a config.json or weights that are not what they say, or that are not computed here.
    """
    folder = ModelFolder(path)
    found, config = _translated(folder.path, folder.config)
    if config.n_layers > len(folder.keys()):
        raise CheckpointError(f"{folder.path}: config.json says {config.n_layers} layers, and there are {len(folder.keys())} tensors")
    backend = backend or current_backend()
    model = Transformer(config, seed=None)
    parameters = dict(model.named_state())
    locations, kept = locate({name: p.shape for name, p in parameters.items()}, config, folder, found)
    model.prepare(dtype, backend)  # not before sizes are known to be those of real tensors
    experts = {name: module for name, module in model.named_modules() if isinstance(module, Experts)}
    names = {path: [name for name in parameters if name.startswith(f"{path}.")] for path in experts}
    model.weights, shelves = attach(parameters, locations, names, backend, dtype, max_memory)
    for name, shelf in shelves.items():
        experts[name].on_demand = shelf.on_demand
    e = config.moe.n_experts if config.moe is not None else 0
    model.expert_rows = [backend.from_host(np.zeros(e, dtype=np.int32)) for _ in config.moe_layers()]
    model.origin = Origin(folder, found, config, kept)
    model.end_tokens = _end_tokens(folder)
    return model


def _end_tokens(folder: ModelFolder) -> tuple[int, ...]:
    """The ids that end a text."""
    given = folder.config.get("eos_token_id")
    with contextlib.suppress(OSError, ValueError, AttributeError, RecursionError):
        given = json.loads((folder.path / "generation_config.json").read_bytes()).get("eos_token_id", given)
    ids = given if isinstance(given, list) else [given]
    return tuple(i for i in ids if isinstance(i, int) and not isinstance(i, bool))


# ---- writing -----------------------------------------------------------------------------------------------------------------------------


def save_pretrained(model: Transformer, path: Path | str, dtype: str | None = None, tokenizer: Tokenizer | None = None) -> Family:
    """Write a model as a folder that transformers opens.   -> the family that it is written as

    `dtype`: of the file, float32, bfloat16, float16 or float64; by default each tensor's own if loaded and not changed, else float32.
    Raises ConfigError where no family can express the model, CheckpointError where the folder is taken or cannot be written.
    """
    if dtype is not None and dtype not in WORDS:
        raise ConfigError(f"dtype {dtype!r}: a folder holds {', '.join(WORDS)}")
    origin: Origin | None = model.origin
    same = origin is not None and essence(origin.config) == essence(model.config)
    found = origin.family if origin is not None and same else family_for(model.config)
    written = Written(model, found, dtype)
    config = dict(origin.folder.config) if origin is not None and same else found.config_json(model.config)
    if not same:
        kept = {key: origin.folder.config[key] for key in KEPT if key in origin.folder.config} if origin is not None else {}
        unset = dict.fromkeys(("bos_token_id", "eos_token_id") if model.config.head == "lm" else ())  # else transformers fills them in
        config = {**unset, **kept, **config}
    config.pop("quantization_config", None)
    config.pop("torch_dtype", None)
    config["dtype"] = written.main_dtype
    if origin is not None and same:
        written.keep(origin)
    texts = _beside(origin)
    if tokenizer is not None:
        texts["tokenizer.json"] = tokenizer.to_json()
    write_model_folder(path, config, written.plan, written.produce, texts=texts)
    return found


def _beside(origin: Origin | None) -> dict[str, str]:
    """Files of the folder that a model came from that belong to its tokenizer or its way of generating."""
    texts = {}
    for name in (*BESIDE, "tokenizer.json") if origin is not None else ():
        file = origin.folder.path / name  # type: ignore[union-attr]
        if file.is_file() and file.stat().st_size < 100_000_000:
            texts[name] = file.read_text(encoding="utf-8", errors="strict")
    return texts


class Written:
    """The tensors of a model under a family's names: `plan` {name: (dtype, shape)}, and `produce(name)`."""

    def __init__(self, model: Transformer, found: Family, dtype: str | None) -> None:
        self.model = model
        self.parameters = dict(model.named_state())
        self.plan: dict[str, tuple[str, tuple[int, ...]]] = {}
        self.makers: dict[str, Callable[[], Array]] = {}
        self.last: tuple[str, int | None, Array] | None = None
        for name, layouts in found.names(model.config):
            self._add(name, self.parameters[name], layouts[0], WORDS[dtype] if dtype else None)

    def _add(self, name: str, parameter: Parameter, layout: Layout, dtype: str | None) -> None:
        dtype = dtype or _own_dtype(parameter)
        shape = parameter.shape[1:] if layout.kind != "whole" else parameter.shape
        for e in range(parameter.shape[0]) if layout.kind == "each" else (None,):
            for part in layout.parts:
                key, size = part.key.replace("{e}", str(e)), part.shape(shape)
                self.plan[key] = (dtype, (parameter.shape[0], *size) if layout.kind == "stacked" else size)

                def make(part: Any = part, e: int | None = e) -> Array:
                    if layout.kind != "stacked":
                        return np.ascontiguousarray(part.view(self._piece(name, e)))
                    return np.stack([part.view(self._piece(name, i)) for i in range(parameter.shape[0])])

                self.makers[key] = make

    def _piece(self, name: str, expert: int | None) -> Array:
        """A parameter, or an expert's slice of it, on the host; read from the file where it lies there."""
        if self.last is not None and self.last[:2] == (name, expert):
            return self.last[2]
        parameter = self.parameters[name]
        if isinstance(parameter.source, DenseSource | ExpertSource):
            array = parameter.source.read(expert, exact=True)
        else:
            array = self.model.backend.to_host(parameter.data if expert is None else parameter.data[expert, ...])
        self.last = (name, expert, array)
        return array

    def keep(self, origin: Origin) -> None:
        """Write these tensors of the folder that the model came from as they are."""
        for name, key in origin.kept.items():
            entry = origin.folder.entry(key)
            self.plan[name] = (entry.dtype, tuple(entry.shape))
            self.makers[name] = lambda key=key: origin.folder.raw(key)  # type: ignore[misc]

    def produce(self, key: str) -> Array:
        """A tensor in the plan's dtype."""
        dtype, shape = self.plan[key]
        array = self.makers[key]()
        return array if array.dtype.kind not in "f" else pack(array.reshape(shape), dtype)

    @property
    def main_dtype(self) -> str:
        """The dtype that most numbers have, as config.json says it."""
        sizes: dict[str, int] = {}
        for dtype, shape in self.plan.values():
            sizes[dtype] = sizes.get(dtype, 0) + int(np.prod(shape, dtype=np.int64))
        most = max(sizes, key=lambda dtype: sizes[dtype])
        return next((word for word, name in WORDS.items() if name == most), "float32")


def _own_dtype(parameter: Parameter) -> str:
    """The dtype that a parameter is written in where none is asked for."""
    if isinstance(parameter.source, DenseSource | ExpertSource):
        location: Location = parameter.source.location
        return location.dtype
    return "F64" if str(parameter.data.dtype).endswith("float64") else "F32"
