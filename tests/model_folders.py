"""Small model folders of every family, of random numbers, written without torch.

folder = write(tmp_path / "m", small("mixtral", num_local_experts=3))            # config.json and model.safetensors
arrays = tensors(config)                                                         # or: change them first
write(path, config, arrays | {"lm_head.weight": other}, dtype="BF16", shard_bytes=10_000)
write(path, config | FP8, fp8(arrays))                                           # quantised as DeepSeek-V3, as gpt-oss
"""

import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from minimoe.data.tokenizer import ByteTokenizer
from minimoe.model.transformer import Transformer
from minimoe.pretrained.families.table import family
from minimoe.pretrained.file import pack
from minimoe.pretrained.folder import write_model_folder
from minimoe.pretrained.saving import FamilyTensors

Json = dict[str, Any]
Arrays = dict[str, npt.NDArray[Any]]

_DECODER = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}  # fmt: skip
_ENCODER = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_act": "gelu"}

# config.json of a small model of each family, in the words of published ones.
SMALL: dict[str, Json] = {
    "gpt2": {
        "architectures": ["GPT2LMHeadModel"], "vocab_size": 61, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 32,
        "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
    },
    "bert": {
        "architectures": ["BertForMaskedLM"], **_ENCODER, "vocab_size": 61, "max_position_embeddings": 32, "type_vocab_size": 2,
        "layer_norm_eps": 1e-12, "pad_token_id": 0,
    },
    "vit": {
        "architectures": ["ViTForImageClassification"], **_ENCODER, "image_size": 12, "patch_size": 4, "num_channels": 3,
        "layer_norm_eps": 1e-12, "qkv_bias": True, "id2label": {str(i): f"LABEL_{i}" for i in range(7)},
    },
    "llama": {"architectures": ["LlamaForCausalLM"], **_DECODER},
    "mistral": {"architectures": ["MistralForCausalLM"], **_DECODER, "sliding_window": 8},
    "mixtral": {
        "architectures": ["MixtralForCausalLM"], **_DECODER, "rope_theta": 1e6, "sliding_window": None, "num_local_experts": 4,
        "num_experts_per_tok": 2, "router_aux_loss_coef": 0.02,
    },
    "olmoe": {
        "architectures": ["OlmoeForCausalLM"], **_DECODER, "num_experts": 5, "num_experts_per_tok": 2, "norm_topk_prob": False,
        "clip_qkv": None,
    },
    "qwen3_moe": {
        "architectures": ["Qwen3MoeForCausalLM"], **_DECODER, "num_hidden_layers": 3, "head_dim": 8, "moe_intermediate_size": 16,
        "num_experts": 5, "num_experts_per_tok": 2, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [1],
    },
    "gpt_oss": {
        "architectures": ["GptOssForCausalLM"], **_DECODER, "hidden_size": 32, "intermediate_size": 64, "head_dim": 8, "sliding_window": 8,
        "num_local_experts": 4, "num_experts_per_tok": 2, "swiglu_limit": 7.0, "attention_bias": True, "rope_theta": 150000,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_scaling": {
            "rope_type": "yarn", "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
            "original_max_position_embeddings": 8,
        },
    },
    "deepseek_v3": {
        "architectures": ["DeepseekV3ForCausalLM"], **_DECODER, "num_hidden_layers": 3, "num_key_value_heads": 4, "q_lora_rank": 12,
        "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6, "first_k_dense_replace": 1,
        "moe_intermediate_size": 16, "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 4, "topk_group": 2,
        "routed_scaling_factor": 2.5, "norm_topk_prob": True, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
    },
}  # fmt: skip
FP8: Json = {"quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}}
MXFP4: Json = {"quantization_config": {"quant_method": "mxfp4"}}


def small(model_type: str, /, **changes: Any) -> Json:
    """The config.json of a small model of a family; `changes` override its keys."""
    return {"model_type": model_type, **SMALL[model_type], **changes}


def shapes(config: Json) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a model's tensors, in the spelling in which its family is written."""
    found = family(config["model_type"])
    specs = FamilyTensors(Transformer(found.model_config(config), seed=None), found, "float32").specs
    return {name: shape for name, (_, shape) in specs.items()}


def tensors(config: Json, seed: int = 0) -> Arrays:
    """Random float32 under those names: std 0.1, around 1 for the weights of norms. A tensor depends on its name and the seed alone."""
    return {name: _random(name, shape, seed) for name, shape in shapes(config).items()}


def _random(name: str, shape: tuple[int, ...], seed: int) -> npt.NDArray[Any]:
    values = 0.1 * _generator(name, seed).standard_normal(shape)
    is_norm = len(shape) == 1 and name.endswith("weight")
    return (values + is_norm).astype(np.float32)


def _generator(name: str, seed: int) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def write(path: Path, config: Json, arrays: Arrays | None = None, *, dtype: str = "F32", seed: int = 0, shard_bytes: int = 5_000_000_000,
          tokenizer: bool = False, texts: Mapping[str, str] | None = None) -> Path:  # fmt: skip
    """Write a model folder; `arrays` defaults to `tensors(config, seed)`. `tokenizer`: with a tokenizer.json of bytes.   -> path

    float32 is written as `dtype`; uint8 as F8_E4M3 where scales lie beside it, else as U8.
    """
    arrays = tensors(config, seed) if arrays is None else arrays

    def word(name: str) -> str:
        kind = arrays[name].dtype
        if kind == np.uint8:
            return "F8_E4M3" if f"{name}_scale_inv" in arrays else "U8"
        return dtype if kind == np.float32 and not name.endswith("_scale_inv") else f"F{8 * kind.itemsize}"

    specs = {name: (word(name), array.shape) for name, array in arrays.items()}

    def produce(name: str) -> npt.NDArray[Any]:
        return arrays[name] if arrays[name].dtype == np.uint8 else pack(arrays[name], specs[name][0])

    json = ByteTokenizer().to_json() if tokenizer else None
    write_model_folder(path, config, specs, produce, shard_bytes, json, texts)
    return path


def fp8(arrays: Arrays, pattern: str = r"_proj(_with_mqa)?\.weight$", seed: int = 0) -> Arrays:
    """Matrices whose name matches in float8, random bytes except NaN, each with a scale for every block of 128 x 128."""
    found: Arrays = {}
    for name, array in arrays.items():
        if array.ndim != 2 or not re.search(pattern, name):
            found[name] = array
            continue
        generator = _generator(name, seed)
        found[name] = generator.integers(0, 127, array.shape, dtype=np.uint8) | generator.integers(0, 2, array.shape, dtype=np.uint8) << 7
        blocks = tuple(-(-size // 128) for size in array.shape)
        found[f"{name}_scale_inv"] = np.exp2(generator.uniform(-11, -9, blocks)).astype(np.float32)
    return found


def mxfp4(arrays: Arrays, seed: int = 0) -> Arrays:
    """gpt-oss's experts in MXFP4, random: [E,in,out] becomes blocks [E,out,in/32,16] and scales [E,out,in/32]."""
    found: Arrays = {}
    for name, array in arrays.items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            found[name] = array
            continue
        generator = _generator(name, seed)
        experts, into, out = array.shape
        found[f"{name}_blocks"] = generator.integers(0, 256, (experts, out, into // 32, 16), dtype=np.uint8)
        found[f"{name}_scales"] = generator.integers(121, 125, (experts, out, into // 32), dtype=np.uint8)
    return found
