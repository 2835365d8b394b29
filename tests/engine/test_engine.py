"""The engine: long chains, no leaks, clear errors, gradients that nobody shares, arrays in and out."""

import gc
import weakref

import numpy as np
import pytest
from strict_backend import StrictBackend

from minimoe import ops
from minimoe.backend import current_backend, load, use_backend
from minimoe.engine.backward import backward
from minimoe.engine.creation import tensor
from minimoe.engine.grad_mode import grad_mode, no_grad
from minimoe.engine.recompute import recompute
from minimoe.engine.tensor import Tensor

NUMPY, STRICT = load("numpy"), StrictBackend()


@pytest.fixture(autouse=True)
def on_numpy():
    with use_backend(NUMPY):
        yield


def leaf(*shape, seed=0):
    return tensor(np.random.default_rng(seed).standard_normal(shape), requires_grad=True)


# ---- long chains, memory ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("walk", [True, False], ids=["with backward", "dropped without backward"])
def test_a_chain_of_100000_operations_works(walk):
    x = leaf(2)
    y = x
    for _ in range(50_000):
        y = ops.reshape(ops.add(y, x), (2,))
    if walk:
        y.backward(np.ones(2))
        assert x.grad.tolist() == [50_001.0, 50_001.0]
    del y


def step(x, w):
    hidden = ops.gelu(ops.linear(ops.rms_norm(x, w[0]), w[1]))
    (total,) = recompute(lambda h: (ops.softmax(h @ h.T).sum(0).max(),), hidden)
    parts = ops.concat([hidden, hidden * 2.0]) + hidden[0]
    loss = total + (parts / (parts * parts + 1.0)).mean()
    loss.backward()
    return loss


def test_a_step_leaves_no_reference_cycle():
    x, w = leaf(3, 4), [leaf(4), leaf(4, 4)]
    step(x, w)
    gc.collect()
    gc.disable()
    try:
        step(x, w)
        (x * x).sum()  # and a graph that is never walked
        assert gc.collect() == 0
    finally:
        gc.enable()


def test_arrays_die_with_their_graph():
    x = leaf(3)
    y = ops.exp(x * 2.0)
    ref = weakref.ref(y.data)
    z = y.sum()
    del y
    assert ref() is not None
    z.backward()
    assert ref() is None


def test_a_gradient_lives_no_longer_than_it_is_needed():
    x = leaf(4)
    alive = []

    def spy(dy):
        alive.append(weakref.ref(dy))
        assert sum(ref() is not None for ref in alive) <= 2
        return dy * 1.5

    y = x * 1.0
    for _ in range(5):
        y = Tensor.from_op(y.data * 1.5, (y,), spy)
    y.backward(np.ones(4))
    assert all(ref() is None for ref in alive[:-1])


# ---- roots, errors ---------------------------------------------------------------------------------------------------------------------


def test_several_roots_are_walked_together():
    x = leaf(3)
    shared = x * x
    a, b = shared.sum(), ops.exp(shared)
    backward([a, b], [None, np.full(3, 2.0)])
    expected = 2 * x.data + 2.0 * np.exp(x.data**2) * 2 * x.data
    assert np.allclose(x.grad, expected, rtol=1e-14)


def test_a_leaf_may_be_a_root_and_a_root_may_stand_twice():
    x = leaf()
    backward([x, x, x * 3.0], [None, None, None])
    assert x.grad == 5.0


def test_a_freed_graph_is_an_error():
    x = leaf(3)
    y = (x * x).sum()
    y.backward()
    with pytest.raises(ValueError, match=r"already walked and freed.*no double backward"):
        y.backward()


def test_a_shared_part_that_was_freed_is_an_error():
    x = leaf(3)
    shared = x * x
    shared.sum().backward()
    with pytest.raises(ValueError, match="already walked and freed"):
        (shared * 2.0).sum().backward()


