"""One Transformer: a decoder, an encoder or a vision encoder, dense or routed, as its configuration says.

embed -> blocks of attention and feed-forward (a dense one, or experts) around a residual stream -> norm -> head.
Pre-norm:  x = x + attention(norm(x)), x = x + ffn(norm(x)).   Post-norm:  x = norm(x + attention(x)), x = norm(x + ffn(x)).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from minimoe.backend import Array, Backend
from minimoe.config import ModelConfig
from minimoe.engine import ops
from minimoe.engine.random import Rng
from minimoe.engine.recompute import recompute
from minimoe.engine.tensor import Tensor
from minimoe.errors import ConfigError
from minimoe.layers.balance import MoEStats, joined_aux_loss, joined_z_loss
from minimoe.layers.cache import Cache as Cache
from minimoe.layers.dense import Dropout, Embedding, Linear, Norm
from minimoe.layers.module import Module, Parameter, lowered
from minimoe.model.block import Block, Call
from minimoe.model.heads import MaskedHead
from minimoe.reference.loss import IGNORE


@dataclass(frozen=True)
class LossParts:
    """The loss of a batch and what it is made of, 0-d tensors in nats."""

    total: Tensor  # cross_entropy + router_loss
    cross_entropy: Tensor  # mean over valid targets
    router_loss: Tensor | None  # weighted, as added; None without routed layers
    aux_loss: Tensor | None  # raw, layers joined by the convention
    stats: list[MoEStats]  # of each routed layer

    @cached_property
    def z_loss(self) -> Tensor | None:
        """Raw, mean over layers; None without routed layers."""
        return joined_z_loss(self.stats) if self.stats else None


class Transformer(Module):
    """`logits = model(tokens)`, `model.loss(tokens, targets)`. `seed` draws the weights; `backend` defaults to the current one.

    With `seed` None nothing is allocated: the weights are to be read from somewhere (`pretrained.py`), after `prepare`.
    """

    tokenizer: Any = None  # of the text that it was trained on, where it was loaded from a checkpoint
    weights: Any = None  # of a model folder that it was opened from
    origin: Any = None  # that folder (`pretrained.Origin`)
    end_tokens: tuple[int, ...] = ()  # ids that end a text
    expert_rows: Sequence[Array] = ()  # of each routed layer, the rows that its experts [E] were given, where that is counted

    def __init__(self, config: ModelConfig, seed: int | None = 0, dtype: str = "float32", backend: Backend | None = None) -> None:
        self.config = c = config
        self._declare_input(c)
        self.blocks = [Block(c, layer) for layer in range(c.n_layers)]
        self.dropout = Dropout(c.dropout, "embedding")
        if c.norm_position == "pre":
            self.norm = Norm(c.d_model, c.norm, c.norm_eps, c.bias)
        if c.head == "classifier":
            self.head: Module = Linear(c.d_model, c.n_classes, True, c.init_std, role="head")
        elif c.head == "mlm":
            self.head = MaskedHead(c, self.vocab_size)
        elif c.head == "lm" and not c.tie_embeddings:
            self.head = Linear(c.d_model, self.vocab_size, False, c.init_std, role="head")
        if seed is not None:
            self.init(seed, dtype, backend)

    def setup(self, backend: Backend, dtype: str) -> None:
        self.dtype = backend.dtype(dtype)  # of what flows from block to block; the embeddings are added up in the parameters' own
        self.device_array = type(backend.xp.zeros(()))

    def _declare_input(self, c: ModelConfig) -> None:
        length = c.max_seq_len
        if c.image_size:
            self.patch_embed = Linear(c.n_channels * c.patch_size**2, c.d_model, True, c.init_std)
            self.class_token = Parameter(c.d_model, std=c.init_std, role="vector")
            length = c.n_patches + 1
        else:
            self.embed = Embedding(self.vocab_size, c.d_model, c.init_std, c.pad_token_id)
        if c.position == "learned":
            self.positions = Embedding(length, c.d_model, c.init_std)
        if c.type_vocab_size:
            self.token_types = Embedding(c.type_vocab_size, c.d_model, c.init_std)
        if c.norm_position == "post":
            self.embed_norm = Norm(c.d_model, c.norm, c.norm_eps, c.bias)

    @property
    def vocab_size(self) -> int:
        if self.config.vocab_size is None:
            raise ConfigError("model.vocab_size is not set: give it, or let the tokenizer")
        return self.config.vocab_size

    @property
    def resident(self) -> bool:
        """Is every weight in memory, to stay?"""
        return self.weights is None or self.weights.complete

    if TYPE_CHECKING:  # defined in pretrained/models.py, bound by pretrained/__init__.py

        def save_pretrained(self, path: str | Path, dtype: str | None = None) -> None: ...

    @property
    def backend(self) -> Backend:
        """Where the parameters live."""
        return next(self.named_state())[1].backend

    # ---- forward -----------------------------------------------------------------------------------------------------------------

    def __call__(
        self, tokens: Any, attention_mask: Any = None, positions: Any = None, token_types: Any = None, cache: Cache | None = None,
        rng: Rng | None = None,
    ) -> Tensor:  # fmt: skip
        """tokens [B,T] int (or images [B,channels,height,width]) -> logits [B,T,V]; classes [B,n_classes]; without a head [B,T,D]

        `attention_mask` [B,T], or [B,Tk] with those of a cache: 0 where padding. `cache` holds earlier positions and takes up these.
        `rng` None: evaluation.
        Raises ValueError for shapes, positions or ids that do not fit.
        """
        x, _ = self.hidden(tokens, attention_mask, positions, token_types, cache, rng)
        return self.logits(x)

    def logits(self, x: Tensor) -> Tensor:
        """What the head makes of the last hidden states.   x [B,T,D] -> [B,T,V]; of a classifier [B,n_classes]"""
        head = self.config.head
        if head == "none":
            return x
        if head == "classifier":
            return self.head(x[:, 0, :])  # type: ignore[operator]
        if head == "mlm":
            return self.head(x, self.embed.weight)  # type: ignore[operator]
        return ops.linear(x, self._output_weight(x))

    def _output_weight(self, x: Tensor) -> Tensor:
        return lowered(self.embed.weight if self.config.tie_embeddings else self.head.weight, x)  # type: ignore[attr-defined]

    def hidden(
        self, tokens: Any, attention_mask: Any = None, positions: Any = None, token_types: Any = None, cache: Cache | None = None,
        rng: Rng | None = None, recompute_blocks: bool = False,
    ) -> tuple[Tensor, list[MoEStats]]:  # fmt: skip
        """The last hidden states, normalised, and the stats of each routed layer.   -> [B,T,D], stats"""
        x, call = self._embed(tokens, attention_mask, positions, token_types, cache, rng)
        stats, delta = [], None
        for layer, block in enumerate(self.blocks):
            run = _recomputed if recompute_blocks else Block.__call__
            x, delta, layer_stats = run(block, x, delta, call, layer)
            if layer_stats is not None:
                stats.append(layer_stats)
        if self.config.norm_position == "pre":
            x = self.norm(x) if delta is None else self.norm.after_add(x, delta)[1]
        for rows, layer_stats in zip(self.expert_rows, stats, strict=False):
            rows[...] = rows + layer_stats.counts
        return x, stats

    def loss(
        self, tokens: Any, targets: Any, attention_mask: Any = None, positions: Any = None, token_types: Any = None,
        rng: Rng | None = None, recompute_blocks: bool = False,
    ) -> LossParts:  # fmt: skip
        """Mean cross-entropy over targets that are not -100, and the router's losses.   targets [B,T] int (classifier: [B])"""
        x, stats = self.hidden(tokens, attention_mask, positions, token_types, None, rng, recompute_blocks)
        classes = self.config.n_classes if self.config.head == "classifier" else self.config.vocab_size or 0
        flat = self.backend.xp.reshape(self._ints(targets, classes, "targets", "the classes are", IGNORE), (-1,))
        if flat.shape[0] != (x.shape[0] if self.config.head == "classifier" else x.shape[0] * x.shape[1]):
            raise ValueError(f"targets have {flat.shape[0]} values, the input {x.shape[:2]}")
        if self.config.head == "lm":
            rows = x.reshape(-1, self.config.d_model)
            total, count = ops.linear_cross_entropy(rows, self._output_weight(rows), flat, IGNORE)
        else:
            logits = self.logits(x)
            total, count = ops.cross_entropy(logits.reshape(-1, logits.shape[-1]), flat, IGNORE)
        cross_entropy = total * Tensor(1.0 / self.backend.xp.clip(count, min=1.0), self.backend)
        if not stats or self.config.moe is None:
            return LossParts(cross_entropy, cross_entropy, None, None, stats)
        aux, (aux_coef, z_coef) = joined_aux_loss(stats, self.config.moe), stats[0].coefs
        router_loss = aux * aux_coef
        if z_coef:
            router_loss = router_loss + joined_z_loss(stats) * z_coef
        return LossParts(cross_entropy + router_loss, cross_entropy, router_loss, aux, stats)

    # ---- input -------------------------------------------------------------------------------------------------------------------

    def _embed(
        self, tokens: Any, attention_mask: Any, positions: Any, token_types: Any, cache: Cache | None, rng: Rng | None
    ) -> tuple[Tensor, Call]:
        xp, c = self.backend.xp, self.config
        if c.image_size:
            x = self._patches(tokens)
            b, t = x.shape[:2]
        else:
            ids = self._ids(tokens)
            b, t = ids.shape
            x = self.embed(ids)
        past = 0 if cache is None else cache.length
        if positions is None:
            pos = xp.reshape(xp.arange(past, past + t, dtype=xp.int32), (1, t))
            self._check_length(past + t)
        else:
            pos = self._ints(positions, self._n_positions if c.position == "learned" else 0, "positions", "the model has learned")
        if c.position == "learned":
            x = x + self.positions(pos)
        if c.type_vocab_size:
            x = x + self.token_types(self._ints(token_types) if token_types is not None else xp.zeros((1, t), dtype=xp.int32))
        if c.norm_position == "post":
            x = self.embed_norm(x)
        valid, token_valid = self._masks(attention_mask, b, t, past)
        if cache is not None:
            cache.place(pos, valid, b, t)
        x = ops.astype(x, self.dtype)
        return self.dropout(x, rng), Call(pos, valid, token_valid, rng, cache)

    def _masks(self, attention_mask: Any, b: int, t: int, past: int) -> tuple[Array | None, Array | None]:
        """Keys that count [B,Tk] and tokens that are routed [B,T], from a mask over all keys or over the new ones."""
        if attention_mask is None:
            return None, None
        valid = self._ints(attention_mask) != 0
        shape = tuple(valid.shape)
        if shape not in ((b, t), (b, past + t)):
            raise ValueError(f"attention_mask has shape {shape}, expected {(b, past + t)}: a value for each key")
        return valid, valid if shape == (b, t) else valid[:, past:]

    def _patches(self, images: Any) -> Tensor:
        """Images cut into patches, each a row of the patch embedding, after a class token.   [B,channels,S,S] -> [B,n_patches+1,D]"""
        c, backend = self.config, self.backend
        xp, p, side = backend.xp, c.patch_size, c.image_size // c.patch_size
        if isinstance(images, Tensor):
            images = images.data
        images = np.asarray(images) if isinstance(images, list) else images
        if isinstance(images, np.ndarray) and (self.device_array is np.ndarray or not isinstance(images, self.device_array)):
            images = backend.from_host(images)
        expected = (c.n_channels, c.image_size, c.image_size)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise ValueError(f"images have shape {tuple(images.shape)}, expected (batch, {', '.join(map(str, expected))})")
        b = images.shape[0]
        cut = xp.permute_dims(xp.reshape(images, (b, c.n_channels, side, p, side, p)), (0, 2, 4, 1, 3, 5))
        rows = xp.reshape(xp.astype(cut, self.class_token.dtype), (b, side * side, c.n_channels * p * p))
        x = self.patch_embed(Tensor(rows, backend))
        first = ops.broadcast_to(self.class_token, (b, 1, c.d_model))
        return ops.concat([first, x], axis=1)

    def _ids(self, tokens: Any) -> Array:
        """Token ids [B,T] on the device; ids that come from the host are checked against the vocabulary."""
        ids = self._ints(tokens, self.vocab_size, "token ids", "the vocabulary has")
        if ids.ndim != 2:
            raise ValueError(f"tokens have shape {tuple(ids.shape)}, expected [B,T]")
        return ids

    def _ints(self, values: Any, limit: int = 0, what: str = "", holder: str = "", ignore: int | None = None) -> Array:
        """Integers of any library as the backend's int32; given a limit, those at hand must be `ignore` or 0 .. limit - 1."""
        if isinstance(values, Tensor):
            values = values.data
        if isinstance(values, list | tuple):
            values = np.asarray(values)
        elif hasattr(values, "__dlpack__") and not hasattr(values, "__array_namespace__"):
            values = np.from_dlpack(values)
        seen = self.backend.at_hand(values) if limit else None
        if seen is not None:
            checked = seen if ignore is None else seen[seen != ignore]
            if checked.size and (checked.min() < 0 or checked.max() >= limit):
                raise ValueError(f"{what} run from {checked.min()} to {checked.max()}, {holder} {limit}")
        if isinstance(values, np.ndarray) and (self.device_array is np.ndarray or not isinstance(values, self.device_array)):
            values = self.backend.from_host(values)
        return self.backend.xp.astype(values, self.backend.xp.int32, copy=False)

    @property
    def _n_positions(self) -> int:
        return self.config.n_patches + 1 if self.config.image_size else self.config.max_seq_len

    def _check_length(self, length: int) -> None:
        limit = self._n_positions
        if length > limit and self.config.position == "learned":
            raise ValueError(f"a sequence of {length} is longer than the {limit} positions that this model has learned")

    def update_balance(self, counts: list[Array], ok: Array | None = None) -> None:
        """After an optimizer step: bias updates of every routed layer, with the step's counts [E] of each."""
        routed = [block.moe for block in self.blocks if block.routed]
        for layer, count in zip(routed, counts, strict=True):
            layer.update_balance(count, ok)


def _recomputed(block: Block, x: Tensor, delta: Tensor | None, call: Call, layer: int) -> tuple[Tensor, Tensor | None, MoEStats | None]:
    """A block whose inner activations are not kept; its differentiable statistics stay differentiable."""

    def run(x: Tensor, delta: Tensor | None = None) -> tuple[Any, ...]:
        y, dy, stats = block(x, delta, call, layer)
        if stats is None:
            return y, dy, None
        return y, dy, stats, stats.logits, stats.prob_sum, stats.own_loss

    y, dy, stats, *tensors = recompute(run, x) if delta is None else recompute(run, x, delta)
    if stats is None:
        return y, dy, None
    return y, dy, replace(stats, **dict(zip(("logits", "prob_sum", "own_loss"), tensors, strict=True)))
