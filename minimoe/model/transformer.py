"""One Transformer: a decoder, an encoder or a vision encoder, dense or routed, as its configuration says.

input -> blocks of attention and feed-forward (dense, or experts) around a residual stream -> norm -> head.
Pre-norm:  x = x + attention(norm(x)), x = x + ffn(norm(x)).   Post-norm:  x = norm(x + attention(x)), x = norm(x + ffn(x)).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from minimoe.backend import Array, Backend
from minimoe.config import ModelConfig
from minimoe.engine.random import Rng
from minimoe.engine.tensor import Tensor
from minimoe.errors import ConfigError
from minimoe.layers.balance import MoEStats
from minimoe.layers.cache import Cache
from minimoe.layers.dense import Norm
from minimoe.layers.module import Module
from minimoe.model.block import Block
from minimoe.model.heads import make_head
from minimoe.model.inputs import ImageInput, Input, TokenInput
from minimoe.model.loss import LossParts as LossParts
from minimoe.model.loss import loss_parts
from minimoe.reference.loss import IGNORE


class Transformer(Module):
    """`logits = model(tokens)`, `model.loss(tokens, targets)`. `seed` draws the weights; `backend` defaults to the current one.

    With `seed` None nothing is allocated: call `prepare`, then give the parameters their numbers.
    """

    def __init__(self, config: ModelConfig, seed: int | None = 0, dtype: str = "float32", backend: Backend | None = None) -> None:
        self.config = c = config
        vocab_size = 0 if c.image_size else self.vocab_size
        self.input: Input = ImageInput(c) if c.image_size else TokenInput(c, vocab_size)
        self.blocks = [Block(c, layer) for layer in range(c.n_layers)]
        if c.norm_position == "pre":
            self.norm = Norm(c.d_model, c.norm, c.norm_eps, c.bias)
        self.head = make_head(c, vocab_size)
        if seed is not None:
            self.init(seed, dtype, backend)

    def children(self) -> Iterator[tuple[str, Module]]:
        """Return the modules directly below. The input adds nothing to a path: checkpoints say `embed.weight`, not `input.embed.weight`."""
        return (("" if module is self.input else name, module) for name, module in super().children())

    @property
    def vocab_size(self) -> int:
        if self.config.vocab_size is None:
            raise ConfigError("model.vocab_size is not set: set it, or let the tokenizer do so")
        return self.config.vocab_size

    @property
    def backend(self) -> Backend:
        """The backend that the parameters are on."""
        return self.input.backend

    @property
    def dtype(self) -> Any:
        """The dtype that blocks compute in."""
        return self.input.dtype

    def __call__(
        self, tokens: Any, attention_mask: Any = None, positions: Any = None, token_types: Any = None, cache: Cache | None = None,
        rng: Rng | None = None,
    ) -> Tensor:  # fmt: skip
        """tokens [B,T] int (or images [B,channels,height,width]) -> logits [B,T,V]; classes [B,n_classes]; without a head [B,T,D]

        `attention_mask` [B,T], or [B,Tk] with the columns of a cache, is 0 where there is padding. `cache` holds earlier positions;
        these are added. Without `rng` the model evaluates: no dropout, no noise. Raises ValueError for shapes, positions or ids that do
        not fit.
        """
        x, _ = self.hidden(tokens, attention_mask, positions, token_types, cache, rng)
        return self.logits(x)

    def logits(self, x: Tensor) -> Tensor:
        """Apply the head to the last hidden states.   x [B,T,D] -> [B,T,V]; of a classifier [B,n_classes]"""
        return self.head(x, self.input.tied_weight())

    def hidden(
        self, tokens: Any, attention_mask: Any = None, positions: Any = None, token_types: Any = None, cache: Cache | None = None,
        rng: Rng | None = None, recompute_blocks: bool = False, document_starts: Any = None,
    ) -> tuple[Tensor, list[MoEStats]]:  # fmt: skip
        """Return the last hidden states, normalised, and the stats of each routed layer.   -> [B,T,D], stats

        `document_starts` [B,T]: the index in the row at which the document of each position begins. Attention then stays within documents,
        and positions count from their beginnings.
        """
        x, context = self.input(tokens, attention_mask, positions, token_types, cache, rng, document_starts)
        stats, delta = [], None
        for layer, block in enumerate(self.blocks):
            run = block.recomputed if recompute_blocks else block
            x, delta, layer_stats = run(x, delta, context, layer)
            if layer_stats is not None:
                stats.append(layer_stats)
        if self.config.norm_position == "pre":
            x = self.norm(x) if delta is None else self.norm.after_add(x, delta)[1]
        return x, stats

    def loss(
        self, tokens: Any, targets: Any, attention_mask: Any = None, positions: Any = None, token_types: Any = None,
        rng: Rng | None = None, recompute_blocks: bool = False, document_starts: Any = None,
    ) -> LossParts:  # fmt: skip
        """Return the mean cross-entropy over targets that are not -100, and the routers' losses.   targets [B,T] int (classifier: [B])"""
        x, stats = self.hidden(tokens, attention_mask, positions, token_types, None, rng, recompute_blocks, document_starts)
        xp, classifies = self.backend.xp, self.config.head == "classifier"
        classes = self.config.n_classes if classifies else self.config.vocab_size or 0
        flat = xp.reshape(self.input.arrays.integers(targets, classes, "targets", "the classes are", IGNORE), (-1,))
        if flat.shape[0] != (x.shape[0] if classifies else x.shape[0] * x.shape[1]):
            raise ValueError(f"targets have {flat.shape[0]} values, but the input has shape {x.shape[:2]}")
        total, count = self.head.cross_entropy(x, self.input.tied_weight(), flat)
        cross_entropy = total * Tensor(1.0 / xp.clip(count, min=1.0), self.backend)
        return loss_parts(cross_entropy, stats, self.config.moe)

    def update_balance(self, counts: list[Array], ok: Array | None = None) -> None:
        """Update the balance biases after an optimizer step, with the step's counts [E] of each routed layer."""
        routed = [block.moe for block in self.blocks if block.routed]
        for layer, count in zip(routed, counts, strict=True):
            layer.update_balance(count, ok)
