"""Configurations: typed tables (`tables.py`) that presets and TOML files fill (`files.py`)."""

from minimoe.config.files import apply_override, config_from_tables, load_config, preset_names, preset_text, read_tables, to_tables, to_toml
from minimoe.config.tables import Activation, Config, DataConfig, Dtype, ModelConfig, MoEConfig, Router, TrainConfig

__all__ = [
    "Activation",
    "Config",
    "DataConfig",
    "Dtype",
    "MoEConfig",
    "ModelConfig",
    "Router",
    "TrainConfig",
    "apply_override",
    "config_from_tables",
    "load_config",
    "preset_names",
    "preset_text",
    "read_tables",
    "to_tables",
    "to_toml",
]
