"""The level "recording" finds backends that repeat a step wrongly, and says which step."""

import re

import numpy as np
import pytest
from frozen_backend import CompilingBackend

from minimoe.backend import load
from minimoe.testing import ConformanceError, cases
from minimoe_numpy import NumpyBackend


class Replays(NumpyBackend):
    """Repeats a step by calling it. Each subclass has one fault."""

    def record(self, work, say):
        work()
        return work


class RunsTwice(Replays):
    def record(self, work, say):
        work()
        work()
        return work


class DoesNotRun(Replays):
    def record(self, work, say):
        work.result = work.function(*[self.xp.asarray(array, copy=True) for array in work.inputs])
        return lambda: None


class OldArguments(Replays):
    """Reads the arguments of the first step at every later one."""

    def record(self, work, say):
        first = [np.array(array) for array in work.inputs]
        work()

        def again():
            work.result = work.function(*first)

        return again


class ForgetsState(Replays):
    """Compiles the state's values in: what is written between steps is lost."""

    def record(self, work, say):
        work()
        after = [np.array(array) for array in work.state]

        def again():
            for array, value in zip(work.state, after, strict=True):
                array[...] = value
            work()
            after[:] = [np.array(array) for array in work.state]

        return again


class RoundsState(Replays):
    """Keeps the first array of the state in less precision than a plain step does."""

    def record(self, work, say):
        work()

        def again():
            work()
            work.state[0][...] = np.asarray(work.state[0], dtype=np.float16)

        return again


class OneResult(Replays):
    """Returns the same array each time, without `Recorded`'s copy."""

    def record(self, work, say):
        work()
        kept = np.array(work.result)

        def again():
            work()
            kept[...] = work.result * 1.001
            work.result = kept

        return again


class Refuses(Replays):
    def record(self, work, say):
        say("a sort waits for the device")
        work()
        return


class NearlyExact(CompilingBackend):
    """Promises bytes, and differs from a plain step in the last bit."""

    def compile(self, function):
        step = super().compile(function)

        def off(state, arguments):
            after, result = step(state, arguments)
            return after, np.nextafter(result, np.inf, dtype=result.dtype)

        return off


class NearlyAsPromised(NearlyExact):
    exact_recording = False


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (RunsTwice, "record at .* figures of step 2"),
        (DoesNotRun, "record at .* figures of step 3"),
        (OldArguments, "record at .* figures of step 3"),
        (ForgetsState, "record at .* step 4"),
        (RoundsState, "record at "),
        (OneResult, "record at .* figures of step 3"),
        (Refuses, "a sort waits for the device.* it can be recorded"),
        (NearlyExact, "record at .* figures of step 0.* tolerance 0"),
    ],
)
def test_a_wrong_recording_is_found(kind, says):
    failed = []
    for case in cases(kind(), level="recording"):
        try:
            case.run()
        except ConformanceError as error:
            failed.append(str(error))
    assert failed
    assert any(re.search(says, text) for text in failed), failed[0]


@pytest.mark.parametrize("backend", [Replays(), NearlyAsPromised(), load("numba")], ids=["replays", "to rounding", "numba"])
def test_a_right_recording_passes(backend):
    found = cases(backend, level="recording")
    assert len(found) >= 11
    for case in found:
        case.run()


def test_a_backend_that_does_not_record_has_no_cases():
    assert cases(load("numpy"), level="recording") == []
