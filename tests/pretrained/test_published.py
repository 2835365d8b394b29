"""Published checkpoints, without their weights: config.json and the list of tensors as on the Hub, and what minimoe makes of them.

`published/*.json` has the most used ones, at least one for each way of laying weights out. Each says what its list was derived from; none
was made from minimoe's tables. "layers.{0..31}" means 32 names.
"""

import json
import math
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from minimoe.config.cost import cost, parameter_shapes
from minimoe.errors import CheckpointError
from minimoe.model.transformer import Transformer
from minimoe.pretrained.families.family import built_in, get
from minimoe.pretrained.families.table import family
from minimoe.pretrained.locating import Location, locate

FOLDER = Path(__file__).parents[1] / "published"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))
BYTES = {"F32": 4, "BF16": 2, "F8_E4M3": 1, "U8": 1}
# Long lists made short: their last layer, its number in the short one, and the layers that config.json then has.
SHORT = {"deepseek-v3": (61, 4, 4), "qwen3-30b-a3b": (47, 1, 2), "olmoe-1b-7b": (15, 1, 2), "mixtral-8x7b": (31, 1, 2)}
Json = dict[str, Any]


class Entry(NamedTuple):
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Headers:
    """A stand-in for a `ModelFolder` that has only config.json and headers."""

    config: Json
    entries: dict[str, Entry] = field(repr=False)
    path: Path = Path("published")

    def keys(self) -> set[str]:
        return set(self.entries)

    def entry(self, name: str) -> Entry:
        return self.entries[name]

    def raw(self, name: str) -> Any:
        raise AssertionError(f"{name} was read")

    release = raw


def spelled_out(pattern: str) -> Iterator[str]:
    """The six names that "layers.{0..2}.w{1..2}" means, and the like."""
    texts = re.split(r"\{\d+\.\.\d+\}", pattern)
    ranges = [range(int(first), int(last) + 1) for first, last in re.findall(r"\{(\d+)\.\.(\d+)\}", pattern)]
    for numbers in product(*ranges):
        yield texts[0] + "".join(f"{number}{text}" for number, text in zip(numbers, texts[1:], strict=True))


class Checkpoint:
    """One file of `published/`, and minimoe's model of it."""

    def __init__(self, name: str, short: bool) -> None:
        text = (FOLDER / f"{name}.json").read_text(encoding="utf-8")
        last, new, layers = SHORT.get(name, (0, 0, 0)) if short else (0, 0, 0)
        if layers:
            text = text.replace(f"..{last}}}", f"..{new}}}").replace(f"layers.{last}.", f"layers.{new}.")
        self.said: Json = json.loads(text)
        self.json: Json = self.said["config"]
        if layers:
            self.json["num_hidden_layers"] = layers
        if labels := self.said.get("labels"):
            self.json["id2label"] = {str(i): f"class {i}" for i in range(labels)}
        self.family = family(self.json["model_type"])
        self.config = self.family.model_config(self.json)
        entries = {key: Entry(one["dtype"], tuple(one["shape"])) for one in self.said["tensors"] for key in spelled_out(one["key"])}
        self.headers = Headers(self.json, entries)

    @cached_property
    def model(self) -> Transformer:
        return Transformer(self.config, seed=None)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: parameter.shape for name, parameter in self.model.named_state()}

    @cached_property
    def not_computed(self) -> set[str]:
        """Tensors that the model does not use."""
        starts = tuple(key for pattern in self.said["not_computed"] for key in spelled_out(pattern))
        return {key for key in self.headers.entries if key.startswith(starts)}

    @cached_property
    def samples(self) -> list[str]:
        """One computed tensor of each pattern: the last."""
        spelled = ([key for key in spelled_out(one["key"]) if key not in self.not_computed] for one in self.said["tensors"])
        return [keys[-1] for keys in spelled if keys]

    def locations(self, **changes: Any) -> tuple[dict[str, Location], Collection[str]]:
        headers: Any = replace(self.headers, **changes)
        return locate(self.shapes, self.config, headers, self.family)

    def refusal(self, **changes: Any) -> str:
        with pytest.raises(CheckpointError) as caught:
            self.locations(**changes)
        message = str(caught.value)
        assert message.isprintable() and message.startswith("published: ")
        return message


checkpoint = cache(lambda name: Checkpoint(name, short=False))
shortened = cache(lambda name: Checkpoint(name, short=True))
each = pytest.mark.parametrize("name", NAMES)


