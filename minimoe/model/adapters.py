"""Freezes parameters of a model, gives its products low-rank adapters, and merges these into the weights (Hu et al. 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from minimoe.config import Config, LoraConfig, ModelConfig
from minimoe.config.cost import parameter_shapes
from minimoe.config.trained import adapter_shapes, is_adapter, is_frozen, pairs
from minimoe.errors import CheckpointError
from minimoe.layers.low_rank import Adapter
from minimoe.layers.module import Parameter
from minimoe.model.transformer import Transformer


def choose_trained(model: Transformer, config: Config) -> None:
    """Freeze what a configuration freezes, or draw its adapters, in a model that has its numbers."""
    if config.lora is None:
        freeze(model, config.train.freeze)
    else:
        draw_adapters(model, config.lora, config.train.seed, config.train.dtype)


def freeze(model: Transformer, patterns: tuple[str, ...]) -> None:
    """Keep the parameters that patterns name as they are: they need no gradient, and no optimizer has them."""
    for name, parameter in model.named_state():
        if is_frozen(name, patterns):
            parameter.freeze()


def adapt(model: Transformer, lora: LoraConfig) -> dict[str, Parameter]:
    """Freeze a model and give its products adapters.   -> the adapters' parameters by name, to be filled"""
    for _, parameter in model.named_state():
        parameter.freeze()
    modules = dict(model.named_modules())
    for pair in pairs(model.config, lora).values():
        path, _, name = pair.path.rpartition(".")
        setattr(modules[path], name, Adapter(pair.a, pair.b, lora.scale))
    return {name: parameter for name, parameter in model.named_state() if is_adapter(name)}


def draw_adapters(model: Transformer, lora: LoraConfig, seed: int, dtype: str) -> None:
    """Do what `adapt` does, and draw the adapters of a model that has its numbers."""
    for name, parameter in adapt(model, lora).items():
        parameter.fill(name, seed, dtype, model.backend)


def merge_adapters(model: Transformer, lora: LoraConfig) -> None:
    """Replace the weights of a model by those with its adapters, and take these away."""
    to_host = model.backend.to_host
    whole = merged({name: to_host(array) for name, array in model.state_dict().items()}, model.config, lora)
    modules = dict(model.named_modules())
    for pair in pairs(model.config, lora).values():
        path, _, name = pair.path.rpartition(".")
        setattr(modules[path], name, None)
    model.load_state_dict(whole)
    trainable = dict(parameter_shapes(model.config))
    for name, parameter in model.named_state():
        parameter.frozen, parameter.requires_grad = False, name in trainable


def merged(arrays: Mapping[str, Any], model: ModelConfig, lora: LoraConfig) -> dict[str, Any]:
    """Return the weights of a base and its adapters without adapters: W + scale B A, computed in float64 and rounded once.

    `arrays`: all of them by name, on the host. Raises `CheckpointError` if one is missing or has another shape.
    """
    for name, shape in adapter_shapes(model, lora):
        if name not in arrays or tuple(arrays[name].shape) != shape:
            has = f"has shape {list(arrays[name].shape)}" if name in arrays else "is missing"
            raise CheckpointError(f"{name}: {has}, the configuration says {list(shape)}")
    whole = {name: array for name, array in arrays.items() if not is_adapter(name)}
    with np.errstate(all="ignore"):  # numbers that are not finite stay so
        for name, pair in pairs(model, lora).items():
            if name in whole:  # else what reads these arrays says what is missing
                a, b = (arrays[f"{pair.path}.{side}"].astype(np.float64) for side in "ab")
                whole[name] = (whole[name] + lora.scale * (b @ a)).astype(whole[name].dtype)
    return whole
