"""Folders of images: which classes they have, what is left out, what is held out, and what is kept in the cache."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from command_line import call
from hypothesis import given
from hypothesis import strategies as st
from made_images import COLOURS, age, picture, write_pets
from PIL import Image

from minimoe.data import image_store
from minimoe.data.image_folder import Images, divided
from minimoe.data.image_store import load_images
from minimoe.data.store import stored_folders
from minimoe.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINIMOE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "data"


def load(folder: Path, side: int = 8, channels: int = 3) -> Images:
    return load_images(folder, "pets", side, channels)


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- what is there ---------------------------------------------------------------------------------------------------------------------


def test_each_folder_is_a_class_and_classes_are_sorted_by_name(tmp_path: Path) -> None:
    found = load(write_pets(tmp_path, 4, ("owl", "cat", "dog")))
    assert found.names == ("cat", "dog", "owl") and found.classes.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert found.pixels.shape == (12, 3, 8, 8) and found.path(5) == Path("dog/01.png")
    assert np.abs(found.pixels[5].mean(axis=(1, 2)) - COLOURS["dog"]).max() < 15
    assert found.notes == (
        "pets: 12 images of 3 classes: cat 4, dog 4, owl 4",
        "pets: of each image the middle square is taken, as 8 x 8 pixels in colour (model.image_size, model.n_channels)",
    )


def test_images_in_folders_below_belong_to_the_class_and_hidden_files_do_not(tmp_path: Path) -> None:
    folder = write_pets(tmp_path, 2)
    for place in ("cat/more/deep", "cat/.thumbnails", ".git", "__MACOSX"):
        (folder / place).mkdir(parents=True)
        picture(COLOURS["cat"], 7).save(folder / place / (".x.png" if place == "__MACOSX" else "x.png"))
    picture(COLOURS["cat"], 8).save(folder / "cat" / ".hidden.png")
    found = load(folder)
    assert [found.path(i).as_posix() for i in range(3)] == ["cat/00.png", "cat/01.png", "cat/more/deep/x.png"]
    assert found.names == ("cat", "dog", "owl") and "pets: 1 folder without images (__MACOSX) left out" in found.notes


def test_what_is_left_out_is_named_with_the_reason(tmp_path: Path) -> None:
    folder = write_pets(tmp_path, 2)
    (folder / "cat" / "labels.txt").write_text("cats")
    (folder / "dog" / "cut.png").write_bytes((folder / "dog" / "00.png").read_bytes()[:100])
    (folder / "README.md").write_text("pets")
    shutil.rmtree(folder / "owl")
    (folder / "owl").mkdir()
    picture(COLOURS["owl"], 0).save(folder / "owl" / "one.png")
    Image.new("RGB", (4, 4)).save(folder / "cat" / "x.gif", save_all=True, append_images=[Image.new("RGB", (4, 4), "red")])
    assert load(folder).notes[2:] == (
        "pets: 1 file (README.md) left out: beside the folders, so of no class",
        "pets: 1 file (labels.txt) left out: not an image that can be read",
        "pets: 1 file (cut.png) left out: a damaged image",
        "pets: 1 animated: the first frame of each is taken",
        "pets: classes of one image, which is not held out: owl",
    )


def test_a_folder_without_two_classes_is_refused(tmp_path: Path) -> None:
    folder = write_pets(tmp_path, 2, ("cat",))
    assert refusal(folder) == "pets: images of one class (cat): a classifier needs two classes, each a folder with images"
    for path in (folder / "cat").iterdir():
        path.write_text("no image")
    found = refusal(folder)
    assert found.startswith("pets: no image; 2 files (00.png, 01.png) left out: not an image that can be read: a classifier needs")
    assert "has no folders: put the images of each class into a folder of its name, such as" in refusal(folder / "cat")
    one = write_pets(tmp_path / "one", 1)
    assert "every class has one image, so that none can be held out" in refusal(one)


def test_a_folder_whose_name_cannot_be_printed_is_refused(tmp_path: Path) -> None:
    folder = write_pets(tmp_path, 2)
    os.mkdir(os.fsencode(folder) + b"/\xff")
    assert "cannot be a class: its name has characters that cannot be printed" in refusal(folder)


def test_a_pipe_among_the_images_is_not_waited_for(tmp_path: Path) -> None:
    folder = write_pets(tmp_path, 2)
    os.mkfifo(folder / "cat" / "pipe.png")
    assert len(load(folder).pixels) == 6


# ---- what is held out ------------------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.floats(0.001, 0.999))
def test_each_class_is_divided_and_no_image_is_on_both_sides(counts: list[int], share: float) -> None:
    classes = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    train, val = divided(classes, share)
    assert sorted([*train, *val]) == list(range(len(classes)))
    for number, count in enumerate(counts):
        held = int((classes[val] == number).sum())
        assert held == min(count - 1, max(1, round(count * share)))


def test_the_division_follows_from_the_numbers_alone() -> None:
    classes = np.repeat(np.arange(3, dtype=np.int32), 20)
    one, other = divided(classes, 0.2), divided(classes, 0.2)
    assert all(np.array_equal(*pair) for pair in zip(one, other, strict=True)) and len(one[1]) == 12
    assert one[1][:4].tolist() != [0, 1, 2, 3]  # not the first of each class


# ---- what is kept ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that counts as large."""
    monkeypatch.setattr(image_store, "MOST_IN_MEMORY", 1000)
    return write_pets(tmp_path, 4)


