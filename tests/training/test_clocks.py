"""The clock of training: on a device that computes while the host goes on, the times of the steps are those of the device."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_runs import tiny, write_text

import minimoe as mm
from minimoe.backend import kernel_names, load, unproven
from minimoe.errors import Diverged
from minimoe.study.bench.step import step_seconds
from minimoe.training import starting, trainer
from minimoe_numpy import NumpyBackend

STEP, FIRST = 0.03, 0.4  # seconds of the device for each step, and for the first, in which it compiles


class Asynchronous(NumpyBackend):
    """A device that is busy for some time after each step was launched. Reading an array, or `synchronize`, waits for it."""

    def __init__(self, first: float = STEP) -> None:
        self.due, self.costs, self.busy = 0.0, [first], 0.0

    def launch(self) -> None:
        cost = self.costs.pop() if self.costs else STEP
        self.due, self.busy = max(self.due, time.perf_counter()) + cost, self.busy + cost

    def sum_of_squares(self, x: Any) -> Any:  # of the gradient, once in a step for each group of parameters
        self.launch()
        return super().sum_of_squares(x)

    def to_host(self, array: Any) -> Any:
        self.synchronize()
        return super().to_host(array)

    def synchronize(self) -> None:
        time.sleep(max(0.0, self.due - time.perf_counter()))


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Asynchronous:
    found = Asynchronous(FIRST)
    monkeypatch.setattr(trainer, "load", lambda name: found)
    return found


def config(folder: Path, **settings: Any) -> Any:
    return tiny(write_text(folder), dense=True, steps=12, log_every=4, **settings)


def test_the_times_of_steps_on_an_asynchronous_device_add_up_to_the_time_that_passed(tmp_path: Path, device: Asynchronous) -> None:
    """The sum is at least the time for which the device was busy, and at most that of the whole run, with its evaluations."""
    began = time.perf_counter()
    rows = mm.train(config(tmp_path, eval_every=4), root=tmp_path).metrics
    wall, total = time.perf_counter() - began, sum(row["step_ms"] for row in rows) / 1e3
    assert device.busy > FIRST + 11 * STEP and 0.999 * device.busy <= total <= wall
    assert rows[-1]["elapsed_s"] == pytest.approx(total)
    assert all(row["tokens_per_s"] <= 4 * 16 / STEP * 1.01 for row in rows)


def test_waits_are_shared_by_the_steps_since_the_last_one(tmp_path: Path, device: Asynchronous) -> None:
    """The last step of four is not given the time of all four, and what the first step compiles is in its own line."""
    rows = mm.train(config(tmp_path), root=tmp_path).metrics
    each = device.busy - FIRST
    assert all(0.6 * each / 12 <= row["step_ms"] / 1e3 <= 2.5 * each / 12 for row in rows[4:])
    assert rows[0]["step_ms"] >= FIRST * 1e3 > max(row["step_ms"] for row in rows[1:])


def test_a_resumed_run_goes_on_with_the_time_of_the_first_session(tmp_path: Path, device: Asynchronous) -> None:
    run = mm.train(config(tmp_path), root=tmp_path, out=tmp_path / "run")
    before = run.metrics[-1]["elapsed_s"]
    device.costs = [FIRST]
    rows = starting.resume(tmp_path / "run", steps=16).metrics
    assert rows[11]["elapsed_s"] == before and rows[12]["elapsed_s"] >= before + FIRST
    assert rows[12]["step_ms"] >= FIRST * 1e3 > rows[13]["step_ms"]


def test_bench_waits_for_the_device(tmp_path: Path) -> None:
    seconds = step_seconds(config(tmp_path), Asynchronous(), steps=3)
    assert min(seconds) >= STEP * 0.99 and np.isfinite(seconds).all()


def test_a_diverged_run_suggests_to_check_a_backend_with_unproven_kernels(tmp_path: Path, device: Asynchronous) -> None:
    bad = config(tmp_path, lr=1e30, warmup_steps=0)
    for proven, expected in (({}, True), ({"sum_of_squares": "here, 2026-11-30"}, False)):
        device.proven = proven
        with np.errstate(all="ignore"), pytest.raises(Diverged) as raised:
            mm.train(bad, root=tmp_path)
        assert ("`minimoe backends check numpy`" in str(raised.value)) == expected and "\n" not in str(raised.value)


def test_references_count_as_proven_on_the_array_layers_of_minimoe_alone() -> None:
    class Elsewhere(NumpyBackend):
        name = "elsewhere"

    class Proven(Elsewhere):
        proven = dict.fromkeys(kernel_names(), "here, 2026-11-30")

    assert [unproven(load("numpy")), unproven(load("numba")), unproven(Elsewhere()), unproven(Proven())] == [False, False, True, False]
