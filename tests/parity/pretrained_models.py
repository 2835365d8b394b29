"""Small random models of transformers' families, at odd sizes, as folders that transformers itself wrote.

`build(name)` is a case's model in transformers, cached (change a copy); `saved(name)` its folder, kept for the whole run of tests;
`opened(name)` that folder in minimoe.
"""

import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import torch
import transformers
from parity.peers import NUMPY
from safetensors.torch import load_file

from minimoe.layers.moe import Router
from minimoe.pretrained.opening import open_folder
from minimoe.pretrained.saving import FamilyTensors

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

VOCAB, LENGTH = 61, 17
FOLDERS = tempfile.TemporaryDirectory(prefix="minimoe-pretrained-", ignore_cleanup_errors=True)


RIGHT = (np.arange(LENGTH) < np.array([[17], [11], [1]])).astype(np.int64)  # 0 where padding
MASKS = {"right": RIGHT, "left": RIGHT[:, ::-1].copy(), "holes": (np.arange(LENGTH) % np.array([[17], [4], [2]]) < 1).astype(np.int64)}


def decoder(**keys):
    """Keys of decoders like Llama: by default 3 heads of width 10 in 1 group, and 2 layers."""
    sizes = {"vocab_size": VOCAB, "hidden_size": 30, "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 1}
    return sizes | {"intermediate_size": 23, "max_position_embeddings": 40, "pad_token_id": None} | keys


def rope(kind, theta=1000.0, **keys):
    return {"rope_type": kind, "rope_theta": theta, **keys}


GROUPS = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=32, beta_fast=4.0, beta_slow=0.05)
GPT2 = {"n_embd": 30, "n_layer": 2, "n_head": 3, "n_positions": 19, "vocab_size": VOCAB, "bos_token_id": None, "eos_token_id": None}
BERT = {"vocab_size": VOCAB, "hidden_size": 30, "num_hidden_layers": 2, "num_attention_heads": 5, "intermediate_size": 41,
        "max_position_embeddings": 19}  # fmt: skip
VIT = {"hidden_size": 30, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 41, "image_size": 12, "patch_size": 4,
       "num_channels": 3, "num_labels": 7}  # fmt: skip
MIXTRAL = decoder(num_local_experts=5, num_experts_per_tok=2)
OLMOE = decoder(num_experts=7, num_experts_per_tok=3, num_key_value_heads=3, eos_token_id=None)
QWEN3 = decoder(**GROUPS, head_dim=10, moe_intermediate_size=13, num_experts=7, num_experts_per_tok=3)
GPT_OSS = decoder(head_dim=14, num_local_experts=5, num_experts_per_tok=2, sliding_window=4, swiglu_limit=0.5)
DEEPSEEK = decoder(
    num_key_value_heads=3, num_hidden_layers=3, moe_intermediate_size=13, n_routed_experts=8, n_group=4, topk_group=2,
    num_experts_per_tok=3, first_k_dense_replace=1, q_lora_rank=12, kv_lora_rank=11, qk_rope_head_dim=6, qk_nope_head_dim=7, v_head_dim=9,
)  # fmt: skip

