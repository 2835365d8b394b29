"""Model folders of a given size, made of random numbers: for measurements of loading and generating."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from minimoe.config import ModelConfig, MoEConfig
from minimoe.data.tokenizer import ByteTokenizer
from minimoe.model.transformer import Transformer
from minimoe.pretrained.families.table import family
from minimoe.pretrained.folder import write_model_folder
from minimoe.pretrained.saving import FamilyTensors

BYTES = {"BF16": 2, "F32": 4}


def mixtral_config(gigabytes: float, dtype: str = "BF16", layers: int = 12, experts: int = 8) -> ModelConfig:
    """Return a Mixtral of about that many gigabytes, most of them in experts."""
    d = 512
    hidden = int(gigabytes * 1e9 / BYTES[dtype] / (layers * experts * 3 * d)) // 64 * 64
    return ModelConfig(
        d_model=d, n_layers=layers, n_heads=8, n_kv_heads=4, d_hidden=hidden, max_seq_len=1024, vocab_size=256, rope_theta=1e6,
        moe=MoEConfig(n_experts=experts, top_k=2, d_hidden=hidden, aux_convention="mixtral"),
    )  # fmt: skip


def write_random(path: Path, config: ModelConfig, dtype: str = "BF16", shard_bytes: int = 500_000_000) -> int:
    """Write a folder of random weights, std 0.02, with a tokenizer of bytes.   -> bytes of weights"""
    found = family("mixtral")
    model = Transformer(config, seed=None)
    plan = {key: (dtype, shape) for key, (_, shape) in FamilyTensors(model, found, "bfloat16").specs.items()}
    block = (np.random.default_rng(0).standard_normal(1 << 20) * 0.02).astype(np.float32)
    stored: npt.NDArray[Any] = (block.view(np.uint32) >> 16).astype(np.uint16) if dtype == "BF16" else block

    def produce(key: str) -> npt.NDArray[Any]:
        shape = plan[key][1]
        return np.resize(stored, math.prod(shape)).reshape(shape)

    config_json = found.config_json(config) | {"dtype": "bfloat16" if dtype == "BF16" else "float32"}
    write_model_folder(path, config_json, plan, produce, shard_bytes, ByteTokenizer().to_json())
    return sum(math.prod(shape) * BYTES[dtype] for _, shape in plan.values())
