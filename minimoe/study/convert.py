"""Converts models: a run to a folder that transformers opens, a folder to another dtype, a dense model to a routed run.

Upcycling (Komatsuzaki et al. 2022): every expert starts as a copy of the dense layer, and the router is new. Equal experts give equal
outputs, and the weights of a token's experts add up to 1, so the routed model starts with the dense one's predictions.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from minimoe.config import Config, DataConfig, ModelConfig, apply_override, config_from_tables, to_tables
from minimoe.errors import ConfigError, notice
from minimoe.hints import command
from minimoe.model.transformer import Transformer
from minimoe.pretrained.folder import is_model_folder
from minimoe.pretrained.loading import Loaded, open_model
from minimoe.pretrained.saving import save_pretrained

Arrays = dict[str, npt.NDArray[Any]]
STACKED = {"weight": "proj", "bias": "bias"}  # ffn.up_proj.weight -> experts.up_proj, ffn.up_proj.bias -> experts.up_bias


def convert(source: str | Path, target: Path, dtype: str | None = None) -> str:
    """Write a run, a checkpoint or a model folder as a model folder.   -> a line that says what was written, and one of what was left

    What `dtype` cannot hold gives a `Notice`. Raises UserError if no family can express the model, or if the target exists.
    """
    loaded = _open(source)
    tokenizer = None if is_model_folder(source) else loaded.tokenizer  # a folder's tokenizer.json is copied
    found = save_pretrained(loaded.model, target, dtype, tokenizer, loaded.model.provenance, loaded.config.data.classes)
    size = sum(file.stat().st_size for file in target.iterdir())
    line = f"{target}: {found.model_type}, {size / 1e6:,.1f} MB, for transformers' {_class(target)}"
    left = loaded.model.provenance.other_files().what_is_left() if loaded.model.provenance is not None else ""
    return f"{line}\nnot copied from {source}: {left}" if left else line


def _open(source: str | Path) -> Loaded:
    """Open a model; a damaged checkpoint that is passed over gives a `Notice`."""
    loaded = open_model(source)
    for problem in loaded.problems:
        notice(f"damaged: {problem}; using step {loaded.step}")
    return loaded


def _class(folder: Path) -> str:
    from minimoe.pretrained.folder import read_config

    return str(read_config(folder)["architectures"][0])


# ---- upcycling ----------------------------------------------------------------------------------------------------------------


def upcycle(source: str | Path, target: Path, n_experts: int, overrides: Iterable[str] = ()) -> str:
    """Write a dense model as a run in which every layer has `n_experts` copies of its feed-forward layer.   -> one line that says so

    `overrides`: KEY=VALUE of the run's configuration, such as moe.top_k=1. Raises UserError if the model is routed already.
    """
    from minimoe.training.trainer import Trainer

    loaded = _open(source)
    config = upcycled_config(loaded, target.name, n_experts, overrides)
    trainer = Trainer(config)
    trainer.model.load_state_dict(upcycled_state(loaded.model, trainer.model))
    run = trainer.begin(target, {"path": str(loaded.folder.resolve()), "step": loaded.step})
    total = sum(p.size for p in trainer.model.parameters())
    layers = config.model.n_layers
    return f"{run.path}: {total:,} parameters, {n_experts} experts in each of {layers} layers; next: {command('resume', run.path)}"


def upcycled_config(loaded: Loaded, name: str, n_experts: int, overrides: Iterable[str] = ()) -> Config:
    """Return the dense model's configuration with a table [moe]. A run made of a model folder keeps the folder's tokenizer."""
    config = loaded.config
    if config.model.moe_layers():
        raise ConfigError(f"{loaded.folder}: is routed already: --upcycle needs a dense model")
    tables = to_tables(config) | {"name": name, "moe": {"n_experts": n_experts}}
    if is_model_folder(loaded.folder):
        tokenizer = loaded.folder / "tokenizer.json"
        data = DataConfig(tokenizer=str(tokenizer.resolve()) if tokenizer.is_file() else "byte")
        tables["data"] = {"source": data.source, "tokenizer": data.tokenizer}
        tables["train"]["seq_len"] = min(config.train.seq_len, config.model.max_seq_len)
    for override in overrides:
        apply_override(tables, override)
    return config_from_tables(tables, name)


def upcycled_state(dense: Transformer, routed: Transformer) -> Arrays:
    """Return the routed model's weights: the dense ones, with feed-forward layers copied to each expert, and the router as drawn."""
    _check_alike(dense.config, routed.config)
    state: Arrays = {name: routed.backend.to_host(array) for name, array in routed.state_dict().items() if ".moe.router." in name}
    for name, parameter in dense.named_state():
        array = dense.backend.to_host(parameter.data)
        block, found, inner = name.partition(".ffn.")
        if not found:
            state[name] = array
            continue
        product, _, x = inner.partition("_proj.")
        experts = f"{block}.moe.experts.{product}_{STACKED[x]}"
        e = routed.config.moe.n_experts if routed.config.moe else 1
        state[experts] = np.broadcast_to(array, (e, *array.shape)).copy()
    return state


def _check_alike(dense: ModelConfig, routed: ModelConfig) -> None:
    """Raise ConfigError if overrides change the shape of the copies; they may change routing and training."""
    if routed.moe is None or len(routed.moe_layers()) != routed.n_layers or routed.expert_hidden != dense.d_hidden:
        raise ConfigError("upcycling copies the dense layer of every block: leave out moe.every, moe.layers and moe.d_hidden")
    if routed.moe.n_shared_experts or routed.moe.router_facts.state_for("noise"):
        raise ConfigError("upcycling supports neither shared experts nor noisy_topk, which starts with noise: choose another moe.router")
