"""Reading and writing configurations: tables with `--set key=value` as a typed `Config`, and the resolved file of a run.

An unknown key is refused with the nearest known one, a wrong type or an impossible value with the full path of its key.
"""

import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from minimoe.config.keys import TABLES, meant, own_keys, table_below, table_in_list, tidied
from minimoe.config.sources import drop_replaced, preset_names, read_tables
from minimoe.config.tables import Config, DataConfig, LoraConfig, ModelConfig, MoEConfig, TrainConfig, check_choice
from minimoe.errors import ConfigError, nearest, notice, with_toml
from minimoe.reference.extensions import UnknownName
from minimoe.untrusted import MOST_KEY_PARTS, Malformed, NotToml, parse_toml


def load_config(source: str | Path, overrides: Iterable[str] = (), say: Callable[[str], None] = notice) -> Config:
    """Load a preset by name or a TOML file by path, and apply `key=value` overrides.

    `say` is called where a path in a file means one of two files. Raises `ConfigError` if the source does not exist or is not TOML,
    or if a key is unknown or a value impossible.
    """
    tables = read_tables(str(source), say)
    for override in overrides:
        apply_override(tables, override)
    name = str(source) if str(source) in preset_names() else Path(source).stem
    return config_from_tables(tables, name)


@contextmanager
def saved_names(path: Path) -> Iterator[None]:
    """Explain a router or an optimizer that a saved configuration names and that is not known here. Raises ConfigError."""
    try:
        yield
    except UnknownName as error:
        raise ConfigError(
            f"{path}: {error.kind} {error.name!r} comes from a package that is not installed here: install it first"
            f"{nearest(error.name, error.known)}"
        ) from error


def apply_override(tables: dict[str, Any], override: str) -> None:
    """Apply an override such as `moe.top_k=1`, in place. The value is TOML; anything that is not TOML is taken as a string."""
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"--set {override}: expected KEY=VALUE, as in --set train.lr=3e-4")
    *path, last = key.strip().split(".")
    if len(path) >= MOST_KEY_PARTS:
        raise ConfigError(f"--set {key[:40]}...: has a dotted key of more than {MOST_KEY_PARTS} parts")
    table = tables
    for part in path:
        below = table.setdefault(part, {})
        if not isinstance(below, dict):
            below = table[part] = {}
        table = below
    table[last] = override_value(key.strip(), text)
    if path == ["data"]:
        drop_replaced(table, (last,))


def override_value(key: str, text: str) -> Any:
    try:
        found = parse_toml(f"value = {text}")
    except NotToml:
        return text.strip()
    except Malformed as error:
        raise ConfigError(f"--set {key}: {error}") from None
    if set(found) != {"value"}:
        raise ConfigError(f"--set {key}: more than one value: give each key its own --set")
    return found["value"]


OPTIONAL = ("moe", "lora")  # tables that a value of "none" takes away


def config_from_tables(tables: Mapping[str, Any], name: str) -> Config:
    """Return the typed configuration of raw tables; errors name the key's path."""
    tables = {key: value for key, value in tables.items() if not (key in OPTIONAL and value == "none")}
    name = tables.pop("name", name)
    if not isinstance(name, str):
        raise ConfigError(f"name: expected str, got {reprlib.repr(name)}")
    for key, value in tables.items():
        if key not in TABLES:
            raise ConfigError(f"{key}: unknown table or key{meant(key, TABLES)}")
        if not isinstance(value, dict):
            raise ConfigError(f"{key}: expected a table, got {reprlib.repr(value)}")
        check_keys(value, TABLES[key], key)
    tables = {key: tidied(value, TABLES[key]) for key, value in tables.items()}
    moe = convert(tables["moe"], MoEConfig, "moe") if "moe" in tables else None
    if moe is not None and "layers" in tables["moe"] and "every" in tables["moe"]:
        raise ConfigError("moe.every and moe.layers both say which layers route: keep one")
    model = convert({**tables.get("model", {}), "moe": moe}, ModelConfig, "model")
    if {"source", "sources"} <= tables.get("data", {}).keys():
        raise ConfigError("data.source and data.sources both say what is read: keep one")
    train = convert(tables.get("train", {}), TrainConfig, "train")
    data = convert(tables.get("data", {}), DataConfig, "data")
    lora = convert(tables["lora"], LoraConfig, "lora") if "lora" in tables else None
    return Config(model=model, train=train, data=data, lora=lora, name=name)


def check_keys(table: Mapping[str, Any], kind: type[Struct], path: str) -> None:
    known = own_keys(kind)
    for key, value in table.items():
        if key not in known:
            raise ConfigError(f"{path}.{key}: unknown key{meant(key, known)}")
        check_choice(f"{path}.{key}", value, known[key])
        below = table_below(known[key]) or table_in_list(known[key])
        for part in value if isinstance(value, list) else [value]:
            if below is not None and isinstance(part, dict):
                check_keys(part, below, f"{path}.{key}")


def convert(table: Mapping[str, Any], kind: type[Any], path: str) -> Any:
    try:
        return msgspec.convert(table, kind)
    except msgspec.ValidationError as error:
        if isinstance(error.__cause__, ConfigError):
            raise error.__cause__ from None
        message, _, where = str(error).partition(" - at `$")
        where = where.rstrip("`")
        message = f"{message[0].lower()}{message[1:].replace('`', '').replace(' | null', '')}"
        raise ConfigError(f"{path}{where}: {with_toml(message, value_at(table, where))}") from None
    except UnicodeEncodeError:  # the command line was not UTF-8
        raise ConfigError(f"{path}: has text that is not valid Unicode") from None


def value_at(table: Any, where: str) -> Any:
    """Return the value at msgspec's path of an error, such as `.rope.factor`; None if it lies in a list."""
    for part in where.split(".")[1:]:
        table = table.get(part) if isinstance(table, Mapping) else None
    return table


# ---- writing -----------------------------------------------------------------------------------------------------------------


def to_tables(config: Config) -> dict[str, Any]:
    """Return tables that read back as the same configuration: defaults are resolved, unset keys are left out."""
    tables: dict[str, Any] = {"name": config.name}
    for key in ("model", "train", "data"):
        tables[key] = without_none(msgspec.to_builtins(getattr(config, key)))
    moe = tables["model"].pop("moe", None)
    for table in (moe, tables["train"]):
        if table is not None and not table.get("options"):
            table.pop("options", None)
    if not config.train.freeze:
        tables["train"].pop("freeze")
    if moe is not None:
        if "layers" in moe:
            moe.pop("every", None)
        tables["moe"] = moe
    data = tables["data"]
    data.pop("source" if data["sources"] else "sources")
    data |= {"sources": [without_none(part) for part in data["sources"]]} if "sources" in data else {}
    if config.lora is not None:
        tables["lora"] = msgspec.to_builtins(config.lora)
    return tables


def without_none(table: dict[str, Any]) -> dict[str, Any]:
    """Leave out what is not set, in a table and those below it: TOML has no null."""
    return {key: without_none(value) if isinstance(value, dict) else value for key, value in table.items() if value is not None}


def to_toml(config: Config) -> str:
    """Return the configuration as TOML."""
    import tomli_w

    return tomli_w.dumps(to_tables(config))
