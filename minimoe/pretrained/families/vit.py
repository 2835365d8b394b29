"""ViT (Dosovitskiy et al. 2020): images cut into patches, a class token, a pre-norm encoder, and a classifier.

A convolution whose stride is its own size is a product over the pixels of a patch.
"""

from minimoe.config import ModelConfig
from minimoe.errors import ConfigError
from minimoe.pretrained.families.bert import ACTIVATIONS
from minimoe.pretrained.families.family import Family, Json, Key, Tables, of_kind, whole_number
from minimoe.pretrained.families.layout import Names, pair, rows, whole
from minimoe.pretrained.header import shown

MODULES = {
    "attention_norm": "layernorm_before", "attention.o_proj": "attention.output.dense", "ffn_norm": "layernorm_after",
    "ffn.up_proj": "intermediate.dense", "ffn.down_proj": "output.dense",
}  # fmt: skip
SPELLINGS = (  # transformers 5 with save_original_format=False
    (r"^vit\.layers\.", "vit.encoder.layer."), (r"\.q_proj\.", ".attention.query."), (r"\.k_proj\.", ".attention.key."),
    (r"\.v_proj\.", ".attention.value."), (r"\.o_proj\.", ".output.dense."), (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)  # fmt: skip


def names(config: ModelConfig) -> Names:
    d, channels, patch = config.d_model, config.n_channels, config.patch_size
    yield "class_token", whole("vit.embeddings.cls_token", lambda token: token.reshape(1, 1, d))
    yield "positions.weight", whole("vit.embeddings.position_embeddings", lambda table: table[None])
    kernel = "vit.embeddings.patch_embeddings.projection"
    yield "patch_embed.weight", whole(f"{kernel}.weight", lambda weight: weight.reshape(d, channels, patch, patch))
    yield "patch_embed.bias", whole(f"{kernel}.bias")
    for layer in range(config.n_layers):
        mm, hf = f"blocks.{layer}", f"vit.encoder.layer.{layer}"
        for x in ("weight", "bias"):
            heads = ((f"{hf}.attention.attention.{name}.{x}", d) for name in ("query", "key", "value"))
            yield f"{mm}.attention.qkv_proj.{x}", rows(*heads)
        for name, key in MODULES.items():
            yield from pair(f"{mm}.{name}", f"{hf}.{key}")
    yield from pair("norm", "vit.layernorm")
    yield from pair("head", "classifier")


def read(given: Json, tables: Tables) -> None:
    model = tables["model"]
    model["activation"] = ACTIVATIONS[given.get("hidden_act", "gelu")]
    named = of_kind(given, "id2label", (dict, list), "an object with a name for each class") or ["LABEL_0", "LABEL_1"]
    model["n_classes"] = whole_number(given, "num_labels", 0) if given.get("num_labels") else len(named)
    for key in ("image_size", "patch_size"):
        if isinstance(model[key], list):
            if len(set(map(str, model[key]))) != 1:
                raise ConfigError(f"{key} = {shown(model[key])} is not supported: images and patches must be square")
            model[key] = model[key][0]
    if not model["image_size"]:
        raise ConfigError(f"image_size = {model['image_size']!r}: expected a number of pixels above 0")


def write(config: ModelConfig, written: Json) -> None:
    hf = {mm: name for name, mm in reversed(ACTIVATIONS.items())}
    written["hidden_act"] = hf.get(config.activation, config.activation)
    written["id2label"] = {str(i): f"LABEL_{i}" for i in range(config.n_classes)}
    written["label2id"] = {f"LABEL_{i}": i for i in range(config.n_classes)}


FAMILY = Family(
    model_type="vit",
    architectures={"ViTForImageClassification": "classifier"},
    keys={
        "model.d_model": Key("hidden_size"),
        "model.n_layers": Key("num_hidden_layers"),
        "model.n_heads": Key("num_attention_heads"),
        "model.d_hidden": Key("intermediate_size"),
        "model.image_size": Key("image_size", 224),
        "model.patch_size": Key("patch_size", 16),
        "model.n_channels": Key("num_channels", 3),
        "model.norm_eps": Key("layer_norm_eps", 1e-12),
        "model.dropout": Key("hidden_dropout_prob", 0.0),
        "model.attention_dropout": Key("attention_probs_dropout_prob", 0.0),
        "model.init_std": Key("initializer_range", 0.02),
    },
    fixed={
        "model.norm": "layer", "model.norm_position": "pre", "model.position": "learned", "model.causal": False, "model.bias": True,
        "model.attention_bias": True,
    },
    only={"hidden_act": tuple(ACTIVATIONS), "qkv_bias": (True,)},
    names=names,
    read=read,
    write=write,
    aliases=SPELLINGS,
)
