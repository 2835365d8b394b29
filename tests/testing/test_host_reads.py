"""The level "host reads" finds a read however it is made, names the kernel, and leaves the backend as it was."""

import numpy as np
import pytest
from frozen_backend import FrozenBackend
from strict_backend import StrictBackend

from minimoe.backend import load
from minimoe.reference import routers
from minimoe.testing import ConformanceError, cases
from minimoe.testing.host_reads import note_reads


class CopiesInGelu(StrictBackend):
    def swiglu(self, gate_up, limit=0.0, out=None):
        self.to_host(gate_up)
        return super().swiglu(gate_up, limit, out)


class AsksInRoute(StrictBackend):
    def route(self, ids, weights, valid, *, n_experts, rows, capacity=None, priority="position"):
        if bool(self.xp.any(ids < 0)):
            ids = ids + 0
        return super().route(ids, weights, valid, n_experts=n_experts, rows=rows, capacity=capacity, priority=priority)


class RoundsItsRate(StrictBackend):
    def adamw(self, inout_param, inout_m, inout_v, grad, *, lr, **given):
        super().adamw(inout_param, inout_m, inout_v, grad, lr=self.xp.full_like(lr, float(lr)), **given)


class ReadsOffsets(FrozenBackend):
    """It has no kernel for groups and calls the reference that reads."""

    def grouped_bias(self, bias, offsets, rows):
        self.offsets_on_host(offsets)
        return super().grouped_bias(bias, offsets, rows)

    def grouped_matmul(self, x, weight, offsets, transpose=False, out=None):
        self.offsets_on_host(offsets)
        return super().grouped_matmul(x, weight, offsets, transpose, out)


class ReadsInABackward(FrozenBackend):
    def dropout_backward(self, dy, rate, rng):
        np.asarray(dy)
        return super().dropout_backward(dy, rate, rng)


@pytest.mark.parametrize(
    "planted, says",
    [
        (CopiesInGelu, r"swiglu at a dense model: it read an array on the host through to_host \(test_host_reads.py, line \d+\)"),
        (AsksInRoute, "route at router softmax_topk: .* through __bool__"),
        (RoundsItsRate, "adamw at a dense model: .* through __float__"),
        (ReadsOffsets, "grouped_matmul at router .* through offsets_on_host, though the backend says reads_offsets = False"),
        (ReadsInABackward, "dropout_backward at a dense model: .* through __array__"),
    ],
)
def test_a_planted_read_is_found_and_named(planted, says):
    backend = planted()
    with pytest.raises(ConformanceError, match=says):
        for case in cases(backend, level="host reads")[:2]:
            case.run()


def test_there_is_a_case_for_every_router_and_one_of_them_is_quick():
    backend = load("numpy")
    names = [case.name for case in cases(backend, level="host reads")]
    assert all(any(name.startswith(f"router {router},") for name in names) for router in routers.names())
    assert len(cases(backend, level="host reads", quick=True)) == 1


def test_offsets_may_be_read_where_the_backend_says_so():
    backend = StrictBackend()
    with note_reads(backend) as reads:
        assert backend.offsets_on_host(backend.from_host(np.array([0, 2], np.int32))) == [0, 2]
    assert reads.offsets == 1 and reads.found == []


def test_each_way_to_read_is_noted_and_nothing_is_left_behind():
    backend = FrozenBackend()
    x = backend.from_host(np.ones(()))
    before = dict(vars(type(x))), dict(vars(backend))
    for read in (bool, int, float, np.asarray, lambda x: backend.to_host(x)):
        with note_reads(backend) as reads:
            assert read(x) == 1
        assert [kernel for kernel, *_ in reads.found] == ["training"]
    assert (dict(vars(type(x))), dict(vars(backend))) == before


def test_arrays_that_can_be_read_without_waiting_may_be_read_by_the_backend_alone():
    backend = load("numba")
    x = backend.from_host(np.ones((), np.int32))
    with note_reads(backend) as reads:
        int(x)  # here, as in code of the backend
        exec(compile("int(x)", "reference.py", "exec"), {"x": x, "__name__": "minimoe.reference.loss"})
    assert [place for _, _, place in reads.found] == ["reference.py, line 1"]
