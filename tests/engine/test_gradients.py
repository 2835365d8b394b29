"""Every operation's gradient against differences, in float64: the directional derivative agrees to 1e-6."""

from collections import defaultdict

import numpy as np
import pytest

import minimoe.ops
from minimoe import ops
from minimoe.backend import load
from minimoe.engine.creation import tensor
from minimoe.engine.tensor import Tensor
from minimoe.testing import check_grads
from minimoe.testing.dense_examples import floats
from minimoe.testing.op_examples import op_examples

NUMPY = load("numpy")
BY_OP = defaultdict(list)
for example in op_examples():
    BY_OP[example.op].append(example)


@pytest.mark.parametrize("op", BY_OP)
def test_backward_agrees_with_differences(op):
    for function, inputs, label in ((e.function, e.inputs, e.label) for e in BY_OP[op]):
        if op == "embedding" and "padding 0" in label:
            continue
        leaves = [tensor(array, requires_grad=True, backend=NUMPY) for array in inputs]
        try:
            check_grads(lambda *tensors, f=function: f(NUMPY, *tensors), *leaves)
        except AssertionError as error:
            raise AssertionError(f"{op}, {label}: {error}") from None


def test_every_public_operation_is_checked():
    public = {name: value for name, value in vars(minimoe.ops).items() if name[0] != "_"}
    named = {name for name, value in public.items() if getattr(value, "__module__", "").startswith("minimoe.engine.ops.")}
    through_operators = {"power", "expert_sum"}
    assert named - set(BY_OP) - through_operators == set()


def test_the_embedding_row_of_the_padding_id_gets_no_gradient():
    weight = tensor(floats(1, 4, 3), requires_grad=True, backend=NUMPY)
    ops.embedding(np.array([0, 2, 0, 3], dtype=np.int32), weight, 0).sum().backward()
    assert np.array_equal(weight.grad, [[0] * 3, [0] * 3, [1] * 3, [1] * 3])


@pytest.mark.parametrize("view", [lambda a: a.T, lambda a: a[::2], lambda a: a[:, ::-1], lambda a: np.broadcast_to(a[:1], a.shape)])
def test_inputs_need_not_be_contiguous(view):
    weight = floats(2, 3, view(floats(1, 6, 6)).shape[-1])
    x = Tensor(view(floats(1, 6, 6)), NUMPY, requires_grad=True)
    norm = Tensor(floats(3, 12)[::2], NUMPY, requires_grad=True)
    check_grads(lambda x, w, g: ops.linear(ops.gelu(ops.rms_norm(x, g)), w), x, weight, norm)
    check_grads(lambda x: ops.softmax(ops.swiglu(x)), Tensor(view(floats(4, 6, 6)), NUMPY, requires_grad=True))


def test_a_wrong_gradient_is_found_and_named():
    def wrong(x, y):
        return Tensor.from_op(x.data * y.data, (x, y), lambda dy: (dy * y.data, dy * x.data * 1.00001))

    with pytest.raises(AssertionError, match=r"input 1, shape \(3, 4\).*backward gives the slope .* differences give"):
        check_grads(wrong, floats(1, 3, 4), floats(2, 3, 4))


def test_a_missing_gradient_is_found():
    with pytest.raises(AssertionError, match="input 0"):
        check_grads(lambda x: x + Tensor(x.data * x.data, NUMPY), tensor(floats(1, 3), requires_grad=True, backend=NUMPY))


def test_check_grads_leaves_gradients_and_data_as_they_were():
    x = tensor(floats(1, 3), requires_grad=True, backend=NUMPY)
    data, kept = x.data, np.ones(3)
    x.grad = kept
    assert check_grads(lambda x: x * x, x) < 1e-6
    assert x.data is data and x.grad is kept


def test_check_grads_needs_something_to_differentiate():
    with pytest.raises(ValueError, match="no input is differentiable"):
        check_grads(lambda x: x, np.arange(3))
    with pytest.raises(AssertionError, match="depends on its inputs"):
        check_grads(lambda x: x.detach(), floats(1, 3))
