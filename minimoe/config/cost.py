"""Cost: parameters, FLOPs and bytes, counted from a configuration alone; nothing is allocated.

`parameter_shapes` lists every parameter of the model by name and shape; everything else is a sum over that list.

What the figures mean:
- FLOPs are those of matrix products, two for each multiply-add: the layers' weights, and attention's scores and values. Lookups, norms,
  softmax and activations are not counted.
- Attention is counted in full: every token against all `seq_len` keys, also where the causal mask hides half of them, as PaLM's
  appendix B does; a sliding window counts min(seq_len, window) keys.
- A token runs through K of the E experts (for expert choice on average), through every shared expert and the router. Dropped
  tokens are counted as if they had run.
- Figures per token are those of one sequence over its length, rounded down: a classifier's head runs once per sequence, a patch
  embedding on all but the class token.
- Training costs three times the forward pass (the backward of a product is two products), four times with recomputation.
- An active parameter is one that a token uses: all except those of the E - K experts that it does not visit. Embeddings count.
"""


import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from minimoe.config import Dtype, LatentConfig, ModelConfig
from minimoe.errors import ConfigError
from minimoe.reference import optimizers

Shapes = Iterable[tuple[str, tuple[int, ...]]]

ITEM_BYTES: dict[Dtype, int] = {"float64": 8, "float32": 4, "bfloat16": 2}

# The part that a parameter belongs to, by the start of its name within its layer.
PARTS: dict[str, tuple[str, ...]] = {
    "embedding": ("embed.", "token_types.", "patch_embed.", "class_token"),
    "positions": ("positions.",),
    "attention": ("attention.",),
    "router": ("moe.router.",),
    "experts": ("moe.experts.",),
    "shared experts": ("moe.shared.",),
    "dense ffn": ("ffn.",),
    "norms": ("embed_norm.", "attention_norm.", "ffn_norm.", "norm."),
    "head": ("head.",),
}
LOOKUPS = ("embed.", "token_types.", "positions.")  # rows are read, not multiplied


@dataclass(frozen=True, slots=True)
class Part:
    """A kind of part, summed over the layers that have it."""

    name: str
    parameters: int
    active: int  # parameters that one token uses
    flops_per_token: int  # forward
    count: int  # layers that have it; 1 for what is outside the layers


