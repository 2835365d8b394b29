"""Finds a model's parameters in a folder, and reads them. Names and shapes are compared before anything is read.

Errors name a key that is missing, that no parameter needs, or whose shape differs from the configuration.
"""

import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from minimoe.config import ModelConfig
from minimoe.errors import CheckpointError
from minimoe.pretrained.families.family import MOST_NUMBER, Family
from minimoe.pretrained.families.layout import Layout, Layouts, Shape, StoredTensor, all_of_it
from minimoe.pretrained.file import FLOATS, fill
from minimoe.pretrained.folder import ModelFolder
from minimoe.pretrained.header import shown
from minimoe.pretrained.quantised import fill_fp8_blocks, fill_mxfp4

Host = npt.NDArray[Any]
SCALE = "_scale_inv"  # suffix of the scales of a float8 weight, one per block
MXFP4 = ("_blocks", "_scales")
QUANTISED = {"fp8": "float8 with a scale for each block", "mxfp4": "MXFP4"}


class Keys:
    """A folder's tensors: {name in the family: key in the folder}, and which of them were used."""

    def __init__(self, folder: ModelFolder, family: Family) -> None:
        self.folder, self.family = folder, family
        self.key_of: dict[str, str] = {}
        self.used: set[str] = set()
        for key in sorted(folder.keys()):
            name = key
            for pattern, spelling in family.aliases:
                name = re.sub(pattern, spelling, name)
            if name in self.key_of:
                raise CheckpointError(f"{folder.path}: tensors {self.key_of[name]!r} and {key!r} have the same name in {family.model_type}")
            self.key_of[name] = key

    def __contains__(self, name: str) -> bool:
        return name in self.key_of

    def use(self, name: str, shape: Shape, kind: str = "") -> str:
        """Return the key of a tensor in the folder, after comparing its shape."""
        if name not in self.key_of:
            raise CheckpointError(f"{self.folder.path}: tensor {name!r} is missing")
        key = self.key_of[name]
        entry = self.folder.entry(key)
        if tuple(entry.shape) != shape:
            raise CheckpointError(f"{self.folder.path}: tensor {key!r} has shape {list(entry.shape)}, config.json says {list(shape)}")
        wanted = ("U8",) if kind == "packed" else FLOATS
        if entry.dtype not in wanted:
            raise CheckpointError(f"{self.folder.path}: tensor {key!r} has dtype {entry.dtype}, which weights cannot have")
        self.used.add(name)
        return key

    def check_rest(self, config: ModelConfig) -> dict[str, str]:
        """Refuse tensors that no parameter needs.   -> those that the family keeps without computing with them: {name: key}"""
        kept, end = {}, self._end(config)
        for name in sorted(self.key_of.keys() - self.used):
            if name in self.family.copies and self._repeats(name, self.family.copies[name]):
                continue
            if any(re.search(pattern, name) for pattern in self.family.dropped):
                continue
            matches = (re.search(pattern, name) for pattern in self.family.unused)
            layers = [int(match.groupdict().get("beyond", -1)) for match in matches if match]
            if any(layer < 0 or config.n_layers <= layer < end for layer in layers):
                kept[name] = self.key_of[name]
                continue
            raise CheckpointError(f"{self.folder.path}: tensor {self.key_of[name]!r} is unexpected in this {self.family.model_type}")
        return kept

    def _end(self, config: ModelConfig) -> int:
        """Return the number of layers, including those that the family may have after the last."""
        further = self.family.further.value(self.folder.config) if self.family.further else 0
        return config.n_layers + (further if isinstance(further, int) else 0)

    def _repeats(self, name: str, other: str) -> bool:
        """Return True if a tensor equals the one that it is tied to, and False if that is missing; raise if they differ."""
        if other not in self.key_of:
            return False
        a, b = self.key_of[name], self.key_of[other]
        same = bool(np.array_equal(self.folder.raw(a), self.folder.raw(b)))
        self.folder.release(a)
        self.folder.release(b)
        if not same:
            raise CheckpointError(f"{self.folder.path}: config.json ties {a!r} to {b!r}, but they differ: set tie_word_embeddings = false")
        return True


