"""Norms and activations of the backend `cupy` where the conformance suite does not go: wide and odd rows, NaN and infinity, equal bits."""

from functools import cache

import numpy as np
import pytest
from ptx_machine.arrays import HostArrays
from ptx_machine.cupy_on_ptx import PtxLoader
from ptx_machine.schedules import SEEDS

from minimoe.testing.conformance import compare, rounded, to_device, to_host
from minimoe.testing.dense_examples import reference
from minimoe.testing.tolerances import KERNELS
from minimoe_cupy.activation import CudaActivation
from minimoe_cupy.norm import CudaNorm, row_layout

EPS = 1e-5
DTYPES = ("float32", "bfloat16")
WIDTHS = (1, 7, 768, 4096, 16384 + 8)  # of the last, float32 is too long to be kept in registers, backward in bfloat16 too
LIMIT = 1.5


class NormsAndActivations(CudaNorm, CudaActivation, HostArrays):
    name = "norms and activations"

    def __init__(self, seed):
        self.loader = PtxLoader(seed)


@cache
def backend(seed=SEEDS[0]):
    return NormsAndActivations(seed)


@cache
def floats(seed, *shape):
    array = np.random.default_rng([seed, *shape]).standard_normal(shape)
    array.flags.writeable = False
    return array


def norms(b, x, delta, weight, bias, dtotal, dy):
    """Both norms, alone and fused, forward and backward."""
    rms, layer = b.rms_norm(x, weight, EPS), b.layer_norm(x, weight, bias, EPS)
    add_rms, kept_rms = b.add_rms_norm(x, delta, weight, EPS)
    add_layer, kept_layer = b.add_layer_norm(x, delta, weight, bias, EPS)
    return (
        rms, layer, add_rms, add_layer, b.rms_norm_backward(dy, x, weight, rms[1]), b.layer_norm_backward(dy, x, weight, *layer[1:]),
        b.add_rms_norm_backward(dtotal, dy, kept_rms), b.add_layer_norm_backward(None, dy, kept_layer),
    )  # fmt: skip


def activations(b, x, dy):
    """All of them, forward and backward; swiglu of x beside its mirror image."""
    both = b.xp.concat((x, x[:, ::-1]), axis=1)
    results = []
    for limit in (0.0, LIMIT):
        results += [b.swiglu(both, limit), b.swiglu_backward(dy, both, limit)]
    for tanh in (False, True):
        results += [b.gelu(x, tanh), b.gelu_backward(dy, x, tanh)]
    return (*results, b.relu(x), b.relu_backward(dy, x))


def inputs(function, n, width):
    """The arguments of a function above. Away from zero: the norm of a row of one number has a gradient only where that is small."""
    x, dy = (np.copysign(0.5, a) + a for a in (floats(1, n, width), floats(2, n, width)))
    if function is activations:
        return x, dy
    return x, 0.25 * x, 1.0 + 0.1 * floats(4, width), floats(5, width), floats(6, n, width), dy


def conforms(function, given, dtype, kernels=None):
    """Check that the kernels, of backend() unless others are given, return what the reference returns in float64 for the same numbers."""
    kernels = kernels or backend()
    with np.errstate(all="ignore"):
        got = function(kernels, *to_device(kernels, given, dtype))
        wanted = function(reference(), *rounded(kernels, given, dtype))
    compare(to_host(kernels, got), to_host(kernels, wanted), KERNELS[dtype], function.__name__, str(given[0].shape), "")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [0, 1, 33])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("function", [norms, activations])
def test_rows_of_any_width_conform(function, width, n, dtype):
    conforms(function, inputs(function, n, width), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [7, 768, 16384 + 8])
