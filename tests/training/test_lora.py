"""Low-rank adapters: the formula and its gradient, the frozen base, and that every command works on a run that has them."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import TINY, call, one_line, sets
from msgspec.structs import replace
from tiny_runs import sha256_of, tiny, train, untimed, weights_of, write_text

import minimoe as mm
from minimoe.backend import load
from minimoe.config import Config, LoraConfig, ModelConfig, MoEConfig, load_config
from minimoe.config.trained import adapter_shapes, is_adapter, trained_shapes
from minimoe.engine import ops
from minimoe.engine.tensor import Tensor
from minimoe.errors import CheckpointError, ConfigError
from minimoe.layers.module import Module
from minimoe.model.adapters import adapt, draw_adapters, merge_adapters
from minimoe.runs.checkpoint import load_checkpoint
from minimoe.runs.run import Run
from minimoe.study.bench.step import TrainingStep
from minimoe.study.convert import convert
from minimoe.testing import check_grads
from minimoe.training.listener import Listener
from minimoe.training.trained_run import TrainedRun
from minimoe.training.trainer import Trainer
from minimoe.training.weights import open_weights

TOKENS = np.random.default_rng(0).integers(0, 256, (2, 11))
TRAINED = 80  # steps of the source: adapters need features to change
ALL = ("attention", "dense", "experts")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def source(text: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    config = tiny(text, model={"n_layers": 2}, moe={"layers": (1,), "n_shared_experts": 1, "router": "sigmoid_bias"}, steps=TRAINED)
    return train(config, tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("other") / "text.txt"
    path.write_text("".join(f"The row {verb} every gate.\n" for verb in ("sorts", "weighs", "finds", "drops") * 40))
    return path


def adapted_run(source: TrainedRun, other: Path, root: Path, *keys: str, **options: Any) -> TrainedRun:
    keys = ("train.lr=0.05", "lora.rank=2", *keys)
    return mm.train(init=source.path, data=str(other), root=root, overrides=keys, **{"steps": 4, **options})


# ---- the formula -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["numpy", "numba"])
@pytest.mark.parametrize("experts", [0, 3])
def test_a_product_with_an_adapter_is_the_plain_formula_with_its_gradient(backend: str, experts: int) -> None:
    b, draw = load(backend), np.random.default_rng(1)
    lead = (experts,) if experts else ()
    w, a, c, dy = (draw.standard_normal((*lead, *shape)) for shape in ((7, 5), (2, 5), (7, 2), (7, 5)))
    tensors = [Tensor(b.from_host(array), b, requires_grad=True) for array in (w, a, c)]
    y = ops.low_rank(*tensors, 1.5)
    np.testing.assert_allclose(b.to_host(y.data), w + 1.5 * c @ a, atol=1e-12)
    y.backward(b.from_host(dy))
    expected = (dy, 1.5 * np.swapaxes(c, -1, -2) @ dy, 1.5 * dy @ np.swapaxes(a, -1, -2))
    for tensor, gradient in zip(tensors, expected, strict=True):
        np.testing.assert_allclose(b.to_host(tensor.grad), gradient, atol=1e-12)


def small_model(backend: str, seed: int = 0) -> tuple[mm.Transformer, LoraConfig]:
    moe = MoEConfig(n_experts=3, top_k=2, layers=(1,), n_shared_experts=1)
    config = ModelConfig(d_model=8, n_layers=2, n_heads=2, d_hidden=6, max_seq_len=8, vocab_size=11, bias=True, moe=moe)
    model, lora = mm.Transformer(config, seed=seed, dtype="float64", backend=load(backend)), LoraConfig(rank=2, alpha=3.0)
    draw_adapters(model, lora, seed, "float64")
    draw = np.random.default_rng(5)
    for name, p in model.named_parameters():  # b starts at zero, where the gradient of a vanishes
        p.data[...] = load(backend).from_host(0.3 * draw.standard_normal(p.shape)) if name.endswith(".b") else p.data
    return model, lora


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_gradients_of_adapters_in_a_whole_model_are_those_of_differences(backend: str) -> None:
    model, _ = small_model(backend)
    tokens = np.random.default_rng(2).integers(0, 11, (2, 6))
    targets = np.roll(tokens, -1, axis=1)
    parameters = model.parameters()
    assert len(parameters) == 2 * (2 + 2 + 2 + 2 + 2)  # attention twice, dense, experts, shared experts: two products each
    with mm.use_backend(backend):
        check_grads(lambda *_: model.loss(tokens, targets).total, *parameters)


@pytest.mark.parametrize("backend", ["numpy", "numba"])
@pytest.mark.parametrize("seed", [0, 1])
def test_merged_weights_give_the_adapted_models_logits(backend: str, seed: int) -> None:
    model, lora = small_model(backend, seed)
    tokens = np.random.default_rng(3).integers(0, 11, (2, 7))
    names = [name for name, _ in model.named_state()]
    with mm.no_grad():
        before = model(tokens).numpy()
        merge_adapters(model, lora)
        after = model(tokens).numpy()
    np.testing.assert_allclose(after, before, atol=1e-10)
    assert [name for name, _ in model.named_state()] == [name for name in names if not is_adapter(name)]
    assert all(p.requires_grad for p in model.parameters()) and len(model.parameters()) > 20


def test_adapters_of_zero_change_nothing(source: TrainedRun) -> None:
    model = mm.load(source.path)
    with mm.no_grad():
        before = model(TOKENS).numpy()
        draw_adapters(model, LoraConfig(rank=3), 0, "float32")
        np.testing.assert_array_equal(model(TOKENS).numpy(), before)


def test_every_adapter_is_found_from_the_configuration_alone(source: TrainedRun) -> None:
    for targets in (("attention",), ("dense",), ("experts",), ALL):
        lora = LoraConfig(rank=2, targets=targets)
        model = mm.Transformer(source.config.model, seed=None)
        assert {name: p.shape for name, p in adapt(model, lora).items()} == dict(adapter_shapes(source.config.model, lora))
        assert {name for name, _ in model.named_parameters()} == {name for name, _ in adapter_shapes(source.config.model, lora)}


# ---- a run ---------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(source: TrainedRun, other: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    return adapted_run(source, other, tmp_path_factory.mktemp("adapted"))


def logits(path: Path) -> Any:
    with mm.no_grad():
        return mm.load(path)(TOKENS).numpy()


def test_a_checkpoint_has_the_adapters_alone_and_the_run_its_base(run: TrainedRun, source: TrainedRun) -> None:
    saved = load_checkpoint(run.path / "checkpoints" / "step-000004")
    assert saved.model.keys() == trained_shapes(run.config).keys()
    assert (run.path / "base.safetensors").read_bytes() == weights_of(source.path, TRAINED)
    recorded = json.loads((run.path / "env.json").read_text())["weights"]
    assert saved.state["base_sha256"] == recorded["sha256"] == sha256_of(source.path, TRAINED)


def test_the_base_keeps_its_bytes_in_memory_too(source: TrainedRun, other: Path) -> None:
    config = replace(source.config, lora=LoraConfig(rank=2))
    trainer = Trainer(config, weights=open_weights(source.path))
    before = {name: np.array(array) for name, array in trainer.model.state_dict().items()}
    for _ in range(3):
        trainer.do_step()
    after = trainer.model.state_dict()
    changed = {name for name, array in before.items() if array.tobytes() != np.array(after[name]).tobytes()}
    assert changed == trained_shapes(config).keys()  # not even the router's balance bias


def test_the_loaded_model_is_the_one_that_was_trained(run: TrainedRun, source: TrainedRun) -> None:
    with mm.no_grad():
        np.testing.assert_allclose(run.model(TOKENS).numpy(), logits(run.path), atol=1e-6)
    assert np.abs(logits(run.path) - logits(source.path)).max() > 1e-3
    assert mm.load(run.path / "checkpoints" / "step-000000").state_dict().keys() == mm.load(source.path).state_dict().keys()
    np.testing.assert_array_equal(logits(run.path / "checkpoints" / "step-000000"), logits(source.path))


def test_adapters_alone_learn(source: TrainedRun, other: Path, tmp_path: Path) -> None:
    losses = [row["loss"] for row in adapted_run(source, other, tmp_path, "train.lr=0.02", steps=40).metrics]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.3


def test_convert_merges_and_the_logits_are_those_of_the_adapted_model(text: Path, other: Path, tmp_path: Path) -> None:
    source = train(tiny(text, steps=4), tmp_path)
    run = adapted_run(source, other, tmp_path)
    adapted = mm.load(source.path)
    draw_adapters(adapted, run.config.lora, 0, "float32")
    adapted.load_state_dict({**adapted.state_dict(), **load_checkpoint(run.path / "checkpoints" / "step-000004").model})
    convert(run.path, tmp_path / "folder")
    with mm.no_grad():
        np.testing.assert_allclose(logits(tmp_path / "folder"), adapted(TOKENS).numpy(), atol=1e-5)
    run.model.save_pretrained(tmp_path / "again")
    np.testing.assert_allclose(logits(tmp_path / "again"), logits(tmp_path / "folder"), atol=1e-6)


def test_all_commands_work_on_it(run: TrainedRun, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(run.path.parent)
    commands = [["eval"], ["generate", "--tokens", "5"], ["inspect"], ["verify"], ["eval"]]
    said = {}
    for command, *rest in commands:
        code, out, err = call(capsys, command, str(run.path), *rest)
        assert code == 0, (command, out, err)
        said[command] = out
    assert f"loss {run.val_loss:.4f}" in said["eval"]
    assert "adapters of rank 2" in said["inspect"]
    assert "base.safetensors" in said["verify"]


def test_a_run_goes_on_from_an_adapted_one_with_merged_weights(run: TrainedRun, tmp_path: Path) -> None:
    whole = mm.train(init=run.path, root=tmp_path, steps=1, overrides=["lora=none"])
    assert whole.config.lora is None
    np.testing.assert_array_equal(logits(whole.path / "checkpoints" / "step-000000"), logits(run.path))
    again = mm.train(init=run.path, root=tmp_path, steps=1)
    assert again.config.lora == run.config.lora
    np.testing.assert_array_equal(logits(again.path / "checkpoints" / "step-000000"), logits(run.path))


def test_less_than_a_twentieth_of_the_default_model_trains() -> None:
    config = replace(load_config("tiny-moe", ["model.vocab_size=256"]), lora=LoraConfig())
    trained = sum(int(np.prod(shape)) for shape in trained_shapes(config).values())
    whole = sum(p.size for p in mm.Transformer(config.model, seed=0).parameters())
    assert trained == 141_312
    assert trained < 0.05 * whole


# ---- nothing is lost -------------------------------------------------------------------------------------------------------------------


def test_a_run_needs_its_source_no_more(source: TrainedRun, other: Path, tmp_path: Path) -> None:
    shutil.copytree(source.path, tmp_path / "copy")
    run = mm.train(init=tmp_path / "copy", data=str(other), root=tmp_path, steps=2, overrides=["lora.rank=2", "train.schedule=constant"])
    whole = mm.train(init=tmp_path / "copy", data=str(other), root=tmp_path, steps=4, overrides=["lora.rank=2", "train.schedule=constant"])
    shutil.rmtree(tmp_path / "copy")
    shutil.move(run.path, tmp_path / "elsewhere")
    mm.resume(tmp_path / "elsewhere", steps=4, root=tmp_path)
    np.testing.assert_array_equal(logits(tmp_path / "elsewhere"), logits(whole.path))


class Killed(BaseException):
    """The process is gone."""


class At(Listener):
    def __init__(self, step: int) -> None:
        self.step = step

    def stepped(self, step: int) -> None:
        if step == self.step:
            raise Killed


@pytest.mark.parametrize("step", [1, 5])
def test_a_run_that_was_killed_ends_with_the_same_bytes(source: TrainedRun, other: Path, tmp_path: Path, step: int) -> None:
    keys = ("train.checkpoint_every=2", "train.eval_every=3", "train.eval_batches=1", "model.dropout=0.1", "train.accumulate=2")
    whole = adapted_run(source, other, tmp_path, *keys, steps=6)
    with pytest.raises(Killed):
        adapted_run(source, other, tmp_path, *keys, steps=6, out=tmp_path / "killed", listener=At(step))
    mm.resume(tmp_path / "killed", root=tmp_path)
    folders = [path / "checkpoints" / "step-000006" for path in (whole.path, tmp_path / "killed")]
    for name in ("model.safetensors", "optimizer.safetensors"):
        one, two = (hashlib.sha256((folder / name).read_bytes()) for folder in folders)
        assert one.hexdigest() == two.hexdigest(), name
    assert untimed(Run(tmp_path / "killed").metrics()) == untimed(whole.metrics)
    assert (tmp_path / "killed" / "base.safetensors").read_bytes() == (whole.path / "base.safetensors").read_bytes()


@pytest.mark.parametrize("damage", ["missing", "another byte", "of another run"])
def test_a_base_that_is_not_whole_is_said(run: TrainedRun, source: TrainedRun, tmp_path: Path, damage: str, capsys: Any) -> None:
    shutil.copytree(run.path, tmp_path / "run")
    base = tmp_path / "run" / "base.safetensors"
    data = bytearray(base.read_bytes())
    data[-3] ^= 1
    base.write_bytes(bytes(data) if damage == "another byte" else (weights_of(source.path, 0) if damage == "of another run" else b""))
    if damage == "missing":
        base.unlink()
    says = "is missing" if damage == "missing" else "SHA-256"
    for read in (lambda: mm.load(tmp_path / "run"), lambda: mm.resume(tmp_path / "run", steps=9, root=tmp_path)):
        with pytest.raises(CheckpointError, match=rf"base\.safetensors: .*{says}"):
            read()
    code, out, _ = call(capsys, "verify", str(tmp_path / "run"))
    assert code == 1
    assert "base.safetensors         problem" in out
    assert not (tmp_path / "run" / "training.lock").exists()


# ---- what is refused -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (["lora.rank=40"], r"lora\.rank \(40\) must not exceed the sides of blocks\.0\.attention\.qkv_proj\.weight, which is 48 x 16"),
        (["lora.rank=0"], r"lora\.rank must be above 0"),
        (["lora.alpha=0"], r"lora\.alpha must be above 0"),
        (['lora.targets=["atention"]'], r"'atention' is not one of its values \(did you mean 'attention'\?\)"),
        (["lora.targets=[]"], r"lora\.targets is empty: give one or more of attention, dense, experts"),
        (["lora.rank=2", 'train.freeze=["embed*"]'], r"train\.freeze and \[lora\] exclude each other"),
        (["lora.rnk=2"], r"lora\.rnk: unknown key \(did you mean 'rank'\?\)"),
    ],
)
def test_what_cannot_be_adapted_is_refused(source: TrainedRun, tmp_path: Path, keys: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        mm.train(init=source.path, root=tmp_path, overrides=keys)
    assert not list(tmp_path.iterdir())


def test_targets_that_a_model_lacks_are_refused(text: Path, tmp_path: Path) -> None:
    source = train(tiny(text, dense=True, steps=1), tmp_path)
    with pytest.raises(ConfigError, match=r"lora\.targets = \['experts'\]: this model has none of these; it has attention, dense"):
        mm.train(init=source.path, root=tmp_path, overrides=['lora.targets=["experts"]'])


def test_adapters_need_weights_that_were_trained(text: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = call(capsys, "train", *TINY, "--data", str(text), *sets("lora.rank=2"))
    assert code == 2
    assert "[lora] adapts weights that were trained before: name them with --init RUN|FOLDER" in one_line(err)
    with pytest.raises(ConfigError, match=r"\[lora\] adapts weights"):
        train(replace(tiny(text), lora=LoraConfig(rank=2)), tmp_path / "runs")


def test_other_adapters_in_the_file_are_refused_when_it_is_resumed(run: TrainedRun, tmp_path: Path) -> None:
    shutil.copytree(run.path, tmp_path / "run")
    toml = tmp_path / "run" / "config.toml"
    toml.write_text(toml.read_text().replace("rank = 2", "rank = 3"))
    with pytest.raises(CheckpointError, match=r"its adapters differs .*lora\.rank 2 -> 3"):
        mm.resume(tmp_path / "run", steps=9, root=tmp_path)


def test_the_table_is_written_and_read_back(run: TrainedRun) -> None:
    assert Run(run.path).config.lora == LoraConfig(rank=2, alpha=4.0, targets=ALL)
    assert isinstance(run.model, Module)
    assert Config().lora is None


def test_a_step_with_adapters_can_be_timed() -> None:
    step = TrainingStep(replace(tiny("python-docs"), lora=LoraConfig(rank=2)), load("numpy"))
    assert {name for name, _ in step.model.named_parameters()} == trained_shapes(step.config).keys()
