"""A holder behaves as an array that can be written: its slices and reshapes are views."""

import gc
import weakref

import numpy as np
import pytest
from frozen_backend import FrozenBackend

import minimoe as mm
from minimoe.functional import Holder

FROZEN = FrozenBackend()
XP = FROZEN.xp


def held(*shape):
    return FROZEN.from_host(np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape))


def test_a_write_replaces_the_value_and_leaves_other_holders_of_it_alone():
    x = held(4)
    other, before = Holder(x.value, FROZEN), x.value
    x += 1.0
    x[1] = 9.0
    assert x.tolist() == [1, 9, 3, 4] and other.tolist() == [0, 1, 2, 3] and x.value is not before


@pytest.mark.parametrize(
    "index", [1, slice(1, 3), (slice(None), 2), (Ellipsis, slice(0, 2)), (1, None, slice(None)), (None, 1), -1, Ellipsis]
)
def test_a_basic_slice_reads_and_writes_what_it_is_a_part_of(index):
    x, expected = held(3, 4), np.arange(12, dtype=np.float32).reshape(3, 4)
    part = x[index]
    part *= 2.0
    expected[index] *= 2.0
    assert np.array_equal(x, expected)
    x[...] = -1.0  # after the view has read
    assert np.array_equal(part, np.full_like(expected[index], -1.0))


def test_a_view_of_a_reshaped_view_writes_to_the_root():
    flat = held(8)
    rows = flat[2:8].reshape((2, 3))
    rows[1][1:] = 7.0
    assert flat.tolist() == [0, 1, 2, 3, 4, 5, 7, 7] and rows[1].root is flat


def test_an_index_array_gives_a_copy_and_can_be_written_through_directly():
    x, rows = held(4), FROZEN.from_host(np.array([2, 0], dtype=np.int32))
    taken = x[rows]
    taken += 10.0
    assert x.tolist() == [0, 1, 2, 3]
    x[rows] = taken
    assert x.tolist() == [10, 1, 12, 3]
    x[x > 5.0] = 0.0
    assert x.tolist() == [0, 1, 0, 3]


def test_in_place_operators_keep_shape_and_dtype():
    x = held(2, 2)
    x += FROZEN.from_host(np.ones((1, 2)))  # float64, broadcast
    x //= 2
    assert x.dtype == np.float32 and x.tolist() == [[0, 1], [1, 2]]
    same = x
    same -= np.float32(1)
    assert same is x


def test_numbers_and_numpys_scalars_may_stand_on_either_side():
    x = held(3)
    for result in (2.0 * x, np.float32(2) * x, x * np.float32(2), x + x):
        assert isinstance(result, Holder) and result.tolist() == [0, 2, 4]
    assert (1 - x).tolist() == [1, 0, -1] and (x >= 1).tolist() == [False, True, True] and (2**x).tolist() == [1, 2, 4]


def test_it_is_iterated_over_its_first_axis_and_read_as_a_number():
    x = held(2, 2)
    assert [row.tolist() for row in x] == [[0, 1], [2, 3]] and len(x) == 2 and x.size == 4 and x.ndim == 2
    assert (float(x[1, 1]), int(x[1, 0]), bool(x[0, 0])) == (3.0, 2, False) and [7, 8, 9][(x[0, 1] > 0).item()] == 8
    assert x.T.tolist() == [[0, 2], [1, 3]]


def test_a_copy_shares_nothing_and_an_alias_is_the_holder_itself():
    x = held(3)
    assert XP.asarray(x) is x and XP.astype(x, np.float32, copy=False) is x
    copies = [XP.asarray(x, copy=True), XP.astype(x, np.float32), XP.reshape(x, (3, 1), copy=True)]
    x += 1.0
    assert all(np.asarray(copy).ravel().tolist() == [0, 1, 2] for copy in copies)


def test_views_that_nobody_holds_do_not_live_on():
    x = held(4)
    view = x[1:3]
    assert view.tolist() == [1, 2]
    died = weakref.ref(view)
    del view
    gc.collect()
    assert died() is None
    x += 1.0


def test_a_tensor_of_holders_is_read_by_other_libraries_through_dlpack():
    x = mm.tensor(np.arange(3.0), backend=FROZEN)
    assert isinstance(x.data, Holder) and np.from_dlpack(x).tolist() == [0, 1, 2]


def test_an_integer_of_numpy_gives_a_view_as_one_of_python_does():
    x = FROZEN.from_host(np.zeros((3, 2), np.float32))
    row = x[np.int64(1)]
    row += 2.0
    assert FROZEN.to_host(x).tolist() == [[0, 0], [2, 2], [0, 0]]
