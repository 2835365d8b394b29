"""Which parameters train: all but those that `train.freeze` names or, with a table [lora], only adapters (Hu et al. 2021).

Everything follows from the configuration; nothing is allocated. An adapter of a product W [O,I] is a pair, `a` [r,I] and `b` [O,r]; that of
all experts of a layer is `a` [E,r,I] and `b` [E,O,r].
"""

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import NamedTuple

from minimoe.config.cost import ITEM_BYTES, PARTS, Cost, cost, parameter_shapes, part_of, state_elements
from minimoe.config.tables import Config, LoraConfig, ModelConfig
from minimoe.errors import ConfigError, nearest

TARGETS = {
    "attention": re.compile(r"blocks\.\d+\.attention\.\w+_proj\.weight"),
    "dense": re.compile(r"blocks\.\d+\.(ffn|moe\.shared)\.\w+_proj\.weight"),
    "experts": re.compile(r"blocks\.\d+\.moe\.experts\.\w+_proj"),
}
ADAPTER = re.compile(r".*lora\.[ab]")

Shape = tuple[int, ...]


class Pair(NamedTuple):
    """The adapter of a product: the path of its module, and the shapes of its two parameters, `a` and `b`."""

    path: str
    a: Shape
    b: Shape


def is_adapter(name: str) -> bool:
    """Return True for the name of an adapter's parameter."""
    return ADAPTER.fullmatch(name) is not None


def pairs(model: ModelConfig, lora: LoraConfig) -> dict[str, Pair]:
    """Return the adapters of a model by the names of the products that they adapt. Raises `ConfigError` if a rank is too large."""
    found = {}
    for name, shape in parameter_shapes(model):
        if any(TARGETS[target].fullmatch(name) for target in lora.targets):
            *experts, out, into = shape
            if lora.rank > min(out, into):
                raise ConfigError(f"lora.rank ({lora.rank}) must not exceed the sides of {name}, which is {out} x {into}")
            path = re.sub(r"(gate_)?(up|down)_proj$", r"\2_lora", name) if experts else name.removesuffix("weight") + "lora"
            found[name] = Pair(path, (*experts, lora.rank, into), (*experts, out, lora.rank))
    return found


def adapter_shapes(model: ModelConfig, lora: LoraConfig) -> Iterator[tuple[str, Shape]]:
    """Yield name and shape of every parameter of the adapters."""
    for pair in pairs(model, lora).values():
        yield f"{pair.path}.a", pair.a
        yield f"{pair.path}.b", pair.b


def is_frozen(name: str, patterns: tuple[str, ...]) -> bool:
    """Return True if a pattern names a parameter: `*` stands for any characters, as in a shell."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def trained_shapes(config: Config) -> dict[str, Shape]:
    """Return name and shape of every parameter that trains. A router's balance bias is none: it follows the load."""
    if config.lora is not None:
        return dict(adapter_shapes(config.model, config.lora))
    return {name: shape for name, shape in parameter_shapes(config.model) if not is_frozen(name, config.train.freeze)}


def check_trained(config: Config) -> None:
    """Refuse a pattern that names no parameter, and a configuration in which nothing trains. Raises `ConfigError`."""
    names = [name for name, _ in parameter_shapes(config.model)]
    for pattern in config.train.freeze:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(f"train.freeze: {pattern!r} names no parameter of this model{nearest_pattern(pattern, names)}")
    if config.lora is not None and config.train.freeze:
        raise ConfigError(
            "train.freeze and [lora] exclude each other: with adapters all else is frozen; lora.targets says where they are. "
            "--set lora=none trains without them, also where [lora] was taken over from the run that --init names"
        )
    if config.lora is not None and not pairs(config.model, config.lora):
        kinds = [target for target, names_of in TARGETS.items() if any(map(names_of.fullmatch, names))]
        raise ConfigError(f"lora.targets = {list(config.lora.targets)}: this model has none of these; it has {', '.join(kinds)}")
    if not trained_shapes(config):
        raise ConfigError(f"train.freeze = {list(config.train.freeze)}: freezes every parameter, so that nothing would train")


def nearest_pattern(pattern: str, names: list[str]) -> str:
    """Return a hint for a pattern that names nothing: the nearest name or group of names or, if none is near, the largest groups."""
    parts = [name.split(".") for name in names]
    groups = {".".join(part[:n]) + ".*" for part in parts for n in range(1, len(part))}
    hint = nearest(pattern, {*names, *groups})
    return hint if "did you mean" in hint else nearest("", {part[0] + ".*" for part in parts})


def training_cost(config: Config, seq_len: int | None = None) -> Cost:
    """Return the cost of a model as its configuration trains it: in that dtype, with that optimizer, of what trains. Raises as `cost` does.

    Adapters add their numbers to the weights; FLOPs are those of the model without them.
    """
    train = config.train
    whole = cost(config.model, seq_len, dtype=train.dtype, recompute=train.recompute, optimizer=train.optimizer)
    if config.lora is None and not train.freeze:
        return whole
    trained, item = trained_shapes(config), max(ITEM_BYTES[train.dtype], 4)
    gradients, states = item * count(trained), item * state_elements(trained.items(), train.optimizer)
    weights = whole.bytes.weights + (gradients if config.lora is not None else 0)
    return replace(whole, bytes=replace(whole.bytes, weights=weights, gradients=gradients, optimizer=states))


def trained_line(config: Config) -> str:
    """Return how many parameters train, and of which parts; empty if all do."""
    if config.lora is None and not config.train.freeze:
        return ""
    total, counts = count(dict(parameter_shapes(config.model))), by_part(trained_shapes(config))
    trained = sum(counts.values())
    frozen = [part for part in by_part(dict(parameter_shapes(config.model))) if part not in counts]
    parts = ", ".join(f"{part} {n:,}" for part, n in counts.items())
    line = f"{trained:,} of {total:,} parameters train ({trained / total:.1%}): {parts}"
    if config.lora is not None:
        line = f"adapters of rank {config.lora.rank}: {trained:,} parameters train, {trained / total:.1%} of the model's {total:,}: {parts}"
    return line + (f"; frozen: {', '.join(frozen)}" if frozen else "")


def by_part(shapes: dict[str, Shape]) -> dict[str, int]:
    """Return the number of parameters of each part that has any, in the order of the parts."""
    found = dict.fromkeys(PARTS, 0)
    for name, shape in shapes.items():
        found[part_of(name)] += math.prod(shape)
    return {part: n for part, n in found.items() if n}


def count(shapes: dict[str, Shape]) -> int:
    """Return how many numbers parameters of these shapes have."""
    return sum(map(math.prod, shapes.values()))