@each
def test_a_list_has_the_published_tensors_numbers_and_bytes(name: str) -> None:
    one = checkpoint(name)
    counts, numbers = one.said["counts"], dict.fromkeys(one.said["counts"]["numbers"], 0)
    for entry in one.headers.entries.values():
        numbers[entry.dtype] += math.prod(entry.shape)
    assert (len(one.headers.entries), numbers) == (counts["tensors"], counts["numbers"])
    assert sum(count * BYTES[dtype] for dtype, count in numbers.items()) == counts["bytes"]
    assert counts["tensors"] == sum(len(list(spelled_out(tensor["key"]))) for tensor in one.said["tensors"]), "a tensor is listed twice"


@each
def test_config_json_is_read_with_its_figures(name: str) -> None:
    one = checkpoint(name)
    tables, figures = built_in(one.config), one.said["figures"]
    read = {path: get(tables, path) for path in figures}
    assert {path: list(value) if isinstance(value, tuple) else value for path, value in read.items()} == figures


@each
def test_every_parameter_is_located_and_every_tensor_is_accounted_for(name: str) -> None:
    one = checkpoint(name)
    found, kept = one.locations()
    assert found.keys() == one.shapes.keys()
    used = [key for location in found.values() for keys in location.keys.values() for key in keys]
    assert len(used) == len(set(used)), "a tensor belongs to two parameters"
    assert set(used) == one.headers.keys() - one.not_computed
    masks = {key for key in one.not_computed if key.endswith(".attn.bias")}  # GPT-2's, constants that are not kept
    assert set(kept) == one.not_computed - masks


@each
def test_the_tensors_of_a_parameter_hold_as_many_numbers_as_it_has(name: str) -> None:
    one = checkpoint(name)
    for parameter, location in one.locations()[0].items():
        first = [keys[0] for keys in location.keys.values()]  # those after it are scales
        a_byte = 2 if location.layout.tensors[0].packed else 1
        assert a_byte * sum(math.prod(one.headers.entry(key).shape) for key in first) == math.prod(one.shapes[parameter]), parameter


@each
def test_counted_parameters_are_those_that_were_published(name: str) -> None:
    """DeepSeek-V3 counts without layer 61, scales and balance biases; BERT without pooler and next-sentence head; GPT-2 without masks."""
    one = checkpoint(name)
    counts = one.said["counts"]
    assert cost(one.config).total == counts["parameters"] - counts.get("balance_biases", 0)
    assert dict(parameter_shapes(one.config)) == {key: parameter.shape for key, parameter in one.model.named_parameters()}


# ---- a folder that is not what its config.json says ---------------------------------------------------------------------------


@each
def test_a_tensor_that_is_missing_is_named(name: str) -> None:
    one = shortened(name)
    for key in one.samples:
        others = {other: entry for other, entry in one.headers.entries.items() if other != key}
        message = one.refusal(entries=others)
        assert message.endswith("is missing") and theirs(one, key) in message


@each
def test_a_renamed_tensor_is_reported_missing_under_its_own_name(name: str) -> None:
    one = shortened(name)
    for key in one.samples:
        others = {f"{other}_old" if other == key else other: entry for other, entry in one.headers.entries.items()}
        assert f"{theirs(one, key)}' is missing" in one.refusal(entries=others)


@each
def test_a_tensor_of_another_shape_is_named_with_both(name: str) -> None:
    one = shortened(name)
    for key in one.samples:
        dtype, shape = one.headers.entry(key)
        for other in ((*shape[:-1], shape[-1] + 1), shape[::-1] if shape != shape[::-1] else (1, *shape)):
            message = one.refusal(entries={**one.headers.entries, key: Entry(dtype, other)})
            assert f"{key!r} has shape {list(other)}, config.json says {list(shape)}" in message


@each
def test_a_tensor_of_another_dtype_is_named(name: str) -> None:
    one = shortened(name)
    for key in one.samples:
        dtype, shape = one.headers.entry(key)
        other = "BF16" if dtype == "U8" else "I32"
        assert f"{key!r} has dtype {other}" in one.refusal(entries={**one.headers.entries, key: Entry(other, shape)})


@each
def test_a_tensor_that_no_parameter_needs_is_named(name: str) -> None:
    one = shortened(name)
    for key in one.samples:
        extra = f"{key}.more"
        assert f"{extra!r} is unexpected" in one.refusal(entries={**one.headers.entries, extra: Entry("F32", (1,))})


def theirs(one: Checkpoint, key: str) -> str:
    """A tensor's name in the family's own spelling."""
    for pattern, spelling in one.family.aliases:
        key = re.sub(pattern, spelling, key)
    return key
