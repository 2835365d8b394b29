"""The heads of a Transformer, which compute logits from the last hidden states x [B,T,D].

    language    logits = x W^T                        W [V,D] is the head's own, or the embedding if tied
    masked      logits = norm(f(dense(x))) W^T + b    (BERT: Devlin et al. 2018)
    classifier  logits = x[:, 0] W^T + b              the class token, or the first token
"""

from __future__ import annotations

from minimoe.backend import Array
from minimoe.config import ModelConfig
from minimoe.engine import ops
from minimoe.engine.tensor import Tensor
from minimoe.layers.dense import Linear, Norm
from minimoe.layers.module import Module, Parameter, cast_like
from minimoe.reference.loss import IGNORE


class Head(Module):
    """The interface of a head, and the head of a model that has none: its logits are the hidden states."""

    def __call__(self, x: Tensor, tied: Parameter | None) -> Tensor:
        """Return the logits.   x [B,T,D]; tied [V,D]: the embedding -> [B,T,V], of a classifier [B,n_classes]"""
        return x

    def cross_entropy(self, x: Tensor, tied: Parameter | None, targets: Array) -> tuple[Tensor, Array]:
        """Return the summed cross-entropy and the number of valid targets.   targets [B*T] int32, of a classifier [B]"""
        logits = self(x, tied)
        return ops.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets, IGNORE)


class LanguageHead(Head):
    """A product with a weight [V,D]; the loss is computed without storing all logits (`linear_cross_entropy`)."""

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        self.weight = _own_weight(config, vocab_size)

    def __call__(self, x: Tensor, tied: Parameter | None) -> Tensor:
        return ops.linear(x, cast_like(_output_weight(self.weight, tied), x))

    def cross_entropy(self, x: Tensor, tied: Parameter | None, targets: Array) -> tuple[Tensor, Array]:
        rows = x.reshape(-1, x.shape[-1])
        return ops.linear_cross_entropy(rows, cast_like(_output_weight(self.weight, tied), rows), targets, IGNORE)


class MaskedHead(Head):
    """norm(f(dense(x))) W^T + b, with W tied to the embedding or its own. f is the blocks' activation, gelu in place of swiglu."""

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        self.activation = config.activation
        self.dense = Linear(config.d_model, config.d_model, True, config.init_std)
        self.norm = Norm(config.d_model, "layer", config.norm_eps, True)
        self.bias = Parameter(vocab_size, role="vector")
        self.weight = _own_weight(config, vocab_size)

    def __call__(self, x: Tensor, tied: Parameter | None) -> Tensor:
        h = self.dense(x)
        h = self.norm(ops.relu(h) if self.activation == "relu" else ops.gelu(h, self.activation == "gelu_tanh"))
        return ops.linear(h, cast_like(_output_weight(self.weight, tied), h), cast_like(self.bias, h))


class ClassifierHead(Head):
    """A product with the first row of each sequence."""

    def __init__(self, config: ModelConfig) -> None:
        self.weight = Parameter(config.n_classes, config.d_model, std=config.init_std, role="head")
        self.bias = Parameter(config.n_classes, role="vector")

    def __call__(self, x: Tensor, tied: Parameter | None) -> Tensor:
        first = x[:, 0, :]
        return ops.linear(first, cast_like(self.weight, first), cast_like(self.bias, first))


def _own_weight(config: ModelConfig, vocab_size: int) -> Parameter | None:
    """Return a weight [V,D], or None if the head shares the embedding."""
    return None if config.tie_embeddings else Parameter(vocab_size, config.d_model, std=config.init_std, role="head")


def _output_weight(own: Parameter | None, tied: Parameter | None) -> Parameter:
    weight = tied if own is None else own
    assert weight is not None, "a head over the vocabulary without an embedding has its own weight"
    return weight


def make_head(config: ModelConfig, vocab_size: int) -> Head:
    """Return the head that `model.head` names."""
    if config.head == "lm":
        return LanguageHead(config, vocab_size)
    if config.head == "mlm":
        return MaskedHead(config, vocab_size)
    return ClassifierHead(config) if config.head == "classifier" else Head()