def test_a_non_scalar_without_a_gradient_is_an_error():
    with pytest.raises(ValueError, match=r"not a scalar.*shape \(3,\)"):
        (leaf(3) * 2.0).backward()
    with pytest.raises(ValueError, match=r"gradient has shape \(2,\), multiply has \(3,\)"):
        (leaf(3) * 2.0).backward(np.ones(2))


def test_backward_from_what_needs_no_gradient_is_an_error():
    with pytest.raises(ValueError, match="depends on nothing that requires a gradient"):
        tensor(np.ones(())).backward()


def choose(x, y):
    return ops.where(np.ones((2, 2), dtype=bool), x, y)


@pytest.mark.parametrize("op", [ops.add, ops.subtract, ops.multiply, ops.divide, ops.matmul, choose])
def test_mixed_backends_are_an_error(op):
    x, y = tensor(np.ones((2, 2)), requires_grad=True), tensor(np.ones((2, 2)), backend=STRICT)
    with pytest.raises(ValueError, match="two backends, numpy and strict"):
        op(x, y)


def test_only_floats_have_gradients():
    with pytest.raises(ValueError, match="only float tensors have gradients, got int32"):
        tensor([1, 2], requires_grad=True)


def test_no_grad_records_nothing():
    x = leaf(3)
    with no_grad():
        y = x * 2.0
        with grad_mode(True):
            z = x * 2.0
    assert not y.requires_grad and y.node is None
    assert z.requires_grad
    assert (x * 2.0).requires_grad


def test_detach_cuts_the_graph():
    x = leaf(3)
    (x * x.detach()).sum().backward()
    assert np.array_equal(x.grad, x.data)


# ---- recompute -------------------------------------------------------------------------------------------------------------------------


def block(x, w):
    hidden = ops.gelu(ops.linear(ops.rms_norm(x, w[0]), w[1]))
    return x + hidden, hidden.sum(), "passes through"


def run_blocks(through):
    x, w = leaf(5, 4), [leaf(4, seed=1), leaf(4, 4, seed=2)]
    y, total = x, tensor(np.zeros(()))
    for _ in range(3):
        y, part, text = through(y, w)
        total = total + part
        assert text == "passes through"
    loss = (y * y).sum() + total
    loss.backward()
    return [loss.data, x.grad, w[0].grad, w[1].grad]


def test_recompute_equals_plain_to_the_bit():
    plain = run_blocks(block)
    again = run_blocks(lambda x, w: recompute(lambda h: block(h, w), x))
    assert [np.asarray(a).tobytes() for a in plain] == [np.asarray(a).tobytes() for a in again]


def test_recompute_keeps_nothing_between_and_serves_inputs_without_gradient():
    kept = []

    def function(x):
        hidden = ops.exp(x)
        kept.append(weakref.ref(hidden.data))
        return (hidden * w,)

    w, x = leaf(3), tensor(np.ones(3))
    (y,) = recompute(function, x)
    assert kept[0]() is None
    y.sum().backward()
    assert np.allclose(w.grad, np.exp(1.0)) and x.grad is None
    with no_grad():
        assert not recompute(function, x)[0].requires_grad


# ---- gradients: accumulated in place, owned by one -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3,), ()])
def test_the_gradient_keeps_its_address_while_it_accumulates(shape):
    x = leaf(*shape)
    (x * 2.0).sum().backward()
    first, address = x.grad, x.grad.__array_interface__["data"][0]
    (x * 3.0).sum().backward()
    assert x.grad is first and x.grad.__array_interface__["data"][0] == address
    assert np.all(x.grad == 5.0)


def test_the_gradient_of_x_plus_x_is_two():
    for op, expected in ((lambda x: x + x, 2.0), (lambda x: x - x, 0.0), (lambda x: x * 1.0 + x.reshape(3), 2.0)):
        x = leaf(3)
        op(x).sum().backward()
        assert np.all(x.grad == expected)


