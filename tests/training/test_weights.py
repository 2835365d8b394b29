"""Runs that start from the weights of another run, of a checkpoint or of a model folder: what is taken over, what is said and refused."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import call, contents, one_line, sets
from msgspec.structs import replace
from tiny_runs import sha256_of, tiny, train, untimed, weights_of, with_train, write_text

import minimoe as mm
from minimoe.config import DataConfig
from minimoe.errors import CheckpointError, ConfigError, UserError
from minimoe.runs.checkpoint import load_checkpoint
from minimoe.runs.run import Run
from minimoe.study.convert import convert
from minimoe.training.listener import Listener
from minimoe.training.trained_run import TrainedRun

IMAGES = {
    "causal": False, "head": "classifier", "image_size": 8, "patch_size": 4, "n_channels": 1, "n_classes": 10, "norm": "layer",
    "bias": True, "position": "learned", "activation": "gelu",
}  # fmt: skip


class Heard(Listener):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def said(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another text, of the same characters."""
    path = tmp_path_factory.mktemp("other") / "text.txt"
    path.write_text("".join(f"the row {verb} every gate\n" for verb in ("sorts", "weighs", "finds", "drops") * 40))
    return path


@pytest.fixture(scope="module")
def source(text: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    return train(tiny(text), tmp_path_factory.mktemp("source"))


def initial(run: Path) -> bytes:
    return weights_of(run, 0)


# ---- what is taken over ----------------------------------------------------------------------------------------------------------


def test_a_run_starts_from_the_weights_and_as_the_source_was_configured(source: TrainedRun, tmp_path: Path) -> None:
    run = mm.train(init=source.path, root=tmp_path, steps=2)
    assert initial(run.path) == weights_of(source.path, 10)
    assert run.config == with_train(source.config, steps=2)
    assert run.path.name == "tiny-001"
    assert run.metrics[0]["loss"] < np.log(256) - 1  # the source's weights had learned
    assert weights_of(run.path, 2) != initial(run.path)


def test_the_run_records_where_its_weights_came_from(source: TrainedRun, tmp_path: Path, capsys: Any) -> None:
    run = mm.train(init=source.path, root=tmp_path, steps=1)
    recorded = json.loads((run.path / "env.json").read_text())["weights"]
    assert recorded == {"path": str(source.path / "checkpoints" / "step-000010"), "step": 10, "sha256": sha256_of(source.path, 10)}
    for command in (["verify", str(run.path)], ["eval", str(run.path)]):
        assert call(capsys, *command)[0] == 0
    assert f"started from the weights of {source.path}" in call(capsys, "inspect", str(run.path))[1].replace("\n", "")


def test_the_optimizer_starts_fresh(source: TrainedRun, tmp_path: Path) -> None:
    """The first update is that of a new optimizer: AdamW's first step moves each weight by about the rate, whatever the gradient."""
    run = mm.train(init=source.path, root=tmp_path, overrides=["train.warmup_steps=0", "train.weight_decay=0.0"], steps=1)
    before, after = (mm.load(run.path / "checkpoints" / name).state_dict() for name in ("step-000000", "step-000001"))
    moved = np.abs(after["blocks.0.attention.o_proj.weight"] - before["blocks.0.attention.o_proj.weight"])
    np.testing.assert_allclose(np.median(moved), run.config.train.lr, rtol=0.05)


def test_a_checkpoint_is_named_by_its_folder(text: Path, tmp_path: Path) -> None:
    source = train(tiny(text, steps=4, checkpoint_every=2, keep=5), tmp_path)
    run = mm.train(init=source.path / "checkpoints" / "step-000002", root=tmp_path, steps=1)
    assert initial(run.path) == weights_of(source.path, 2)


def test_a_model_folder_gives_its_model_and_tokenizer(text: Path, tmp_path: Path) -> None:
    source = train(replace(tiny(text, dense=True), data=DataConfig(source=str(text), tokenizer="char")), tmp_path)
    convert(source.path, tmp_path / "folder")
    few = ["train.steps=2", "train.batch_size=2", "train.backend=numpy"]
    run = mm.train(init=tmp_path / "folder", data=str(text), root=tmp_path, overrides=few)
    assert run.config.model.d_model == 16
    assert run.config.train.seq_len == 16  # not more than the model reads
    assert run.task.tokenizer.to_json() == source.task.tokenizer.to_json()
    for name, array in mm.load(source.path).state_dict().items():
        np.testing.assert_array_equal(mm.load(run.path / "checkpoints" / "step-000000").state_dict()[name], array)
    recorded = json.loads((run.path / "env.json").read_text())["weights"]
    assert (recorded["path"], recorded["step"]) == (str(tmp_path / "folder"), None)


def test_a_tokenizer_made_of_the_sources_text_goes_on_with_the_weights(text: Path, other: Path, tmp_path: Path) -> None:
    """The run keeps it, so that it is resumed with it wherever its folder and the source are."""
    source = train(replace(tiny(text), data=DataConfig(source=str(text), tokenizer="char")), tmp_path)
    whole = mm.train(init=source.path, data=str(other), root=tmp_path, steps=4)
    assert whole.task.tokenizer.to_json() == source.task.tokenizer.to_json()
    run = mm.train(init=source.path, data=str(other), root=tmp_path, steps=2, overrides=["train.schedule=constant"])
    shutil.rmtree(source.path)
    moved = tmp_path / "elsewhere"
    os.rename(run.path, moved)
    assert (moved / "tokenizer.json").read_text() == whole.task.tokenizer.to_json()
    resumed = mm.resume(moved, steps=4, root=tmp_path)
    assert resumed.config.data.tokenizer == str(moved / "tokenizer.json")


@pytest.mark.parametrize("kind", ["masked", "images"])
def test_other_tasks_start_from_weights_too(text: Path, tmp_path: Path, kind: str) -> None:
    model = {"causal": False, "head": "mlm"} if kind == "masked" else IMAGES
    config = tiny("digits" if kind == "images" else text, model=model, steps=2)
    source = train(config, tmp_path)
    run = mm.train(init=source.path, root=tmp_path, steps=1)
    assert initial(run.path) == weights_of(source.path, 2)


# ---- a configuration beside the weights --------------------------------------------------------------------------------------------


def write_toml(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text)
    return path


def test_what_a_configuration_does_not_give_comes_from_the_source(source: TrainedRun, other: Path, tmp_path: Path) -> None:
    toml = write_toml(tmp_path, f"[train]\nsteps = 1\nbackend = 'numpy'\nbatch_size = 2\nseq_len = 8\n[data]\nsource = '{other}'\n")
    run = mm.train(toml, init=source.path, root=tmp_path)
    assert run.config.model == source.config.model
    assert run.config.data.source == str(other)
    assert run.path.name == "mine-001"


def test_another_router_gets_its_own_defaults_and_the_sources_experts(source: TrainedRun, other: Path, tmp_path: Path) -> None:
    settings = "[train]\nsteps = 1\nbackend = 'numpy'\nseq_len = 8\n"
    toml = write_toml(tmp_path, f"[moe]\nrouter = 'switch'\n{settings}[data]\nsource = '{other}'\n")
    run = mm.train(toml, init=source.path, root=tmp_path)
    assert (run.config.model.moe.router, run.config.model.moe.k, run.config.model.moe.n_experts) == ("switch", 1, 4)
    assert load_checkpoint(run.path / "checkpoints" / "step-000000").model.keys() == source.model.state_dict().keys()


def test_a_folder_without_a_tokenizer_says_which_one_is_used(other: Path, tmp_path: Path) -> None:
    model = tiny(other, dense=True, model={"vocab_size": 256}).model
    mm.Transformer(model, seed=3).save_pretrained(tmp_path / "folder")
    heard = Heard()
    keys = ["train.steps=1", "train.backend=numpy", "train.batch_size=2"]
    mm.train(init=tmp_path / "folder", data=str(other), root=tmp_path, overrides=keys, listener=heard)
    assert "they have no tokenizer: data.tokenizer = byte is used" in heard.lines


def test_what_the_sources_configuration_adds_to_plain_training_is_named(source: TrainedRun, tmp_path: Path) -> None:
    keys = ["lora.rank=2", "train.patience=7", "train.eval_every=50"]
    adapted = mm.train(init=source.path, root=tmp_path, steps=1, overrides=keys, listener=(first := Heard()))
    mm.train(init=adapted.path, root=tmp_path, steps=1, listener=(second := Heard()))
    mm.train(init=adapted.path, root=tmp_path, steps=1, overrides=["lora=none"], listener=(third := Heard()))
    heard = [[line for line in each.lines if line.startswith("taken over")] for each in (first, second, third)]
    text = "taken over from it: {}train.patience 7 (--set changes them{})"
    adapters = "; --set lora=none trains without adapters"
    assert heard == [[], [text.format("lora.rank 2, ", adapters)], [text.format("", "")]]
    with pytest.raises(ConfigError, match="--set lora=none trains without them"):
        mm.train(init=adapted.path, root=tmp_path, steps=1, freeze=["embed*"])


def test_keys_that_change_no_shape_may_differ_and_are_named(source: TrainedRun, tmp_path: Path) -> None:
    heard = Heard()
    keys = ["model.dropout=0.1", "moe.aux_loss_coef=0.02", "moe.top_k=3"]
    mm.train(init=source.path, root=tmp_path, steps=1, overrides=keys, listener=heard)
    said = "\n".join(heard.lines)
    assert f"starting from the weights of {source.path}" in said
    for line in ("model.dropout 0.0 -> 0.1", "moe.aux_loss_coef 0.01 -> 0.02", "moe.top_k 2 -> 3"):
        assert line in said
    assert "n_heads" not in said


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (["model.d_model=32"], r"model\.d_model is 32, they have 16"),
        (["model.n_layers=2", "moe.n_experts=8"], r"model\.n_layers is 2, they have 1; moe\.n_experts is 8, they have 4"),
        (["moe.d_hidden=8"], r"moe\.d_hidden is 8, they have 16"),
        (["moe=none"], r"fit: moe is none, they have 4 experts: give a configuration of their shapes"),
        (["model.n_heads=4"], r"model\.n_heads is 4, they have 2"),
        (["model.tie_embeddings=true"], r"model\.tie_embeddings is true, they have false"),
        (["model.vocab_size=300"], r"model\.vocab_size is 300, they have 256"),
        (["model.activation=gelu"], r"model\.activation is gelu, they have swiglu"),
    ],
)
def test_what_cannot_be_loaded_is_refused_with_the_keys_and_both_values(
    source: TrainedRun, tmp_path: Path, keys: list[str], says: str
) -> None:
    with pytest.raises(ConfigError, match=says) as found:
        mm.train(init=source.path, root=tmp_path, overrides=keys)
    assert "dropout" not in str(found.value)
    assert not list(tmp_path.iterdir())


