"""Every error that backward raises names the operation that it is about."""

import numpy as np
import pytest

import minimoe as mm
from minimoe import ops
from minimoe.backend import load, use_backend
from minimoe.engine.recompute import recompute
from minimoe.engine.tensor import Tensor


@pytest.fixture(autouse=True)
def on_numpy():
    with use_backend(load("numpy")):
        yield


def leaf(*shape):
    return mm.tensor(np.ones(shape), requires_grad=True)


def returning(gradients):
    """An operation named `cube` whose closure returns what it is told to."""

    def cube(*tensors):
        return Tensor.from_op(tensors[0].data ** 3, tensors, lambda dy: gradients)

    return cube


def raises(message):
    return pytest.raises(ValueError, match=message)


def test_a_graph_that_was_freed_names_the_operation_where_the_walk_met_it():
    shared = ops.softmax(leaf(3))
    total = shared.sum()
    total.backward()
    with raises(r"backward: sum was already walked and freed; run the forward pass again \(there is no double backward\)"):
        total.backward()
    with raises("backward: softmax was already walked and freed"):
        (shared * 2.0).sum().backward()


def test_a_loss_that_is_not_a_scalar_names_the_operation_that_made_it():
    with raises(r"The loss is not a scalar \(softmax has shape \(3,\)\): pass a gradient to backward\(\)"):
        ops.softmax(leaf(3)).backward()
    with raises(r"this leaf has shape \(2,\)"):
        leaf(2).backward()


def test_a_gradient_of_another_shape_than_the_root_names_the_operation_that_made_the_root():
    with raises(r"backward: the gradient has shape \(2,\), softmax has \(3,\)"):
        ops.softmax(leaf(3)).backward(np.ones(2))


@pytest.mark.parametrize("start", [lambda x: x, lambda x: x * 1.0], ids=["leaf", "inner result"])
def test_a_closure_that_returns_another_shape_than_its_input_has_is_named(start):
    with raises(r"backward: cube returned a gradient of shape \(1, 3\) for an input of shape \(3,\)"):
        returning(np.ones((1, 3)))(start(leaf(3))).backward(np.ones(3))


def test_a_closure_that_returns_too_few_or_too_many_gradients_is_named():
    with raises("backward: cube returned 1 gradients for 2 inputs"):
        returning(np.ones(3))(leaf(3), leaf(3)).backward(np.ones(3))
    with raises("backward: cube returned 2 gradients for 1 inputs"):
        returning((np.ones(3), np.ones(3)))(leaf(3)).backward(np.ones(3))


def test_operands_on_two_backends_name_the_operation():
    x, y = leaf(2, 2), mm.tensor(np.ones((2, 2)), backend=load("numba"))
    with raises("multiply: the operands are on two backends, numpy and numba"):
        x * y
    with raises("linear: the operands are on two backends, numpy and numba"):
        ops.linear(x, y)


def test_an_exception_in_a_closure_carries_a_note_that_names_the_operation():
    def cube(x):
        def backward(dy):
            raise ZeroDivisionError("as planned")

        return Tensor.from_op(x.data**3, (x,), backward)

    with pytest.raises(ZeroDivisionError) as caught:
        (cube(leaf(3)) * 2.0).sum().backward()
    assert caught.value.__notes__ == ["This was raised in the backward of cube."]
    with pytest.raises(ZeroDivisionError) as caught:
        recompute(lambda x: (cube(x),), leaf(3))[0].sum().backward()
    assert caught.value.__notes__ == [f"This was raised in the backward of {name}." for name in ("cube", "recompute")]