@dataclass(frozen=True, slots=True)
class Bytes:
    """Memory: what the parameters need in training, and what each token needs in the key/value cache. Activations are not counted."""

    weights: int
    gradients: int
    optimizer: int  # the states that the optimizer keeps for each parameter: for AdamW two
    kv_cache_per_token: int  # over all layers; 0 for an encoder, which keeps none


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of one model at one sequence length; the module's docstring says what each figure means."""

    total: int
    active: int
    seq_len: int
    flops_per_token: int
    training_flops_per_token: int
    bytes: Bytes
    parts: tuple[Part, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return what `minimoe inspect --json` prints."""
        return {
            "parameters": {"total": self.total, "active": self.active},
            "seq_len": self.seq_len,
            "flops_per_token": self.flops_per_token,
            "training_flops_per_token": self.training_flops_per_token,
            "bytes": asdict(self.bytes),
            "parts": [asdict(part) for part in self.parts],
        }


def cost(
    model: ModelConfig, seq_len: int | None = None, *, dtype: Dtype = "float32", recompute: bool = False, optimizer: str = "adamw"
) -> Cost:
    """Count parameters, FLOPs per token and bytes of a model at a sequence length (default: max_seq_len; for images always n_patches + 1).

    `dtype` is what the model computes in and what the cache holds; weights and the optimizer's states are kept in float32 at least.
    Raises `ConfigError` if the vocabulary's size is not known, or `seq_len` is not possible.
    """
    found = parts(model, seq_len)
    total = sum(part.parameters for part in found)
    flops = sum(part.flops_per_token for part in found)
    item = max(ITEM_BYTES[dtype], 4)
    weights = total * item
    cached = model.n_layers * model.kv_heads * sum(widths(model)) * ITEM_BYTES[dtype] if model.causal else 0
    states = item * state_elements(parameter_shapes(model), optimizer)
    return Cost(
        total=total,
        active=sum(part.active for part in found),
        seq_len=sequence_length(model, seq_len),
        flops_per_token=flops,
        training_flops_per_token=flops * (4 if recompute else 3),
        bytes=Bytes(weights, gradients=weights, optimizer=states, kv_cache_per_token=cached),
        parts=tuple(found),
    )


def state_elements(shapes: Shapes, optimizer: str) -> int:
    """Return how many numbers an optimizer keeps for parameters of these names and shapes. Raises ConfigError for an unknown optimizer."""
    facts = optimizers.find(optimizer)
    return sum(math.prod(shape) * len(facts.for_role(role_of(name, shape)).states) for name, shape in shapes)


def role_of(name: str, shape: tuple[int, ...]) -> Literal["matrix", "other"]:
    """Return "matrix" for a matrix of the blocks, "other" for an embedding, head, norm or bias: optimizers treat them differently."""
    if len(shape) < 2 or name.endswith("bias") or name.startswith(LOOKUPS) or name == "head.weight":
        return "other"
    return "matrix"


def parts(model: ModelConfig, seq_len: int | None = None) -> list[Part]:
    """Return the parts of the model, in the order in which a token passes through them. Raises as `cost` does."""
    length = sequence_length(model, seq_len)
    shapes: dict[str, list[tuple[str, tuple[int, ...]]]] = {part: [] for part in PARTS}
    for name, shape in parameter_shapes(model):
        shapes[part_of(name)].append((name, shape))
    found = []
    for part, members in shapes.items():
        flops = sum(product_flops(model, name, shape, length) for name, shape in members)
        if part == "attention":
            flops += attention_flops(model, length)
        if part == "head" and model.tie_embeddings:  # it has no parameters, but its product with the embedding counts
            flops += 2 * length * vocabulary(model) * model.d_model
        if members or flops:
            parameters = sum(math.prod(shape) for _, shape in members)
            active = parameters // experts(model) * per_token(model) if part == "experts" else parameters
            found.append(Part(part, parameters, active, flops // length, count_layers(name for name, _ in members)))
    return found


def part_of(name: str) -> str:
    """Return the part that a parameter belongs to, by its name."""
    local = re.sub(r"^blocks\.\d+\.", "", name)
    return next(part for part, starts in PARTS.items() if local.startswith(starts))


def count_layers(names: Iterator[str]) -> int:
    layers = {name.split(".")[1] for name in names if name.startswith("blocks.")}
    return len(layers) or 1


def product_flops(model: ModelConfig, name: str, shape: tuple[int, ...], length: int) -> int:
    """Return the forward FLOPs of one sequence in the matrix product with this parameter; 0 if there is none."""
    if len(shape) < 2 or name.endswith("bias") or name.startswith(LOOKUPS):
        return 0
    multiply_adds = math.prod(shape)
    if part_of(name) == "experts":
        multiply_adds = multiply_adds // experts(model) * per_token(model)
    rows = length
    if name.startswith("patch_embed."):
        rows = model.n_patches
    elif name == "head.weight" and model.head == "classifier":
        rows = 1
    return 2 * multiply_adds * rows


def attention_flops(model: ModelConfig, length: int) -> int:
    """Return the FLOPs of scores q k' and values p v of one sequence: in each layer length x keys x (Q*C) and x (Q*Cv)."""
    keys = sum(min(length, model.window(layer) or length) for layer in range(model.n_layers))
    return 2 * length * keys * model.n_heads * sum(widths(model))


def widths(model: ModelConfig) -> tuple[int, int]:
    """Return the widths of one head: its key (C) and its value (Cv)."""
    if model.mla is not None:
        return model.mla.nope_dim + model.mla.rope_dim, model.mla.v_dim
    return model.head_width, model.head_width


def sequence_length(model: ModelConfig, seq_len: int | None) -> int:
    if model.image_size:
        return model.n_patches + 1
    if seq_len is None:
        return model.max_seq_len
    if not 0 < seq_len <= model.max_seq_len:
        raise ConfigError(f"seq_len ({seq_len}) must lie between 1 and model.max_seq_len ({model.max_seq_len})")
    return seq_len


def vocabulary(model: ModelConfig) -> int:
    if model.vocab_size is None:
        raise ConfigError("model.vocab_size is not set: set it, or take it from the tokenizer")
    return model.vocab_size


def experts(model: ModelConfig) -> int:
    return model.moe.n_experts if model.moe else 1


def per_token(model: ModelConfig) -> int:
    return model.moe.k if model.moe else 1


# ---- every parameter: its name in the model, and its shape -------------------------------------------------------------------


def parameter_shapes(model: ModelConfig) -> Shapes:
    """Yield name and shape of every parameter of `Transformer(model)`, tied weights once. Weights are [out, in], experts [E, out, in].

    Raises `ConfigError` if the model reads tokens and vocab_size is not set.
    """
    yield from embedding_shapes(model)
    routed = set(model.moe_layers())
    for layer in range(model.n_layers):
        yield from norm_shapes(model, f"blocks.{layer}.attention_norm")
        yield from attention_shapes(model, f"blocks.{layer}.attention")
        yield from norm_shapes(model, f"blocks.{layer}.ffn_norm")
        if layer in routed:
            yield from moe_shapes(model, f"blocks.{layer}.moe")
        else:
            yield from ffn_shapes(model, f"blocks.{layer}.ffn", model.d_hidden)
    if model.norm_position == "pre":
        yield from norm_shapes(model, "norm")
    yield from head_shapes(model)


def embedding_shapes(model: ModelConfig) -> Shapes:
    """Yield the embedding of tokens or patches, positions and token types."""
    d = model.d_model
    if model.image_size:
        yield from linear_shapes("patch_embed", d, model.n_channels * model.patch_size**2, bias=True)
        yield "class_token", (d,)
    else:
        yield "embed.weight", (vocabulary(model), d)
    if model.position == "learned":
        yield "positions.weight", (model.n_patches + 1 if model.image_size else model.max_seq_len, d)
    if model.type_vocab_size:
        yield "token_types.weight", (model.type_vocab_size, d)
    if model.norm_position == "post":
        yield from norm_shapes(model, "embed_norm")


def attention_shapes(model: ModelConfig, prefix: str) -> Shapes:
    """Yield query, key and value rows stacked in one product; then the output."""
    if model.mla is not None:
        yield from latent_shapes(model, model.mla, prefix)
        return
    q, kv = model.n_heads * model.head_width, model.kv_heads * model.head_width
    if model.sinks:
        yield f"{prefix}.sinks", (model.n_heads,)
    yield from linear_shapes(f"{prefix}.qkv_proj", q + 2 * kv, model.d_model, model.attention_bias)
    yield from linear_shapes(f"{prefix}.o_proj", model.d_model, q, model.attention_bias)
    if model.qk_norm != "none":
        head = model.qk_norm == "head"
        yield f"{prefix}.q_norm.weight", (model.head_width if head else q,)
        yield f"{prefix}.k_norm.weight", (model.head_width if head else kv,)


def latent_shapes(model: ModelConfig, mla: LatentConfig, prefix: str) -> Shapes:
    """Yield the products into narrow vectors, the norms of these, and the products from them into heads."""
    heads, d = model.n_heads, model.d_model
    if mla.q_rank:
        yield from linear_shapes(f"{prefix}.q_a_proj", mla.q_rank, d, model.attention_bias)
        yield f"{prefix}.q_a_norm.weight", (mla.q_rank,)
    yield from linear_shapes(f"{prefix}.q_b_proj", heads * (mla.nope_dim + mla.rope_dim), mla.q_rank or d, False)
    yield from linear_shapes(f"{prefix}.kv_a_proj", mla.kv_rank + mla.rope_dim, d, model.attention_bias)
    yield f"{prefix}.kv_a_norm.weight", (mla.kv_rank,)
    yield from linear_shapes(f"{prefix}.kv_b_proj", heads * (mla.nope_dim + mla.v_dim), mla.kv_rank, False)
    yield from linear_shapes(f"{prefix}.o_proj", d, heads * mla.v_dim, model.attention_bias)


def ffn_shapes(model: ModelConfig, prefix: str, hidden: int) -> Shapes:
    """Yield the parameters of a dense FFN of the given hidden width."""
    up, rows = up_proj(model, hidden)
    yield from linear_shapes(f"{prefix}.{up}_proj", rows, model.d_model, model.bias)
    yield from linear_shapes(f"{prefix}.down_proj", model.d_model, hidden, model.bias)


def moe_shapes(model: ModelConfig, prefix: str) -> Shapes:
    """Yield the router, the stacked experts, and the shared experts as one dense FFN of their joint width."""
    assert model.moe is not None
    e, d, hidden = model.moe.n_experts, model.d_model, model.expert_hidden
    yield from linear_shapes(f"{prefix}.router", e, d, model.moe.router_bias)
    for name, shape in model.moe.router_facts.shapes(e, d):
        yield f"{prefix}.router.{name}", shape
    up, rows = up_proj(model, hidden)
    yield f"{prefix}.experts.{up}_proj", (e, rows, d)
    yield f"{prefix}.experts.down_proj", (e, d, hidden)
    if model.bias:
        yield f"{prefix}.experts.{up}_bias", (e, rows)
        yield f"{prefix}.experts.down_bias", (e, d)
    if model.moe.n_shared_experts:
        yield from ffn_shapes(model, f"{prefix}.shared", model.moe.n_shared_experts * hidden)


def up_proj(model: ModelConfig, hidden: int) -> tuple[str, int]:
    """Return name and rows of an FFN's first product: SwiGLU stacks the gate's rows on the others."""
    return ("gate_up", 2 * hidden) if model.activation == "swiglu" else ("up", hidden)


def head_shapes(model: ModelConfig) -> Shapes:
    """Yield the parameters from vectors to logits; a tied head's weight is the embedding's, counted there."""
    d = model.d_model
    if model.head == "classifier":
        yield from linear_shapes("head", model.n_classes, d, bias=True)
    if model.head == "mlm":
        yield from linear_shapes("head.dense", d, d, bias=True)
        yield "head.norm.weight", (d,)
        yield "head.norm.bias", (d,)
        yield "head.bias", (vocabulary(model),)
    if model.head in ("lm", "mlm") and not model.tie_embeddings:
        yield "head.weight", (vocabulary(model), d)


def norm_shapes(model: ModelConfig, prefix: str) -> Shapes:
    yield f"{prefix}.weight", (model.d_model,)
    if model.norm == "layer" and model.bias:
        yield f"{prefix}.bias", (model.d_model,)


def linear_shapes(prefix: str, out: int, into: int, bias: bool) -> Shapes:
    yield f"{prefix}.weight", (out, into)
    if bias:
        yield f"{prefix}.bias", (out,)
