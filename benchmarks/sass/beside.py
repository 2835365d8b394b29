"""Predictions beside the times that `python -m benchmarks.gpu` measured on a card, for the same operations at the same sizes."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.dense import dense_problems
from benchmarks.gpu.problems import Problem
from benchmarks.gpu.routed import routed_problems
from benchmarks.sass.cards import CARDS, Card
from benchmarks.sass.counts import Row, predicted
from benchmarks.sass.launches import Blank, Cupy, Launch

SIDES = "cupy"
FILES = "gpu*.json"


def measured(folder: Path, rows: Sequence[Row]) -> list[Row]:
    """For each operation that was measured on a card and whose kernels are all counted: its prediction and its time."""
    known = {row["key"]: row for row in rows}
    problems = {place_of(problem.kernel, problem.sizes, problem.dtype): problem for problem in all_problems()}
    found = []
    for path in sorted(folder.glob(FILES)):
        results = json.loads(path.read_text(encoding="utf-8"))
        card = card_of(str(results.get("machine", {}).get("card", "")))
        for row in results.get("kernels", []):
            problem = problems.get(place_of(row["kernel"], row["sizes"], row["dtype"]))
            if card is None or problem is None or row["side"] != SIDES or "ms" not in row:
                continue
            seconds = prediction(problem, card, known)
            if seconds is not None:
                sizes = ", ".join(f"{name} {value}" for name, value in row["sizes"].items())
                found.append({
                    "operation": row["kernel"], "sizes": sizes, "dtype": row["dtype"], "card": card.name,
                    "predicted_us": round(seconds * 1e6, 3), "measured_us": round(row["ms"] * 1e3, 3),
                })  # fmt: skip
    return found


def prediction(problem: Problem, card: Card, known: dict[str, Row]) -> float | None:
    """The least time of a problem's launches one after the other, in seconds; None if a kernel of it is not counted."""
    total = 0.0
    for launch in launches_of(problem):
        row = known.get(launch.key)
        if row is None or card.architecture not in row["code"]:
            return None
        small = row["flops"] / row["scale"] if launch.flops else row["bytes"] / row["scale"]  # of the launch that was executed
        total += predicted(row, card, launch.bytes, launch.flops, (launch.flops or launch.bytes) / small)["us"] * 1e-6
    return total


def launches_of(problem: Problem) -> list[Launch]:
    """What a problem launches on the backend `cupy`; nothing runs."""
    notes: list[Launch] = []

    def note(launch: Launch) -> None:
        notes.append(launch.forget())

    backend = Cupy(note, False, False)
    call = problem.make(backend, Blank(backend))
    notes.clear()
    call()
    return notes


def all_problems() -> Iterator[Problem]:
    for scale in ("full", "quick"):
        yield from routed_problems(scale)
        yield from dense_problems(scale)


def place_of(kernel: str, sizes: dict[str, Any], dtype: str) -> str:
    return json.dumps([kernel, sizes, dtype], sort_keys=True)


def card_of(name: str) -> Card | None:
    """The card whose name is in the name that the driver gives: NVIDIA H200."""
    return next((card for card in CARDS if card.name in name), None)