@pytest.mark.parametrize("start", [lambda x: x, lambda x: x * 1.0], ids=["leaf", "inner result"])
def test_one_array_that_comes_twice_as_a_gradient_is_added_twice(start):
    for function, expected in ((lambda h: h + h, 2.0), (lambda h: (h + 1.0) + h, 2.0), (lambda h: ops.concat([h + h, h]), 3.0)):
        x = leaf(3)
        y = function(start(x))
        y.backward(np.ones(y.shape))
        assert np.all(x.grad == expected)


def test_a_leafs_own_gradient_may_be_given_to_backward():
    x = leaf(3)
    x.grad = np.ones(3)
    (x + 0.0).backward(x.grad)
    assert np.all(x.grad == 2.0)


def test_no_two_leaves_share_a_gradient_array():
    a, b, c = leaf(3), leaf(3), leaf(3, 1)
    given = np.ones((3, 3))
    total = (a + b) + ops.broadcast_to(c.reshape(1, 3), (3, 3))
    total.backward(given)
    for one, other in ((a, b), (a, c), (b, c)):
        assert not np.shares_memory(one.grad, other.grad)
    a.grad += 100.0
    assert np.all(b.grad == 3.0) and np.all(given == 1.0)


def test_the_gradient_given_to_backward_is_neither_kept_nor_written():
    for function in (lambda x: x, lambda x: x + 0.0, lambda x: x.reshape(3), lambda x: x.permute(0), lambda x: x + x):
        x, given = leaf(3), np.ones(3)
        function(x).backward(given)
        assert not np.shares_memory(x.grad, given)
        function(x).backward(given)
        assert np.all(given == 1.0)


def test_aliased_gradients_are_never_added_into():
    x, y = leaf(3), leaf(3)
    shared = x + y  # both get the same dy
    again = shared + x  # x gets a second one
    (again + shared * 2.0).backward(np.ones(3))
    assert np.all(x.grad == 4.0) and np.all(y.grad == 3.0)


def test_a_rebound_parameter_does_not_change_a_gradient():
    x, w = leaf(2, 3), leaf(4, 3)
    loss = ops.linear(x, w).sum()
    kept = w.data.copy()
    w.data = w.data * 100.0
    loss.backward()
    assert np.allclose(x.grad, np.broadcast_to(kept.sum(0), (2, 3)))


def test_gradients_come_in_the_dtype_of_their_tensor():
    x = tensor(np.ones(3, dtype=np.float32), requires_grad=True)
    (x.astype("float64") * np.float64(2.0)).sum().backward()
    assert x.grad.dtype == np.float32 and np.all(x.grad == 2.0)


def test_broadcast_operands_get_sums():
    a, b = leaf(2, 1, 3), leaf(4, 1)
    (a * b).sum().backward()
    assert a.grad.shape == (2, 1, 3) and b.grad.shape == (4, 1)
    assert np.allclose(b.grad, a.data.sum()) and np.allclose(a.grad, b.data.sum())


def test_an_output_that_nothing_used_has_no_gradient():
    x, w = leaf(2, 3), leaf(3)
    total, _ = ops.add_norm(x, x, w, None, 1e-5, "rms")
    total.sum().backward()
    assert np.all(x.grad == 2.0) and w.grad is None


def test_gradients_that_nobody_needs_are_not_computed():
    class Counting(type(NUMPY)):
        calls = 0

        def linear_dx(self, dy, weight, out=None, accumulate=False):
            self.calls += 1
            return super().linear_dx(dy, weight, out, accumulate)

    counting = Counting()
    x, w = tensor(np.ones((2, 3)), backend=counting), tensor(np.ones((4, 3)), requires_grad=True, backend=counting)
    ops.linear(x, w).sum().backward()
    assert counting.calls == 0 and w.grad is not None


