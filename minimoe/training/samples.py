"""What a run shows of its model while it trains, every `train.sample_every` steps: a text, a filled blank, a digit and its guess.

Every sample of a run begins alike and draws the same random numbers, which are its own, so that samples differ by what was learned, and
training does not depend on them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Timer
from time import monotonic as now
from typing import Any

from minimoe.errors import UserError
from minimoe.model.transformer import Transformer
from minimoe.training.tasks import Task

MOST_SECONDS = 10.0  # of one sample, from its first piece on: some backends compile before it
SOON = 2.0  # seconds until a user is told what the wait is for


def take_sample(task: Task, model: Transformer, step: int, number: int) -> dict[str, Any]:
    """Return the line of samples.jsonl of a step; `number` counts the run's samples. A slow sample is cut, and the line says so."""
    pieces: list[str] = []
    until = None
    try:
        for piece in task.sample(model, number):
            pieces.append(piece)
            until = now() + MOST_SECONDS if until is None else until
            if now() > until:
                return {"step": step, "text": "".join(pieces), "cut": True}
    except UserError as error:  # such as predictions that are not finite: the run itself may go on
        return {"step": step, "text": None, "error": str(error)}
    return {"step": step, "text": "".join(pieces)}


@contextmanager
def told_if_slow(tell: Callable[[str], None]) -> Iterator[None]:
    """Tell what is being waited for if the work within takes long, as where a library compiles what generates text."""
    timer = Timer(SOON, tell, ["taking a sample"])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def shown(row: dict[str, Any]) -> str:
    """Return a sample as a terminal shows it."""
    text = f"none: {row['error']}" if row["text"] is None else row["text"] + (" ..." if row.get("cut") else "")
    return f"sample at step {row['step']}:\n" + "\n".join(f"  {line}".rstrip() for line in text.strip("\n").split("\n"))
