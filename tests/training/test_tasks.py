"""The tasks beside language modelling: what a micro-batch is, what is measured, what a run shows, and that it is repeatable to the bit."""

import json
import math
import re
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import made_tokenizers
import numpy as np
import pytest
from command_line import call, one_line, sets
from msgspec.structs import replace
from tiny_runs import BACKEND, tiny, train, untimed, weights_of, with_train, write_text

import minimoe as mm
from minimoe.config import Config, DataConfig, load_config
from minimoe.data.batches import IGNORE
from minimoe.data.tokenizer import HuggingFaceTokenizer
from minimoe.errors import CheckpointError, ConfigError, UserError
from minimoe.hints import install
from minimoe.pretrained.loading import open_model
from minimoe.study import bench
from minimoe.study.compare import compare
from minimoe.training.evaluation import evaluate
from minimoe.training.listener import Listener
from minimoe.training.tasks import ImageClassification, MaskedLanguageModelling, Task, load_task
from minimoe.training.tasks.digits import load_digits, shifted
from minimoe.training.tasks.masked import hide
from minimoe.training.trainer import Trainer

MASKED = {"causal": False, "head": "mlm"}
IMAGES = {
    "causal": False, "head": "classifier", "image_size": 8, "patch_size": 2, "n_channels": 1, "n_classes": 10, "norm": "layer",
    "bias": True, "position": "learned", "activation": "gelu", "init_std": 0.15,
}  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"), lines=400)


def masked(text: Path, **keys: Any) -> Config:
    return tiny(text, model={**MASKED, **keys.pop("model", {})}, **keys)


def images(**keys: Any) -> Config:
    config = tiny("digits", model={**IMAGES, **keys.pop("model", {})}, **keys)
    return replace(config, data=DataConfig(source="digits", val_fraction=0.2))


def config_of(kind: str, text: Path, **keys: Any) -> Config:
    return images(**keys) if kind == "images" else masked(text, **keys)


KINDS = ["masked", "images"]


# ---- masked language modelling: what is hidden ---------------------------------------------------------------------------------


def test_of_100_tokens_15_are_targets_of_which_12_are_masked_and_one_and_a_half_are_random_and_as_many_stay() -> None:
    n = 100_000
    tokens = np.full(n, 7, np.int32)
    words = np.random.default_rng(0).integers(0, 2**32, (n, 2))
    seen, targets = hide(tokens, words, 256, 256)
    shares = {
        "target": np.mean(targets != IGNORE), "mask": np.mean(seen == 256), "stays": np.mean((seen == 7) & (targets == 7)),
        "random": np.mean((seen != 7) & (seen != 256)),
    }  # fmt: skip
    assert shares == pytest.approx({"target": 0.15, "mask": 0.12, "stays": 0.015, "random": 0.015}, abs=0.003)
    assert (targets[targets != IGNORE] == 7).all() and (seen[targets == IGNORE] == 7).all()
    others = seen[(seen != 7) & (seen != 256)]
    assert others.min() < 10 and 245 < others.max() < 256 and len(np.unique(others)) > 200


@pytest.mark.parametrize("word, expected", [(0, 99), (int(0.1199 * 2**32), 99), (int(0.1201 * 2**32), 25), (int(0.1351 * 2**32), 3)])
def test_one_word_says_how_a_token_is_hidden_and_the_other_which_random_token_takes_its_place(word: int, expected: int) -> None:
    seen, targets = hide(np.array([3], np.int32), np.array([[word, 2**31]]), 50, 99)
    assert (seen.tolist(), targets.tolist()) == ([expected], [3])
    seen, targets = hide(np.array([3], np.int32), np.array([[int(0.1501 * 2**32), 2**31]]), 50, 99)
    assert (seen.tolist(), targets.tolist()) == ([3], [IGNORE])


