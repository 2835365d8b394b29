"""The models of the CPU benchmark: their shapes, the tokens of a step, and the matrix products that a step needs."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from msgspec.structs import replace

from minimoe.config import ModelConfig, MoEConfig, load_config
from minimoe.config.cost import parameter_shapes, part_of, vocabulary

BYTES, CHARACTERS = 256, 65  # vocabularies: of bytes, and of tinyshakespeare

# width, layers, heads, key/value heads, hidden width (of one expert), experts, experts per token, sequence, batch
SHAPES = {
    "tiny": (128, 4, 4, 2, 256, 8, 2, 128, 16),
    "small": (256, 6, 8, 4, 512, 8, 2, 256, 8),
    "many": (256, 4, 8, 4, 256, 64, 4, 256, 8),
    "dense": (256, 6, 8, 4, 1024, 0, 0, 256, 8),
    "micro": (64, 2, 4, 4, 128, 0, 0, 32, 4),
    "micro-moe": (64, 2, 4, 4, 128, 8, 2, 32, 4),
}
NAMES = ("tiny", "small", "many", "dense", "nano", "micro", "micro-moe")


class Case(NamedTuple):
    """A model, and the tokens of a step."""

    name: str
    model: ModelConfig
    seq_len: int
    batch: int

    @property
    def tokens(self) -> int:
        """Tokens per step."""
        return self.batch * self.seq_len

    def random_batch(self) -> tuple[Any, Any]:
        """Random tokens and those that follow them, both int32 [batch, T]."""
        rows = np.random.default_rng(0).integers(0, vocabulary(self.model), (self.batch, self.seq_len + 1)).astype(np.int32)
        return rows[:, :-1].copy(), rows[:, 1:].copy()


def case(name: str) -> Case:
    """One of `NAMES`, or a preset of minimoe (over bytes if its vocabulary comes from a tokenizer). Raises `ConfigError`."""
    if name in SHAPES:
        d, layers, heads, kv, hidden, experts, k, seq, batch = SHAPES[name]
        moe = MoEConfig(n_experts=experts, top_k=k, d_hidden=hidden, aux_loss_coef=0.01, z_loss_coef=0.0) if experts else None
        model = ModelConfig(
            d_model=d, n_layers=layers, n_heads=heads, n_kv_heads=kv, d_hidden=hidden, max_seq_len=seq, vocab_size=BYTES, moe=moe
        )
        return Case(name, model, seq, batch)
    config = load_config("shakespeare-dense" if name == "nano" else name)
    model, train = config.model, config.train
    if model.vocab_size is None:
        model = replace(model, vocab_size=CHARACTERS if name == "nano" else BYTES)
    return Case(name, model, train.seq_len, train.batch_size)


class Product(NamedTuple):
    """y [rows, out] = x [rows, into] times a weight [out, into]'; backward takes dx and dw as well, of the same size."""

    rows: int
    out: int
    into: int

    @property
    def training_flops(self) -> int:
        """FLOPs of the three products, two per multiply-add."""
        return 3 * 2 * self.rows * self.out * self.into


def products(case: Case) -> Iterator[Product]:
    """The products with a weight in one forward pass: qkv, output, FFN or router and experts, head. Attention's own are left out.

    An expert has its even share of the rows.
    """
    for name, shape in parameter_shapes(case.model):
        part = part_of(name)
        if part == "experts" and len(shape) == 3:
            assert case.model.moe is not None
            experts, out, into = shape
            share, rest = divmod(case.tokens * case.model.moe.k, experts)
            yield from (Product(share + (expert < rest), out, into) for expert in range(experts))
        elif part not in ("embedding", "positions") and len(shape) == 2 and not name.endswith("bias"):
            yield Product(case.tokens, *shape)
    if case.model.tie_embeddings:
        yield Product(case.tokens, vocabulary(case.model), case.model.d_model)
