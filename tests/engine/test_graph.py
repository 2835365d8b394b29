"""show_graph: the graph of a loss as text and as a picture."""

from xml.etree import ElementTree

import numpy as np
import pytest

import minimoe as mm
from minimoe import ops
from minimoe.backend import load, use_backend

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(autouse=True)
def on_numpy():
    with use_backend(load("numpy")):
        yield


def leaf(*shape):
    return mm.tensor(np.ones(shape), requires_grad=True)


def drawn(tensor, **options):
    """The titles of the boxes in the picture, the labels beside arrows, and the number of arrows that leave a box."""
    root = ElementTree.fromstring(mm.show_graph(tensor, svg=True, **options))
    titles = [group.find(f"{SVG}text").text for group in root.iter(f"{SVG}g")]
    return titles, [text.text for text in root.findall(f"{SVG}text")], len([p for p in root.iter(f"{SVG}path") if "C" in p.get("d")])


def split_loss():
    x = leaf(3, 4)
    left, right = ops.split(ops.softmax(x), [1, 3])
    return (left.sum() + (right * right).sum()) * 2.0


def test_a_graph_with_a_shared_result_and_several_outputs_is_printed_in_the_order_of_its_operations(capsys):
    text = mm.show_graph(split_loss())
    assert text.splitlines() == [
        "leaf1                   (3, 4) float64",
        "t1 = softmax(leaf1)     (3, 4)",
        "t2, t3 = split(t1)      (3, 1) (3, 3)",
        "t4 = sum(t2)            ()",
        "t5 = multiply(t3, t3)   (3, 3)",
        "t6 = sum(t5)            ()",
        "t7 = add(t4, t6)        ()",
        "t8 = multiply(t7, _)    ()",
    ]
    assert capsys.readouterr().out == text + "\n"


def test_the_picture_has_a_box_for_each_operation_and_leaf_and_labels_the_outputs_that_are_used():
    titles, labels, arrows = drawn(split_loss())
    assert sorted(titles) == ["add", "leaf1", "multiply", "multiply", "softmax", "split", "sum", "sum"]
    assert sorted(labels) == ["t2", "t3"] and arrows == 9  # 8 edges, of which one takes two arrows past a row


def test_a_result_among_several_is_named():
    assert mm.show_graph(ops.split(leaf(2, 4), [1, 3])[1]).splitlines()[-1] == "The tensor is t2."


def test_a_freed_operation_is_marked():
    shared = ops.softmax(leaf(3))
    loss = (shared * 2.0).sum()
    shared.sum().backward()
    lines = mm.show_graph(loss).splitlines()
    assert lines[0].startswith("t1 = softmax(freed: backward has walked it)") and lines[1].startswith("t2 = multiply(t1, _)")
    assert drawn(loss)[0][0] == "softmax (freed)"


def test_a_leaf_and_a_tensor_without_a_graph_are_shown_as_what_they_are():
    assert mm.show_graph(leaf(2, 3)) == "leaf1   (2, 3) float64"
    assert "depends on nothing that requires a gradient" in mm.show_graph(mm.tensor([1.0]))
    assert drawn(leaf(2, 3))[0] == ["leaf1"] and drawn(mm.tensor([1.0]))[0] == ["no graph"]


def test_of_a_large_graph_the_newest_operations_are_shown_and_the_others_counted():
    y = x = leaf(2)
    for _ in range(20_000):
        y = y + x
    lines = mm.show_graph(y).splitlines()
    assert len(lines) == 102 and lines[1].split("  ")[-1].strip() == "19900 operations that ran earlier are left out: limit=100"
    assert lines[2].startswith("t1 = add(..., leaf1)") and lines[-1].startswith("t100 = add(t99, leaf1)")
    titles, labels, _ = drawn(y, limit=5)
    assert titles == ["leaf1", *["add"] * 5] and labels == ["19995 operations that ran earlier are left out"]


def test_lines_of_a_models_graph_fit_a_terminal_of_80_columns():
    config = mm.ModelConfig(d_model=16, n_layers=2, n_heads=2, d_hidden=24, max_seq_len=12, vocab_size=19, moe=mm.MoEConfig())
    model = mm.Transformer(config)
    tokens = np.ones((2, 7), np.int32)
    text = mm.show_graph(model.loss(tokens[:, :-1], tokens[:, 1:]).total)
    assert max(map(len, text.splitlines())) <= 80 and "moe_ffn" in text


def test_a_limit_below_one_is_refused():
    for limit in (0, -1):
        with pytest.raises(ValueError, match=rf"show_graph: limit \({limit}\) must be 1 or more"):
            mm.show_graph(split_loss(), limit=limit)
