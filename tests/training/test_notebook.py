"""Training in a notebook: what the cell shows, what a run's own words are, and that a run serves wherever its path does."""

import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace
from tiny_runs import tiny, write_text

import minimoe as mm
from minimoe.training.notebook import NotebookProgress, curve, default_listener, load_row
from minimoe.training.trained_run import TrainedRun


class Cell:
    """The output of a cell: what it shows now, and how often that has changed."""

    def __init__(self, shown: str) -> None:
        self.shown, self.updates = shown, 0

    def update(self, shown: str) -> None:
        self.shown, self.updates = shown, self.updates + 1


@pytest.fixture
def cells(monkeypatch: pytest.MonkeyPatch) -> list[Cell]:
    """The cells of a notebook that this process takes itself to run in."""
    found: list[Cell] = []

    def display(shown: str, display_id: bool) -> Cell:
        assert display_id
        found.append(Cell(shown))
        return found[-1]

    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=object())))
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=display, HTML=str))
    return found


@pytest.fixture
def run(tmp_path: Path) -> TrainedRun:
    return mm.train(tiny(write_text(tmp_path), steps=6), root=tmp_path)


class Balanced(HTMLParser):
    """Fails where an element is not closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None: ...

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def assert_whole(html: str) -> None:
    reader = Balanced()
    reader.feed(html)
    assert not reader.open


def test_training_shows_one_cell_that_is_updated(cells: list[Cell], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mm.train(replace(tiny(write_text(tmp_path), steps=6), name="<tiny>"), root=tmp_path, out=tmp_path / "run")
    (cell,) = cells
    assert cell.updates and "step 6/6" in cell.shown and "<svg" in cell.shown and "layer 0" in cell.shown and "validation" in cell.shown
    assert "&lt;tiny&gt;" in cell.shown and "waiting" not in cell.shown
    assert_whole(cell.shown)
    assert capsys.readouterr() == ("", "")


def test_before_the_first_step_the_cell_says_what_is_waited_for(cells: list[Cell], tmp_path: Path) -> None:
    from minimoe.training.trainer import Trainer

    listener = default_listener()
    assert isinstance(listener, NotebookProgress)
    listener.started(Trainer(tiny(write_text(tmp_path), steps=6)))
    assert "step 0/6" in cells[0].shown and "waiting for the first step" in cells[0].shown and "left" not in cells[0].shown


def test_outside_of_a_notebook_nothing_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not isinstance(default_listener(), NotebookProgress)
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: SimpleNamespace()))  # a terminal
    assert not isinstance(default_listener(), NotebookProgress)


@pytest.mark.parametrize("losses", [[], [2.0], [2.0, 2.0], [None, None], [float("nan"), 1.0], [float("inf")] * 3])
def test_a_curve_needs_two_different_losses(losses: list[float | None]) -> None:
    assert curve(losses) == ""


def test_a_curve_falls_as_the_loss_does() -> None:
    drawn = curve([4.0, None, 3.0, float("nan"), 2.0] + [1.0] * 100)
    points = drawn.split('points="')[1].split('"')[0].split()
    heights = [float(point.split(",")[1]) for point in points]
    assert len(points) == 103 and heights == sorted(heights) and heights[0] == 2.0 and ">4.000<" in drawn and ">1.000<" in drawn
    assert_whole(drawn)


def test_an_even_load_is_half_dark() -> None:
    assert load_row(1, [0.25] * 4).count(",0.50)") == 4 and "25.0% to 25.0%" in load_row(1, [0.25] * 4)


def test_a_run_is_a_screen_of_text(run: TrainedRun) -> None:
    lines = repr(run).splitlines()
    assert 3 <= len(lines) <= 16 and all(len(line) <= 80 + len(str(run.path)) for line in lines)
    assert "finished at step 6 of 6" in lines[0] and f"validation loss {run.val_loss:.4f}" in lines[1] and "expert load, layer" in lines[2]
    assert "finished, step 6 of 6" in repr(run.run)


def test_a_run_serves_wherever_its_path_does(run: TrainedRun, tmp_path: Path) -> None:
    tokens = np.arange(8, dtype=np.int32)[None] % 4
    expected = mm.load(run.path)(tokens).numpy()
    assert np.array_equal(mm.load(run)(tokens).numpy(), expected) and np.array_equal(mm.load(run.run)(tokens).numpy(), expected)
    assert mm.inspect(run).to_dict() == mm.inspect(str(run.path)).to_dict() and "parameters" in repr(mm.inspect(run))
    assert mm.evaluate(run)["loss"] == pytest.approx(run.val_loss, rel=1e-6)
    assert "validation loss" in repr(mm.compare([run, mm.train(run.config, root=tmp_path)]))
    assert mm.resume(run, steps=8).metrics[-1]["step"] == 8


def test_data_that_changed_since_the_training_are_said(run: TrainedRun) -> None:
    Path(run.config.data.source).write_text("other words\n" * 200)
    with pytest.warns(UserWarning, match="has changed since the training"):
        mm.evaluate(run)


def test_generate_takes_the_models_own_tokenizer(run: TrainedRun) -> None:
    model = mm.load(run)
    assert model.tokenizer is not None
    whole = "".join(mm.generate(model, model.tokenizer, "a", 5))
    text = mm.generate(model, "a", tokens=5)
    first = next(text)
    assert whole.startswith(first) and str(text) == repr(text) == whole
    with pytest.raises(mm.UserError, match="the prompt is missing"):
        mm.generate(model, model.tokenizer)
    with pytest.raises(mm.UserError, match="takes a model, a tokenizer and a prompt"):
        mm.generate(model, "a", "b")
    model.tokenizer = None
    with pytest.raises(mm.UserError, match="has no tokenizer"):
        mm.generate(model, "a")