def test_a_kernel_adds_into_a_sum_that_the_walk_owns_and_never_into_what_another_holds():
    class Noting(type(NUMPY)):
        accumulated = ()

        def linear_dx(self, dy, weight, out=None, accumulate=False):
            self.accumulated += (out is not None and accumulate,)
            return super().linear_dx(dy, weight, out, accumulate)

    noting, draw = Noting(), np.random.default_rng(0)
    x = tensor(draw.random((2, 3)), requires_grad=True, backend=noting)
    weights = [tensor(draw.random((3, 3)), requires_grad=True, backend=noting) for _ in range(3)]
    h = x * 1.0
    total = sum((ops.linear(h, w).sum() for w in weights[1:]), ops.linear(h, weights[0]).sum())
    aliased = h.reshape(2, 3)  # its backward hands the gradient on as it came
    (total + aliased.sum()).backward()
    assert noting.accumulated == (False, True, True)
    assert np.allclose(x.grad, sum(w.data.sum(axis=0) for w in weights) + 1.0)


def test_a_kernel_never_writes_into_a_gradient_of_another_dtype():
    class Noting(type(NUMPY)):
        given = ()

        def linear_dw(self, dy, x, out=None, accumulate=False):
            self.given += (out,)
            return super().linear_dw(dy, x, out, accumulate)

    noting = Noting()
    x, w = (tensor(np.ones((2, 2)), requires_grad=True, dtype="float32", backend=noting) for _ in range(2))
    w.grad = np.ones((2, 2))  # float64
    ops.linear(x, w).sum().backward()
    assert noting.given == (None,) and w.grad.dtype == np.float64 and np.all(w.grad == 3.0)


# ---- arrays in and out -----------------------------------------------------------------------------------------------------------------


def test_numpy_arrays_are_copied_in_and_keep_their_dtype():
    for dtype in ("float32", "float64", "int32", "int64", "bool"):
        source = np.ones(3, dtype=dtype)
        ours = tensor(source)
        source[0] = 0
        assert ours.dtype == np.dtype(dtype) and ours.numpy()[0] == 1
    assert np.array_equal(tensor(np.arange(6.0).reshape(2, 3).T).numpy(), [[0, 3], [1, 4], [2, 5]])


def test_pythons_numbers_have_the_working_precision():
    assert tensor([1.0, 2.0]).dtype == np.float32
    assert tensor([1, 2]).dtype == np.int32
    assert tensor(1.5, dtype="float64").dtype == np.float64
    assert tensor([1.0], requires_grad=True).requires_grad


def test_tensors_move_between_backends():
    x = tensor(np.arange(3.0), backend=STRICT)
    assert tensor(x, backend=NUMPY).numpy().tolist() == [0.0, 1.0, 2.0]
    back = tensor(tensor(x, backend=NUMPY), backend=STRICT)
    assert back.backend is STRICT and isinstance(back.data, type(x.data))
    assert tensor(x.data, backend=STRICT).data is not x.data


def test_dlpack_and_array_speak_both_ways():
    class OnlyDLPack:
        def __init__(self, array):
            self.array = array

        def __dlpack__(self, **options):
            return self.array.__dlpack__(**options)

        def __dlpack_device__(self):
            return self.array.__dlpack_device__()

    ours = tensor(OnlyDLPack(np.arange(4.0)))
    assert ours.numpy().tolist() == [0, 1, 2, 3] and ours.dtype == np.float64
    shared = np.from_dlpack(ours)
    assert np.shares_memory(shared, ours.data)
    assert np.asarray(ours).tolist() == [0, 1, 2, 3]
    assert np.array(ours, dtype=np.float32).dtype == np.float32
    assert np.asarray(tensor(np.ones(2), backend=STRICT)).tolist() == [1, 1]


def test_numpy_and_item_give_host_values():
    x = tensor(np.arange(3.0))
    copy = x.numpy()
    copy[0] = 9.0
    assert x.numpy()[0] == 0.0
    assert x.sum().item() == 3.0
    assert len(x) == 3 and x.shape == (3,) and x.ndim == 1 and x.size == 3
    with pytest.raises(TypeError, match="0-d"):
        len(x.sum())


def test_a_tensor_shows_its_values_dtype_and_backend():
    assert repr(tensor(np.array([1.0, 2.0]), requires_grad=True)) == "tensor([1., 2.], float64, numpy, requires_grad)"


