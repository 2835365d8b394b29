"""What Llama and similar decoders share: keys of config.json, and names of tensors."""

from minimoe.config import ModelConfig
from minimoe.pretrained.families.family import Absent, Key
from minimoe.pretrained.families.layout import Names, rows, whole

SILU = ("silu", "swish")
FIXED = {"model.norm": "rms", "model.norm_position": "pre", "model.position": "rope", "model.activation": "swiglu", "model.causal": True}
COPIES = {"lm_head.weight": "model.embed_tokens.weight"}
DROPPED = (r"\.rotary_emb\.inv_freq$",)


def keys(eps: float, kv_heads: int | None = None, seq_len: int | type = Absent, padding: int | None = None) -> dict[str, Key]:
    """Return the keys that all of them have. The arguments are the defaults that differ between families."""
    return {
        "model.vocab_size": Key("vocab_size"),
        "model.d_model": Key("hidden_size"),
        "model.n_layers": Key("num_hidden_layers"),
        "model.n_heads": Key("num_attention_heads"),
        "model.n_kv_heads": Key("num_key_value_heads", kv_heads),
        "model.d_hidden": Key("intermediate_size"),
        "model.max_seq_len": Key("max_position_embeddings", seq_len),
        "model.norm_eps": Key("rms_norm_eps", eps),
        "model.pad_token_id": Key("pad_token_id", padding),
        "model.tie_embeddings": Key("tie_word_embeddings", False),
        "model.attention_dropout": Key("attention_dropout", 0.0),
        "model.init_std": Key("initializer_range", 0.02),
    }


def outer_names(config: ModelConfig) -> Names:
    """Yield embedding, last norm and head."""
    yield "embed.weight", whole("model.embed_tokens.weight")
    yield "norm.weight", whole("model.norm.weight")
    if not config.tie_embeddings:
        yield "head.weight", whole("lm_head.weight")


def norm_names(layer: int) -> Names:
    """Yield the two norms of a block."""
    yield f"blocks.{layer}.attention_norm.weight", whole(f"model.layers.{layer}.input_layernorm.weight")
    yield f"blocks.{layer}.ffn_norm.weight", whole(f"model.layers.{layer}.post_attention_layernorm.weight")


def attention_names(config: ModelConfig, layer: int) -> Names:
    """Yield the projections of grouped heads, with their biases and norms if the configuration has them."""
    mm, hf = f"blocks.{layer}.attention", f"model.layers.{layer}.self_attn"
    q, kv = config.n_heads * config.head_width, config.kv_heads * config.head_width
    for x in ("weight", "bias") if config.attention_bias else ("weight",):
        yield f"{mm}.qkv_proj.{x}", rows((f"{hf}.q_proj.{x}", q), (f"{hf}.k_proj.{x}", kv), (f"{hf}.v_proj.{x}", kv))
        yield f"{mm}.o_proj.{x}", whole(f"{hf}.o_proj.{x}")
    if config.qk_norm != "none":
        yield f"{mm}.q_norm.weight", whole(f"{hf}.q_norm.weight")
        yield f"{mm}.k_norm.weight", whole(f"{hf}.k_norm.weight")


def ffn_names(config: ModelConfig, mm: str, hf: str, hidden: int) -> Names:
    """Yield the parameters of a dense gated layer."""
    for x in ("weight", "bias") if config.bias else ("weight",):
        yield f"{mm}.gate_up_proj.{x}", rows((f"{hf}.gate_proj.{x}", hidden), (f"{hf}.up_proj.{x}", hidden))
        yield f"{mm}.down_proj.{x}", whole(f"{hf}.down_proj.{x}")


def moe_names(layer: int, router: str, experts: Names) -> Names:
    """Yield the router and the experts of a block."""
    yield f"blocks.{layer}.moe.router.weight", whole(router)
    for name, layouts in experts:
        yield f"blocks.{layer}.moe.experts.{name}", layouts