# name: the class in transformers, and its config's keys. The family is the first word of the name.
CASES = {
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "gpt2, untied, odd inner width, exact gelu": (
        "GPT2LMHeadModel",
        GPT2 | {"tie_word_embeddings": False, "n_inner": 37, "activation_function": "gelu"},
    ),
    "gpt2, one layer, one head, relu": ("GPT2LMHeadModel", GPT2 | {"n_layer": 1, "n_head": 1, "activation_function": "relu"}),
    "gpt2, large eps": ("GPT2LMHeadModel", GPT2 | {"layer_norm_epsilon": 1e-2, "activation_function": "gelu_pytorch_tanh"}),
    "bert": ("BertForMaskedLM", BERT),
    "bert, untied, three types, another padding": (
        "BertForMaskedLM",
        BERT | {"tie_word_embeddings": False, "type_vocab_size": 3, "pad_token_id": 4},
    ),
    "bert, relu, large eps": ("BertForMaskedLM", BERT | {"hidden_act": "relu", "layer_norm_eps": 1e-2}),
    "bert, gelu_new": ("BertForMaskedLM", BERT | {"hidden_act": "gelu_new", "num_attention_heads": 1}),
    "bert, bare": ("BertModel", BERT),
    "bert, for pretraining": ("BertForPreTraining", BERT),
    "vit": ("ViTForImageClassification", VIT),
    "vit, one channel, odd patches, relu": (
        "ViTForImageClassification",
        VIT | {"image_size": 15, "patch_size": 5, "num_channels": 1, "num_labels": 2, "hidden_act": "relu"},
    ),
    "vit, sizes as lists": (
        "ViTForImageClassification",
        VIT | {"image_size": [9, 9], "patch_size": [3, 3], "hidden_act": "gelu_new", "layer_norm_eps": 1e-2},
    ),
    "llama": ("LlamaForCausalLM", decoder(num_key_value_heads=None, rms_norm_eps=1e-2)),
    "llama, tied, linear rope": ("LlamaForCausalLM", decoder(tie_word_embeddings=True, rope_parameters=rope("linear", factor=3.0))),
    "llama, biases, own head width, llama3 rope": (
        "LlamaForCausalLM",
        decoder(**GROUPS, head_dim=10, attention_bias=True, mlp_bias=True, rope_parameters=LLAMA3),
    ),
    "llama, attention's biases, yarn": ("LlamaForCausalLM", decoder(attention_bias=True, rope_parameters=YARN)),
    "llama, biases of the mlp, yarn not truncated": (
        "LlamaForCausalLM",
        decoder(mlp_bias=True, rope_parameters=YARN | {"truncate": False}),
    ),
    "llama, yarn with mscale": ("LlamaForCausalLM", decoder(rope_parameters=YARN | {"mscale": 1.3, "mscale_all_dim": 0.7})),
    "llama, yarn with one mscale": ("LlamaForCausalLM", decoder(rope_parameters=YARN | {"mscale": 1.3})),
    "llama, yarn with a factor of its own": ("LlamaForCausalLM", decoder(rope_parameters=YARN | {"attention_factor": 0.8})),
    "llama, yarn over the whole length": ("LlamaForCausalLM", decoder(rope_parameters=rope("yarn", factor=2.0))),
    "llama, a padding token": ("LlamaForCausalLM", decoder(pad_token_id=3)),
    "llama, padding counted from the end": ("LlamaForCausalLM", decoder(pad_token_id=-1, tie_word_embeddings=True)),
    "mistral, window, tied": ("MistralForCausalLM", decoder(sliding_window=5, tie_word_embeddings=True)),
    "mistral, no window, own head width": (
        "MistralForCausalLM",
        decoder(**GROUPS, sliding_window=None, head_dim=14, rope_parameters=rope("default", 77.0)),
    ),
    "mistral, window of one, yarn": ("MistralForCausalLM", decoder(sliding_window=1, rope_parameters=YARN)),
    "mixtral": ("MixtralForCausalLM", MIXTRAL),
    "mixtral, one expert per token, window": ("MixtralForCausalLM", MIXTRAL | {"num_experts_per_tok": 1, "sliding_window": 5}),
    "mixtral, all experts, own head width, tied": (
        "MixtralForCausalLM",
        MIXTRAL | GROUPS | {"num_local_experts": 3, "num_experts_per_tok": 3, "head_dim": 6, "tie_word_embeddings": True},
    ),
    "mixtral, a single expert, linear rope": (
        "MixtralForCausalLM",
        MIXTRAL | {"num_local_experts": 1, "num_experts_per_tok": 1, "rope_parameters": rope("linear", factor=2.0)},
    ),
    "olmoe": ("OlmoeForCausalLM", OLMOE | {"norm_topk_prob": False}),
    "olmoe, normalised, groups, biases": (
        "OlmoeForCausalLM",
        OLMOE | GROUPS | {"norm_topk_prob": True, "attention_bias": True, "tie_word_embeddings": True},
    ),
    "olmoe, one expert per token, yarn, a padding token": (
        "OlmoeForCausalLM",
        OLMOE | {"num_experts_per_tok": 1, "norm_topk_prob": False, "rope_parameters": YARN, "pad_token_id": 1},
    ),
    "qwen3_moe, normalised, a dense layer": (
        "Qwen3MoeForCausalLM",
        QWEN3 | {"num_hidden_layers": 3, "norm_topk_prob": True, "mlp_only_layers": [1]},
    ),
    "qwen3_moe, every other layer, window": (
        "Qwen3MoeForCausalLM",
        QWEN3
        | {"num_hidden_layers": 4, "norm_topk_prob": False, "decoder_sparse_step": 2, "use_sliding_window": True, "sliding_window": 5},
    ),
    "qwen3_moe, tied, biases, one expert per token, yarn": (
        "Qwen3MoeForCausalLM",
        QWEN3 | {"tie_word_embeddings": True, "attention_bias": True, "num_experts_per_tok": 1, "rope_parameters": YARN},
    ),
    "qwen3_moe, all layers dense, window not used": (
        "Qwen3MoeForCausalLM",
        QWEN3 | {"mlp_only_layers": [0, 1], "use_sliding_window": False, "sliding_window": 3},
    ),
    "gpt_oss": ("GptOssForCausalLM", GPT_OSS),
    "gpt_oss, groups, no biases, tied, default rope": (
        "GptOssForCausalLM",
        GPT_OSS | GROUPS | {"attention_bias": False, "tie_word_embeddings": True, "rope_parameters": rope("default")},
    ),
    "gpt_oss, one expert per token, own kinds of layers": (
        "GptOssForCausalLM",
        GPT_OSS
        | {"num_experts_per_tok": 1, "num_hidden_layers": 3, "layer_types": ["full_attention", "full_attention", "sliding_attention"]},
    ),
    "gpt_oss, no layer slides, wide limit, yarn": (
        "GptOssForCausalLM",
        GPT_OSS | {"layer_types": ["full_attention"] * 2, "swiglu_limit": 7.0, "rope_parameters": YARN},
    ),
    "deepseek_v3": ("DeepseekV3ForCausalLM", DEEPSEEK),
    "deepseek_v3, plain queries, two shared experts, yarn with mscale": (
        "DeepseekV3ForCausalLM",
        DEEPSEEK
        | {"q_lora_rank": None, "n_shared_experts": 2, "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.8}},
    ),
    "deepseek_v3, halves turned, biases, all layers routed, not normalised": (
        "DeepseekV3ForCausalLM",
        DEEPSEEK | {"rope_interleave": False, "attention_bias": True, "first_k_dense_replace": 0, "norm_topk_prob": False},
    ),
    "deepseek_v3, all layers dense, tied, yarn with one mscale": (
        "DeepseekV3ForCausalLM",
        DEEPSEEK | {"first_k_dense_replace": 3, "tie_word_embeddings": True, "rope_parameters": YARN | {"mscale_all_dim": 0.8}},
    ),
    "deepseek_v3, one group, one expert per token, linear rope": (
        "DeepseekV3ForCausalLM",
        DEEPSEEK | {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 1, "rope_parameters": rope("linear", factor=2.0)},
    ),
}  # fmt: skip
FAMILIES = tuple(dict.fromkeys(name.split(",")[0] for name in CASES))
FIRST = {family: next(name for name in CASES if name.split(",")[0] == family) for family in FAMILIES}  # one case of each
CAUSAL = tuple(name for name, (architecture, _) in CASES.items() if "Causal" in architecture or "GPT2" in architecture)
FIRST_CAUSAL = tuple(name for name in FIRST.values() if name in CAUSAL)


def make(name, **changes):
    """A transformers model with random weights; `changes` override keys of its case."""
    architecture, keys = CASES[name]
    made = getattr(transformers, architecture)
    model = made(made.config_class(**{**keys, **changes})).eval()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # PyTorch's grouped product takes rows of 16 bytes and their multiples alone
    return randomise(model)


def randomise(model, seed=0, std=0.2):
    """Random numbers, around 1 for norms, in every parameter and saved buffer: what starts as 0 would hide a wrong mapping."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            is_norm = name.endswith("weight") and any(word in name.lower() for word in ("norm", ".ln_"))
            tensor.copy_(is_norm + std * torch.randn(tensor.shape, generator=generator, dtype=torch.float64))
    model.tie_weights()
    return model


@cache
def build(name):
    """The model of a case."""
    return make(name)


@cache
def saved(name, dtype="float32"):
    """The folder that transformers made of it, its numbers rounded to a dtype."""
    folder = Path(FOLDERS.name) / f"{dtype} {name}"
    model = build(name) if dtype == "float32" else randomise(make(name).to(getattr(torch, dtype)))
    model.save_pretrained(folder)
    return folder


def opened(name, dtype="float32", backend=NUMPY):
    """That folder as a model of minimoe. A router whose one combine weight is always 1 is frozen: minimoe refuses to train it."""
    model = open_folder(saved(name, dtype), backend=backend)
    for _, module in model.named_modules():
        if isinstance(module, Router) and module.moe.router_facts.constant_weight(module.moe):
            module.weight.requires_grad = False
    return model


def inputs_of(name, seed=0):
    """Token ids [3,17] of the whole vocabulary, or images."""
    rng = np.random.default_rng(seed)
    config = build(name).config
    if config.model_type == "vit":
        size = config.image_size[0] if isinstance(config.image_size, list | tuple) else config.image_size
        return rng.standard_normal((3, config.num_channels, size, size)).astype(np.float32)
    return rng.integers(0, VOCAB, (3, LENGTH))


def outputs(model, *args, **options):
    """Logits, or the hidden states of a model without a head."""
    out = model(*args, **options)
    found = (getattr(out, key, None) for key in ("logits", "prediction_logits", "last_hidden_state"))
    return next(value for value in found if value is not None)


def their_logits(model, inputs, **options):
    """Convert to a NumPy array."""
    with torch.no_grad():
        return outputs(model, torch.tensor(inputs), **{key: torch.tensor(value) for key, value in options.items()}).numpy()


def their_tensors(folder):
    """The tensors of a folder as the safetensors library reads them: torch tensors by name."""
    return {name: tensor for file in sorted(Path(folder).glob("*.safetensors")) for name, tensor in load_file(file).items()}


def our_tensors(model):
    """A model's parameters under its family's names: float32 arrays."""
    tensors = FamilyTensors(model, model.provenance.family, "float32")
    return {name: tensors.produce(name) for name in tensors.specs}
