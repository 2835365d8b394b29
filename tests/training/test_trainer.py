"""Training: what a step does to the weights, what the metrics say, what an evaluation measures, and what a non-finite step does."""

import json
import math
import os
import signal
from collections.abc import Callable
from dataclasses import replace as with_field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_runs import BACKEND, tiny, train, untimed, weights_of, with_train, write_text

import minimoe as mm
from minimoe.backend import use_backend
from minimoe.data.batches import batch, sample_windows, windows
from minimoe.data.corpus import load_corpus
from minimoe.engine.random import Rng
from minimoe.engine.tensor import Tensor
from minimoe.errors import ConfigError, Diverged, Interrupted, UserError
from minimoe.model.transformer import LossParts, Transformer
from minimoe.optim import learning_rate, make_optimizer
from minimoe.pretrained.loading import open_model
from minimoe.runs.checkpoint import load_checkpoint
from minimoe.runs.listing import list_runs
from minimoe.runs.run import Run
from minimoe.training.evaluation import Evaluation, evaluate
from minimoe.training.listener import Listener
from minimoe.training.trainer import Trainer
from minimoe_numpy import NumpyBackend

KEYS = {
    "step", "loss", "aux_loss", "z_loss", "router_loss", "lr", "grad_norm", "step_ms", "tokens_per_s", "elapsed_s", "expert_load",
    "dropped", "router_entropy", "skipped", "aux_loss_layers",
}  # fmt: skip