# ---- operators -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [NUMPY, STRICT], ids=["numpy", "strict"])
def test_operators_take_numbers_and_arrays_on_either_side(backend):
    a = np.array([[1.0, 2.0], [3.0, 5.0]])
    x = tensor(a, requires_grad=True, backend=backend)
    pairs = [
        (x + 1, a + 1), (1 + x, 1 + a), (x - 2.0, a - 2), (2.0 - x, 2 - a), (x * 3, a * 3), (3 * x, a * 3), (x / 2, a / 2),
        (2 / x, 2 / a), (-x, -a), (x**2, a**2), (x @ x, a @ a), (x.T, a.T), (x[0], a[0]), (x[:, 1], a[:, 1]), (x[[1, 1]], a[[1, 1]]),
        (x.sqrt(), np.sqrt(a)), (x.exp(), np.exp(a)), (x.log(), np.log(a)), (x.tanh(), np.tanh(a)), (x.sum(0), a.sum(0)),
        (x.mean(), a.mean()), (x.max(1), a.max(1)), (x.reshape(4), a.ravel()), (x.reshape((1, -1)), a.reshape(1, -1)),
        (x.permute(1, 0), a.T), (a + x, a + a), (a * x, a * a), (x - a, a - a), (a / x, a / a), (np.float64(2) * x, 2 * a),
        (x[1, 1], a[1, 1]), (x[None], a[None]), (x[..., 0], a[..., 0]),
    ]  # fmt: skip
    for ours, expected in pairs:
        assert isinstance(ours, Tensor) and ours.backend is backend and ours.requires_grad
        assert np.allclose(ours.numpy(), expected, rtol=1e-14), expected


def test_an_index_that_cannot_be_differentiated_is_refused():
    x = leaf(3, 4)
    with pytest.raises(TypeError, match="row numbers, got bool"):
        x[np.array([True, False, True])]
    with pytest.raises(TypeError, match="must be the only index"):
        x[:, np.array([0, 1])]


def test_matmul_of_a_vector_is_refused_with_both_shapes():
    with pytest.raises(ValueError, match=r"two axes or more, got \(3,\) and \(3, 2\)"):
        leaf(3) @ leaf(3, 2)


def test_a_module_level_backend_holds_within_its_block():
    before = current_backend()
    with use_backend(STRICT) as chosen:
        assert chosen is STRICT and tensor([1.0]).backend is STRICT
    assert current_backend() is before


# ---- what a user may write -------------------------------------------------------------------------------------------------------------


def test_negative_and_positive_numbers_of_one_row_add_their_gradients():
    x = leaf(3, 2)
    x[np.array([-1, 2])].sum().backward()
    np.testing.assert_array_equal(x.grad, [[0, 0], [0, 0], [2, 2]])


def test_an_array_may_stand_left_of_a_matrix_product():
    x, a = leaf(3, 2), np.ones((4, 3))
    np.testing.assert_array_equal((a @ x).numpy(), a @ x.numpy())


def test_a_tensor_of_integers_refuses_floats_rather_than_cut_them_off():
    with pytest.raises(TypeError, match=r"with the float 0\.5: convert the tensor first"):
        tensor([1, 2, 3]) * 0.5
    with pytest.raises(TypeError, match="an array of float64: convert the tensor first"):
        tensor([1, 2, 3]) + np.ones(3)


def test_a_scalar_goes_out_by_dlpack():
    assert np.from_dlpack(leaf(3).sum()).shape == ()


def test_a_gradient_may_be_given_as_plain_numbers():
    x = leaf(2)
    (x * 3.0).backward([1.0, 2.0])
    np.testing.assert_array_equal(x.grad, [3.0, 6.0])


def test_an_unknown_dtype_names_those_that_there_are():
    with pytest.raises(ValueError, match="no bfloat16: it has float32, float64"):
        tensor([1.0], dtype="bfloat16")
