"""The keys of a configuration by their full names, such as `train.lr`: what a short or misspelt one means, and what a key can be."""

from collections.abc import Collection, Iterator, Mapping
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from msgspec import Struct
from msgspec.structs import FieldInfo, fields

from minimoe.config.tables import DataConfig, LoraConfig, ModelConfig, MoEConfig, TrainConfig
from minimoe.errors import near, nearest, one_of

TABLES: dict[str, type[Struct]] = {"model": ModelConfig, "moe": MoEConfig, "train": TrainConfig, "data": DataConfig, "lora": LoraConfig}


def alternatives(field: FieldInfo) -> tuple[Any, ...]:
    """Return the types that a key's value may have: those of its union, or its only one."""
    return get_args(field.type) if get_origin(field.type) in (Union, UnionType) else (field.type,)


def table_below(field: FieldInfo) -> type[Struct] | None:
    """Return the table that a key holds, such as that of `model.rope`; None for a key with a plain value."""
    return next((kind for kind in alternatives(field) if isinstance(kind, type) and issubclass(kind, Struct)), None)


def table_in_list(field: FieldInfo) -> type[Struct] | None:
    """Return the table that each entry of a key's list is, such as those of `data.sources`; None for a key with anything else."""
    parts = (part for kind in alternatives(field) for part in get_args(kind))
    return next((part for part in parts if isinstance(part, type) and issubclass(part, Struct)), None)


@cache
def own_keys(kind: type[Struct]) -> Mapping[str, FieldInfo]:
    """Return the keys of a table. The table [moe] is not one of them: in TOML it stands beside [model]."""
    return {field.name: field for field in fields(kind) if not (kind is ModelConfig and field.name == "moe")}


@cache
def full_keys() -> dict[str, FieldInfo]:
    """Return every key by its full name, those of tables in tables included: `train.lr`, `model.rope`, `model.rope.factor`."""

    def walk(path: str, kind: type[Struct]) -> Iterator[tuple[str, FieldInfo]]:
        for name, field in own_keys(kind).items():
            yield f"{path}.{name}", field
            below = table_below(field)
            if below is not None:
                yield from walk(f"{path}.{name}", below)

    return {key: field for table, kind in TABLES.items() for key, field in walk(table, kind)}


def meant(name: str, here: Collection[str]) -> str:
    """Return a hint for an unknown key of a table that has the keys `here`: its full name if another table has it, or what is near."""
    elsewhere: dict[str, list[str]] = {}
    for key in full_keys():
        elsewhere.setdefault(key.rpartition(".")[2], []).append(key)
    if name in elsewhere:
        return f" (did you mean {one_of(elsewhere[name])}?)"
    if not near(name, here) and near(name, elsewhere):
        return f" (did you mean {one_of(key for short in near(name, elsewhere) for key in elsewhere[short])}?)"
    return nearest(name, here, "minimoe config tiny-moe explains the keys")


# ---- values --------------------------------------------------------------------------------------------------------------------------


def tidied(table: Mapping[str, Any], kind: type[Struct]) -> dict[str, Any]:
    """Return a table of known keys without those that are "none", if they may be unset, and with 1e3 as the integer 1000."""
    known = own_keys(kind)
    return {key: _tidied(value, known[key]) for key, value in table.items() if not _unset(value, known[key])}


def _unset(value: Any, field: FieldInfo) -> bool:
    return isinstance(value, str) and value == "none" and _may_be_unset(field)


def _may_be_unset(field: FieldInfo) -> bool:
    return NoneType in alternatives(field) or get_origin(field.type) is dict


def _tidied(value: Any, field: FieldInfo) -> Any:
    kinds, below = alternatives(field), table_below(field)
    if isinstance(value, float) and value.is_integer() and int in kinds and float not in kinds:
        return int(value)
    return tidied(value, below) if below is not None and isinstance(value, dict) else value


def choices(key: str) -> list[str]:
    """Return the values of a key that has a few, as they are written after `--set KEY=`; of any other key an empty list."""
    field = full_keys()[key]
    found: list[str] = []
    for kind in alternatives(field):
        found += ["true", "false"] if kind is bool else get_args(kind) if get_origin(kind) is Literal else []
    return [*found, "none"] if _may_be_unset(field) else found
