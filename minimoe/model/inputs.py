"""The inputs of a Transformer: token ids or images become the first hidden states x [B,T,D].

tokens: x = embed[ids];   images: x = [class_token, patch_embed(patches)], a row for each patch (Dosovitskiy et al. 2020).
Learned positions and token types are added, a post-norm model normalises the sum, and dropout acts on it.
"""

from __future__ import annotations

from typing import Any

from minimoe.backend import Array, Backend
from minimoe.config import ModelConfig
from minimoe.engine import ops
from minimoe.engine.random import Rng
from minimoe.engine.tensor import Tensor
from minimoe.layers.attention import document_places
from minimoe.layers.cache import Cache
from minimoe.layers.dense import Dropout, Embedding, Linear, Norm
from minimoe.layers.module import Module, Parameter
from minimoe.model.arrays import DeviceArrays
from minimoe.model.block import ForwardContext


class Input(Module):
    """What both inputs have in common: positions, token types, norm, dropout and masks. `n_positions`: the longest sequence."""

    def __init__(self, config: ModelConfig, n_positions: int) -> None:
        self.config = c = config
        self.n_positions = n_positions
        if c.position == "learned":
            self.positions = Embedding(n_positions, c.d_model, c.init_std)
        if c.type_vocab_size:
            self.token_types = Embedding(c.type_vocab_size, c.d_model, c.init_std)
        if c.norm_position == "post":
            self.embed_norm = Norm(c.d_model, c.norm, c.norm_eps, c.bias)
        self.dropout = Dropout(c.dropout, "embedding")

    def setup(self, backend: Backend, dtype: str) -> None:
        self.backend, self.arrays = backend, DeviceArrays(backend)
        self.dtype = backend.dtype(dtype)  # of what flows from block to block; the embeddings are added in the parameters' dtype

    def rows(self, given: Any) -> Tensor:
        """Return the embedding of what the caller passes, before positions are added.   -> [B,T,D]"""
        raise NotImplementedError

    def tied_weight(self) -> Parameter | None:
        """Return the embedding [V,D], which a tied head shares; None if there is no vocabulary."""
        return None

    def __call__(
        self, given: Any, attention_mask: Any, positions: Any, token_types: Any, cache: Cache | None, rng: Rng | None,
        starts: Any = None,
    ) -> tuple[Tensor, ForwardContext]:  # fmt: skip
        """Return the first hidden states [B,T,D], and what all blocks of this forward pass share."""
        xp, c, integers = self.backend.xp, self.config, self.arrays.integers
        x = self.rows(given)
        b, t = x.shape[:2]
        past = 0 if cache is None else cache.length
        learned, places = c.position == "learned", None
        if starts is not None and (cache is not None or positions is not None):
            raise ValueError("document_starts give the positions of whole rows: they go with neither positions nor a cache")
        if positions is None:
            pos = xp.reshape(xp.arange(past, past + t, dtype=xp.int32), (1, t))
            if learned and past + t > self.n_positions:
                raise ValueError(f"a sequence of {past + t} is longer than the {self.n_positions} positions that this model has learned")
            if starts is not None:
                starts = integers(starts, t, "document_starts", "the row has")
                pos, places = pos - starts, document_places(pos, starts)
        else:
            pos = integers(positions, self.n_positions if learned else 0, "positions", "the model has learned")
        if learned:
            x = x + self.positions(pos)
        if c.type_vocab_size:
            x = x + self.token_types(integers(token_types) if token_types is not None else xp.zeros((1, t), dtype=xp.int32))
        if c.norm_position == "post":
            x = self.embed_norm(x)
        valid, token_valid = self._masks(attention_mask, b, t, past)
        if cache is not None:
            cache.add_columns(pos, valid, b, t)
        return self.dropout(ops.astype(x, self.dtype), rng), ForwardContext(pos, places, valid, token_valid, rng, cache)

    def _masks(self, attention_mask: Any, b: int, t: int, past: int) -> tuple[Array | None, Array | None]:
        """Return the keys that count [B,Tk] and the tokens that are routed [B,T], from a mask over all keys or over the new ones."""
        if attention_mask is None:
            return None, None
        valid = self.arrays.integers(attention_mask) != 0
        shape = tuple(valid.shape)
        if shape not in ((b, t), (b, past + t)):
            raise ValueError(f"attention_mask has shape {shape}, expected {(b, past + t)}: a value for each key")
        return valid, valid if shape == (b, t) else valid[:, past:]


class TokenInput(Input):
    """Token ids [B,T]; those that the host can read are checked against the vocabulary."""

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.embed = Embedding(vocab_size, config.d_model, config.init_std, config.pad_token_id)
        super().__init__(config, config.max_seq_len)

    def rows(self, given: Any) -> Tensor:
        ids = self.arrays.integers(given, self.vocab_size, "token ids", "the vocabulary has")
        if ids.ndim != 2:
            raise ValueError(f"tokens have shape {tuple(ids.shape)}, expected [B,T]")
        return self.embed(ids)

    def tied_weight(self) -> Parameter:
        return self.embed.weight


class ImageInput(Input):
    """Images [B,channels,side,side], cut into patches of p x p pixels: a class token, then a row for each of (side / p)^2 patches."""

    def __init__(self, config: ModelConfig) -> None:
        c = config
        self.patch_embed = Linear(c.n_channels * c.patch_size**2, c.d_model, True, c.init_std)
        self.class_token = Parameter(c.d_model, std=c.init_std, role="vector")
        super().__init__(c, c.n_patches + 1)

    def rows(self, given: Any) -> Tensor:
        c, backend, images = self.config, self.backend, self.arrays.any(given)
        xp, p, side = backend.xp, c.patch_size, c.image_size // c.patch_size
        expected = (c.n_channels, c.image_size, c.image_size)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise ValueError(f"images have shape {tuple(images.shape)}, expected (batch, {', '.join(map(str, expected))})")
        b = images.shape[0]
        cut = xp.permute_dims(xp.reshape(images, (b, c.n_channels, side, p, side, p)), (0, 2, 4, 1, 3, 5))
        patches = xp.reshape(xp.astype(cut, self.class_token.dtype), (b, side * side, c.n_channels * p * p))
        class_token = ops.broadcast_to(self.class_token, (b, 1, c.d_model))
        return ops.concat([class_token, self.patch_embed(Tensor(patches, backend))], axis=1)
