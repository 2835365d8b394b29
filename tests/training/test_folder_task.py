"""Image classification on a folder: its configuration, its batches, resuming, and what `train`, `eval` and `classify` make of it."""

import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import call, one_line, sets
from made_images import COLOURS, picture, write_pets
from msgspec.structs import replace
from tiny_runs import tiny, untimed, weights_of

import minimoe as mm
from minimoe.config import Config, load_config
from minimoe.data import image_store
from minimoe.errors import ConfigError, UserError
from minimoe.pretrained.loading import open_model
from minimoe.training.listener import Listener
from minimoe.training.tasks import FolderClassification, load_task
from minimoe.training.tasks.folder import moved, scaled
from minimoe.training.trainer import Trainer

SHAPE = {
    "causal": False, "head": "classifier", "image_size": 8, "patch_size": 4, "n_channels": 3, "n_classes": 10, "norm": "layer",
    "bias": True, "position": "learned", "activation": "gelu", "init_std": 0.15,
}  # fmt: skip
SMALL = sets(
    "model.d_model=16", "model.n_layers=1", "model.n_heads=2", "model.d_hidden=16", "model.image_size=8", "train.backend=numpy",
    "train.log_every=2", "train.batch_size=8", "train.warmup_steps=2", "train.lr=3e-3",
)  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIMOE_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    return write_pets(tmp_path)


def config_of(folder: Path, **keys: Any) -> Config:
    config = tiny(folder, model={**SHAPE, **keys.pop("model", {})}, dense=True, **keys)
    return replace(config, data=replace(config.data, val_fraction=0.2))


def task_of(folder: Path, **keys: Any) -> FolderClassification:
    task = load_task(config_of(folder, **keys))
    assert isinstance(task, FolderClassification)
    return task


# ---- the task --------------------------------------------------------------------------------------------------------------------------


def test_the_classes_come_from_the_folders_and_are_said_and_recorded(pets: Path) -> None:
    task = task_of(pets)
    assert task.config.data.classes == ("cat", "dog", "owl") and task.config.model.n_classes == 3
    assert task.config.train.seq_len == 5 and task.size() == "24 + 6 images"
    assert task.read()[0] == f"{pets}: 30 images of 3 classes: cat 10, dog 10, owl 10"
    assert task.read()[-1] == f"model.n_classes 10 -> 3: the classes of {pets}"
    assert not any("n_classes" in line for line in task_of(pets, model={"n_classes": 3}).read())


def test_batches_are_a_pure_function_and_hold_no_held_out_image(pets: Path) -> None:
    task, again = task_of(pets, batch_size=64), task_of(pets, batch_size=64)
    for step in range(3):
        for one, other in zip(task.batch(step, 0), again.batch(step, 0), strict=True):
            assert np.array_equal(one, other)
    images, classes = task.batch(0, 0)
    assert images.shape == (64, 3, 8, 8) and images.dtype == np.float32 and images.min() >= -1 and images.max() <= 1
    assert set(classes.tolist()) == {0, 1, 2} and not np.array_equal(task.batch(0, 0)[0], task.batch(1, 0)[0])
    colours = scaled(np.array([COLOURS[name] for name in task.classes], np.uint8))
    assert np.abs(images.mean(axis=(2, 3)) - colours[classes]).max() < 0.2
    held_out = [images for images, *_ in task.held_out()]
    assert sum(map(len, held_out)) == 6 and set(task.val.tolist()).isdisjoint(task.train.tolist())