def test_a_large_folder_is_decoded_once_and_mapped(large: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load(large)
    monkeypatch.setattr(image_store, "Decoding", None)  # the second start decodes nothing
    second = load(large)
    monkeypatch.undo()
    held = load_images(large, "pets", 8, 3)
    for found in (first, second):
        assert not found.pixels.flags.owndata and np.array_equal(found.pixels, held.pixels) and np.array_equal(found.classes, held.classes)
        assert (found.names, found.files, found.sha256, found.notes) == (held.names, held.files, held.sha256, held.notes)


def test_an_image_that_changed_is_decoded_again_and_changes_the_digest(large: Path) -> None:
    before = load(large)
    picture(COLOURS["dog"], 99).save(large / "cat" / "00.png")
    age(large)
    after = load(large)
    assert before.sha256 != after.sha256 and not np.array_equal(before.pixels[0], after.pixels[0])
    assert len(stored_folders()) == 2


def test_other_sizes_and_colours_are_kept_apart(large: Path) -> None:
    shapes = [load(large, side, channels).pixels.shape[1:] for side, channels in ((8, 3), (4, 3), (8, 1), (8, 3))]
    assert shapes == [(3, 8, 8), (3, 4, 4), (1, 8, 8), (3, 8, 8)] and len(stored_folders()) == 3


@pytest.mark.parametrize("damage", ["cut", "header", "missing"])
def test_a_damaged_cache_is_made_again(damage: str, large: Path, cache: Path) -> None:
    before = load(large)
    pixels = before.pixels.copy()
    (place,) = (one.path for one in stored_folders())
    if damage == "cut":
        (place / "pixels").write_bytes((place / "pixels").read_bytes()[:-1])
    elif damage == "header":
        (place / "header.json").write_text("{}")
    else:
        (place / "names").unlink()
    with pytest.warns(Warning, match="its images are decoded again"):
        after = load(large)
    assert np.array_equal(pixels, after.pixels) and before.files == after.files


def test_data_list_and_rm_know_of_images(large: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load(large)
    (row,) = json.loads(call(capsys, "data", "list", "--json")[1])
    assert (row["source"], row["tokenizer"], row["tokens"], row["problem"]) == ("pets", "8 x 8 x 3", 12, "")
    assert "8 x 8 x 3" in call(capsys, "data", "list")[1]
    assert call(capsys, "data", "rm", row["name"])[0] == 0 and not stored_folders()
    load(large)
    assert call(capsys, "data", "rm", "--all")[0] == 0 and not stored_folders()


def test_a_folder_that_changes_while_it_is_read_is_refused(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = image_store.Listing.of
    calls = []

    def of(root: Path) -> image_store.Listing:
        calls.append(root)
        if len(calls) == 2:
            picture(COLOURS["dog"], 99).save(large / "cat" / "new.png")
        return listed(root)

    monkeypatch.setattr(image_store.Listing, "of", of)
    assert "changed while it was read" in refusal(large)
    assert not stored_folders()
