"""Weights that a run starts from, those of a run, a checkpoint or a model folder, and how a configuration fits them.

    weights = open_weights("runs/tiny-moe-001")
    config = weights.configuration("shakespeare-moe", ["train.lr=3e-4"])   # None: the source's own
    notes = weights.fit(config)        # a line for each key of the model that differs; refuses what cannot be loaded

A key that the configuration does not give comes from the source: shapes, vocabulary, tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minimoe.backend import load
from minimoe.config import Config, ModelConfig, apply_override, config_from_tables, preset_names, read_tables, to_tables
from minimoe.config.cost import parameter_shapes
from minimoe.config.sources import merge
from minimoe.data.tokenizer import BUILT_IN, Tokenizer, load_tokenizer, make_tokenizer
from minimoe.errors import ConfigError, UserError, notice
from minimoe.pretrained.loading import model_folder, open_checkpoint, open_model
from minimoe.runs.checkpoint import TOKENIZER, Arrays, first_not_finite, pack, sha256
from minimoe.runs.run import RUNS
from minimoe.training.differences import flat, shown

NOT_SHAPES = ("n_heads", "n_kv_heads", "head_dim")  # they cut rows of equal shapes into other heads
SHAPES = ("n_experts", "d_hidden", "every", "layers", "n_shared_experts", "router_bias")  # the keys of [moe] that any router has
FOR_DRAWING = ("model.init_std", "moe.router_bias_std")  # keys that only a start from the seed reads
TAKEN_OVER = ("lora.rank", "train.freeze", "train.patience", "train.sample_every")  # keys that a user may not expect to be on
HEAD = "head."  # begins the names of a head's parameters


@dataclass(frozen=True)
class Weights:
    """Arrays on the host, by parameter name, and what is known of where they come from."""

    arrays: Arrays
    config: Config
    folder: Path  # of the checkpoint, or of the model
    step: int | None  # None: a model folder, which says nothing of steps
    tokenizer: Tokenizer | None
    sha256: str

    @property
    def origin(self) -> dict[str, Any]:
        """What env.json records: the folder, the step, and the SHA-256 of the weights as a checkpoint's model.safetensors has them."""
        return {"path": str(self.folder.resolve()), "step": self.step, "sha256": self.sha256}

    @property
    def named(self) -> str:
        """The folder as messages name it."""
        return str(self.folder)

    # ---- the configuration ---------------------------------------------------------------------------------------------------------

    def configuration(self, source: str | Path | None, overrides: Iterable[str] = ()) -> Config:
        """Return the configuration of a preset or a TOML file, completed from the source; None: the source's own.

        Of a model folder, that is its model with the defaults of training. Raises `ConfigError`, also for another tokenizer.
        """
        tables = self._own() if source is None else self._completed(read_tables(str(source), notice))
        given = source is not None and "tokenizer" in tables.get("data", {})
        for override in overrides:
            apply_override(tables, override)
            given = given or override.partition("=")[0].strip() == "data.tokenizer"
        name = self.config.name if source is None else str(source) if str(source) in preset_names() else Path(source).stem
        if not self.config.model.image_size:
            self._set_tokenizer(tables, given)
        return config_from_tables(tables, name)

    def completed(self, config: Config) -> Config:
        """Return a configuration with the source's vocabulary and tokenizer. Raises `ConfigError` if it names another tokenizer."""
        tables = to_tables(config)
        if self.config.model.vocab_size is not None:
            tables["model"].setdefault("vocab_size", self.config.model.vocab_size)
        if not config.model.image_size:
            self._set_tokenizer(tables, given=True)
        return config_from_tables(tables, config.name)

    def _own(self) -> dict[str, Any]:
        """Return the source's own tables; those of a model folder, which has no [train] and no [data], fit its model."""
        tables, model = to_tables(self.config), self.config.model
        if self.step is None:
            tables["train"]["seq_len"] = min(tables["train"]["seq_len"], model.max_seq_len)
            tables["data"]["source"] = "digits" if model.image_size else tables["data"]["source"]
        return tables

    def _completed(self, tables: dict[str, Any]) -> dict[str, Any]:
        """Return a configuration's tables with the source's values of [model] and [moe] where it gives none.

        Without a table [model] both come from the source; with it, a missing table [moe] means a dense model, as always.
        """
        own, given = to_tables(self.config), tables.get("moe")
        moe = own.get("moe", {}) if "moe" in tables or "model" not in tables else {}
        if isinstance(given, dict):
            if given.get("router", moe.get("router")) != moe.get("router"):  # other keys are that router's own
                moe = {key: value for key, value in moe.items() if key in SHAPES}
            if {"every", "layers"} & given.keys():
                moe = {key: value for key, value in moe.items() if key not in ("every", "layers")}
        return merge({"model": own["model"], **({"moe": moe} if moe else {})}, tables)

    def _set_tokenizer(self, tables: dict[str, Any], given: bool) -> None:
        """Name the source's tokenizer in [data], in place; refuse another one that was given."""
        data = tables.setdefault("data", {})
        if self.tokenizer is None or not isinstance(data, dict):
            return
        wanted, own = data.get("tokenizer"), self.tokenizer
        right = own.name if own.name in BUILT_IN else str(self.folder / TOKENIZER)
        other = wanted in BUILT_IN or (isinstance(wanted, str) and make_tokenizer(wanted, "").to_json() != own.to_json())
        if given and wanted != right and other:
            raise ConfigError(
                f"data.tokenizer = {wanted!r} is not the tokenizer of {self.named}, whose embedding has a row for each of its tokens: "
                f"leave it out, or --set data.tokenizer={right}"
            )
        data["tokenizer"] = right

    @property
    def kept_tokenizer(self) -> dict[str, bytes]:
        """The file that a new run keeps so that it can be resumed with the source's tokenizer; none for bytes, which need no file."""
        own = self.tokenizer
        return {} if own is None or own.name == "byte" else {TOKENIZER: own.to_json().encode()}

    # ---- how the arrays fit --------------------------------------------------------------------------------------------------------

    def fit(self, config: Config) -> list[str]:
        """Return a line for each key of the model that differs from the source's. Raises `ConfigError` if the weights do not fit.

        What may differ changes no parameter's shape, or is the number of classes: then the head is drawn anew.
        """
        before, now = resolved(self.config.model), resolved(config.model)
        keys = [key for key in (*before, *(key for key in now if key not in before)) if before.get(key) != now.get(key)]
        one_routes = (self.config.model.moe is None) != (config.model.moe is None)
        keys = [key for key in keys if (not key.startswith("moe.") if one_routes else key != "moe")]
        alike = dict(parameter_shapes(config.model)) == dict(parameter_shapes(self.config.model))
        wrong = [key for key in keys if key.removeprefix("model.") in NOT_SHAPES or not (alike or key == "model.n_classes")]
        wrong = [key for key in wrong if self._is_a_shape(key, now)]
        if wrong:
            found = "; ".join(f"{key} is {shown(now, key)}, they have {shown(before, key)}" for key in wrong)
            raise ConfigError(
                f"the weights of {self.named} do not fit: {found}: give a configuration of their shapes, or none: then their own is used"
            )
        head = ["the head is drawn anew, for another number of classes"] if "model.n_classes" in keys else []
        return [f"{key} {shown(before, key)} -> {shown(now, key)}" for key in keys] + head

    def lines(self, config: Config, own: bool = False) -> list[str]:
        """Return what a user should know of a start from these weights. `own`: the configuration is the source's. Raises as `fit` does."""
        text = not config.model.image_size
        none = [f"they have no tokenizer: data.tokenizer = {config.data.tokenizer} is used"] if text and self.tokenizer is None else []
        differs = [f"it differs: {line}" for line in self.fit(config)]
        return [f"starting from the weights of {self.named}", *none, *differs, *self._taken_over(config, own)]

    def _taken_over(self, config: Config, own: bool) -> list[str]:
        """Return a line that names what the source's configuration adds to plain training, in the order of `TAKEN_OVER`."""
        before, now, plain = (flat(to_tables(each)) for each in (self.config, config, Config(model=config.model)))
        keys = [key for key in TAKEN_OVER if own and key in now and now[key] == before.get(key) != plain.get(key)]
        if not keys:
            return []
        change = "; --set lora=none trains without adapters" if "lora.rank" in keys else ""
        return [f"taken over from it: {', '.join(f'{key} {shown(now, key)}' for key in keys)} (--set changes them{change})"]

    def _is_a_shape(self, key: str, now: dict[str, Any]) -> bool:
        """Return True if a key's new value alone changes the parameters, or what their rows mean."""
        table, _, name = key.partition(".")
        if name in NOT_SHAPES or not name:
            return True
        tables = to_tables(self.config)
        part = tables.setdefault(table, {})
        for inner in (*name.split(".")[:-1],):
            part = part.setdefault(inner, {})
        last = name.rpartition(".")[2]
        part.pop(last, None)
        if key == "moe.layers":
            part.pop("every", None)
        if key in now:
            part[last] = now[key]
        try:
            return dict(parameter_shapes(config_from_tables(tables, "").model)) != dict(parameter_shapes(self.config.model))
        except ConfigError:
            return True

    def arrays_for(self, model: ModelConfig, drawn: Arrays) -> Arrays:
        """Return the arrays of a model that `fit`s, with the head as `drawn` if it has another number of classes."""
        if model.n_classes == self.config.model.n_classes:
            return self.arrays
        return {name: drawn[name] if name.startswith(HEAD) else array for name, array in self.arrays.items()}


