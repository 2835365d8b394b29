"""BERT (Devlin et al. 2018): a post-norm encoder, with its masked-language-model head or without a head.

The pooler and the next-sentence head of published checkpoints are kept but not computed with.
"""

from minimoe.config import ModelConfig
from minimoe.pretrained.families.family import Family, Json, Key, Tables
from minimoe.pretrained.families.layout import Names, pair, rows, whole

MODULES = {
    "attention.o_proj": "attention.output.dense", "attention_norm": "attention.output.LayerNorm", "ffn.up_proj": "intermediate.dense",
    "ffn.down_proj": "output.dense", "ffn_norm": "output.LayerNorm",
}  # fmt: skip
ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}  # transformers' word -> minimoe's


def names(config: ModelConfig) -> Names:
    for mm, hf in {"embed": "word_embeddings", "positions": "position_embeddings", "token_types": "token_type_embeddings"}.items():
        yield f"{mm}.weight", whole(f"bert.embeddings.{hf}.weight")
    yield from pair("embed_norm", "bert.embeddings.LayerNorm")
    for layer in range(config.n_layers):
        mm, hf = f"blocks.{layer}", f"bert.encoder.layer.{layer}"
        for x in ("weight", "bias"):
            heads = ((f"{hf}.attention.self.{name}.{x}", config.d_model) for name in ("query", "key", "value"))
            yield f"{mm}.attention.qkv_proj.{x}", rows(*heads)
        for name, key in MODULES.items():
            yield from pair(f"{mm}.{name}", f"{hf}.{key}")
    if config.head == "mlm":
        yield from pair("head.dense", "cls.predictions.transform.dense")
        yield from pair("head.norm", "cls.predictions.transform.LayerNorm")
        bias = whole("cls.predictions.bias")
        if not config.tie_embeddings:  # then the decoder has its own bias, which is the one that is added
            yield "head.weight", whole("cls.predictions.decoder.weight")
            bias = whole("cls.predictions.decoder.bias") + bias
        yield "head.bias", bias


def read(given: Json, tables: Tables) -> None:
    model = tables["model"]
    model["activation"] = ACTIVATIONS[given.get("hidden_act", "gelu")]
    if model["head"] == "none":
        model["tie_embeddings"] = False


def write(config: ModelConfig, written: Json) -> None:
    hf = {mm: name for name, mm in reversed(ACTIVATIONS.items())}
    written |= {"hidden_act": hf.get(config.activation, config.activation), "pad_token_id": config.pad_token_id}


FAMILY = Family(
    model_type="bert",
    architectures={"BertForMaskedLM": "mlm", "BertForPreTraining": "mlm", "BertModel": "none"},
    keys={
        "model.vocab_size": Key("vocab_size"),
        "model.d_model": Key("hidden_size"),
        "model.n_layers": Key("num_hidden_layers"),
        "model.n_heads": Key("num_attention_heads"),
        "model.d_hidden": Key("intermediate_size"),
        "model.max_seq_len": Key("max_position_embeddings", 512),
        "model.type_vocab_size": Key("type_vocab_size", 2),
        "model.pad_token_id": Key("pad_token_id", 0),
        "model.norm_eps": Key("layer_norm_eps", 1e-12),
        "model.tie_embeddings": Key("tie_word_embeddings", True),
        "model.dropout": Key("hidden_dropout_prob", 0.1),
        "model.attention_dropout": Key("attention_probs_dropout_prob", 0.1),
        "model.init_std": Key("initializer_range", 0.02),
    },
    fixed={
        "model.norm": "layer", "model.norm_position": "post", "model.position": "learned", "model.causal": False, "model.bias": True,
        "model.attention_bias": True,
    },
    only={
        "hidden_act": tuple(ACTIVATIONS), "position_embedding_type": ("absolute", None), "is_decoder": (False, None),
        "add_cross_attention": (False, None),
    },
    names=names,
    read=read,
    write=write,
    aliases=((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"), (r"^(?!bert\.|cls\.)", "bert.")),
    copies={
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    unused=(r"^bert\.pooler\.", r"^cls\.seq_relationship\.", r"^cls\.predictions\.bias$"),
    dropped=(r"\.position_ids$",),
)
