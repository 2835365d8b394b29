"""Pictures of runs show the numbers of their metrics, and are drawn without a window or a setting that stays."""

import math
import re
import sys
import warnings
import xml.etree.ElementTree as xml
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_runs import tiny, train, write_text

from minimoe.errors import UserError
from minimoe.hints import install
from minimoe.runs.plots import MOST_POINTS, draw, grouped, loads, render
from minimoe.runs.run import Run

matplotlib = pytest.importorskip("matplotlib")


def rows(steps: int, layers: int = 2, every: int = 5) -> list[dict[str, Any]]:
    found = []
    for step in range(1, steps + 1):
        row: dict[str, Any] = {"step": step, "loss": 5.0 / step, "expert_load": [[0.5, 0.25, 0.25, 0.0]] * layers}
        found.append(row | ({"val_loss": 6.0 / step} if step % every == 0 else {}))
    return found


def curves(figure: Any) -> list[Any]:
    figures = [figure, *figure.subfigs]
    return [line for each in figures for axes in each.axes for line in axes.get_lines()]


def test_curves_have_the_losses_of_every_step_and_every_evaluation() -> None:
    metrics = rows(10)
    metrics[3]["loss"] = None
    metrics[-1] |= {"val_loss": 9.0, "val_loss_sampled": 0.5}
    training, validation = curves(draw({"a": metrics}))
    assert list(training.get_xdata()) == list(range(1, 11))
    assert np.array_equal(training.get_ydata(), [5.0 / s if s != 4 else math.nan for s in range(1, 11)], equal_nan=True)
    assert (list(validation.get_xdata()), list(validation.get_ydata())) == ([5, 10], [1.2, 0.5]), "evaluations over the same batches"
    assert validation.get_label() == "a: 0.5000"


@pytest.mark.parametrize("count", [1, 3, 30])
def test_every_run_has_a_colour_and_a_name(count: int) -> None:
    figure = draw({f"_run$-{i}": rows(6, every=3 if i % 2 else 100) for i in range(count)})
    lines = curves(figure)
    assert len({str(line.get_color()) for line in lines}) == count
    legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes if axes.get_legend())]
    assert [len(legend.get_texts()) for legend in legends] == [count]
    assert render(figure, "png").startswith(b"\x89PNG")


def test_the_load_is_a_map_of_each_layer_in_units_of_the_even_share() -> None:
    assert loads(rows(3)) == [[[2.0] * 3, [1.0] * 3, [1.0] * 3, [0.0] * 3]] * 2
    figure = draw({"a": rows(12), "b": rows(12, layers=3)}, load=True)
    maps = [axes.images[0] for axes in figure.subfigs[1].axes if axes.images]
    assert len(maps) == 5 and all(np.array_equal(np.asarray(image.get_array())[:, 0], [2, 1, 1, 0]) for image in maps)
    assert xml.fromstring(render(figure, "svg")).tag.endswith("svg")


def test_of_a_long_run_the_means_of_groups_are_drawn() -> None:
    steps = list(range(1, 10 * MOST_POINTS + 1))
    at, means = grouped(steps, [float(step) for step in steps])
    assert at == means and len(at) == MOST_POINTS and at[0] == 5.5
    assert grouped([1, 2], [3.0, 4.0]) == ([1, 2], [3, 4]) and grouped([], []) == ([], [])


def test_equal_pictures_are_equal_bytes_and_no_setting_stays() -> None:
    before = dict(matplotlib.rcParams)
    one, other = (render(draw({"a": rows(8)}, load=True), "svg") for _ in range(2))
    assert one == other and dict(matplotlib.rcParams) == before


def test_what_cannot_be_drawn_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="a, b: no step was recorded yet, so there is nothing to plot"):
        draw({"a": [], "b": []})
    with pytest.raises(UserError, match="a: the models are dense: there is no load of experts to plot"):
        draw({"a": rows(3, layers=0)}, load=True)
    with pytest.raises(UserError, match="the load of 5 runs does not fit side by side: name up to 4"):
        draw({name: rows(3) for name in "abcde"}, load=True)
    assert draw({"a": [], "b": rows(3)}) is not None
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=re.escape(f"drawn by matplotlib, which is not installed: {install('plot')}")):
        draw({"a": rows(3)})


def test_a_name_that_the_font_lacks_is_drawn_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert render(draw({"日本語": rows(3)}), "png")


def test_damaged_loads_are_left_out() -> None:
    metrics = rows(4)
    metrics[1]["expert_load"] = [[0.5]]
    metrics[2]["expert_load"] = [[0.5, None, 0.25, 0.25]] * 2
    first = loads(metrics)[0]
    assert [len(layer) for layer in first] == [3] * 4 and math.isnan(first[1][1])
    render(draw({"a": metrics}, load=True), "png")


def test_a_trained_run_and_its_folder_draw_themselves_in_a_notebook(tmp_path: Path) -> None:
    trained = train(tiny(write_text(tmp_path), steps=4, eval_every=2, eval_batches=1), tmp_path / "runs")
    figure = trained.plot()
    assert isinstance(figure, matplotlib.figure.Figure) and figure._repr_png_().startswith(b"\x89PNG")
    assert len(trained.plot(load=True).subfigs) == 2
    assert [list(line.get_ydata()) for line in curves(Run(trained.path).plot())] == [list(line.get_ydata()) for line in curves(figure)]
