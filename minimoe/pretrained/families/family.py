"""A family of models: how its config.json translates to a ModelConfig and back, and how its weights are named.

One table of keys serves both directions. There are no rules for which models a family can express: the configuration is written, read
again, and compared with the original.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from minimoe.config import ModelConfig, config_from_tables
from minimoe.config.tables import MOST_LAYERS
from minimoe.errors import ConfigError
from minimoe.pretrained.families.layout import Names
from minimoe.pretrained.header import shown
from minimoe.reference.routers import find

Json = dict[str, Any]
MOST_NUMBER = 2**63 - 1
MOST_FLOAT = 3.4028234663852886e38  # float32's largest number: models compute in it
Tables = dict[str, dict[str, Any]]  # {"model": {...}, "moe": {...}} as in a TOML file

# Settings that do not change a prediction: a family need not express them.
TRAINING = {"model.dropout", "model.attention_dropout", "model.init_std", "model.pad_token_id"} | {
    f"moe.{key}" for key in ("capacity_factor", "drop_priority", "jitter", "jitter_experts", "noise_std", "aux_loss_coef", "aux_convention",
                             "z_loss_coef", "bias_rate", "router_bias_std")
}  # fmt: skip

# Keys for which null means the same as absence from a ModelConfig. For any other key, null would silently become minimoe's default.
NULLABLE = TRAINING | {
    "model.n_kv_heads", "model.head_dim", "model.sliding_window", "model.tie_embeddings", "model.attention_bias", "model.bias",
    "model.attention.interleaved", "model.mla.q_rank", "moe.n_groups", "moe.top_groups",
}  # fmt: skip


class Absent:
    """A key that config.json must have."""


@dataclass(frozen=True)
class Key:
    """A key of config.json, and the value that its absence means (by default an error)."""

    name: str
    default: Any = Absent
    others: tuple[str, ...] = ()  # other names that some writers use

    def value(self, given: Json) -> Any:
        """Return the value in config.json, or the one that its absence means."""
        return next((given[name] for name in (self.name, *self.others) if name in given), self.default)


@dataclass(frozen=True)
class Family:
    """One `model_type`. Paths of keys are written as in a TOML file: "model.d_model", "moe.n_experts", "model.mla.kv_rank"."""

    model_type: str
    architectures: Mapping[str, str]  # class in transformers -> model.head; the first one for a head is written
    keys: Mapping[str, Key]
    names: Callable[[ModelConfig], Names]
    fixed: Mapping[str, Any] = field(default_factory=dict)  # settings that all models of the family share
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)  # keys of config.json, and the values of them that are supported
    read: Callable[[Json, Tables], None] = lambda given, tables: None  # what `keys` cannot express
    write: Callable[[ModelConfig, Json], None] = lambda config, written: None
    aliases: tuple[tuple[str, str], ...] = ()  # other spellings of tensor names: (pattern, the spelling in `names`)
    copies: Mapping[str, str] = field(default_factory=dict)  # tensors that repeat another if weights are tied
    unused: tuple[str, ...] = ()  # patterns of tensors that are not computed with, and are saved again with the model
    further: Key | None = None  # number of layers after the last that may be there; (?P<beyond>...) in `unused` matches their index
    dropped: tuple[str, ...] = ()  # patterns of tensors that hold constants
    float32: tuple[str, ...] = ()  # patterns of tensors that a folder in bfloat16 or float16 has in float32
    float32_in_float16: tuple[str, ...] = ()  # patterns of tensors that only a folder in float16 has in float32

    # ---- config.json -> ModelConfig -------------------------------------------------------------------------------------------------

    def model_config(self, given: Json) -> ModelConfig:
        """Translate a config.json. Raises ConfigError naming the key that is missing, wrong or not supported."""
        for name, values in self.only.items():
            if given.get(name, values[0]) not in values:
                known = " or ".join(repr(value) for value in values)
                raise ConfigError(f"{name} = {shown(given[name])} is not supported: {self.model_type} needs {name} = {known}")
        tables: Tables = {"model": {}, "moe": {}}
        for path, value in self.fixed.items():
            put(tables, path, value)
        for path, key in self.keys.items():
            value = key.value(given)
            if value is Absent:
                raise ConfigError(f"{key.name} is missing: {self.model_type} needs it")
            if value is None and key.default is not None and path not in NULLABLE:
                raise ConfigError(f"{key.name} is null: {self.model_type} needs a value")
            if value is not None:
                put(tables, path, value)
        padding, vocab = get(tables, "model.pad_token_id"), get(tables, "model.vocab_size")
        if isinstance(padding, int) and isinstance(vocab, int) and -vocab <= padding < 0:
            put(tables, "model.pad_token_id", vocab + padding)  # counted from the end, as in PyTorch
        put(tables, "model.head", self.head(given))
        layers = tables["model"].get("n_layers")
        if not isinstance(layers, int) or layers > MOST_LAYERS:
            raise ConfigError(f"{self.keys['model.n_layers'].name} = {shown(layers)}: expected a number of layers, {MOST_LAYERS} at most")
        try:
            self.read(given, tables)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"a value of the wrong kind: {error}") from None
        if not tables["moe"]:
            del tables["moe"]
        try:
            refuse_huge(tables)
            return config_from_tables(tables, self.model_type).model
        except ConfigError as error:
            raise ConfigError(self._with_key_names(str(error))) from None

    def head(self, given: Json) -> str:
        """Return the head of the class that config.json names, or of the first class. Raises ConfigError for an unknown class."""
        named = given.get("architectures") or [next(iter(self.architectures))]
        if not isinstance(named, list) or not isinstance(named[0], str) or named[0] not in self.architectures:
            known = ", ".join(self.architectures)
            raise ConfigError(f"architectures = {shown(named)} is not supported: expected one of {known}")
        return self.architectures[named[0]]

    def _with_key_names(self, message: str) -> str:
        for path, key in self.keys.items():
            message = re.sub(rf"{re.escape(path)}\b", f"{key.name} ({path})", message)
        return message

    def stored_dtype(self, name: str, dtype: str) -> str:
        """Return the dtype, in safetensors' words, of a tensor in a folder whose other tensors have `dtype`.

        transformers computes these tensors in float32 whatever the dtype of the model (`_keep_in_fp32_modules_strict` of its classes), or
        unless that is bfloat16 (`_keep_in_fp32_modules`), and so it writes them.
        """
        kept = {"BF16": self.float32, "F16": self.float32 + self.float32_in_float16}.get(dtype, ())
        return "F32" if any(re.search(pattern, name) for pattern in kept) else dtype

    # ---- ModelConfig -> config.json -------------------------------------------------------------------------------------------------

    def config_json(self, config: ModelConfig) -> Json:
        """Write the config.json of a model. Settings that the family cannot express are left out: see `contradictions`."""
        tables = built_in(config)
        normalise_router(tables["moe"])
        written: Json = {"model_type": self.model_type}
        architecture = next((name for name, head in self.architectures.items() if head == config.head), next(iter(self.architectures)))
        written["architectures"] = [architecture]
        for path, key in self.keys.items():
            value = get(tables, path)
            written[key.name] = key.default if value is None and key.default is not Absent else value
        self.write(config, written)
        return written

    def contradictions(self, config: ModelConfig) -> list[str]:
        """Return the settings that would change if this model were written as the family; empty if the family can express it.

        Raises ConfigError if the family cannot express it at all.
        """
        back, given = essence(self.model_config(self.config_json(config))), essence(config)
        return [
            f"{path} is {back.get(path)!r} there, not {given.get(path)!r}"
            for path in sorted(given.keys() | back.keys())
            if given.get(path) != back.get(path)
        ]


def built_in(config: ModelConfig) -> Tables:
    """Return a ModelConfig as the tables of a TOML file, with derived values for keys that are not set."""
    model = msgspec.to_builtins(config)
    moe = model.pop("moe") or {}
    model |= {"n_kv_heads": config.kv_heads, "head_dim": None if config.mla else config.head_width}
    if moe:
        moe |= {"d_hidden": config.expert_hidden, "top_k": config.moe.k if config.moe else None}
        if not moe["options"]:
            del moe["options"]
    return {"model": model, "moe": moe}


def essence(config: ModelConfig) -> dict[str, Any]:
    """Return the settings that a prediction depends on, by path, in a normal form."""
    tables = built_in(config)
    model, moe = tables["model"], tables["moe"]
    routed = config.moe_layers()
    model |= {"windows": [config.window(layer) for layer in range(config.n_layers)], "routed_layers": list(routed)}
    for replaced in ("sliding_window", "layer_types"):
        del model[replaced]
    if len(routed) == config.n_layers:
        del model["d_hidden"]
    if config.position != "rope":
        del model["rope_theta"]
    if not config.bias and config.norm == "layer":
        model["norm"] = "layer without bias"
    if config.image_size:
        del model["max_seq_len"], model["vocab_size"]
    if model.get("attention") == {"sinks": False, "interleaved": False}:
        model["attention"] = None
    if not routed:
        moe.clear()
    else:
        del moe["every"], moe["layers"]
        normalise_router(moe)
    found = {f"{table}.{key}": value for table in tables for key, value in tables[table].items()}
    return {path: value for path, value in found.items() if path not in TRAINING}


def normalise_router(moe: dict[str, Any]) -> None:
    """Rename a router that computes the same as another to that other, in place."""
    if "router" in moe:
        moe |= find(moe["router"]).same_as


def whole_number(given: Json, name: str, default: int) -> int:
    """Return a number of config.json that `keys` cannot express. Raises ConfigError."""
    value = given.get(name, default)
    if type(value) is not int:
        raise ConfigError(f"{name} = {shown(value)}: expected a whole number")
    return value


def of_kind(given: Json, name: str, kinds: tuple[type, ...], what: str) -> Any:
    """Return a value of config.json that `keys` cannot express, or None if it is absent or empty. Raises ConfigError."""
    value = given.get(name) or None
    if value is not None and not isinstance(value, kinds):
        raise ConfigError(f"{name} = {shown(value)}: expected {what}")
    return value


def refuse_huge(table: Mapping[str, Any], path: str = "") -> None:
    """Raise ConfigError for an integer that does not fit into 64 bits, or another number that does not fit into float32."""
    for name, value in table.items():
        if isinstance(value, dict):
            refuse_huge(value, f"{path}{name}.")
        elif isinstance(value, int | float) and not abs(value) <= (MOST_NUMBER if isinstance(value, int) else MOST_FLOAT):
            raise ConfigError(f"{path}{name} is too large a number: {shown(value)}")


def put(tables: Tables, path: str, value: Any) -> None:
    """Set tables["model"]["mla"]["kv_rank"] = value for "model.mla.kv_rank"."""
    *above, last = path.split(".")
    table: dict[str, Any] = tables
    for name in above:
        table = table.setdefault(name, {})
    table[last] = value


def get(tables: Tables, path: str) -> Any:
    """Return the value at a path, or None."""
    value: Any = tables
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value
