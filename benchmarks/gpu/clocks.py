"""Clocks: they time calls on a card, by CUDA events, or on the processor."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

Call = Callable[[], object]

AT_ONCE = 16  # calls queued behind one hold
LONGEST_HOLD = 0.05  # seconds
MARGIN = 2.0  # a hold lasts this many times as long as the host takes to queue the calls
HOLD = r"""
extern "C" __global__ void hold(long long ticks) {
    const long long began = clock64();
    while (clock64() - began < ticks) {}
}
"""


class Clock(ABC):
    """Times calls, in seconds."""

    @abstractmethod
    def row(self, call: Call, count: int) -> float:
        """The time of `count` calls in a row, including the host's part."""

    def each(self, calls: Sequence[Call], count: int) -> list[float]:
        """The device's time of each of `count` calls, taken from `calls` in rotation; this clock includes the host's part."""
        return [self.row(calls[i % len(calls)], 1) for i in range(count)]


class WallClock(Clock):
    """For work of the processor, and where no better clock exists."""

    def __init__(self, synchronize: Call) -> None:
        self.synchronize = synchronize

    def row(self, call: Call, count: int) -> float:
        self.synchronize()
        began = time.perf_counter()
        for _ in range(count):
            call()
        self.synchronize()
        return time.perf_counter() - began


class EventClock(Clock):
    """CUDA events on CuPy's current stream. PyTorch's default stream is the same one, the default stream of the device.

    A call of some microseconds ends before the host has queued the next event. So a kernel that only waits holds the stream until all is
    queued, and the time between two events is the device's work alone. A call in which the host waits for the device cannot be held.
    """

    def __init__(self) -> None:
        import cupy

        self.cuda: Any = cupy.cuda
        self.hold = cupy.RawKernel(HOLD, "hold")
        kilohertz = cupy.cuda.Device().attributes.get("ClockRate", 2_000_000)
        self.ticks_per_second = kilohertz * 1e3  # of the highest clock: a hold is never too short

    def each(self, calls: Sequence[Call], count: int) -> list[float]:
        times: list[float] = []
        self._synchronize()
        began = time.perf_counter()
        calls[0]()
        host = time.perf_counter() - began
        at_once = max(1, min(AT_ONCE, int(LONGEST_HOLD / MARGIN / max(host, 1e-6))))
        while len(times) < count:
            n = min(at_once, count - len(times))
            self._hold(MARGIN * host * n + 1e-4)
            marks = []
            for i in range(len(times), len(times) + n):
                first = self._mark()
                calls[(i + 1) % len(calls)]()  # the first set of inputs was used just now
                marks.append((first, self._mark()))
            self._synchronize()
            times += [self._between(*pair) for pair in marks]
        return times

    def row(self, call: Call, count: int) -> float:
        self._synchronize()
        first = self._mark()
        for _ in range(count):
            call()
        last = self._mark()
        last.synchronize()
        return self._between(first, last)

    def _hold(self, seconds: float) -> None:
        if seconds <= LONGEST_HOLD + 1e-3:
            self.hold((1,), (1,), (int(seconds * self.ticks_per_second),))

    def _mark(self) -> Any:
        event = self.cuda.Event()
        event.record()
        return event

    def _between(self, first: Any, last: Any) -> float:
        return float(self.cuda.get_elapsed_time(first, last)) / 1e3

    def _synchronize(self) -> None:
        self.cuda.get_current_stream().synchronize()


class TorchClock(Clock):
    """CUDA events by PyTorch, for a process without CuPy."""

    @property
    def cuda(self) -> Any:
        import torch

        return torch.cuda

    def row(self, call: Call, count: int) -> float:
        first, last = (self.cuda.Event(enable_timing=True) for _ in range(2))
        self.cuda.synchronize()
        first.record()
        for _ in range(count):
            call()
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last)) / 1e3