def test_a_byte_tokenizer_gets_a_mask_token_after_its_last_and_the_model_one_more_id(text: Path) -> None:
    task = load_task(masked(text))
    assert isinstance(task, MaskedLanguageModelling)
    assert (task.mask_id, task.config.model.vocab_size) == (256, 257)
    chars = load_task(replace(masked(text), data=DataConfig(source=str(text), tokenizer="char")))
    assert chars.config.model.vocab_size == len(set(text.read_text())) + 1
    with pytest.raises(ConfigError, match=r"\(256\) is smaller than the tokenizer's vocabulary with its mask token \(257\)"):
        load_task(masked(text, model={"vocab_size": 256}))


@pytest.mark.parametrize("mask", ["[MASK]", "<mask>"])
def test_a_tokenizer_with_a_mask_token_keeps_its_own(text: Path, tmp_path: Path, mask: str) -> None:
    words = sorted(set(text.read_text().split()))
    vocab = {word: i for i, word in enumerate(["[UNK]", mask, *words])}
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": "[UNK]"}
    table = {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "WhitespaceSplit"}, "model": model}
    (tmp_path / "tokenizer.json").write_text(json.dumps(table))
    task = load_task(replace(masked(text), data=DataConfig(source=str(text), tokenizer=str(tmp_path / "tokenizer.json"))))
    assert isinstance(task, MaskedLanguageModelling) and isinstance(task.tokenizer, HuggingFaceTokenizer)
    assert (task.mask_id, task.config.model.vocab_size) == (1, len(vocab))
    assert 1 in task.batch(0, 0)[0]
    shown = "".join(task.show(mm.Transformer(task.config.model)))
    assert any(word in shown for word in words) and "^" in shown


@pytest.mark.parametrize("kind", made_tokenizers.KINDS)
def test_words_stay_apart_where_blanks_are_shown(tmp_path: Path, kind: str) -> None:
    """Decoders leave out the space before a token that stands alone."""
    path, text = made_tokenizers.write(kind, tmp_path), tmp_path / "text.txt"
    text.write_text(f"{made_tokenizers.PLAIN}\n" * 20)
    task = load_task(replace(masked(text), data=DataConfig(source=str(text), tokenizer=str(path))))
    assert isinstance(task, MaskedLanguageModelling)
    tokens = task.tokenizer.encode("the router sends every token")
    ends = [len(task.tokenizer.decode(tokens[:i])) for i in range(len(tokens) + 1)]
    words = np.array([end - start > 1 for start, end in pairwise(ends)])  # all but spaces and letters of their own
    whole, hidden = "the router sends every token", np.array([*"the router sends every token"])
    for start, end in pairwise(ends):
        if end - start > 1:
            hidden[start:end][hidden[start:end] != " "] = "_"
    assert task._lines(tokens, tokens, np.zeros(len(tokens), bool)).splitlines() == [f"  {whole}"] * 2
    assert task._lines(tokens, tokens, words).splitlines() == [f"  {''.join(hidden)}", f"  {whole}"]


def test_held_out_blanks_are_the_same_for_every_seed_and_at_every_length_of_window(text: Path) -> None:
    hidden = []
    for keys in ({}, {"seed": 5}, {"seq_len": 8, "batch_size": 3}):
        task = load_task(masked(text, **keys))
        batches = [[part.reshape(-1) for part in batch] for batch in task.held_out()]
        seen, targets, valid = (np.concatenate(part) for part in zip(*batches, strict=True))
        hidden.append((seen[valid == 1], targets[valid == 1]))
        assert (targets[valid == 0] == IGNORE).all() and (valid == 1).sum() == len(task.corpus.val)  # type: ignore[union-attr]
    for seen, targets in hidden[1:]:
        assert np.array_equal(seen, hidden[0][0]) and np.array_equal(targets, hidden[0][1])


