"""Frozen parameters: they keep their bytes, take no state of the optimizer, and what cannot be frozen is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import TINY, call, one_line, sets
from tiny_runs import tiny, train, untimed, with_train, write_text

import minimoe as mm
from minimoe.config.cost import parameter_shapes
from minimoe.config.trained import trained_shapes, training_cost
from minimoe.errors import CheckpointError, ConfigError
from minimoe.runs.checkpoint import load_checkpoint
from minimoe.runs.run import Run
from minimoe.training.trainer import Trainer


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


def arrays(run: Path, step: int) -> dict[str, Any]:
    return load_checkpoint(run / "checkpoints" / f"step-{step:06d}").model


PATTERNS = [("embed*",), ("blocks.0.*",), ("*.router.*", "head.weight"), ("blocks.0.moe.experts.*",), ("*norm*", "*attention*")]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("patterns", PATTERNS)
def test_frozen_parameters_keep_their_bytes_and_all_others_move(
    text: Path, tmp_path: Path, patterns: tuple[str, ...], optimizer: str
) -> None:
    config = tiny(text, moe={"router": "sigmoid_bias"}, model={"n_layers": 2}, steps=3, keep=9, freeze=patterns, optimizer=optimizer)
    run = train(config, tmp_path)
    before, after = arrays(run.path, 0), arrays(run.path, 3)
    moving = trained_shapes(run.config)
    assert 0 < len(moving) < len(before)
    buffers = before.keys() - dict(parameter_shapes(run.config.model)).keys()  # the balance bias follows the load, unless it is frozen
    frozen = {name for name in before if before[name].tobytes() == after[name].tobytes()}
    kept = {name for name in buffers if "*.router.*" in patterns or (patterns == ("blocks.0.*",) and name.startswith("blocks.0."))}
    assert frozen == (before.keys() - moving.keys() - buffers) | kept


def test_frozen_parameters_take_no_state_and_no_gradient(text: Path) -> None:
    whole, part = Trainer(tiny(text)), Trainer(tiny(text, freeze=["blocks.0.moe.*", "embed*"]))
    assert {name for name, _ in part.model.named_parameters()} == trained_shapes(part.config).keys()
    sizes = [sum(array.size for array in trainer.optimizer.state_dict().values()) for trainer in (whole, part)]
    count = sum(int(np.prod(shape)) for shape in trained_shapes(part.config).values())
    assert sizes[1] == 2 * count + 1 < sizes[0]
    assert part.model.state_dict().keys() == whole.model.state_dict().keys()
    part.do_step()
    frozen = [p for name, p in part.model.named_state() if name.startswith(("blocks.0.moe.", "embed"))]
    assert frozen and all(p.grad is None for p in frozen)
    assert training_cost(part.config).bytes.optimizer == 4 * 2 * count
    assert training_cost(part.config).bytes.weights == training_cost(whole.config).bytes.weights


def test_gradients_of_what_trains_are_those_of_a_whole_model(text: Path) -> None:
    """Without clipping, which depends on all gradients, one step moves what is not frozen to where it would move anyway."""
    whole, part = Trainer(tiny(text, grad_clip=0.0)), Trainer(tiny(text, grad_clip=0.0, freeze=["blocks.0.attention.*", "head*"]))
    for trainer in (whole, part):
        trainer.do_step()
    for name in trained_shapes(part.config):
        np.testing.assert_allclose(part.model.state_dict()[name], whole.model.state_dict()[name], atol=1e-7)


def test_recomputed_blocks_train_alike(text: Path, tmp_path: Path) -> None:
    config = tiny(text, steps=3, freeze=["embed*", "blocks.0.attention.*"])
    one, other = train(config, tmp_path), train(with_train(config, recompute=True), tmp_path)
    for name, array in arrays(one.path, 3).items():
        np.testing.assert_allclose(arrays(other.path, 3)[name], array, atol=1e-6)


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("embd*", r"'embd\*' names no parameter of this model \(did you mean 'embed\.\*'\?\)"),
        ("blocks.0.attention.qkv_proj.wight", r"did you mean 'blocks\.0\.attention\.qkv_proj\.weight'"),
        ("xyz", r"known: blocks\.\*, embed\.\*, head\.\*, norm\.\*"),
    ],
)
def test_a_pattern_that_names_nothing_is_refused_with_the_nearest(text: Path, tmp_path: Path, pattern: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        train(tiny(text), tmp_path, freeze=[pattern])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("patterns", [["*"], ["blocks.*", "embed*", "norm*", "head*"]])
def test_a_model_that_is_frozen_as_a_whole_is_refused(text: Path, tmp_path: Path, patterns: list[str]) -> None:
    with pytest.raises(ConfigError, match="freezes every parameter, so that nothing would train"):
        train(tiny(text, freeze=patterns), tmp_path)


def test_the_patterns_are_kept_and_the_run_resumes_to_the_same_bytes(text: Path, tmp_path: Path) -> None:
    config = tiny(text, steps=6, schedule="constant", freeze=["embed*"])
    whole = train(config, tmp_path, freeze=["blocks.0.attention.*"])
    run = train(with_train(config, steps=3), tmp_path, freeze=["blocks.0.attention.*"])
    assert Run(run.path).config.train.freeze == ("embed*", "blocks.0.attention.*")
    mm.resume(run.path, steps=6, root=tmp_path)
    for name, array in arrays(whole.path, 6).items():
        assert arrays(run.path, 6)[name].tobytes() == array.tobytes(), name
    assert untimed(Run(run.path).metrics())[3:] == untimed(whole.metrics)[3:]


def test_other_patterns_in_the_file_are_refused_when_it_is_resumed(text: Path, tmp_path: Path) -> None:
    run = train(tiny(text, steps=2, freeze=["embed*"]), tmp_path)
    toml = run.path / "config.toml"
    toml.write_text(toml.read_text().replace("embed*", "head*"))
    with pytest.raises(CheckpointError, match=r"its frozen parameters differs .*train\.freeze"):
        mm.resume(run.path, steps=4, root=tmp_path)


def test_the_start_and_the_plan_say_how_many_parameters_train(text: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["train", *TINY, "--data", str(text), "--steps", "1", "--freeze", "embed*", "--freeze", "*.experts.*"]
    code, out, err = call(capsys, *arguments, "--dry-run")
    assert code == 0, err
    line = "4,976 of 12,144 parameters train (41.0%): attention 768, router 64, norms 48, head 4,096; frozen: embedding, experts"
    assert line in out.replace("\n", " ").replace("  ", " ")
    code, _, err = call(capsys, *arguments)
    assert code == 0, err
    assert line in err
    assert call(capsys, "verify", "tiny-moe-001")[0] == 0
    assert line in call(capsys, "inspect", "tiny-moe-001")[1].replace("\n", " ").replace("  ", " ")
    facts = json.loads((tmp_path / "runs" / "tiny-moe-001" / "status.json").read_text())
    assert facts["parameters"] == 12_144


def test_a_run_without_frozen_parameters_is_written_as_before(text: Path, tmp_path: Path) -> None:
    run = train(tiny(text, steps=1), tmp_path)
    assert "freeze" not in (run.path / "config.toml").read_text()
    assert "freeze" not in (run.path / "checkpoints" / "step-000001" / "config.json").read_text()


def test_a_frozen_embedding_that_is_tied_freezes_the_head_too(text: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    run = train(tiny(text, model={"tie_embeddings": True}, steps=2, freeze=["embed*"]), tmp_path)
    assert arrays(run.path, 0)["embed.weight"].tobytes() == arrays(run.path, 2)["embed.weight"].tobytes()
    monkeypatch.chdir(tmp_path)
    code, _, err = call(capsys, "train", *TINY, "--data", str(text), *sets('train.freeze="embed*"'))
    assert code == 2
    assert "train.freeze: expected array, got str" in one_line(err)
