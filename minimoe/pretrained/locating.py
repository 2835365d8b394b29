"""Where a model's parameters lie in a folder: names and shapes compared before anything is read, and the reading itself.

A key that is missing, that nothing asks for, or whose shape is not the one that the configuration says, is named.
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
SCALE = "_scale_inv"  # beside a weight in float8: a number for each block
MXFP4 = ("_blocks", "_scales")
QUANTISED = {"fp8": "float8 with a scale for each block", "mxfp4": "MXFP4"}


class Keys:
    """A folder's tensors under the names of its family, each with the one that it has in the folder; what was asked for is noted."""

    def __init__(self, folder: ModelFolder, family: Family) -> None:
        self.folder, self.family = folder, family
        self.spelled: dict[str, str] = {}
        self.used: set[str] = set()
        for key in sorted(folder.keys()):
            name = key
            for pattern, spelling in family.aliases:
                name = re.sub(pattern, spelling, name)
            if name in self.spelled:
                raise CheckpointError(f"{folder.path}: tensors {self.spelled[name]!r} and {key!r} are the same to {family.model_type}")
            self.spelled[name] = key

    def __contains__(self, name: str) -> bool:
        return name in self.spelled

    def use(self, name: str, shape: Shape, kind: str = "") -> str:
        """The key of a tensor in the folder, its shape compared."""
        if name not in self.spelled:
            raise CheckpointError(f"{self.folder.path}: tensor {name!r} is missing")
        key = self.spelled[name]
        entry = self.folder.entry(key)
        if tuple(entry.shape) != shape:
            raise CheckpointError(f"{self.folder.path}: tensor {key!r} has shape {list(entry.shape)}, config.json says {list(shape)}")
        wanted = ("U8",) if kind == "packed" else FLOATS
        if entry.dtype not in wanted:
            raise CheckpointError(f"{self.folder.path}: tensor {key!r} has dtype {entry.dtype}, which is not read as weights")
        self.used.add(name)
        return key

    def check_rest(self, config: ModelConfig) -> dict[str, str]:
        """Refuse tensors that nothing asked for.   -> those that the family keeps without computing with them: {name: key}"""
        kept, end = {}, self._end(config)
        for name in sorted(self.spelled.keys() - self.used):
            if name in self.family.copies and self._repeats(name, self.family.copies[name]):
                continue
            if any(re.search(pattern, name) for pattern in self.family.dropped):
                continue
            matches = (re.search(pattern, name) for pattern in self.family.unused)
            layers = [int(match.groupdict().get("beyond", -1)) for match in matches if match]
            if any(layer < 0 or config.n_layers <= layer < end for layer in layers):
                kept[name] = self.spelled[name]
                continue
            raise CheckpointError(f"{self.folder.path}: tensor {self.spelled[name]!r} is unexpected in this {self.family.model_type}")
        return kept

    def _end(self, config: ModelConfig) -> int:
        """The number of layers, with those that the family has past the last."""
        further = self.family.further.value(self.folder.config) if self.family.further else 0
        return config.n_layers + (further if isinstance(further, int) else 0)

    def _repeats(self, name: str, other: str) -> bool:
        """Is a tensor the same as the one that it is tied to?"""
        if other not in self.spelled:
            return False
        a, b = self.spelled[name], self.spelled[other]
        same = bool(np.array_equal(self.folder.raw(a), self.folder.raw(b)))
        self.folder.release(a)
        self.folder.release(b)
        if not same:
            raise CheckpointError(f"{self.folder.path}: config.json ties {a!r} to {b!r}, but they differ: set tie_word_embeddings = false")
        return True


class Location:
    """The tensors of one parameter."""

    def __init__(self, layout: Layout, shape: Shape, keys: Keys) -> None:
        self.layout, self.shape, self.folder = layout, shape, keys.folder
        self.keys: dict[tuple[str, int | None], tuple[str, ...]] = {}  # (tensor's key, expert): the tensors in the folder
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
        """The file's word for what the first tensor is made of; BF16 where it is quantised."""
        dtype = self.folder.entry(next(iter(self.keys.values()))[0]).dtype
        return dtype if dtype in ("F64", "F32", "F16", "BF16") else "BF16"

    def read(self, out: Host, expert: int | None = None) -> None:
        """Fill an array of the parameter's shape, or with `expert` of one slice's."""
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
        """A view of the file where the parameter lies there as it is used, else None."""
        tensor, names = self.layout.tensors[0], next(iter(self.keys.values()))
        if self.of_experts or len(self.layout.tensors) > 1 or len(names) > 1 or tensor.view is not all_of_it:
            return None
        raw = self.folder.raw(names[0])
        return raw if self.dtype.startswith("F") and raw.dtype == dtype and raw.flags.aligned else None

    def release(self) -> None:
        """The pages of its tensors need not stay."""
        for names in self.keys.values():
            for name in names:
                self.folder.release(name)


def _find(tensor: StoredTensor, shape: Shape, e: int | None, keys: Keys) -> tuple[str, ...]:
    """The tensors of one tensor: one; a float8 weight and its scales; MXFP4's blocks and scales."""
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
        raise CheckpointError(f"{keys.folder.path}: tensor {key!r}: of float8 weights E4M3 matrices with scales for each block are read")
    return key, keys.use(name + SCALE, tuple(-(-size // 128) for size in shape))


def locate(
    shapes: dict[str, Shape], config: ModelConfig, folder: ModelFolder, family: Family
) -> tuple[dict[str, Location], dict[str, str]]:
    """Where each parameter of these shapes lies.   -> locations by our names; tensors that are kept without being computed with, as the
    family names them: the folder's keys

    Raises CheckpointError naming the first tensor that is missing, unexpected, or of a shape or dtype that does not fit.
    """
    check_quantisation(folder)
    keys = Keys(folder, family)
    found = {}
    for name, layouts in family.names(config):
        if name not in shapes:
            raise CheckpointError(f"{folder.path}: {family.model_type} has {name}, which the model of config.json lacks")
        if math.prod(shapes[name]) > MOST_NUMBER:
            raise CheckpointError(f"{folder.path}: config.json says that {name} is {list(shapes[name])}: no array is so large")
        found[name] = Location(_choose(layouts, keys), shapes[name], keys)
    return found, keys.check_rest(config)


def _choose(layouts: Layouts, keys: Keys) -> Layout:
    """The form in which a parameter is there; where it is in none, the first, whose key will be named as missing."""
    for layout in layouts:
        tensor = layout.tensors[0]
        name = tensor.key.replace("{e}", "0") if layout.kind == "each" else tensor.key
        if any(name + end in keys for end in (MXFP4 if tensor.packed else ("",))):
            return layout
    return layouts[0]


def check_quantisation(folder: ModelFolder) -> None:
    """Refuse a method of quantisation that is not read here, by its name."""
    quantised = folder.config.get("quantization_config")
    if quantised is None:
        return
    method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
    if not isinstance(method, str) or method not in QUANTISED:
        known = " and ".join(f"{name} ({what})" for name, what in QUANTISED.items())
        raise CheckpointError(f"{folder.path}: weights quantised by {shown(method)} are not read here: {known} are")
    block = quantised.get("weight_block_size", [128, 128])
    if method == "fp8" and block != [128, 128]:
        raise CheckpointError(f"{folder.path}: float8 with weight_block_size = {shown(block)} is not read here: [128, 128] is")