def test_another_tokenizer_is_refused_with_the_right_one(source: TrainedRun, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.tokenizer = 'char' is not the tokenizer of .*--set data\.tokenizer=byte"):
        mm.train(init=source.path, root=tmp_path, overrides=["data.tokenizer=char"])


def test_a_config_object_is_completed_and_compared_too(source: TrainedRun, other: Path, tmp_path: Path) -> None:
    run = mm.train(tiny(other, steps=1), init=source.path, root=tmp_path)
    assert run.config.model == source.config.model
    with pytest.raises(ConfigError, match=r"model\.d_model is 32"):
        mm.train(tiny(other, model={"d_model": 32}), init=source.path, root=tmp_path)
    with pytest.raises(ConfigError, match="is not the tokenizer of"):
        mm.train(replace(tiny(other), data=DataConfig(source=str(other), tokenizer="char")), init=source.path, root=tmp_path)


def test_a_classifier_of_other_classes_gets_a_new_head_and_says_so(tmp_path: Path) -> None:
    """Digits have ten classes: the source's three are those of a model that was made elsewhere."""
    config = tiny("digits", model={**IMAGES, "n_classes": 3, "attention_bias": True, "norm_eps": 1e-12}, dense=True)
    model = mm.Transformer(config.model, seed=5)
    model.save_pretrained(tmp_path / "folder")
    heard = Heard()
    keys = ["model.n_classes=10", "train.steps=1", "train.backend=numpy", "train.batch_size=4"]
    run = mm.train(init=tmp_path / "folder", root=tmp_path, overrides=keys, listener=heard)
    assert any("the head is drawn anew" in line for line in heard.lines)
    assert any("model.n_classes 3 -> 10" in line for line in heard.lines)
    started = mm.load(run.path / "checkpoints" / "step-000000").state_dict()
    assert started["head.weight"].shape == (10, 16)
    np.testing.assert_array_equal(started["patch_embed.weight"], model.state_dict()["patch_embed.weight"])


# ---- what is refused -----------------------------------------------------------------------------------------------------------------


def test_a_run_is_no_configuration_and_both_ways_on_are_named(source: TrainedRun, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(source.path.parent.parent)
    (source.path.parent.parent / "runs").symlink_to(source.path.parent)
    for name in (str(source.path), "tiny-001", str(source.path / "checkpoints")):
        code, _, err = call(capsys, "train", name)
        assert code == 2
        assert f"is a run, not a configuration: minimoe resume {name} continues it, minimoe train --init {name}" in one_line(err)


def test_a_model_folder_is_no_configuration_either(text: Path, tmp_path: Path) -> None:
    convert(train(tiny(text, dense=True, steps=1), tmp_path).path, tmp_path / "folder")
    with pytest.raises(ConfigError, match=r"is a model folder, not a configuration: minimoe train --init"):
        mm.train(tmp_path / "folder", root=tmp_path)


def test_weights_that_are_missing_or_damaged_are_refused(source: TrainedRun, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such run"):
        mm.train(init=tmp_path / "nothing", root=tmp_path)
    shutil.copytree(source.path, tmp_path / "cut")
    for file in (tmp_path / "cut").glob("checkpoints/*/model.safetensors"):
        file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="no checkpoint is whole"):
        mm.train(init=tmp_path / "cut", root=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_the_plan_says_what_it_starts_from(source: TrainedRun, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = call(capsys, "train", "--init", str(source.path), "--dry-run", *sets("model.dropout=0.1"))
    assert code == 0, err
    assert f"starting from the weights of {source.path}" in out.replace("\n", "")
    assert "model.dropout 0.0 -> 0.1" in out
    assert not list(tmp_path.iterdir())


# ---- stopping and going on -------------------------------------------------------------------------------------------------------------


def same(one: Path, other: Path, step: int) -> None:
    """Compare weights, optimizer state and metrics of two runs after a step."""
    for name in ("model.safetensors", "optimizer.safetensors"):
        first, second = (hashlib.sha256((run / "checkpoints" / f"step-{step:06d}" / name).read_bytes()).hexdigest() for run in (one, other))
        assert first == second, name
    assert untimed(Run(one).metrics()) == untimed(Run(other).metrics())


class Killed(BaseException):
    """The process is gone."""


class At(Heard):
    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def stepped(self, step: int) -> None:
        if step == self.step:
            raise Killed


@pytest.mark.parametrize("step", [1, 5])
def test_a_run_that_was_killed_ends_with_the_same_bytes(source: TrainedRun, other: Path, tmp_path: Path, step: int) -> None:
    options: dict[str, Any] = {"data": str(other), "overrides": ["train.checkpoint_every=2", "train.eval_every=3", "train.eval_batches=1"]}
    whole = mm.train(init=source.path, root=tmp_path, steps=6, **options)
    with pytest.raises(Killed):
        mm.train(init=source.path, root=tmp_path, steps=6, out=tmp_path / "killed", listener=At(step), **options)
    before = contents(source.path)
    mm.resume(tmp_path / "killed", root=tmp_path)
    same(tmp_path / "killed", whole.path, 6)
    assert contents(source.path) == before


def test_a_run_whose_weights_are_lost_is_refused(source: TrainedRun, tmp_path: Path) -> None:
    run = mm.train(init=source.path, root=tmp_path, steps=1)
    shutil.rmtree(run.path / "checkpoints")
    with pytest.raises(CheckpointError, match=r"the weights of the run are lost: .*minimoe train .*config\.toml --init "):
        mm.resume(run.path, root=tmp_path)


def test_a_start_that_was_killed_before_its_weights_were_written_can_be_given_again(
    source: TrainedRun, tmp_path: Path, monkeypatch: Any
) -> None:
    def die(*arguments: Any, **options: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Run, "publish", die)
        mm.train(init=source.path, root=tmp_path, steps=1, out=tmp_path / "out")
    with pytest.raises(CheckpointError, match="the start of this run ended before its weights were written"):
        mm.resume(tmp_path / "out", root=tmp_path)
    with pytest.warns(UserWarning, match="held only what a start that was killed left there"):
        run = mm.train(init=source.path, root=tmp_path, steps=1, out=tmp_path / "out")
    assert run.metrics[-1]["step"] == 1
