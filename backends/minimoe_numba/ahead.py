"""Finds the kernels that a configuration needs, so that those which the cache lacks are compiled before they are called.

`prepare(config)` is called before data are read and weights are drawn. It starts the helpers of `helpers.py`.
"""

import sys
from importlib import import_module
from typing import Any

from minimoe.config import Config
from minimoe_numba.blas import find_blas
from minimoe_numba.gating import KINDS as ROUTERS
from minimoe_numba.helpers import helpers, start_helpers
from minimoe_numba.machine import default_threads

MOST_HELPERS = 8  # there are about 30 kernels, and the largest takes as long as many others
FEWEST_KERNELS = 3  # missing kernels that are worth starting a helper: it takes half a second to start


def kernels_of(config: Config) -> list[str]:
    """The kernels of one training step, "file.kernel", those that take longest to compile first."""
    model, moe = config.model, config.model.moe
    product = find_blas()
    if config.train.dtype != "float32" or product is None:
        return []
    routed = model.moe_layers()
    names = ["gemm"] if product.own else []
    names += ["attention.attention_heads", "attention.attention_heads_backward"]
    if moe is not None and routed and moe.router in ROUTERS:
        names += ["gating.gate_tokens", "gating.gate_tokens_backward"]
    names += ["expert.expert_blocks", "expert.expert_blocks_backward"]
    names += ["rope.split_tokens", "rope.join_tokens"] if model.position == "rope" else ["rope.join_rows"]
    names += ["pool", "expert.weight_gradients", "loss.head_losses"]
    if routed:
        names += ["routing.sort_by_expert", "routing.gather_sum", "loss.softmax_rows", "loss.logsumexp_rows"]
    kind = "layer" if model.norm == "layer" else "rms"
    names += [f"norm.{kind}_rows_backward", f"norm.add_{kind}_rows", f"norm.{kind}_rows", "norm.add_parts"]
    names += ["embedding.take_rows", "embedding.add_columns", "linear.product", "optimizer.squares", "arrays.clear"]
    if config.train.optimizer in ("adamw", "sgd", "lion"):
        names.append(f"optimizer.{config.train.optimizer}_elements")
    if model.dropout:
        names.append("random.dropout_blocks")
    return names


def compilable(name: str) -> Any:
    """The kernel of this name, or the `Functions` of a file."""
    file, _, attribute = name.partition(".")
    return getattr(import_module(f"minimoe_numba.{file}"), attribute or "machine_code")


def prepare(config: Config) -> None:
    """Start helpers for the kernels of a configuration that the cache lacks, where there is more than one core."""
    count = min(MOST_HELPERS, default_threads())
    if any(each.running for each in helpers) or count < 2 or not sys.executable:
        return
    missing = [name for name in kernels_of(config) if not compilable(name).is_cached()]
    if len(missing) >= FEWEST_KERNELS:
        start_helpers(missing, min(count, len(missing)))
