"""Opens a model folder: every name and shape is compared, and no weight is read (`locating.py`, `on_demand.py`)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from minimoe.backend import Backend, current_backend
from minimoe.config import ModelConfig
from minimoe.errors import CheckpointError, ConfigError, UserError, notice
from minimoe.files import reason
from minimoe.layers.moe import Experts
from minimoe.pretrained.families.family import Family, Json
from minimoe.pretrained.families.table import family
from minimoe.pretrained.folder import ModelFolder
from minimoe.pretrained.header import shown
from minimoe.pretrained.locating import locate
from minimoe.pretrained.on_demand import attach
from minimoe.pretrained.saving import Provenance
from minimoe.pretrained.transformer import PretrainedTransformer
from minimoe.untrusted import MOST_JSON, Malformed, parse_json_object, read_bounded


def open_folder(
    path: Path, dtype: str = "float32", backend: Backend | None = None, max_memory: int | None = None
) -> PretrainedTransformer:
    """Return the model of a folder. `max_memory` bounds the bytes of its weights: the least recently used ones are evicted.

    Raises UserError, in one line, if the folder, its config.json or its weights contradict each other, or if minimoe cannot compute them.
    """
    folder = ModelFolder(path)
    found, config = _translated(folder.path, folder.config)
    if config.n_layers > len(folder.keys()):
        raise CheckpointError(f"{folder.path}: config.json says {config.n_layers} layers, and there are {len(folder.keys())} tensors")
    backend = backend or current_backend()
    model = PretrainedTransformer(config, seed=None)
    parameters = dict(model.named_state())
    locations, kept = locate({name: p.shape for name, p in parameters.items()}, config, folder, found)
    model.prepare(dtype, backend)  # only now: the sizes are known to be those of real tensors
    experts = {name: module for name, module in model.named_modules() if isinstance(module, Experts)}
    names = {path: [name for name in parameters if name.startswith(f"{path}.")] for path in experts}
    model.file_weights, by_layer = attach(parameters, locations, names, backend, dtype, max_memory)
    for name, resident in by_layer.items():
        experts[name].on_demand = resident.on_demand
    e = config.moe.n_experts if config.moe is not None else 0
    model.expert_rows = [backend.from_host(np.zeros(e, dtype=np.int32)) for _ in config.moe_layers()]
    model.provenance = Provenance(folder, found, config, kept)
    model.end_tokens = _end_tokens(folder)
    return model


def _translated(path: Path, given: Json) -> tuple[Family, ModelConfig]:
    try:
        found = family(given.get("model_type"))
        return found, found.model_config(given)
    except UserError as error:
        raise ConfigError(f"{path}/config.json: {error}") from None


def _end_tokens(folder: ModelFolder) -> tuple[int, ...]:
    """Return the ids that end a text."""
    given = folder.config.get("eos_token_id")
    path = folder.path / "generation_config.json"
    try:
        if path.is_file():
            given = parse_json_object(read_bounded(path, MOST_JSON)).get("eos_token_id", given)
    except (OSError, Malformed) as error:
        why = reason(error) if isinstance(error, OSError) else error
        notice(f"{shown(path)}: {why}: texts end at the end tokens of config.json instead")
    ids = given if isinstance(given, list) else [given]
    return tuple(dict.fromkeys(i for i in ids if type(i) is int))
