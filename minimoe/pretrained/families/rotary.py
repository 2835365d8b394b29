"""Rotary positions in a config.json: `rope_parameters` of transformers 5, `rope_theta` and `rope_scaling` of earlier versions."""

from typing import Any

import msgspec

from minimoe.config import ModelConfig
from minimoe.errors import ConfigError
from minimoe.pretrained.families.family import Json, Tables
from minimoe.pretrained.header import shown

SUPPORTED = ("default", "linear", "llama3", "yarn")
KEYS = {  # transformers' word -> minimoe's
    "factor": "factor", "original_max_position_embeddings": "original_max_seq_len", "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor", "beta_fast": "beta_fast", "beta_slow": "beta_slow", "truncate": "truncate",
    "attention_factor": "attention_factor", "mscale": "mscale", "mscale_all_dim": "mscale_all_dim",
}  # fmt: skip


def read_rotary(given: Json, tables: Tables, theta: float) -> None:
    """Fill model.rope_theta (default: `theta`) and model.rope. Raises ConfigError for a scaling, or a key of one, that is not supported."""
    stretch = given.get("rope_parameters") or given.get("rope_scaling") or {}
    if not isinstance(stretch, dict):
        raise ConfigError(f"rope_parameters: expected an object, got {shown(stretch)}")
    kind = stretch.get("rope_type", stretch.get("type", "default"))
    if kind not in SUPPORTED:
        raise ConfigError(f"rope type {shown(kind)} is not supported: expected one of {', '.join(SUPPORTED)}")
    partial = stretch.get("partial_rotary_factor", given.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise ConfigError(f"partial_rotary_factor = {shown(partial)} is not supported: only whole heads are rotated")
    unknown = set(stretch) - set(KEYS) - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    if unknown:
        raise ConfigError(f"rope_parameters: {shown(min(unknown))} is not supported")
    given_theta = stretch.get("rope_theta", given.get("rope_theta"))
    model = tables["model"]
    model["rope_theta"] = theta if given_theta is None else given_theta
    if not isinstance(model["rope_theta"], int | float) or not model["rope_theta"] > 1:
        raise ConfigError(f"rope_theta = {shown(model['rope_theta'])}: expected a number above 1")
    if kind != "default":
        rope: dict[str, Any] = {mm: stretch[key] for key, mm in KEYS.items() if stretch.get(key) is not None}
        model["rope"] = {"type": kind, **rope}
        if kind == "yarn" and "factor" not in rope:
            raise ConfigError("rope_parameters: yarn needs a factor")
        for turns in ("beta_fast", "beta_slow") if kind == "yarn" else ():
            if rope.get(turns) == 0:
                raise ConfigError(f"rope_parameters: {turns} = 0: expected a number of turns above 0")


def write_rotary(config: ModelConfig, written: Json) -> None:
    """Write the rotary positions of a configuration to a config.json, as `rope_parameters` and as `rope_theta`."""
    written["rope_theta"] = config.rope_theta
    stretch: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope is not None:
        mm = msgspec.to_builtins(config.rope)
        used = {"linear": ("factor",), "llama3": ("factor", "original_max_seq_len", "low_freq_factor", "high_freq_factor")}
        wanted = used.get(config.rope.type, tuple(name for name in mm if not name.startswith(("low_", "high_"))))
        unset = {name for name in mm if mm[name] is None or (name.startswith("mscale") and not mm[name])}
        stretch |= {key: mm[name] for key, name in KEYS.items() if name in wanted and name not in unset}
        stretch["rope_type"] = config.rope.type
    written["rope_parameters"] = stretch