def test_evaluations_in_between_hide_the_very_tokens_that_the_last_one_hides(text: Path) -> None:
    task = load_task(masked(text, eval_batches=1, seq_len=16, batch_size=2))
    val = task.corpus.val  # type: ignore[union-attr]
    (seen, targets, valid), *rest = task.held_out(1)
    assert not list(rest) and valid.all() and (targets != IGNORE).any()
    whole = next(iter(task.held_out()))
    assert np.array_equal(seen[0], whole[0][0]) and np.array_equal(targets[0], whole[1][0])  # both begin where the split begins
    true = np.where(targets == IGNORE, seen, targets)
    assert np.array_equal(true[0], val[:16]) and np.array_equal(true[1], val[len(val) - 16 :])


def test_masked_accuracy_and_loss_are_those_of_the_logits(text: Path, tmp_path: Path) -> None:
    run = train(masked(text, steps=20), tmp_path)
    total, right, count = 0.0, 0, 0
    for seen, targets, valid in run.task.held_out():
        z = run.model(seen, attention_mask=valid).numpy().astype(np.float64)
        log_p = z - np.log(np.exp(z).sum(axis=-1, keepdims=True))
        for b, t in np.argwhere(targets != IGNORE):
            total, right, count = total - log_p[b, t, targets[b, t]], right + (z[b, t].argmax() == targets[b, t]), count + 1
    assert run.val_loss == pytest.approx(total / count, rel=1e-4) and run.val_accuracy == pytest.approx(right / count)
    assert run.task.measure(run.model).tokens == count


def test_a_masked_language_model_learns_more_than_the_most_common_byte(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKEND, "name", "numba")
    run = train(masked(text, model={"init_std": 0.1}, dense=True, steps=200, batch_size=16), tmp_path)
    assert run.val_accuracy is not None and run.task.chance is not None
    assert run.task.chance < 0.3 and run.val_accuracy > run.task.chance + 0.1


def test_the_baseline_is_the_share_of_the_most_common_hidden_token(text: Path) -> None:
    task = load_task(masked(text))
    targets = np.concatenate([batch[1].reshape(-1) for batch in task.held_out()])
    hidden = targets[targets != IGNORE].tolist()
    assert task.chance == pytest.approx(max(hidden.count(token) for token in set(hidden)) / len(hidden))


def test_the_end_of_a_masked_run_shows_blanks_what_fills_them_and_what_is_wrong(text: Path) -> None:
    task = load_task(masked(text))
    head, *examples = "".join(task.show(mm.Transformer(task.config.model, seed=0))).split("\n\n")
    assert head.startswith("Blanks in held-out text, and how they are filled (^: wrong); ") and len(examples) == 3
    for example in examples:
        blanks, filled, marks = [*example.split("\n"), ""][:3]
        filled = filled.ljust(len(blanks))
        for place, char in enumerate(blanks):
            if char != "_":
                assert filled[place] == char
        assert all(blanks[place] == "_" for place, mark in enumerate(marks) if mark == "^")
    assert any("^" in example for example in examples)


# ---- images ------------------------------------------------------------------------------------------------------------------


def test_the_digits_are_1797_images_of_which_a_fifth_is_held_out_whatever_the_seed() -> None:
    data = load_digits(0.2)
    assert data.train.shape == (1437, 1, 8, 8) and data.val.shape == (360, 1, 8, 8)
    assert (data.train.min(), data.train.max()) == (0.0, 1.0) and data.train.dtype == np.float32
    assert np.bincount(data.train_classes, minlength=10).min() > 100 and np.bincount(data.val_classes, minlength=10).min() > 20
    one, other = (load_task(images(seed=seed)) for seed in (0, 1))
    assert isinstance(one, ImageClassification) and isinstance(other, ImageClassification)
    assert np.array_equal(one.val, other.val) and one.sha256 == other.sha256 and len(one.sha256) == 64


def test_no_held_out_image_is_drawn_in_training() -> None:
    data = load_digits(0.2)
    held_out = {image.tobytes() for image in data.val} - {image.tobytes() for image in data.train}
    task = load_task(images(batch_size=512))
    drawn = np.concatenate([task.batch(step, 0)[0] for step in range(8)])
    assert held_out.isdisjoint(image.tobytes() for image in drawn)