def test_a_moved_image_shows_another_part_and_repeats_its_edge() -> None:
    image = np.arange(64, dtype=np.float32).reshape(1, 1, 8, 8)
    still = (1 << 15 << 16) | 1 << 15
    assert np.array_equal(moved(image, np.array([still]))[0, 0], image[0, 0])
    first = moved(image, np.array([0]))[0, 0]  # one pixel down and to the right
    assert np.array_equal(first[1:, 1:], image[0, 0, :-1, :-1]) and np.array_equal(first[0, 1:], image[0, 0, 0, :-1])
    last = moved(image, np.array([2**32 - 1]))[0, 0]
    assert np.array_equal(last[:-1, :-1], image[0, 0, 1:, 1:])
    colours = np.random.default_rng(0).random((4, 3, 32, 32)).astype(np.float32)
    assert np.array_equal(moved(colours, np.full(4, still)), colours)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"source": "nowhere"}, "data.source = 'nowhere' does not exist, 'tiny' classifies images: give digits"),
        ({"classes": ("cat", "dog")}, "its classes are not those of data.classes: among them it has owl"),
        ({"classes": ("cat", "dog", "owl", "rat")}, "its classes are not those of data.classes: among them it lacks rat"),
        ({"classes": ("cat", "cat")}, "data.classes needs two names or more, each once"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(pets: Path, change: dict[str, Any], words: str) -> None:
    config = config_of(pets)
    with pytest.raises(UserError) as caught:
        load_task(replace(config, data=replace(config.data, **change)))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_two_channels_are_refused_before_an_image_is_opened(pets: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.n_channels = 2"):
        task_of(pets, model={"n_channels": 2})


def test_given_classes_decide_their_order(pets: Path) -> None:
    config = config_of(pets)
    task = load_task(replace(config, data=replace(config.data, classes=("owl", "dog", "cat"))))
    assert isinstance(task, FolderClassification) and task.labels[:10].tolist() == [2] * 10 and task.config.model.n_classes == 3


# ---- resuming --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [0, 10**9], ids=["mapped", "held"])
def test_a_resumed_run_ends_with_equal_bytes(pets: Path, tmp_path: Path, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_store, "MOST_IN_MEMORY", most)
    whole = mm.train(config_of(pets, steps=8, eval_every=4), root=tmp_path / "whole")
    cut = mm.train(config_of(pets, steps=8, eval_every=4, checkpoint_every=4), root=tmp_path / "cut")
    for name in ("step-000008", "best"):
        path = cut.path / "checkpoints" / name
        for file in path.rglob("*") if path.is_dir() else ():
            file.unlink()
        if path.is_dir():
            path.rmdir()
    again = mm.resume(cut.path)
    assert weights_of(again.path, 8) == weights_of(whole.path, 8) and untimed(again.metrics) == untimed(whole.metrics)
    assert again.config.data.classes == ("cat", "dog", "owl")


@pytest.mark.parametrize("change", ["pixels", "new", "gone", "class", "renamed class"])
def test_a_run_is_not_resumed_with_other_images(pets: Path, tmp_path: Path, change: str) -> None:
    run = mm.train(config_of(pets, steps=2), root=tmp_path)
    if change == "pixels":
        picture(COLOURS["dog"], 99).save(pets / "cat" / "00.png")
    elif change == "new":
        picture(COLOURS["cat"], 99).save(pets / "cat" / "new.png")
    elif change == "gone":
        (pets / "cat" / "00.png").unlink()
    elif change == "class":
        write_pets(tmp_path / "more", 2, ("cat",)).joinpath("cat").rename(pets / "ant")
    else:
        (pets / "owl").rename(pets / "emu")
    with pytest.raises(UserError, match="have changed since the run began") as caught:
        mm.resume(run.path, steps=4)
    assert "\n" not in str(caught.value) and weights_of(run.path, 2)


def test_a_file_that_is_written_again_with_the_same_pixels_is_no_change(pets: Path, tmp_path: Path) -> None:
    run = mm.train(config_of(pets, steps=2), root=tmp_path)
    for path in pets.rglob("*.png"):
        path.write_bytes(path.read_bytes())
    assert mm.resume(run.path, steps=4).metrics[-1]["step"] == 4


def test_a_run_starts_from_anothers_weights_with_a_head_for_its_own_classes(pets: Path, tmp_path: Path) -> None:
    first = mm.train(config_of(pets, steps=2), root=tmp_path)
    two = write_pets(tmp_path / "two", 5, ("owl", "cat"))
    said: list[str] = []

    class Heard(Listener):
        def said(self, text: str) -> None:
            said.append(text)

    run = mm.train(init=first.path, data=str(two), steps=2, root=tmp_path, listener=Heard())
    assert run.config.data.classes == ("cat", "owl") and run.config.model.n_classes == 2
    assert "it differs: the head is drawn anew, for another number of classes" in said
    same = mm.train(init=first.path, steps=2, root=tmp_path)
    assert same.config.data.classes == ("cat", "dog", "owl")


# ---- the command line ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """The working directory with a run that tells the colours apart; what training printed."""
    monkeypatch.chdir(tmp_path)
    code, out, err = call(capsys, "train", "vit-folder", *SMALL, "--data", "pets", "--steps", "60")
    assert code == 0, err
    return out + err


def test_train_says_what_it_read_and_which_command_comes_next(trained: str, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (
        "pets: 30 images of 3 classes: cat 10, dog 10, owl 10", "as 8 x 8 pixels in colour (model.image_size, model.n_channels)",
        "model.n_classes 2 -> 3: the classes of ", "24 + 6 images; 60 steps of 8 images (40 tokens)",
        "Held-out images, 0 of 6 taken for another:", "cat/", ": right", "next: minimoe classify runs/vit-folder-001 pets/cat/",
    ):  # fmt: skip
        assert words in trained, words
    following = next(line for line in trained.splitlines() if line.startswith("next: "))
    assert call(capsys, *following.removeprefix("next: minimoe ").split())[0] == 0


def test_classify_names_the_classes_of_each_image(trained: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture(COLOURS["owl"], 77, (40, 30)).save("new.jpg")
    code, out, err = call(capsys, "classify", "vit-folder-001", "new.jpg", "pets/dog/03.png", "--top", "2", "--json")
    found = json.loads(out)
    assert (code, err) == (0, "") and [row["image"] for row in found] == ["new.jpg", "pets/dog/03.png"]
    assert [row["classes"][0]["name"] for row in found] == ["owl", "dog"] and all(len(row["classes"]) == 2 for row in found)
    code, out, _ = call(capsys, "classify", "vit-folder-001", "new.jpg")
    lines = [line.split() for line in out.splitlines() if "%" in line]
    assert code == 0 and "new.jpg" in lines[0] and "owl" in lines[0] and len(lines) == 3
    every = mm.classify("runs/vit-folder-001", "new.jpg")[0]
    assert sum(guess.probability for guess in every) == pytest.approx(1.0) and every[0].name == "owl"
    task = load_task(open_model("vit-folder-001").config)
    assert isinstance(task, FolderClassification)
    logits = mm.load("runs/vit-folder-001")(scaled(task.images.pixels[13:14])).numpy()[0].astype(np.float64)  # dog/03.png
    shares = np.exp(logits) / np.exp(logits).sum()
    assert found[1]["classes"][0]["probability"] == pytest.approx(shares.max(), rel=1e-5)


def test_classify_reads_standard_input(trained: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    piped = io.TextIOWrapper(io.BytesIO(Path("pets/owl/00.png").read_bytes()))
    monkeypatch.setattr("sys.stdin", piped)
    code, out, _ = call(capsys, "classify", "vit-folder-001", "-", "--json")
    assert code == 0 and json.loads(out)[0]["classes"][0]["name"] == "owl"


def test_what_classify_cannot_read_is_one_line(trained: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    Path("note.txt").write_text("no image")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"")))
    for images, words in (
        (["pets/cat/00.png", "none.png"], "none.png: cannot be read: No such file or directory"),
        (["note.txt"], "note.txt: not an image that can be read (PNG, JPEG, GIF, WEBP, BMP, TIFF, PPM)"),
        (["pets"], "pets: cannot be read: Is a directory"), (["-"], "-: not an image that can be read"),
    ):  # fmt: skip
        code, out, err = call(capsys, "classify", "vit-folder-001", *images)
        assert (code, out) == (2, "") and words in one_line(err)
    assert call(capsys, "classify", "vit-folder-001")[0] == 2


def test_eval_measures_another_folder_by_the_runs_classes(trained: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = json.loads(call(capsys, "eval", "--json")[1])
    assert (own["images"], own["accuracy"], own["split"]) == (6, 1.0, "validation split")
    write_pets(tmp_path / "other", 3, ("owl", "dog"))
    other = json.loads(call(capsys, "eval", "--data", "other/pets", "--json")[1])
    assert (other["images"], other["accuracy"], other["split"]) == (6, 1.0, "all of it")
    os.rename("other/pets/owl", "other/pets/emu")
    code, _, err = call(capsys, "eval", "--data", "other/pets")
    assert code == 2 and "its classes are not those of data.classes: among them it has emu" in one_line(err)
    code, _, err = call(capsys, "eval", "--data", "digits")
    assert code == 2 and "digits have their own classes" in one_line(err)


def test_a_converted_run_names_its_classes(trained: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "convert", "vit-folder-001", "pets-vit")[0] == 0
    run, folder = (json.loads(call(capsys, "classify", what, "pets/owl/01.png", "--json")[1]) for what in ("vit-folder-001", "pets-vit"))
    assert run == folder and folder[0]["classes"][0]["name"] == "owl"
    settings = Path("pets-vit/preprocessor_config.json")
    settings.write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    likely = [guess.probability for guess in mm.classify("pets-vit", "pets/owl/01.png")[0]]
    assert likely == pytest.approx([one["probability"] for one in folder[0]["classes"]], rel=1e-4)
    settings.write_text(json.dumps({"image_mean": [0.2] * 3, "image_std": [0.9] * 3}))
    assert mm.classify("pets-vit", "pets/owl/01.png")[0][0].probability != pytest.approx(likely[0], rel=1e-3)
    settings.write_text(json.dumps({"image_mean": "half"}))
    code, _, err = call(capsys, "classify", "pets-vit", "pets/owl/01.png")
    assert code == 2 and "preprocessor_config.json: cannot be used" in one_line(err)


def test_a_text_model_classifies_no_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("the router sends every token\n" * 40)
    mm.train(tiny("text.txt", steps=1), root="runs")
    picture(COLOURS["cat"], 0).save("x.png")
    code, _, err = call(capsys, "classify", "runs/last", "x.png")
    assert code == 2 and "classify needs a model that classifies images: this one has head = 'lm'" in one_line(err)


def test_a_picture_of_a_digit_is_read_as_digits_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    from minimoe.training.tasks.digits import load_digits

    monkeypatch.chdir(tmp_path)
    config = load_config("vit-tiny", ["model.n_layers=1", "train.backend=numpy"])
    run = mm.train(config, steps=2, root="runs")
    digit = load_digits(0.2).val[0]
    logits = run.model(digit[None]).numpy()[0]
    Image.fromarray(np.rint(255 - 255 * digit[0]).astype(np.uint8)).save("on-paper.png")
    Image.fromarray(np.rint(255 * digit[0]).astype(np.uint8)).save("on-slate.png")
    for guesses in mm.classify(run, ["on-paper.png", "on-slate.png"]):
        assert guesses[0].name == str(int(logits.argmax())) and len(guesses) == 10
    code, _, err = call(capsys, "eval", "--data", str(write_pets(tmp_path)))
    assert code == 2 and "was trained on digits, whose images are like no others" in one_line(err)


def test_a_folder_of_images_needs_pillow_and_says_so(pets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(UserError, match="images are read with Pillow, which is not installed: pip install"):
        Trainer(config_of(pets))
