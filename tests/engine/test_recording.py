"""A step that is recorded and repeated does what a step that is computed does, and says when it is not repeated."""

import numpy as np
import pytest
from tiny_runs import tiny, train, untimed, weights_of, write_text

from minimoe.engine.recording import Recorded
from minimoe_numpy import NumpyBackend


class Records(NumpyBackend):
    """Repeats by calling again: whatever a step read from the host, or kept elsewhere than in place, would then differ."""

    def __init__(self):
        self.recorded = self.repeated = 0

    def record(self, work, say):
        self.recorded += 1
        work()

        def again():
            self.repeated += 1
            work()

        return again


def scaled(x, factor):
    return x * factor


def test_arrays_of_one_shape_are_recorded_and_repeated():
    backend, said = Records(), []
    function = Recorded(scaled, backend, said.append)
    results = [function(np.full(3, float(i)), np.array(2.0)) for i in range(6)]
    assert [float(r[0]) for r in results] == [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    assert (backend.recorded, backend.repeated, said) == (1, 6 - backend.warm_up - 1, [])


def test_another_shape_is_computed_as_it_comes_and_said_once():
    backend, said = Records(), []
    function = Recorded(scaled, backend, said.append)
    for _ in range(4):
        function(np.ones(3), np.array(2.0))
    assert np.array_equal(function(np.ones(5), np.array(3.0)), np.full(5, 3.0))
    function(np.ones(5), np.array(3.0))
    assert said == [
        "the step is not repeated from a recording: the step now has inputs of float64[5], float64[], "
        "but was recorded with float64[3], float64[]"
    ]


def test_a_step_that_cannot_be_recorded_goes_on_and_says_why():
    class Refuses(NumpyBackend):
        def record(self, work, say):
            work()
            say("a sort waits for the device")

    said = []
    function = Recorded(scaled, Refuses(), said.append)
    assert [float(function(np.ones(1), np.array(float(i)))[0]) for i in range(5)] == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert said == ["the step is not repeated from a recording: a sort waits for the device"]


def test_a_backend_that_records_nothing_is_asked_once_and_nothing_is_said():
    said = []
    function = Recorded(scaled, NumpyBackend(), said.append)
    for _ in range(5):
        function(np.ones(1), np.array(1.0))
    assert not function.possible and said == []


@pytest.mark.parametrize(
    "keys",
    [
        {"accumulate": 2, "model": {"dropout": 0.1}},
        {"moe": {"router": "sigmoid_bias", "bias_rate": 0.05}, "dtype": "float64"},
        {"moe": {"router": "noisy_topk", "capacity_factor": 1.0, "jitter": 0.1}},
        {"optimizer": "muon", "recompute": True},
    ],
    ids=["accumulation and dropout", "sigmoid_bias in float64", "noise and capacity", "muon, recomputed"],
)
def test_a_run_whose_steps_are_repeated_ends_with_the_same_bytes(keys, tmp_path, monkeypatch):
    runs, text = [], write_text(tmp_path)
    for backend in (NumpyBackend(), Records()):
        monkeypatch.setattr("minimoe.training.trainer.load", lambda name, backend=backend: backend)
        runs.append(train(tiny(text, checkpoint_every=5, **keys), tmp_path))
    assert backend.recorded == 1 and backend.repeated == 10 - backend.warm_up - 1
    plain, repeated = runs
    assert weights_of(plain.path, 10) == weights_of(repeated.path, 10)
    assert untimed(plain.metrics) == untimed(repeated.metrics)
