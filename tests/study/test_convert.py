"""Runs written as folders, folders in other dtypes, and dense models made into routed runs, as a user types it."""

import json
import os
import shutil

import numpy as np
import pytest
from command_line import call, one_line
from tiny_runs import tiny, train, write_text

import minimoe as mm
from minimoe.config import ModelConfig
from minimoe.errors import CheckpointError, ConfigError, UserError
from minimoe.runs.checkpoint import load_checkpoint, save_checkpoint
from minimoe.runs.run import Run
from minimoe.study.convert import convert, upcycle

TOKENS = np.random.default_rng(0).integers(0, 256, (2, 11))


def run(capsys, *arguments):
    code, out, err = call(capsys, *arguments)
    assert code == 0, err
    return out


def failure(capsys, *arguments):
    code, _, err = call(capsys, *arguments)
    assert code == 2
    return one_line(err)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A dense run, trained a little."""
    root = tmp_path_factory.mktemp("dense")
    return train(tiny(write_text(root), dense=True), root).path


def logits(path):
    with mm.no_grad():
        return mm.load(path)(TOKENS).numpy()


def test_a_run_becomes_a_folder_with_the_same_logits_and_tokenizer(dense, tmp_path):
    said = convert(dense, tmp_path / "folder")
    assert "llama" in said
    assert "LlamaForCausalLM" in said
    np.testing.assert_array_equal(logits(tmp_path / "folder"), logits(dense))
    assert mm.load(tmp_path / "folder").tokenizer.name == "byte"


def test_a_folder_in_bfloat16_is_half_as_large_and_near(dense, tmp_path):
    convert(dense, tmp_path / "wide")
    convert(tmp_path / "wide", tmp_path / "narrow", "bfloat16")
    wide, narrow = ((tmp_path / name / "model.safetensors").stat().st_size for name in ("wide", "narrow"))
    assert narrow < 0.6 * wide
    assert json.loads((tmp_path / "narrow" / "config.json").read_text())["dtype"] == "bfloat16"
    difference = np.abs(logits(tmp_path / "narrow") - logits(dense)).max()
    assert 0 < difference < 0.05


def test_what_was_loaded_and_not_changed_is_written_to_the_byte(dense, tmp_path):
    convert(dense, tmp_path / "a", "float16")
    convert(tmp_path / "a", tmp_path / "b")
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_a_model_that_no_family_has_is_refused_with_the_key(tmp_path):
    model = mm.Transformer(ModelConfig(d_model=16, n_layers=1, n_heads=2, d_hidden=16, vocab_size=20, activation="relu"), seed=0)
    with pytest.raises(ConfigError, match=r"no family expresses this model; the nearest is \w+, but model\.\w+ is"):
        model.save_pretrained(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_a_folder_that_is_there_is_left_alone(dense, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="exists already"):
        convert(dense, tmp_path / "taken")
    assert [file.name for file in (tmp_path / "taken").iterdir()] == ["file"]


# ---- upcycling ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 3])
def test_an_upcycled_model_starts_with_the_dense_ones_logits(dense, tmp_path, k):
    upcycle(dense, tmp_path / "routed", 4, [f"moe.top_k={k}", "moe.router=softmax_topk", *(["moe.norm_topk_prob=false"] if k == 1 else [])])
    model, before = mm.load(tmp_path / "routed"), mm.load(dense)
    assert model.config.moe.n_experts == 4
    if k > 1:  # one expert without norm_topk_prob is scaled by its probability
        np.testing.assert_allclose(logits(tmp_path / "routed"), logits(dense), atol=1e-6)
    up = before.state_dict()["blocks.0.ffn.gate_up_proj.weight"]
    for expert in model.state_dict()["blocks.0.moe.experts.gate_up_proj"]:
        np.testing.assert_array_equal(expert, up)


def test_an_upcycled_run_is_resumed_and_its_experts_part(dense, tmp_path):
    upcycle(dense, tmp_path / "routed", 4)
    before = mm.load(tmp_path / "routed").state_dict()["blocks.0.moe.experts.down_proj"]
    done = mm.resume(tmp_path / "routed", root=tmp_path)
    after = done.model.state_dict()["blocks.0.moe.experts.down_proj"]
    assert (before[0] == before[1]).all()
    assert not (after[0] == after[1]).all()
    assert done.metrics[-1]["step"] == done.config.train.steps
    assert done.metrics[0]["loss"] < np.log(256)  # the dense run's was trained


def test_a_folder_is_upcycled_with_its_own_tokenizer(dense, tmp_path):
    convert(dense, tmp_path / "folder")
    upcycle(tmp_path / "folder", tmp_path / "routed", 2, ["train.steps=2", "train.batch_size=2", "train.backend=numpy"])
    np.testing.assert_allclose(logits(tmp_path / "routed"), logits(dense), atol=1e-6)
    assert mm.load(tmp_path / "routed").tokenizer.name == "byte"


def test_an_upcycled_run_is_whole_or_no_run_at_every_call_that_changes_the_disk(dense, tmp_path, monkeypatch):
    """A kill at any such call leaves a folder that resume refuses and upcycling takes over, or the whole run."""
    wanted = logits(dense)
    target = tmp_path / "routed"
    for moment in range(200):
        finished = kill_at(monkeypatch, moment, lambda: upcycle(dense, target, 4))
        if (target / "config.toml").exists():
            np.testing.assert_allclose(logits(target), wanted, atol=1e-6)
            assert Run(target).has_begun()
            shutil.rmtree(target)
        else:
            with pytest.raises(CheckpointError, match=r"routed: (no such run|is not a run's folder|the start of this run ended before)"):
                mm.resume(target, root=tmp_path)
            upcycle(dense, target, 4)
            np.testing.assert_allclose(logits(target), wanted, atol=1e-6)
            shutil.rmtree(target)
        assert not list(tmp_path.glob(".*")), "nothing is left beside"
        if finished:
            break
    assert moment > 10


class Killed(BaseException):
    """The process is gone."""


def kill_at(monkeypatch, moment, action):
    """Do `action`, and end it at its `moment`-th call that changes the disk.   -> whether it came to its end"""
    calls = []
    with monkeypatch.context() as patch:
        for name in ("replace", "fsync", "mkdir", "unlink", "rmdir", "rename", "link"):
            patch.setattr(os, name, dying(getattr(os, name), calls, moment))
        try:
            action()
        except Killed:
            return False
    return True


def dying(real, calls, moment):
    """`real`, which ends the process at the `moment`-th of all calls."""

    def call(*args, **kwargs):
        calls.append(real)
        if len(calls) > moment:
            raise Killed
        return real(*args, **kwargs)

    return call


def test_an_upcycled_run_without_its_weights_is_refused(dense, tmp_path):
    upcycle(dense, tmp_path / "routed", 4)
    shutil.rmtree(tmp_path / "routed" / "checkpoints")
    for name in ("nothing more", "status.json"):
        (tmp_path / "routed" / name).unlink(missing_ok=True)
        with pytest.raises(CheckpointError, match=r"weights.*are lost.*convert .* --upcycle"):
            mm.resume(tmp_path / "routed", root=tmp_path)
    assert not (tmp_path / "routed" / "metrics.jsonl").exists()


def test_weights_that_are_not_finite_are_not_upcycled(dense, tmp_path):
    """What an earlier version saved of a run whose weights an update had ruined."""
    shutil.copytree(dense, tmp_path / "ruined")
    folder = max((tmp_path / "ruined" / "checkpoints").glob("step-*"))
    saved = load_checkpoint(folder)
    saved.model["blocks.0.ffn.down_proj.weight"][0, 0] = np.nan
    text = saved.tokenizer_json()
    save_checkpoint(folder, model=saved.model, optimizer=saved.optimizer, state=saved.state, config=saved.config, tokenizer_json=text)
    with pytest.raises(UserError, match=r"experts\.down_proj: has a number that is not finite"):
        upcycle(tmp_path / "ruined", tmp_path / "routed", 4)
    assert not (tmp_path / "routed").exists()


def test_a_routed_model_is_not_upcycled(dense, tmp_path):
    upcycle(dense, tmp_path / "routed", 2)
    with pytest.raises(ConfigError, match="is routed already"):
        upcycle(tmp_path / "routed", tmp_path / "again", 2)


def test_overrides_that_would_make_other_experts_are_refused(dense, tmp_path):
    with pytest.raises(ConfigError, match=r"leave out moe\.every, moe\.layers and moe\.d_hidden"):
        upcycle(dense, tmp_path / "routed", 2, ["moe.d_hidden=8"])


# ---- the command ----------------------------------------------------------------------------------------------------------------


def test_convert_and_inspect_from_the_command_line(dense, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MINIMOE_CACHE_DIR", str(tmp_path / "cache"))
    run(capsys, "convert", str(dense), str(tmp_path / "folder"))
    text = run(capsys, "inspect", str(tmp_path / "folder"))
    assert "llama" in text
    assert "F32" in text
    run(capsys, "convert", str(dense), str(tmp_path / "routed"), "--upcycle", "4", "--set", "moe.top_k=2")
    run(capsys, "convert", str(tmp_path / "routed"), str(tmp_path / "mixtral"))
    assert "none yet" in run(capsys, "inspect", str(tmp_path / "mixtral"))
    run(capsys, "generate", str(tmp_path / "mixtral"), "--prompt", "the", "--tokens", "5")
    report = json.loads(run(capsys, "inspect", str(tmp_path / "mixtral"), "--json"))
    rows = np.asarray(report["folder"]["expert_rows"])
    assert rows.shape == (1, 4)
    assert rows.sum() >= 2 * (3 + 4)  # two experts for each token of the prompt and each that was read again
    assert "experts used here" in run(capsys, "inspect", str(tmp_path / "mixtral"))


def test_a_folder_is_measured_on_data_that_are_given(dense, tmp_path, capsys):
    convert(dense, tmp_path / "folder")
    text = write_text(tmp_path)
    assert "(all of it)" in run(capsys, "eval", str(tmp_path / "folder"), "--data", str(text))
    assert "a model folder has no data" in failure(capsys, "eval", str(tmp_path / "folder"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--dtype", "int8"], "dtype 'int8': a folder holds float64, float32, float16, bfloat16"),
        (["--set", "moe.top_k=1"], "--set needs --upcycle"),
        (["--upcycle", "4", "--dtype", "bfloat16"], "--dtype is for a model folder"),
    ],
)
def test_options_that_do_not_go_together_are_refused(dense, tmp_path, capsys, arguments, says):
    assert says in failure(capsys, "convert", str(dense), str(tmp_path / "folder"), *arguments)