@pytest.fixture(autouse=True, params=["numpy", "numba"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """All of this holds on both backends of the CPU."""
    monkeypatch.setitem(BACKEND, "name", request.param)
    return str(request.param)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


# ---- learning and repeating ----------------------------------------------------------------------------------------------------


def test_the_loss_falls(text: Path, tmp_path: Path) -> None:
    run = train(tiny(text, steps=40), tmp_path)
    losses = [row["loss"] for row in run.metrics]
    assert abs(losses[0] - math.log(256)) < 0.1
    assert np.mean(losses[-5:]) < losses[0] - 1.5 and run.val_loss < losses[0] - 1.5


def test_equal_seeds_give_equal_bytes_and_other_seeds_others(text: Path, tmp_path: Path) -> None:
    runs = [train(tiny(text, seed=seed), tmp_path) for seed in (0, 0, 1)]
    first, second, other = (weights_of(run.path, 10) for run in runs)
    assert first == second and first != other
    assert untimed(runs[0].metrics) == untimed(runs[1].metrics)


def test_dropout_jitter_noise_and_capacity_are_reproducible(text: Path, tmp_path: Path) -> None:
    config = tiny(
        text, model={"dropout": 0.1, "attention_dropout": 0.1}, moe={"jitter": 0.1, "noise_std": 0.5, "capacity_factor": 0.8}, steps=5
    )
    runs = [train(config, tmp_path) for _ in range(2)]
    assert weights_of(runs[0].path, 5) == weights_of(runs[1].path, 5)
    assert weights_of(train(tiny(text, steps=5), tmp_path).path, 5) != weights_of(runs[0].path, 5)
    assert all(0.0 < row["dropped"] < 1.0 for row in runs[0].metrics)


def test_recomputation_gives_the_same_bytes(text: Path, tmp_path: Path) -> None:
    config = tiny(text, model={"n_layers": 2, "dropout": 0.1}, moe={"jitter": 0.1, "capacity_factor": 1.0}, steps=4)
    plain, again = train(config, tmp_path), train(with_train(config, recompute=True), tmp_path)
    assert weights_of(plain.path, 4) == weights_of(again.path, 4)
    assert untimed(plain.metrics) == untimed(again.metrics)


# ---- metrics -------------------------------------------------------------------------------------------------------------------


def test_every_step_has_a_line_with_every_key(text: Path, tmp_path: Path) -> None:
    config = tiny(text, model={"n_layers": 3}, moe={"layers": (0, 2), "n_experts": 5}, steps=11, eval_every=3, accumulate=2)
    run = train(config, tmp_path)
    rows = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert rows == run.metrics and [row["step"] for row in rows] == list(range(1, 12))
    for row in rows:
        assert set(row) - {"val_loss", "val_bits_per_byte"} == KEYS
        assert ("val_loss" in row) == (row["step"] in (3, 6, 9, 11))
        assert np.shape(row["expert_load"]) == (2, 5) and np.allclose(np.sum(row["expert_load"], axis=1), 1.0)
        assert row["skipped"] is False and row["dropped"] == 0.0
        assert 0.0 < row["router_entropy"] <= math.log(5) + 1e-6
        assert min(row[key] for key in ("step_ms", "tokens_per_s", "elapsed_s", "grad_norm", "aux_loss", "z_loss", "lr")) > 0.0
        assert row["router_loss"] == pytest.approx(0.01 * row["aux_loss"] + 0.001 * row["z_loss"], rel=1e-5)
        assert row["tokens_per_s"] == pytest.approx(2 * 4 * 16 / (row["step_ms"] / 1e3))
        assert row["lr"] == pytest.approx(learning_rate(row["step"] - 1, config.train))
    elapsed = [row["elapsed_s"] for row in rows]
    assert elapsed == sorted(elapsed)


def test_lines_come_log_every_steps_at_a_time(text: Path, tmp_path: Path) -> None:
    class Heard(Listener):
        def __init__(self) -> None:
            self.sizes: list[int] = []
            self.steps: list[int] = []

        def stepped(self, step: int) -> None:
            self.steps.append(step)

        def logged(self, rows: list[dict[str, Any]]) -> None:
            self.sizes.append(len(rows))

    heard = Heard()
    train(tiny(text, steps=10, log_every=4), tmp_path, listener=heard)
    assert heard.sizes == [4, 4, 2] and heard.steps == list(range(1, 11))


def test_the_first_lines_numbers_are_those_of_the_model_itself(text: Path, tmp_path: Path) -> None:
    config = tiny(text, steps=1, accumulate=2, dtype="float64", grad_clip=0.0)
    row = train(config, tmp_path).metrics[0]
    trainer = Trainer(config)
    parts = []
    for micro in range(2):
        tokens, targets = batch(trainer.task.corpus.train, 0, 0, micro, 4, 16)
        parts.append(trainer.model.loss(tokens, targets, rng=Rng(0, 0, micro)))
        (parts[-1].total * 0.5).backward()
    norm = math.sqrt(sum(float((p.grad**2).sum()) for p in trainer.model.parameters() if p.grad is not None))
    assert row["loss"] == pytest.approx(np.mean([p.cross_entropy.item() for p in parts]))
    assert row["aux_loss"] == pytest.approx(np.mean([p.aux_loss.item() for p in parts if p.aux_loss is not None]))
    assert row["grad_norm"] == pytest.approx(norm)
    counts = np.sum([p.stats[0].counts for p in parts], axis=0)
    assert row["expert_load"] == [pytest.approx(list(counts / (2 * 4 * 16 * 2)))]


# ---- evaluation ----------------------------------------------------------------------------------------------------------------


def loss_by_hand(model: Transformer, val: Any, seq_len: int) -> tuple[float, int]:
    """The mean of -log p(target), window by window, from the logits."""
    total, count = 0.0, 0
    for start in range(0, len(val) - 1, seq_len):
        row = np.asarray(val[start : start + seq_len + 1])
        z = model(row[None, :-1]).numpy()[0].astype(np.float64)
        top = z.max(axis=1)
        logsumexp = top + np.log(np.exp(z - top[:, None]).sum(axis=1))
        total += float((logsumexp - z[np.arange(len(z)), row[1:]]).sum())
        count += len(row) - 1
    return total / count, count


@pytest.mark.parametrize("dense", [False, True])
def test_the_last_evaluation_covers_the_whole_split(text: Path, tmp_path: Path, dense: bool) -> None:
    run = train(tiny(text, steps=3, dense=dense, eval_batches=1), tmp_path)
    expected, count = loss_by_hand(run.model, run.corpus.val, 16)
    assert run.val_loss == pytest.approx(expected, rel=1e-5)
    seen = evaluate(run.model, windows(run.corpus.val, 16, 4))
    assert seen.tokens == count == len(run.corpus.val) - 1
    assert seen.perplexity == pytest.approx(math.exp(expected), rel=1e-4)
    assert run.val_bits_per_byte == pytest.approx(expected / math.log(2), rel=1e-5), "a token is a byte"
    assert np.shape(seen.expert_load) == ((0,) if dense else (1, 4))


def test_evaluations_in_between_take_eval_batches(text: Path, tmp_path: Path) -> None:
    run = train(tiny(text, steps=4, eval_every=2, eval_batches=1, checkpoint_every=2, keep=4), tmp_path)
    model = mm.load(run.path / "checkpoints" / "step-000002")
    some = evaluate(model, sample_windows(run.corpus.val, 16, 4, 1))
    assert some.tokens == 64 and run.metrics[1]["val_loss"] == pytest.approx(some.loss, rel=1e-6)


def test_evaluation_has_neither_dropout_nor_noise_nor_capacity(text: Path, tmp_path: Path) -> None:
    config = tiny(text, model={"dropout": 0.5}, moe={"noise_std": 3.0, "capacity_factor": 0.3, "jitter": 0.5}, steps=2)
    run = train(config, tmp_path)
    assert run.val_loss == pytest.approx(loss_by_hand(run.model, run.corpus.val, 16)[0], rel=1e-5)


def test_the_load_is_told_apart_by_domain() -> None:
    config = tiny("python-mix", model={"n_layers": 2, "vocab_size": 256})
    corpus = load_corpus(config.data)
    assert corpus.val_domains is not None
    model = Transformer(config.model, seed=0, backend=mm.set_backend("numpy"))
    val, sides = corpus.val[:2000], corpus.val_domains[:2000].astype(np.int32)
    halves = [inputs for inputs, _ in windows(sides, 16, 4)]
    seen = evaluate(model, windows(val, 16, 4), domains=halves, n_domains=2)
    assert seen.domain_load is not None and np.asarray(seen.domain_load).shape == (2, 2, 4)
    share = float((sides[:-1] == 1).mean())
    assert 0.0 < share < 1.0
    mixed = (1 - share) * np.asarray(seen.domain_load[0]) + share * np.asarray(seen.domain_load[1])
    assert np.allclose(mixed, seen.expert_load, atol=1e-12)
    assert not np.allclose(seen.domain_load[0], seen.domain_load[1])


def test_what_was_trained_opens_as_a_model(text: Path, tmp_path: Path, backend: str) -> None:
    run = train(tiny(text, steps=2), tmp_path)
    tokens = np.arange(16, dtype=np.int32)[None]
    for path in (run.path, run.path / "checkpoints" / "step-000002", run.path / "checkpoints" / "best", tmp_path / "last"):
        with use_backend(backend):
            model = mm.load(path)
        assert np.array_equal(model(tokens).numpy(), run.model(tokens).numpy())
        assert model.tokenizer.decode(model.tokenizer.encode("a token")) == "a token"
    assert open_model(root=tmp_path).step == 2


# ---- what can be trained -------------------------------------------------------------------------------------------------------


def test_accumulation_is_the_mean_over_micro_batches(text: Path) -> None:
    """Two micro-batches of 4 move the weights as one step does whose gradient is the mean of both."""
    config = tiny(text, dense=True, accumulate=2, dtype="float64", grad_clip=0.0)
    trainer, other = Trainer(config), Trainer(config)
    trainer.do_step()
    pairs = [batch(other.task.corpus.train, 0, 0, micro, 4, 16) for micro in range(2)]
    tokens, targets = (np.concatenate(side) for side in zip(*pairs, strict=True))
    other.model.loss(tokens, targets).total.backward()
    other.optimizer.step(lr=learning_rate(0, config.train))
    for name, array in trainer.model.state_dict().items():
        assert np.allclose(array, other.model.state_dict()[name], rtol=1e-9, atol=1e-12), name


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(("optimizer", "lr"), [("adamw", 1e-2), ("sgd", 0.3), ("lion", 3e-3), ("muon", 1e-2)])
def test_every_optimizer_trains_under_every_schedule(text: Path, tmp_path: Path, optimizer: str, lr: float, schedule: str) -> None:
    rows = train(tiny(text, optimizer=optimizer, schedule=schedule, lr=lr, steps=15), tmp_path).metrics
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.2 and not any(row["skipped"] for row in rows)
    rates = [row["lr"] for row in rows]
    assert rates[:3] == pytest.approx([lr / 2, lr, lr])
    assert (rates[-1] == lr) if schedule == "constant" else (rates[-1] < rates[6] < lr)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lion", "muon"])
@pytest.mark.parametrize("embeddings", [False, True])
def test_matrices_decay_and_norms_never_and_embeddings_if_asked(text: Path, optimizer: str, embeddings: bool) -> None:
    config = tiny(
        text, optimizer=optimizer, weight_decay=0.5, decay_embeddings=embeddings, model={"bias": True, "norm": "layer", "vocab_size": 256}
    )
    model = Transformer(config.model, seed=0, backend=mm.set_backend("numpy"))
    for p in model.parameters():
        p.data += 1.0
    before = {name: array.copy() for name, array in model.state_dict().items()}
    optimizer_ = make_optimizer(model.parameters(), config.train)
    optimizer_.zero_grad()
    optimizer_.step(lr=0.1)
    for name, array in model.state_dict().items():
        decays = embeddings if name == "embed.weight" else not ("norm" in name or "bias" in name)
        assert np.allclose(array, before[name] * (0.95 if decays else 1.0), rtol=1e-5), name


ROUTERS: dict[str, dict[str, Any]] = {
    "softmax_topk": {},
    "softmax_topk_unnormalised": {"router": "softmax_topk", "norm_topk_prob": False, "top_k": 1},
    "topk_softmax": {"router": "topk_softmax"},
    "switch": {"router": "switch", "top_k": 1, "capacity_factor": 1.0},
    "noisy_topk": {"router": "noisy_topk"},
    "sigmoid_bias": {"router": "sigmoid_bias", "n_groups": 2, "top_groups": 1, "route_scale": 2.0},
    "expert_choice": {"router": "expert_choice"},
    "shared": {"n_shared_experts": 2},
    "megablocks": {"aux_convention": "megablocks"},
    "mixtral": {"aux_convention": "mixtral"},
    "every": {"every": 2},
    "layers": {"layers": (1,)},
    "probability": {"capacity_factor": 0.7, "drop_priority": "probability"},
    "jitter_experts": {"jitter": 0.1, "jitter_experts": True},
    "router_bias": {"router_bias": True, "router_bias_std": 0.5},
    "one_expert": {"n_experts": 1, "top_k": 1},
}


@pytest.mark.parametrize("moe", ROUTERS.values(), ids=ROUTERS)
def test_every_router_and_remedy_trains(text: Path, tmp_path: Path, moe: dict[str, Any]) -> None:
    rows = train(tiny(text, model={"n_layers": 2}, moe=moe, steps=3), tmp_path).metrics
    assert rows[-1]["loss"] < rows[0]["loss"] and not any(row["skipped"] for row in rows)
    assert len(rows[0]["expert_load"]) == (1 if "every" in moe or "layers" in moe else 2)


MODELS: dict[str, dict[str, Any]] = {
    "window": {"sliding_window": 5},
    "mixed_windows": {"sliding_window": 5, "layer_types": ("sliding", "full")},
    "learned": {"position": "learned", "norm": "layer", "bias": True, "attention_bias": True, "activation": "gelu"},
    "post_norm": {"norm_position": "post", "position": "none", "activation": "relu"},
    "grouped": {"n_kv_heads": 1, "qk_norm": "head", "head_dim": 4},
    "tied": {"tie_embeddings": True, "qk_norm": "full", "activation": "gelu_tanh"},
    "larger_vocabulary": {"vocab_size": 300},
}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_every_kind_of_model_trains(text: Path, tmp_path: Path, model: dict[str, Any]) -> None:
    rows = train(tiny(text, model={"n_layers": 2, **model}, steps=3), tmp_path).metrics
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_a_dense_model_has_no_load_and_no_router_loss(text: Path, tmp_path: Path) -> None:
    rows = train(tiny(text, dense=True, steps=3), tmp_path).metrics
    assert all(row["expert_load"] == [] and row["router_loss"] == row["aux_loss"] == row["router_entropy"] == 0.0 for row in rows)


def test_float64_agrees_with_float32(text: Path, tmp_path: Path) -> None:
    wide, narrow = (train(tiny(text, steps=5, dtype=dtype), tmp_path) for dtype in ("float64", "float32"))
    assert mm.load(wide.path)(np.zeros((1, 3), np.int32)).data.dtype == np.float64
    assert [row["loss"] for row in wide.metrics] == pytest.approx([row["loss"] for row in narrow.metrics], rel=1e-3)


def test_threads_may_be_limited(text: Path, tmp_path: Path) -> None:
    assert weights_of(train(tiny(text, threads=1, steps=2), tmp_path).path, 2)


@pytest.mark.parametrize(
    ("model", "moe", "words"),
    [
        ({"vocab_size": 100}, {}, "model.vocab_size"),
        ({"max_seq_len": 8}, {}, "train.seq_len"),
        ({}, {"top_k": 1}, "no gradient"),
        ({"causal": False}, {}, "causal"),
        ({"head": "none"}, {}, "there is no task"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_a_folder_is_made(
    text: Path, tmp_path: Path, model: dict[str, Any], moe: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        train(tiny(text, model=model, moe=moe), tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_text_that_is_too_short_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(UserError, match="too short"):
        train(tiny(tmp_path / "short.txt"), tmp_path / "runs")


# ---- non-finite steps ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Callable[[set[int], str], None]:
    """Makes the loss or the gradient of certain training steps, counted from 0, infinite or NaN."""

    def poisoned(steps: set[int], how: str) -> None:
        plain = Transformer.loss

        def loss(self: Transformer, *args: Any, **kwargs: Any) -> LossParts:
            parts, rng = plain(self, *args, **kwargs), kwargs.get("rng")
            if rng is None or int(rng.step) not in steps:
                return parts
            if how == "gradient":
                return with_field(parts, total=parts.total * float("inf"))
            bad = Tensor(parts.cross_entropy.data * np.float32(np.nan), parts.cross_entropy.backend)
            return with_field(parts, cross_entropy=bad)

        monkeypatch.setattr(Transformer, "loss", loss)

    return poisoned


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lion", "muon"])
@pytest.mark.parametrize("how", ["gradient", "loss"])
def test_a_non_finite_step_changes_nothing_and_is_counted(text: Path, poison: Any, how: str, optimizer: str) -> None:
    poison({2}, how)
    trainer = Trainer(tiny(text, moe={"router": "sigmoid_bias"}, optimizer=optimizer))
    with np.errstate(all="ignore"):
        for _ in range(2):
            trainer.do_step()
        states = [{**trainer.model.state_dict(), **trainer.optimizer.state_dict()}]
        states = [{name: np.array(array) for name, array in states[0].items()}]
        trainer.do_step()
        after = {**trainer.model.state_dict(), **trainer.optimizer.state_dict()}
        assert any("balance_bias" in name and array.any() for name, array in after.items())
        assert all(np.array_equal(array, states[0][name]) for name, array in after.items())
        assert int(trainer.one_step.bad_steps) == 1
        trainer.do_step()
    rows = trainer._fetch()
    assert [row["skipped"] for row in rows] == [False, False, True, False]
    assert int(trainer.one_step.bad_steps) == 0 and int(trainer.optimizer.steps) == 3
    assert all(np.isfinite(array).all() for array in trainer.model.state_dict().values())
    assert any(not np.array_equal(array, states[0][name]) for name, array in trainer.model.state_dict().items())


def test_an_overflow_in_the_weights_themselves_is_skipped(text: Path) -> None:
    trainer = Trainer(tiny(text))
    trainer.model.head.weight.data[...] = 1e38  # type: ignore[attr-defined]
    with np.errstate(all="ignore"):
        trainer.do_step()
    assert [row["skipped"] for row in trainer._fetch()] == [True]


@pytest.mark.parametrize("log_every", [1, 4, 100])
def test_ten_bad_steps_in_a_row_end_a_run_and_keep_its_last_good_state(text: Path, tmp_path: Path, poison: Any, log_every: int) -> None:
    poison(set(range(6, 100)), "gradient")
    config = tiny(text, steps=40, checkpoint_every=3, log_every=log_every, keep=50)
    with pytest.raises(Diverged, match=r"train\.lr") as raised:
        train(config, tmp_path)
    assert raised.value.exit_code == 3
    run = Run.open(root=tmp_path)
    assert run.status()["state"] == "diverged" and run.status()["step"] == 16
    rows = run.metrics()
    assert [row["step"] for row in rows] == list(range(1, 17))
    assert [row["skipped"] for row in rows] == [False] * 6 + [True] * 10
    saved = [entry.name for entry in sorted(run.checkpoint_folder.glob("step-*"))]
    assert saved[-1] == "step-000006"
    assert np.isfinite(mm.load(run.path)(np.zeros((1, 4), np.int32)).numpy()).all()


def test_a_step_that_ruins_the_weights_leaves_the_checkpoint_before_it(text: Path, tmp_path: Path) -> None:
    with pytest.raises(Diverged):
        train(tiny(text, steps=40, checkpoint_every=4, lr=1e30, warmup_steps=0), tmp_path)
    assert np.isfinite(mm.load(Run.open(root=tmp_path).path)(np.zeros((1, 4), np.int32)).numpy()).all()


# ---- weights that are not finite -----------------------------------------------------------------------------------------------


def checkpoints_of(run: Run) -> list[str]:
    """Return the names of a run's checkpoints, each of which must be whole and finite."""
    found = sorted(run.checkpoint_folder.glob("step-*"))
    for folder in found:
        saved = load_checkpoint(folder)
        assert all(np.isfinite(array).all() for array in (*saved.model.values(), *saved.optimizer.values())), folder
    return [folder.name for folder in found]


@pytest.mark.parametrize(("every", "steps"), [(1, 5), (1, 40), (0, 5)])
def test_weights_that_an_update_ruined_are_never_saved_as_good(text: Path, tmp_path: Path, every: int, steps: int) -> None:
    """With eps = 0 the first update divides 0 by 0 wherever a gradient is 0."""
    config = tiny(text, steps=steps, eps=0.0, checkpoint_every=every, eval_every=1, log_every=1)
    with pytest.raises(Diverged, match=r"is not finite after step \d.*the last good state is kept in .*step-000000") as raised:
        train(config, tmp_path)
    run = Run.open(root=tmp_path)
    assert raised.value.exit_code == 3 and run.status()["state"] == "diverged"
    assert checkpoints_of(run) == ["step-000000"]
    best = run.checkpoint_folder / "best"
    assert not best.exists()


def test_moments_that_are_not_finite_are_not_saved_either(text: Path, tmp_path: Path) -> None:
    class Overflows(Listener):
        def started(self, trainer: Any) -> None:
            self.trainer = trainer

        def stepped(self, step: int) -> None:
            if step == 4:
                moment = next(array for array in self.trainer.optimizer.state_dict().values() if array.dtype == np.float32)
                moment.reshape(-1)[0] = np.inf

    with pytest.raises(Diverged, match=r"after step 6; the last good state is kept in .*step-000003"):
        train(tiny(text, steps=9, checkpoint_every=3, keep=1), tmp_path, listener=Overflows())
    assert checkpoints_of(Run.open(root=tmp_path)) == ["step-000003"]


def test_an_interrupt_does_not_save_weights_that_are_not_finite(text: Path, tmp_path: Path) -> None:
    class Interrupts(Listener):
        def stepped(self, step: int) -> None:
            if step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match=r"not finite after step 2 .*the last good state is kept in .*step-000000") as raised:
        train(tiny(text, steps=9, eps=0.0), tmp_path, listener=Interrupts())
    run = Run.open(root=tmp_path)
    assert raised.value.exit_code == 143 and run.status()["state"] == "interrupted"
    assert checkpoints_of(run) == ["step-000000"]


def test_a_run_that_ends_without_a_finite_loss_has_diverged_and_keeps_the_state_before(text: Path, tmp_path: Path) -> None:
    """The first update makes the weights huge but finite, the steps after it are skipped, and the validation overflows."""
    with pytest.raises(Diverged, match=r"validation loss is not finite .*step-000000: try a lower train\.lr") as raised:
        train(tiny(text, steps=5, lr=1e30, warmup_steps=0, keep=1), tmp_path)
    run = Run.open(root=tmp_path)
    assert raised.value.exit_code == 3 and run.status()["state"] == "diverged" and checkpoints_of(run) == ["step-000000"]
    assert run.metrics()[-1]["val_loss"] is None
    assert np.isfinite(mm.load(run.path)(np.zeros((1, 4), np.int32)).numpy()).all()


def test_a_state_saved_while_steps_are_skipped_replaces_no_good_one(text: Path, tmp_path: Path, poison: Any) -> None:
    """An interrupt among bad steps saves the state, for it may be good; if the run then diverges, the state before is the last good one."""

    class Interrupts(Listener):
        def stepped(self, step: int) -> None:
            if step == 8:
                os.kill(os.getpid(), signal.SIGTERM)

    poison(set(range(6, 100)), "loss")
    config = tiny(text, steps=40, checkpoint_every=3, keep=1)
    with pytest.raises(Interrupted):
        train(config, tmp_path, listener=Interrupts())
    run = Run.open(root=tmp_path)
    assert checkpoints_of(run) == ["step-000006", "step-000008"]
    with pytest.raises(Diverged, match=r"up to step 16; the last good state is kept in .*step-000006"):
        mm.resume(run.path)
    assert checkpoints_of(run) == ["step-000006"]


def test_a_good_last_step_after_bad_ones_is_the_result(text: Path, tmp_path: Path, poison: Any) -> None:
    poison({3, 4}, "loss")
    run = train(tiny(text, steps=5, keep=1), tmp_path)
    assert run.run.status()["state"] == "finished" and math.isfinite(run.val_loss) and checkpoints_of(run.run) == ["step-000005"]


# ---- which evaluation is the best ----------------------------------------------------------------------------------------------


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[float], float], None]:
    """Sets what evaluations measure: on the sampled batches, one after the other, and on the whole split."""

    def given(sampled: list[float], whole: float) -> None:
        left = iter(sampled)

        def measure(self: Any, model: Any, n: int | None = None, **_: Any) -> Evaluation:
            return Evaluation(next(left) if n == 1 else whole, 64, [])

        monkeypatch.setattr("minimoe.training.tasks.language.LanguageModelling.measure", measure)

    return given


@pytest.mark.parametrize(
    ("sampled", "whole", "best"),
    [([3.0, 2.5, 2.0], 4.0, 6), ([3.0, 2.5, 2.7], 1.0, 4), ([2.0, 2.5, 2.0], 1.0, 2), ([3.0, math.nan, 2.0], 4.0, 6)],
)
def test_the_best_step_is_found_by_one_and_the_same_measure(
    text: Path, tmp_path: Path, losses: Any, sampled: list[float], whole: float, best: int
) -> None:
    """The whole split is harder or easier than the sampled batches; neither makes the last step better or worse."""
    losses(sampled, whole)
    run = train(tiny(text, steps=6, eval_every=2, eval_batches=1), tmp_path)
    assert (run.path / "checkpoints" / "best").read_text() == f"step-{best:06d}\n"
    assert run.val_loss == whole and run.metrics[-1]["val_loss_sampled"] == sampled[-1]
    state = load_checkpoint(run.path / "checkpoints" / "step-000006").state
    assert (state["best"], state["best_step"]) == (min(loss for loss in sampled if loss == loss), best)
    (row,) = list_runs(tmp_path)
    assert (row["val_loss"], row["best_val_loss"]) == (whole, state["best"])


def test_where_the_sampled_batches_are_the_whole_split_it_is_measured_once(text: Path, tmp_path: Path) -> None:
    run = train(tiny(text, steps=4, eval_every=2, eval_batches=50), tmp_path)
    assert "val_loss_sampled" not in run.metrics[-1] and "val_batches" not in run.metrics[-1]


def test_the_last_evaluation_can_be_capped(text: Path, tmp_path: Path) -> None:
    run = train(tiny(text, steps=4, eval_batches=1, final_eval_batches=2), tmp_path)
    some, one = (evaluate(run.model, sample_windows(run.corpus.val, 16, 4, n)) for n in (2, 1))
    last = run.metrics[-1]
    assert some.tokens == 128 and run.val_loss == pytest.approx(some.loss, rel=1e-6)
    assert last["val_loss_sampled"] == pytest.approx(one.loss, rel=1e-6)
    assert last["val_batches"] == [2, run.task.held_out_batches] and run.task.held_out_batches > 2


def test_nine_bad_steps_in_a_row_do_not_end_a_run(text: Path, tmp_path: Path, poison: Any) -> None:
    poison(set(range(2, 11)) | {12}, "loss")
    run = train(tiny(text, steps=20), tmp_path)
    assert [row["step"] for row in run.metrics if row["skipped"]] == [*range(3, 12), 13]
    assert run.metrics[2]["loss"] is None
    assert run.metrics[-1]["loss"] < run.metrics[0]["loss"] - 0.3 and run.run.status()["state"] == "finished"


@pytest.mark.parametrize("place", ["minimoe.training.trainer.PretrainedTransformer", "minimoe.training.tasks.language.inputs_and_targets"])
def test_a_device_whose_memory_does_not_do_is_one_line_with_what_needs_less(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    class Full(NumpyBackend):
        def out_of_memory(self, error: BaseException) -> tuple[int, int] | None:
            return (3_000_000_000, 500_000_000) if isinstance(error, MemoryError) else None

    def refuse(*args: Any, **options: Any) -> None:
        raise MemoryError("the pool is empty")

    monkeypatch.setattr("minimoe.training.trainer.load", lambda name: Full())
    monkeypatch.setattr(place, refuse)
    words = r"out of memory: 3,000 MB asked for, 500 MB free; .* train.batch_size .* train.recompute = true, .* train.dtype = .bfloat16"
    with pytest.raises(UserError, match=words):
        train(tiny(text), tmp_path)
