"""Whole layers and steps, side by side: a process for each, which waits on a pipe for its turn.

Several sides start at once, because they first compile on the host; then they take turns, one at a time. A turn is many calls in a row,
including the host's part: if that is slower than the card, it is what a user waits for. The most important sides come first: they are
started first, and if memory or time does not suffice, the least important are left out.
"""

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu.clocks import Call
from benchmarks.gpu.lab import Lab, card, card_for_torch
from benchmarks.gpu.problems import Row, figures
from benchmarks.gpu.workers import Deadline, Failed, NoAnswer, Process

ROUNDS = {"full": 7, "quick": 3, "tiny": 2}
TURN = {"full": 0.4, "quick": 0.3, "tiny": 0.0}  # seconds
MOST = 200  # calls per turn
WARM_UP = {"minimoe": 4, "eager": 4, "compiled": 10}  # untimed calls after the first: minimoe records, compilers meet new shapes
TO_BE_READY = 0.8  # fraction of a case's time
SLOWEST = 30.0  # seconds that an answer may be late


class Made(NamedTuple):
    """A side that is ready: a call, which gives a loss or None, and notes about it."""

    call: Call
    notes: list[str]


@dataclass(frozen=True)
class Side:
    """One side: `make(lab)` returns its call, in its own process, if `libraries` are installed."""

    name: str
    kind: str  # minimoe, eager, compiled
    dtype: str
    make: Callable[[Lab], Made]
    libraries: tuple[str, ...] = ()
    memory: float = 0.0  # bytes of the card that it takes, roughly

    @property
    def missing(self) -> str:
        """The libraries that it needs and that are not installed."""
        return " and ".join(name for name in self.libraries if find_spec(name) is None)

    def row(self, sizes: dict[str, Any]) -> Row:
        """The row of this side, without its figure."""
        return {"side": self.name, "kind": self.kind, "dtype": self.dtype, "sizes": sizes}


# ---- in a side's process -------------------------------------------------------------------------------------------------------------


class Runner:
    """A side in its own process."""

    def __init__(self, side: Side, lab: Lab) -> None:
        began = time.perf_counter()
        self.lab, self.made = lab, side.make(lab)
        lab.clock.row(self.made.call, 1)
        self.first = time.perf_counter() - began
        lab.clock.row(self.made.call, WARM_UP[side.kind])
        self.usual = self.turn(1)

    def turn(self, count: int) -> float:
        """Seconds per call, from `count` calls."""
        return self.lab.clock.row(self.made.call, count) / count

    def end(self) -> Row:
        """The rest of its row. Raises ArithmeticError if the loss is not finite: such a side computes nothing."""
        result: Any = self.made.call()
        loss = None if result is None else float(result.item())
        if loss is not None and not math.isfinite(loss):
            raise ArithmeticError(f"the loss is {loss}")
        return {"loss": loss, "notes": self.made.notes}


def serve_side(side: Side, scale: str, pipe: Connection) -> None:
    """Get ready, then do as many calls as the pipe asks for, until it asks for 0."""
    runner = Runner(side, card(scale) if side.kind == "minimoe" else card_for_torch(scale))
    pipe.send(("ready", (runner.first, runner.usual)))
    while (count := pipe.recv()) is not None:
        pipe.send(("seconds", runner.turn(count)) if count else ("end", runner.end()))


# ---- in the process that asks ----------------------------------------------------------------------------------------------------------


@dataclass
class Player:
    """A side as seen by the process that measures."""

    side: Side
    process: Process
    began: float = field(default_factory=time.monotonic)
    first: float = math.nan  # seconds until the first call was done, including making and compiling
    usual: float = math.nan
    times: list[float] = field(default_factory=list)
    said: Row = field(default_factory=dict)  # the rest of its row, or why it failed

    @property
    def plays(self) -> bool:
        return "failed" not in self.said

    def hear(self, patience: float) -> Any:
        """The value of the next answer; None if none comes, and the side then takes no more turns."""
        try:
            return self.process.answer(patience)[1]
        except (NoAnswer, Failed) as error:
            self.fail(str(error))
            return None

    def ask(self, count: int, patience: float) -> Any:
        with suppress(NoAnswer):  # `hear` reports it
            self.process.send(count)
        return self.hear(patience)

    def fail(self, why: str) -> None:
        """Note why it failed and stop its process."""
        self.said = {"failed": why}
        self.process.stop(patience=0.0)

    def row(self, sizes: dict[str, Any], tokens: int) -> Row:
        found = self.side.row(sizes)
        if not self.plays or not self.times:
            return {**found, **(self.said if not self.plays else {"left_out": "the time was up before its first turn"})}
        times = figures(self.times)
        return {**found, **times, "first_s": self.first, "tokens_per_s": tokens / times["ms"] * 1e3, **self.said}


def compete(
    sides: list[Side], sizes: dict[str, Any], tokens: int, scale: str, deadline: Deadline, log: Path, memory: float = math.inf
) -> list[Row]:
    """Measure all sides of a case.   -> a row for each; together they may take `memory` bytes of the card"""
    able, rows = admitted(sides, memory)
    players: list[Player] = []
    try:
        late = get_ready(able, players, scale, deadline.share(TO_BE_READY), log)
        for _ in range(ROUNDS[scale]):
            take_turns(players, scale, deadline)
        for player in playing(players):
            player.said = player.ask(0, deadline.patience(SLOWEST)) or player.said
    finally:
        for player in playing(players):
            player.process.stop(patience=0.0)
    rows += [(side, "the time was up before it began") for side in late]
    return [player.row(sizes, tokens) for player in players] + [{**side.row(sizes), "left_out": why} for side, why in rows]


def admitted(sides: list[Side], memory: float) -> tuple[list[Side], list[tuple[Side, str]]]:
    """The sides that can be measured together, and those that cannot, with the reason."""
    able: list[Side] = []
    out: list[tuple[Side, str]] = []
    for side in sides:
        if side.missing:
            out.append((side, f"{side.missing} not installed"))
        elif side.memory > memory:
            out.append((side, "no memory for it beside the others"))
        else:
            able.append(side)
            memory -= side.memory
    return able, out


def get_ready(sides: list[Side], players: list[Player], scale: str, deadline: Deadline, log: Path) -> list[Side]:
    """Start each side in its process, several at once, and wait until it is ready or too late.   -> those that never began"""
    at_once = max(2, (os.cpu_count() or 1) // 2)
    waiting = list(sides)
    starting: list[Player] = []
    while deadline.left() and (waiting or starting):
        while waiting and len(starting) < at_once:
            side = waiting.pop(0)
            starting.append(Player(side, Process(log, serve_side, side, scale)))
            players.append(starting[-1])
        answers = wait([player.process.pipe for player in starting], deadline.left())
        for player in [player for player in starting if player.process.pipe in answers]:
            player.first, player.usual = player.hear(deadline.patience(1.0)) or (math.nan, math.nan)
            starting.remove(player)
    for player in starting:
        player.fail(f"not ready in {time.monotonic() - player.began:.0f} s")
    return waiting


def take_turns(players: list[Player], scale: str, deadline: Deadline) -> None:
    """Give each side one turn, as long as there is time."""
    for player in playing(players):
        if not deadline.left():
            return
        count = max(1, min(MOST, math.ceil(TURN[scale] / max(player.usual, 1e-6))))
        seconds = player.ask(count, deadline.patience(SLOWEST + deadline.left()))
        if seconds is not None:
            player.times.append(seconds)


def playing(players: list[Player]) -> Iterator[Player]:
    return (player for player in players if player.plays)