class Location:
    """The tensors of one parameter in a folder."""

    def __init__(self, layout: Layout, shape: Shape, keys: Keys) -> None:
        self.layout, self.shape, self.folder = layout, shape, keys.folder
        self.keys: dict[tuple[str, int | None], tuple[str, ...]] = {}  # (key in the layout, expert): keys in the folder
        self.of_experts = layout.kind != "whole"
        own = shape[1:] if self.of_experts else shape
        experts: Iterator[int | None] = iter(range(shape[0])) if layout.kind == "each" else iter((None,))
        expected = [(tensor, tensor.shape(own)) for tensor in layout.tensors]
        for e in experts:
            for tensor, size in expected:
                full = (shape[0], *size) if layout.kind == "stacked" else size
                self.keys[tensor.key, e] = _find(tensor, full, e, keys)

    @property
    def dtype(self) -> str:
        """The dtype of the first tensor in safetensors' words; BF16 if it is quantised."""
        dtype = self.folder.entry(next(iter(self.keys.values()))[0]).dtype
        return dtype if dtype in ("F64", "F32", "F16", "BF16") else "BF16"

    def read(self, out: Host, expert: int | None = None) -> None:
        """Fill an array of the parameter's shape or, with `expert`, of one expert's slice."""
        for tensor in self.layout.tensors:
            target = tensor.view(out)
            names = self.keys[tensor.key, expert if self.layout.kind == "each" else None]
            raws = [self.folder.raw(name) for name in names]
            if self.layout.kind == "stacked":
                raws = [raw[expert] for raw in raws]
            if tensor.packed == "mxfp4":
                groups = target.shape[-1] // 32
                blocks, scales = raws[0].reshape(*target.shape[:-1], groups, 16), raws[1].reshape(*target.shape[:-1], groups)
                fill_mxfp4(target, blocks, scales)
            elif len(names) == 2:
                fill_fp8_blocks(target, raws[0], raws[1])
            else:
                fill(target, raws[0].reshape(target.shape), self.folder.entry(names[0]).dtype)
            for name in names:
                self.folder.release(name)

    def mapped(self, dtype: np.dtype[Any]) -> Host | None:
        """Return a view of the file if the parameter is stored there as it is used, else None."""
        tensor, names = self.layout.tensors[0], next(iter(self.keys.values()))
        if self.of_experts or len(self.layout.tensors) != 1 or len(names) != 1 or tensor.view is not all_of_it:
            return None
        raw = self.folder.raw(names[0])
        return raw if self.dtype.startswith("F") and raw.dtype == dtype and raw.flags.aligned else None

    def release(self) -> None:
        """Let the system drop the pages of these tensors."""
        for names in self.keys.values():
            for name in names:
                self.folder.release(name)


def _find(tensor: StoredTensor, shape: Shape, e: int | None, keys: Keys) -> tuple[str, ...]:
    """Return the keys in the folder of a layout's tensor: one, a float8 weight and its scales, or MXFP4's blocks and scales."""
    name = tensor.key if e is None else tensor.key.replace("{e}", str(e))
    if tensor.packed == "mxfp4":
        if shape[-1] % 32:
            raise CheckpointError(f"{keys.folder.path}: {name}: MXFP4 packs 32 numbers, and its rows have {shape[-1]}")
        groups = (*shape[:-1], shape[-1] // 32)
        return keys.use(name + MXFP4[0], (*groups, 16), "packed"), keys.use(name + MXFP4[1], groups, "packed")
    key = keys.use(name, shape)
    if not keys.folder.entry(key).dtype.startswith("F8"):
        return (key,)
    if len(shape) != 2 or keys.folder.entry(key).dtype != "F8_E4M3":
        raise CheckpointError(f"{keys.folder.path}: tensor {key!r}: only E4M3 matrices with scales for each block are supported in float8")
    return key, keys.use(name + SCALE, tuple(-(-size // 128) for size in shape))


def locate(
    shapes: dict[str, Shape], config: ModelConfig, folder: ModelFolder, family: Family
) -> tuple[dict[str, Location], dict[str, str]]:
    """Find each parameter of these shapes.   -> locations by name; {name in the family: key} of tensors that are not computed with

    Raises CheckpointError naming the first tensor that is missing, unexpected, or of a shape or dtype that does not fit.
    """
    check_quantisation(folder)
    keys = Keys(folder, family)
    found = {}
    for name, layouts in family.names(config):
        if name not in shapes:
            raise CheckpointError(f"{folder.path}: {family.model_type} has {name}, which the model in config.json does not have")
        if math.prod(shapes[name]) > MOST_NUMBER:
            raise CheckpointError(f"{folder.path}: config.json says that {name} is {list(shapes[name])}, which is too large for an array")
        found[name] = Location(_choose(layouts, keys), shapes[name], keys)
    return found, keys.check_rest(config)


def _choose(layouts: Layouts, keys: Keys) -> Layout:
    """Return the layout that a parameter has in the folder. If there is none, return the first, whose key is then reported as missing."""
    for layout in layouts:
        tensor = layout.tensors[0]
        name = tensor.key.replace("{e}", "0") if layout.kind == "each" else tensor.key
        if any(name + end in keys for end in (MXFP4 if tensor.packed else ("",))):
            return layout
    return layouts[0]


def check_quantisation(folder: ModelFolder) -> None:
    """Raise CheckpointError for a method of quantisation that is not supported."""
    quantised = folder.config.get("quantization_config")
    if quantised is None:
        return
    method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
    if not isinstance(method, str) or method not in QUANTISED:
        known = " and ".join(f"{name} ({what})" for name, what in QUANTISED.items())
        raise CheckpointError(f"{folder.path}: weights quantised by {shown(method)} are not supported: expected {known}")
    block = quantised.get("weight_block_size", [128, 128])
    if method == "fp8" and block != [128, 128]:
        raise CheckpointError(f"{folder.path}: float8 with weight_block_size = {shown(block)} is not supported: expected [128, 128]")
