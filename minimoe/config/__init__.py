"""Configurations: typed tables (`tables.py`) that presets and TOML files (`sources.py`) fill (`files.py`)."""

from minimoe.config.files import apply_override, config_from_tables, load_config, to_tables, to_toml
from minimoe.config.sources import preset_about, preset_names, preset_text, read_tables
from minimoe.config.tables import (
    Activation,
    AttentionConfig,
    Config,
    DataConfig,
    Dtype,
    LatentConfig,
    LoraConfig,
    ModelConfig,
    MoEConfig,
    RopeConfig,
    SourceConfig,
    TrainConfig,
)

__all__ = [
    "Activation",
    "AttentionConfig",
    "Config",
    "DataConfig",
    "Dtype",
    "LatentConfig",
    "LoraConfig",
    "MoEConfig",
    "ModelConfig",
    "RopeConfig",
    "SourceConfig",
    "TrainConfig",
    "apply_override",
    "config_from_tables",
    "load_config",
    "preset_about",
    "preset_names",
    "preset_text",
    "read_tables",
    "to_tables",
    "to_toml",
]