@pytest.mark.parametrize("function", [norms, activations])
def test_nan_and_infinity_pass_as_in_the_reference(function, width, dtype):
    given = [array.copy() for array in inputs(function, 6, width)]
    for row, bad in enumerate((np.nan, np.inf, -np.inf)):
        given[0][row, row] = bad
        given[-1][row + 3, row] = bad
    conforms(function, tuple(given), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("function", [norms, activations])
def test_bits_are_equal_in_every_schedule(function, width, dtype):
    n = 2 if width > 4096 else 9
    first, *others = (to_host(b, function(b, *to_device(b, inputs(function, n, width), dtype))) for b in map(backend, SEEDS))
    for other in others:
        compare(other, first, 0.0, function.__name__, f"[{n},{width}] {dtype}", "A race: threads read what others may not have written yet")


@pytest.mark.parametrize("n, width", [(2500, 64), (1000, 129), (300, 1032)])
def test_weights_gradients_of_many_rows_are_the_sums_of_many_blocks(n, width):
    conforms(norms, inputs(norms, n, width), "float32")


def test_odd_rows_that_are_too_long_for_registers_conform():
    conforms(norms, inputs(norms, 2, 16384 + 7), "float32")


def test_rows_that_do_not_begin_at_16_bytes_conform():
    x = np.zeros(5 * 16 + 1, np.float32)[1:].reshape(5, 16)
    x[...] = floats(1, 5, 16)
    weight = floats(4, 16).astype(np.float32)
    assert x.ctypes.data % 16 and np.allclose(backend().rms_norm(x, weight, EPS)[0], reference().rms_norm(x, weight, EPS)[0], atol=1e-5)
    assert np.allclose(backend().swiglu(x), reference().swiglu(x), atol=1e-5)


def test_views_are_read_and_written_as_what_they_show():
    x, weight, out = floats(1, 16, 5).astype(np.float32).T, floats(4, 16).astype(np.float32), np.empty((16, 5), np.float32).T
    assert backend().rms_norm(x, weight, EPS, out)[0] is out and np.allclose(out, reference().rms_norm(x, weight, EPS)[0], atol=1e-5)
    assert backend().gelu(x, out=out) is out and np.allclose(out, reference().gelu(x), atol=1e-5)


@pytest.mark.parametrize(
    "call",
    [
        lambda b, x: b.rms_norm(x, np.ones(7, np.float32), EPS),
        lambda b, x: b.layer_norm(x, np.ones(8, np.float32), np.ones(3, np.float32), EPS),
        lambda b, x: b.rms_norm(x, np.ones(8, np.float32), EPS, np.empty((4, 4), np.float32)),
        lambda b, x: b.rms_norm_backward(x[:, :4], x, np.ones(8, np.float32), np.ones((4, 1), np.float32)),
        lambda b, x: b.rms_norm_backward(x, x, np.ones(8, np.float32), np.ones((3, 1), np.float32)),
        lambda b, x: b.add_rms_norm(x, x[:3], np.ones(8, np.float32), EPS),
        lambda b, x: b.swiglu(x, 0.0, np.empty((4, 3), np.float32)),
        lambda b, x: b.swiglu_backward(x, x),
        lambda b, x: b.gelu_backward(x[:3], x),
        lambda b, x: b.relu(x, np.empty((3, 8), np.float32)),
    ],
)
def test_shapes_that_do_not_fit_are_refused_as_the_reference_refuses_them(call):
    with pytest.raises(ValueError):
        call(backend(), floats(1, 4, 8).astype(np.float32))


@pytest.mark.parametrize(
    "v, most, width", [(1, 1024, 8192), (4, 1024, 16384), (8, 1024, 32768), (1, 512, 4096), (4, 512, 8192), (8, 512, 16384)]
)
def test_the_widest_row_that_is_kept_in_registers(v, most, width):
    assert row_layout(width, v, most).held and not row_layout(width + v, v, most).held


def test_the_threads_of_a_row_are_whole_warps_or_parts_that_tile_one():
    for width in range(1, 4096):
        shape = row_layout(width, 1, 512)
        assert shape.across * shape.v * shape.held >= width and (shape.across * shape.down) % 32 == 0
        assert shape.across % 32 == 0 or 32 % shape.across == 0
