"""The load of experts as lines: they fit the width and the height that they are given, and leave out no layer without saying so."""

import re

from hypothesis import given, settings
from hypothesis import strategies as st

from minimoe.study.load import balance_lines, load_lines


def loads_of(layers: int, experts: int) -> list[list[float]]:
    """Return loads of which later layers are less even."""
    rows = [[1.0 + layer * expert for expert in range(experts)] for layer in range(layers)]
    return [[share / sum(row) for share in row] for row in rows]


shapes = st.tuples(st.integers(1, 40), st.integers(2, 130))


@settings(deadline=None, max_examples=25)
@given(shape=shapes, width=st.integers(50, 200), most=st.none() | st.integers(0, 40))
def test_lines_fit_the_width_and_the_height(shape: tuple[int, int], width: int, most: int | None) -> None:
    lines = load_lines(loads_of(*shape), width, most)
    assert all("\n" not in line.plain and len(line) < width for line in lines)
    assert most is None or len(lines) <= most


@settings(deadline=None, max_examples=25)
@given(shape=shapes, width=st.integers(50, 200), most=st.integers(10, 40))
def test_every_layer_is_shown_or_counted(shape: tuple[int, int], width: int, most: int) -> None:
    layers, _ = shape
    text = "\n".join(line.plain for line in load_lines(loads_of(*shape), width, most))
    rest = re.search(r"^and (\d+) more even layers", text, re.M)
    if rest is None:
        assert f"in {layers} layers" in text or f"{layers - 1} " in text
    else:
        shown = re.findall(r"^ *(?:layer)? *(\d+) ", text, re.M)
        assert shown == [str(layer) for layer in range(int(rest[1]), layers)]  # the least even ones


@settings(deadline=None, max_examples=25)
@given(shape=shapes, width=st.integers(60, 200))
def test_what_is_said_of_the_balance_fits_the_width(shape: tuple[int, int], width: int) -> None:
    layers, _ = shape
    row = {"aux_loss": 1.0 * layers, "aux_loss_layers": [1.0] * layers, "router_entropy": 1.0, "dropped": 0.0}
    assert all(len(line) < width for line in balance_lines(loads_of(*shape), float(layers), row, width))