def resolved(model: ModelConfig) -> dict[str, Any]:
    """Return the keys of [model] and [moe] by their path, with defaults that depend on others resolved."""
    tables = to_tables(Config(model=model))
    if model.mla is None:
        tables["model"] |= {"n_kv_heads": model.kv_heads, "head_dim": model.head_width}
    if model.moe is not None:
        tables["moe"].pop("every", None)
        tables["moe"] |= {"d_hidden": model.expert_hidden, "layers": list(model.moe_layers())}
    found = flat({key: tables[key] for key in ("model", "moe") if key in tables})
    routes = {"moe": f"{model.moe.n_experts} experts"} if model.moe is not None else {"moe": "none"}
    return {key: value for key, value in found.items() if key not in FOR_DRAWING} | routes


def open_weights(path: str | Path, root: str | Path = RUNS) -> Weights:
    """Read the weights of a run (its newest whole checkpoint), a checkpoint or a model folder. A damaged checkpoint gives a `Notice`.

    Raises `UserError` if there are none, they are damaged, or not finite.
    """
    folder = model_folder(path)
    if folder is not None:
        loaded = open_model(folder, backend=load("numpy"))
        arrays = {name: loaded.model.backend.to_host(parameter.data) for name, parameter in loaded.model.named_state()}
        config, where, step, tokenizer = loaded.config, loaded.folder, None, loaded.tokenizer
        if tokenizer is None and loaded.no_tokenizer:
            raise UserError(loaded.no_tokenizer)
    else:
        saved, config, problems = open_checkpoint(path, root)
        for problem in problems:
            notice(f"damaged: {problem}; using step {saved.step}")
        arrays, where, step = saved.model, saved.folder, saved.step
        tokenizer = None if saved.tokenizer_path is None else load_tokenizer(saved.tokenizer_path)
    bad = first_not_finite(arrays)
    if bad is not None:
        raise UserError(f"{where}: {bad} has a number that is not finite: training cannot start from it")
    return Weights(arrays, config, where, step, tokenizer, sha256(pack(arrays)))