def test_a_shift_moves_the_image_sideways_by_a_pixel_at_most() -> None:
    image = np.arange(64, dtype=np.float32).reshape(1, 1, 8, 8)
    left, stays, right = (shifted(image, np.array([word]))[0, 0] for word in (2**32 - 1, 2**31, 0))
    assert np.array_equal(stays, image[0, 0])
    assert np.array_equal(right[:, 1:], image[0, 0, :, :-1]) and (right[:, 0] == 0).all()
    assert np.array_equal(left[:, :-1], image[0, 0, :, 1:]) and (left[:, -1] == 0).all()


def test_every_image_and_every_shift_comes_up_in_training() -> None:
    task = load_task(images(batch_size=1437))
    assert isinstance(task, ImageClassification)
    seen = {image.tobytes() for step in range(20) for image in task.batch(step, 0)[0]}
    for image in task.data.train[:50]:
        assert all(shifted(image[None], np.array([word])).tobytes() in seen for word in (0, 2**31, 2**32 - 1))


def test_accuracy_and_loss_of_images_are_those_of_the_logits(tmp_path: Path) -> None:
    run = train(images(steps=5, batch_size=32), tmp_path)
    task = run.task
    assert isinstance(task, ImageClassification)
    z = run.model(task.val).numpy().astype(np.float64)
    log_p = z - np.log(np.exp(z).sum(axis=-1, keepdims=True))
    assert run.val_loss == pytest.approx(-log_p[np.arange(360), task.val_classes].mean(), rel=1e-4)
    assert run.val_accuracy == pytest.approx((z.argmax(axis=-1) == task.val_classes).mean())
    assert task.chance == np.bincount(task.val_classes).max() / 360


def test_a_short_training_tells_nine_digits_in_ten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config("vit-tiny", ["model.n_layers=2", "train.backend=numba", "train.checkpoint_every=0", "train.log_every=50"])
    run = train(with_train(config, steps=250, eval_every=0, lr=2e-3), tmp_path)
    assert run.val_accuracy is not None and run.val_accuracy > 0.9


def test_the_length_of_an_images_sequence_is_what_its_patches_make_it(tmp_path: Path) -> None:
    run = train(images(steps=2, seq_len=999, accumulate=2), tmp_path)
    assert run.config.train.seq_len == 17
    row = run.metrics[0]
    assert row["tokens_per_s"] == pytest.approx(2 * 4 * 17 / (row["step_ms"] / 1e3))
    assert row["expert_load"] and sum(row["expert_load"][0]) == pytest.approx(1.0)


def test_the_end_of_an_image_run_shows_digits_and_what_they_are_taken_for() -> None:
    task = load_task(images())
    shown = "".join(task.show(mm.Transformer(task.config.model, seed=0)))
    assert shown.startswith("Held-out digits, ") and "of 360 taken for another" in shown
    assert shown.count("taken for") == 5 and "█" in shown  # the headline, and four images
    assert max(map(len, shown.splitlines())) <= 80


