"""Verifies one checkpoint: the digests of its manifest, then what its files mean, as resuming would read them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np

from minimoe.config import Config, config_from_tables
from minimoe.config.files import saved_names
from minimoe.config.trained import is_adapter
from minimoe.data.tokenizer import Tokenizer, load_tokenizer
from minimoe.errors import CheckpointError, UserError
from minimoe.model.adapters import adapt, freeze
from minimoe.model.transformer import Transformer
from minimoe.reference.extensions import UnknownName
from minimoe.runs.checkpoint import Arrays, Checkpoint, check_resumable, is_pruned, load_checkpoint, step_of
from minimoe.runs.records import State
from minimoe.study.verify.checks import Check, count_not_finite, describe_not_finite, named, ok, problem, skipped
from minimoe.training.optim import state_shapes


class Verified:
    """A checkpoint of which `checks` says whether it is whole; `config` and `state` are None where they cannot be read."""

    def __init__(self, folder: Path, what: str) -> None:
        self.folder, self.what = folder, what
        self.config: Config | None = None
        self.state: State | None = None
        self.step = 0
        self.pruned = False  # it has weights, and no optimizer state

    def checks(self) -> Iterator[Check]:
        """Read the checkpoint."""
        try:
            self.pruned = is_pruned(self.folder)
            saved = load_checkpoint(self.folder, optimizer=not self.pruned)
        except CheckpointError as error:
            yield problem(self.what, str(error).removeprefix(f"{self.folder.name}/"))
            return
        found = [*self._state(saved), *self._config(saved)]
        if self.config is not None:
            found += self._arrays(saved, self.config)
        if not found:
            count = sum(array.size for array in saved.model.values())
            ending = "; pruned: no optimizer state" if self.pruned else ""
            found = [ok(self.what, f"SHA-256 match; {count:,} weights, all finite{ending}")]
        yield from found

    def _state(self, saved: Checkpoint) -> Iterator[Check]:
        try:
            check_resumable(saved)
        except CheckpointError as error:
            yield problem(self.what, str(error).removeprefix(f"{self.folder.name}/"))
            return
        self.step, self.state = saved.step, msgspec.convert(saved.state, State)
        if step_of(self.folder) not in (None, saved.step):
            yield problem(self.what, f"state.json: is of step {saved.step}")

    def _config(self, saved: Checkpoint) -> Iterator[Check]:
        try:
            with saved_names(self.folder):
                self.config = config_from_tables(saved.config, self.folder.name)
        except UserError as error:
            missing = isinstance(error.__cause__, UnknownName)
            yield skipped(self.what, f"its weights: {error}") if missing else problem(self.what, f"config.json: {error}")

    def _arrays(self, saved: Checkpoint, config: Config) -> Iterator[Check]:
        for sentence in (*_wrong_arrays(saved, config, self.pruned), *_wrong_tokens(saved, config)):
            yield problem(self.what, sentence)


def _wrong_arrays(saved: Checkpoint, config: Config, pruned: bool) -> Iterator[str]:
    """Yield what does not fit in the weights and in the optimizer's state, and what is not finite there."""
    if config.model.n_layers > len(saved.model):
        yield f"config.json: says {config.model.n_layers} layers, and there are {len(saved.model)} tensors"
        return
    try:
        model = Transformer(config.model, seed=None)
        if config.lora is not None:
            adapt(model, config.lora)
        else:
            freeze(model, config.train.freeze)
        weights = {name: tuple(p.shape) for name, p in model.named_state() if config.lora is None or is_adapter(name)}
        moments = {} if pruned else state_shapes(model.parameters(), config.train)
    except UserError as error:
        yield f"config.json: {error}"
        return
    for file, arrays, shapes in (("model.safetensors", saved.model, weights), ("optimizer.safetensors", saved.optimizer, moments)):
        yield from (f"{file}: {sentence}" for sentence in (*misfits(arrays, shapes), *not_finite(arrays)))


def misfits(arrays: Arrays, shapes: dict[str, tuple[int, ...]]) -> Iterator[str]:
    """Yield how arrays differ in their names and shapes from what the configuration asks for."""
    missing, unexpected = sorted(shapes.keys() - arrays.keys()), sorted(arrays.keys() - shapes.keys())
    if missing:
        yield f"lacks {named(missing)}"
    if unexpected:
        yield f"has {named(unexpected)}, which the configuration does not"
    for name in sorted(shapes.keys() & arrays.keys()):
        if tuple(arrays[name].shape) != shapes[name]:
            yield f"{name} has shape {list(arrays[name].shape)}, the configuration says {list(shapes[name])}"


def not_finite(arrays: Arrays) -> Iterator[str]:
    return describe_not_finite({name: count_not_finite(array) for name, array in arrays.items() if np.issubdtype(array.dtype, np.floating)})


def _wrong_tokens(saved: Checkpoint, config: Config) -> Iterator[str]:
    """Yield what is wrong with the tokenizer."""
    if saved.tokenizer_path is None:
        return
    try:
        tokenizer = load_tokenizer(saved.tokenizer_path)
    except UserError as error:
        yield f"tokenizer.json: {error}"
        return
    yield from beyond_embedding(tokenizer, config.model.vocab_size or 0)


def beyond_embedding(tokenizer: Tokenizer, rows: int) -> Iterator[str]:
    """Yield a sentence if the tokenizer has ids for which the embedding has no row."""
    if tokenizer.vocab_size > rows:
        yield f"tokenizer.json: has ids up to {tokenizer.vocab_size - 1}, and the embedding has {rows} rows"
