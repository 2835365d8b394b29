"""GPT-2 (Radford et al. 2019): learned positions, layer norms with bias, plain dense layers; matrices are stored as [in, out]."""

from minimoe.config import ModelConfig
from minimoe.pretrained.families.family import Family, Json, Key, Tables
from minimoe.pretrained.families.layout import Names, pair, transposed, whole

MODULES = {
    "attention_norm": "ln_1", "attention.qkv_proj": "attn.c_attn", "attention.o_proj": "attn.c_proj", "ffn_norm": "ln_2",
    "ffn.up_proj": "mlp.c_fc", "ffn.down_proj": "mlp.c_proj",
}  # fmt: skip
ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}  # transformers' word -> minimoe's


def names(config: ModelConfig) -> Names:
    yield "embed.weight", whole("transformer.wte.weight")
    yield "positions.weight", whole("transformer.wpe.weight")
    for layer in range(config.n_layers):
        for mm, hf in MODULES.items():
            key = f"transformer.h.{layer}.{hf}"
            yield f"blocks.{layer}.{mm}.weight", whole(f"{key}.weight") if "ln_" in hf else transposed(f"{key}.weight")
            yield f"blocks.{layer}.{mm}.bias", whole(f"{key}.bias")
    yield from pair("norm", "transformer.ln_f")
    if not config.tie_embeddings:
        yield "head.weight", whole("lm_head.weight")


def read(given: Json, tables: Tables) -> None:
    model = tables["model"]
    model["d_hidden"] = given.get("n_inner") or 4 * model["d_model"]
    model["activation"] = ACTIVATIONS[given.get("activation_function", "gelu_new")]


def write(config: ModelConfig, written: Json) -> None:
    hf = {mm: name for name, mm in reversed(ACTIVATIONS.items())}
    written |= {"n_inner": config.d_hidden, "activation_function": hf.get(config.activation, config.activation)}


FAMILY = Family(
    model_type="gpt2",
    architectures={"GPT2LMHeadModel": "lm"},
    keys={
        "model.vocab_size": Key("vocab_size"),
        "model.d_model": Key("n_embd"),
        "model.n_layers": Key("n_layer"),
        "model.n_heads": Key("n_head"),
        "model.max_seq_len": Key("n_positions", 1024),
        "model.norm_eps": Key("layer_norm_epsilon", 1e-5),
        "model.tie_embeddings": Key("tie_word_embeddings", True),
        "model.dropout": Key("resid_pdrop", 0.1),
        "model.attention_dropout": Key("attn_pdrop", 0.1),
        "model.init_std": Key("initializer_range", 0.02),
    },
    fixed={
        "model.norm": "layer", "model.norm_position": "pre", "model.position": "learned", "model.causal": True, "model.bias": True,
        "model.attention_bias": True,
    },
    only={
        "activation_function": tuple(ACTIVATIONS), "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False, None),
        "add_cross_attention": (False, None),
    },
    names=names,
    read=read,
    write=write,
    aliases=((r"^(?!transformer\.|lm_head\.)", "transformer."),),
    copies={"lm_head.weight": "transformer.wte.weight"},
    dropped=(r"\.attn\.(bias|masked_bias)$",),
)
