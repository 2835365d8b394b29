"""`scatter_add` and the gradient of an embedding: a negative index counts from the end, and equal rows add up by either name."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ptx_machine.arrays import HostArrays
from ptx_machine.cupy_on_ptx import PtxLoader
from ptx_machine.numba_on_ptx import NumbaCudaOnPtx
from strict_backend import StrictBackend

import minimoe as mm
from minimoe.backend import load
from minimoe.engine.recording import Recorded
from minimoe_cupy.embedding import CudaEmbedding


class RowsOfCupy(CudaEmbedding, HostArrays):
    """The rows of `cupy`, executed on the processor."""

    name = "cupy_on_ptx"

    def __init__(self):
        self.loader = PtxLoader()


BACKENDS = {
    "numpy": load("numpy"), "numba": load("numba"), "strict": StrictBackend(), "cupy": RowsOfCupy(), "numba-cuda": NumbaCudaOnPtx(),
}  # fmt: skip

NUMBA = BACKENDS["numba"]
WEIGHT, ONES = (NUMBA.from_host(array.astype(np.float32)) for array in (np.arange(6).reshape(3, 2), np.ones((3, 2))))


def by_a_loop(target, index, values):
    """target[index[i]] += values[i], one after the other."""
    target = target.copy()
    for i, row in enumerate(index):
        target[row] += values[i]
    return target


@st.composite
def additions(draw):
    """A number of rows, and indices of them of which some count from the end."""
    vocab = draw(st.integers(1, 6))
    return vocab, draw(st.lists(st.integers(-vocab, vocab - 1), max_size=20))


@pytest.mark.parametrize("name", BACKENDS)
@settings(max_examples=40)
@given(case=additions())
def test_scatter_add_is_the_loop(name, case):
    backend, (vocab, rows) = BACKENDS[name], case
    index = np.array(rows, np.int32)
    target, values = np.ones((vocab, 2), np.float32), 2.0 ** np.arange(2 * len(rows), dtype=np.float32).reshape(-1, 2) % 8191
    on_device = backend.from_host(target)
    backend.scatter_add(on_device, backend.from_host(index), backend.from_host(values))
    np.testing.assert_allclose(backend.to_host(on_device), by_a_loop(target, index, values), rtol=1e-6)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("padding", [None, 0, -1])
def test_the_gradient_of_an_embedding_adds_a_row_named_from_either_end(name, padding):
    backend, ids = BACKENDS[name], np.array([[2, -1], [-3, 0], [-1, 1]], np.int32)
    dy = np.arange(1.0, 13.0, dtype=np.float32).reshape(3, 2, 2)
    wanted = by_a_loop(np.zeros((3, 2), np.float32), ids.reshape(-1), dy.reshape(-1, 2))
    if padding is not None:
        wanted[padding] = 0.0
    got = backend.embedding_backward(backend.from_host(dy), backend.from_host(ids), 3, padding)
    assert backend.to_host(got).tolist() == wanted.tolist()


@pytest.mark.parametrize("name", ["numpy", "numba"])
def test_an_index_that_names_no_row_is_refused_before_anything_is_added(name):
    for row in (3, -4):
        target = np.zeros((3, 1), np.float32)
        with pytest.raises(IndexError):
            BACKENDS[name].scatter_add(target, np.array([0, row], np.int32), np.ones((2, 1), np.float32))
        assert not target.any()


def test_selected_rows_add_their_gradients_under_both_names():
    x = mm.tensor(np.zeros((3, 2), np.float32), requires_grad=True)
    x[np.array([-1, 2, 2, 0])].sum().backward()
    assert x.grad.tolist() == [[1.0, 1.0], [0.0, 0.0], [3.0, 3.0]]


@pytest.mark.parametrize(
    "function, wanted",
    [
        (lambda ids: NUMBA.embedding(ids, WEIGHT), [[0, 1], [4, 5], [4, 5]]),
        (lambda ids: NUMBA.embedding_backward(ONES, ids, 3), [[1, 1], [0, 0], [2, 2]]),
    ],
    ids=["embedding", "embedding_backward"],
)
def test_a_recorded_step_counts_negative_ids_from_the_end_as_a_plain_one_does(function, wanted):
    recorded = Recorded(function, NUMBA, pytest.fail)
    for _ in range(4):
        assert recorded(NUMBA.from_host(np.array([0, -1, 2], np.int32))).tolist() == wanted