# ---- all tasks: a pure function of (seed, step, micro-batch) ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_micro_batch_is_a_function_of_seed_step_and_micro(kind: str, text: Path) -> None:
    def batch(task: Task, step: int, micro: int) -> bytes:
        inputs, targets = task.batch(step, micro)
        assert targets.dtype == np.int32 and inputs.shape[0] == targets.shape[0] == 4
        return inputs.tobytes() + targets.tobytes()

    task, again, other = (load_task(config_of(kind, text, seed=seed)) for seed in (3, 3, 4))
    late, first = batch(task, 7, 1), batch(task, 0, 0)
    assert (batch(again, 0, 0), batch(again, 7, 1)) == (first, late)
    assert len({first, late, batch(task, 0, 1), batch(task, 7, 0), batch(other, 0, 0)}) == 5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_equal_seeds_give_equal_bytes_and_a_run_that_was_stopped_ends_with_them_too(
    kind: str, backend: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BACKEND, "name", backend)
    config = config_of(kind, text, model={"dropout": 0.1}, steps=8, eval_every=4, accumulate=2, schedule="constant")
    whole, again, part = (train(with_train(config, steps=steps), tmp_path) for steps in (8, 8, 4))
    resumed = mm.resume(part.path, steps=8)
    assert weights_of(whole.path, 8) == weights_of(again.path, 8) == weights_of(resumed.path, 8)
    assert untimed(whole.metrics) == untimed(again.metrics) and untimed(resumed.metrics)[4:] == untimed(whole.metrics)[4:]
    other = train(with_train(config, seed=1), tmp_path)
    assert weights_of(other.path, 8) != weights_of(whole.path, 8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("router", ["softmax_topk", "expert_choice", None])
def test_numba_and_numpy_agree_and_numba_plays_the_step_from_a_tape(
    kind: str, router: str | None, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    class Hears(Listener):
        def said(self, text: str) -> None:
            said.append(text)

    losses = []
    for backend in ("numpy", "numba"):
        monkeypatch.setitem(BACKEND, "name", backend)
        keys: dict[str, Any] = {"dense": True} if router is None else {"moe": {"router": router}}
        run = train(config_of(kind, text, steps=6, log_every=1, **keys), tmp_path, listener=Hears())
        losses.append([row["loss"] for row in run.metrics] + [run.val_loss])
    assert np.allclose(losses[0], losses[1], rtol=0, atol=1e-3)
    assert not [text for text in said if "recording" in text or "warning" in text]  # nor does an encoder's expert choice see a future


@pytest.mark.parametrize("kind", KINDS)
def test_every_evaluation_has_a_val_accuracy_and_no_other_line_has(kind: str, text: Path, tmp_path: Path) -> None:
    run = train(config_of(kind, text, steps=7, eval_every=3), tmp_path)
    for row in run.metrics:
        assert ("val_loss" in row) == ("val_accuracy" in row) == (row["step"] in (3, 6, 7))
        assert 0.0 <= row.get("val_accuracy", 0.0) <= 1.0
    assert run.val_accuracy == run.metrics[-1]["val_accuracy"]


def test_a_language_model_has_no_accuracy(text: Path, tmp_path: Path) -> None:
    run = train(tiny(text, steps=1), tmp_path)
    assert run.val_accuracy is None and "val_accuracy" not in run.metrics[-1] and run.task.chance is None


def test_an_evaluation_of_no_target_is_no_number(text: Path) -> None:
    task = load_task(masked(text))
    nothing = np.zeros((1, 16), np.int32), np.full((1, 16), IGNORE, np.int32), np.ones((1, 16), np.int32)
    found = evaluate(mm.Transformer(task.config.model), [nothing])
    assert math.isnan(found.loss) and (found.tokens, found.accuracy) == (0, None)


def test_the_load_of_a_masked_model_is_told_apart_by_domain_over_all_tokens_that_are_no_padding() -> None:
    config = replace(masked(Path("python-mix"), batch_size=64), data=DataConfig(source="python-mix", val_fraction=0.005))
    task = load_task(config)
    found = task.measure(mm.Transformer(task.config.model), by_domain=True)
    assert found.domain_load is not None and len(found.domain_load) == 2
    sides = task.corpus.val_domains  # type: ignore[union-attr]
    shares = np.bincount(sides, minlength=2) / len(sides)  # type: ignore[arg-type]
    mixed = sum(share * np.array(load[0]) for share, load in zip(shares, found.domain_load, strict=True))
    assert np.allclose(mixed, found.expert_load[0], atol=1e-3)


# ---- what does not fit -----------------------------------------------------------------------------------------------------------


def test_data_of_another_kind_are_refused_in_one_line(text: Path) -> None:
    for config, words in (
        (replace(tiny(text), data=DataConfig(source="digits")), "data.source = 'digits' is images, 'tiny' reads text: give python-docs,"),
        (replace(masked(text), data=DataConfig(source="digits")), "a folder of that name as ./digits"),
        (replace(images(), data=DataConfig(source=str(text))), "'tiny' classifies images: give digits (--data digits), or a folder"),
        (images(model={"image_size": 4, "n_classes": 5}), "needs model.image_size = 8 (not 4), model.n_classes = 10 (not 5)"),
        (replace(images(), data=DataConfig(source="digits", val_fraction=0.9999)), "leaves no image to train on"),
    ):
        with pytest.raises(UserError) as caught:
            Trainer(config)
        assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_text_of_which_nothing_held_out_is_hidden_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("ab" * 20)
    with pytest.raises(UserError, match="too short: none of its 4 held-out tokens is hidden"):
        load_task(masked(tmp_path / "short.txt", seq_len=2))


def test_a_text_to_measure_on_needs_two_tokens(text: Path, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("x")
    with pytest.raises(UserError, match=r"one\.txt: too short: an evaluation needs two tokens or more"):
        load_task(tiny(text), all_of=str(tmp_path / "one.txt"))


def test_without_scikit_learn_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UserError, match=re.escape(install("digits"))):
        Trainer(images())


def test_an_image_run_has_no_text(tmp_path: Path) -> None:
    run = train(images(steps=1), tmp_path)
    with pytest.raises(UserError, match="trained on digits, which is not text"):
        _ = run.corpus
    assert not list(run.path.glob("checkpoints/*/tokenizer.json")) and open_model(run.path).tokenizer is None


def test_a_resumed_run_must_find_the_same_data(text: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.txt"
    own.write_text(text.read_text())
    run = train(masked(own, steps=2), tmp_path)
    own.write_text(text.read_text() + "more\n")
    with pytest.raises(CheckpointError, match="have changed since the run began"):
        mm.resume(run.path, steps=4)


# ---- the command line --------------------------------------------------------------------------------------------------------------

SMALL = sets("model.d_model=16", "model.n_layers=1", "model.n_heads=2", "model.d_hidden=16", "train.backend=numpy", "train.log_every=2",
             "train.batch_size=8", "train.warmup_steps=2")  # fmt: skip


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("user")
    write_text(folder, lines=400)
    return folder


@pytest.mark.parametrize("preset", ["bert-tiny", "bert-tiny-moe", "vit-tiny", "vit-tiny-moe"])
def test_every_command_takes_such_a_run(
    preset: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(here)
    vit, moe = preset.startswith("vit"), preset.endswith("moe")
    options = [*SMALL, *sets("moe.n_experts=4", "moe.d_hidden=16")] if moe else SMALL
    data = [] if vit else ["--data", "text.txt"]
    code, out, err = call(capsys, "train", preset, *options, *data, "--steps", "4", "--dry-run")
    assert (code, err) == (0, "") and "times the training data" in out and not (here / "runs" / f"{preset}-001").exists()
    code, out, err = call(capsys, "train", preset, *options, *data, "--steps", "4")
    assert code == 0 and f"run: runs/{preset}-001   validation loss " in out and "accuracy " in out and "(guessing the most common" in out
    assert ("Held-out digits" if vit else "Blanks in held-out text") in out and f"next: minimoe eval runs/{preset}-001" in out
    assert ("1,437 + 360 images; 4 steps of 8 images (136 tokens)" if vit else "4 steps of 512 tokens") in err
    assert " val " in err.splitlines()[-1] and "  accuracy " in err.splitlines()[-1] and ("expert load" in err) == moe
    code, out, err = call(capsys, "resume", f"{preset}-001", "--steps", "6")
    assert code == 0 and "continuing at step 4" in err
    result = json.loads(call(capsys, "eval", f"{preset}-001", "--json")[1])
    rows = [json.loads(line) for line in (here / "runs" / f"{preset}-001" / "metrics.jsonl").read_text().splitlines()]
    assert result["loss"] == pytest.approx(rows[-1]["val_loss"], rel=1e-5) and result["accuracy"] == pytest.approx(rows[-1]["val_accuracy"])
    assert 0.0 < result["baseline_accuracy"] < 1.0 and ("perplexity" in result) == (not vit) and ("images" in result) == vit
    summary = call(capsys, "eval", f"{preset}-001")[1]
    assert ("nats per image, accuracy " if vit else "nats per masked token, perplexity ") in summary and summary.count("\n") == 1
    whole = json.loads(call(capsys, "eval", f"{preset}-001", "--data", "digits" if vit else "text.txt", "--json")[1])
    assert whole["split"] == "all of it" and (whole["images"] == 1797 if vit else whole["tokens"] > 1000)
    report = json.loads(call(capsys, "inspect", f"{preset}-001", "--json")[1])
    assert report["seq_len"] == (17 if vit else 64) and report["run"]["val_accuracy"] == rows[-1]["val_accuracy"]
    assert f"accuracy {rows[-1]['val_accuracy']:.1%}" in call(capsys, "inspect", f"{preset}-001")[1]
    row = next(row for row in json.loads(call(capsys, "runs", "--json")[1]) if row["name"] == f"{preset}-001")
    assert row["val_accuracy"] == rows[-1]["val_accuracy"] and f"{row['val_accuracy']:.1%}" in call(capsys, "runs")[1]


def test_such_a_run_writes_no_text_and_reads_no_other_data(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(here)
    for preset, data, other in (("bert-tiny", ["--data", "text.txt"], "digits"), ("vit-tiny", [], "text.txt")):
        name = f"silent-{preset}"
        assert call(capsys, "train", preset, *SMALL, *data, "--steps", "1", "--quiet", "--out", name) == (0, f"{name}\n", "")
        for options in ([], ["--prompt", "The "]):
            code, out, err = call(capsys, "generate", name, *options)
            assert (code, out) == (2, "") and "generation needs a causal language model" in one_line(err)
        code, out, err = call(capsys, "eval", name, "--data", other)
        assert (code, out) == (2, "") and "images" in one_line(err)


def test_inspect_counts_the_mask_token_and_takes_overrides(capsys: pytest.CaptureFixture[str]) -> None:
    report = json.loads(call(capsys, "inspect", "bert-tiny", "--json")[1])
    embedding = next(part for part in report["parts"] if part["name"] == "embedding")
    assert embedding["parameters"] == 257 * 128
    assert json.loads(call(capsys, "inspect", "vit-tiny", "--json", *sets("model.patch_size=4"))[1])["seq_len"] == 5


def test_dense_and_routed_classifiers_are_compared_with_their_accuracies(tmp_path: Path) -> None:
    keys = [key for key in SMALL if key != "--set"]
    comparison = compare(["vit-tiny", "vit-tiny-moe"], overrides=keys, steps=2, seeds=2, root=tmp_path)
    cells = comparison.cells()
    assert all(cell.endswith("%") for cell in cells["validation accuracy"]) and cells["tokens"] == ("272", "272")
    assert "validation accuracy" in comparison.markdown() and comparison.to_dict()["rows"][0]["val_accuracy"]["mean"] <= 1.0
    assert not any("differ:" in note for note in comparison.notes)


def test_models_of_different_tasks_are_compared_with_a_warning(text: Path, tmp_path: Path) -> None:
    for name, config in (("causal", tiny(text, steps=2)), ("masked", masked(text, steps=2))):
        train(replace(config, name=name), tmp_path)
    comparison = compare(["causal-001", "masked-001"], root=tmp_path)
    assert "The data, tokenizers, tasks or targets differ: losses do not compare." in comparison.notes
    assert comparison.cells()["validation accuracy"][0] == "-"


@pytest.mark.parametrize("preset", ["bert-tiny", "vit-tiny-moe"])
def test_a_step_of_every_task_can_be_timed(preset: str) -> None:
    config = load_config(preset, ["train.batch_size=2", "model.n_layers=1", "train.accumulate=2"])
    profile = bench.profile_step(config, "numpy", steps=1, warmup=0)
    assert profile.tokens == 2 * 2 * (17 if "vit" in preset else 64) and profile.flops > 0
