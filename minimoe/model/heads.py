"""The heads of a Transformer: what is predicted from the last hidden states."""

from __future__ import annotations

from minimoe.config import ModelConfig
from minimoe.engine import ops
from minimoe.engine.tensor import Tensor
from minimoe.layers.cache import Cache as Cache
from minimoe.layers.dense import Linear, Norm
from minimoe.layers.module import Module, Parameter, lowered


class MaskedHead(Module):
    """BERT's head over the vocabulary: norm(f(dense(x))) W^T + b, W tied to the embedding or its own; f is the blocks', gelu for swiglu."""

    def __init__(self, config: ModelConfig, vocab: int) -> None:
        self.activation = config.activation
        self.dense = Linear(config.d_model, config.d_model, True, config.init_std)
        self.norm = Norm(config.d_model, "layer", config.norm_eps, True)
        self.bias = Parameter(vocab, role="vector")
        if not config.tie_embeddings:
            self.weight = Parameter(vocab, config.d_model, std=config.init_std, role="head")

    def __call__(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.dense(x)
        h = self.norm(ops.relu(h) if self.activation == "relu" else ops.gelu(h, self.activation == "gelu_tanh"))
        return ops.linear(h, lowered(getattr(self, "weight", embedding), h), lowered(self.bias, h))
