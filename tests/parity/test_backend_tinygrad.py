"""examples/backend_tinygrad, loaded from its source: what every port is tested for (ports.py), and what tinygrad does otherwise."""

import math
import os

import numpy as np
import pytest
from parity.ports import Port, PortTests

from minimoe.backend import BackendUnavailable, Work

os.environ["DEV"] = "CPU"  # whatever else tinygrad would choose; it reads this when it is imported
pytestmark = pytest.mark.parity
PORT = Port("tinygrad")
TINYGRAD = PORT.backend
XP = TINYGRAD.xp


class TestTinygrad(PortTests):
    port = PORT
    one_in = 20


def array(*numbers, dtype=np.float32):
    return TINYGRAD.from_host(np.array(numbers, dtype=dtype))


def test_without_a_device_it_says_that_the_cpu_needs_clang(monkeypatch):
    class NoDevice:
        DEFAULT = "CPU"

        def __getitem__(self, name):
            raise FileNotFoundError("[Errno 2] No such file or directory: 'clang'")

    monkeypatch.setattr(PORT.module, "Device", NoDevice())
    with pytest.raises(BackendUnavailable, match="needs the compiler clang on the PATH"):
        PORT.module.backend()


def test_nan_passes_through_max_and_sign_and_equal_infinities_through_logaddexp():
    x = array(1.0, math.nan, -2.0, 0.0)
    assert np.array_equal(XP.max(x), np.float32(math.nan), equal_nan=True)
    assert np.array_equal(XP.max(XP.reshape(x, (2, 2)), axis=1), [math.nan, 0.0], equal_nan=True)
    assert np.array_equal(XP.sign(x), [1.0, math.nan, -1.0, 0.0], equal_nan=True)
    infinite = array(-math.inf, math.inf, -math.inf)
    assert np.array_equal(XP.logaddexp(infinite, array(-math.inf, math.inf, 1.0)), [-math.inf, math.inf, 1.0])


@pytest.mark.parametrize("shape, axis", [((7,), -1), ((0,), -1), ((3, 33), -1), ((5, 4), 0)])
def test_a_sort_is_stable_with_nan_last(shape, axis):
    keys = np.random.default_rng(0).integers(0, 3, shape).astype(np.float32)
    keys[keys == 2] = math.nan
    assert np.array_equal(XP.argsort(TINYGRAD.from_host(keys), axis=axis, stable=True), np.argsort(keys, axis=axis, stable=True))


def test_a_number_from_the_host_is_no_constant_of_a_kernel():
    """Else a learning rate that changes would compile kernels at each step."""
    for number in (TINYGRAD.from_host(np.array(0.5, np.float32)), XP.asarray(0.5)):
        assert number.value.uop.base.is_realized and number.item() == 0.5


def test_reading_one_number_computes_what_else_is_alive():
    kept, read = array(1.0), array(2.0)
    kept += 1.0
    read += 1.0
    assert not kept.value.uop.base.is_realized
    assert read.item() == 3.0 and kept.value.uop.base.is_realized


def test_a_recorded_step_keeps_no_array_that_the_next_one_overwrites():
    """Nor the first value of an array that it only reads, which may be replaced from outside."""
    total, factor = array(0.0), array(2.0)

    def add(number):
        total[...] = total + factor * number
        return total * 10.0

    work = Work(add, [array(1.0)], [total, factor])
    said = []
    again = TINYGRAD.record(work, said.append)
    assert not said and total.item() == 2.0 and work.result.item() == 20.0
    seen = [total.value]
    for _ in range(3):
        again()
        seen.append(total.value)
    assert [x.item() for x in seen] == [2.0, 4.0, 6.0, 8.0] and work.result.item() == 80.0
    factor[...] = 5.0
    work.inputs[0][...] = array(10.0)
    again()
    assert total.item() == 58.0 and factor.item() == 5.0
