"""The lines of metrics.jsonl: which can be read, which steps they leave out, and the digest by which a checkpoint knows them.

The digest is the SHA-256 of the lines up to a step, without the figures of the clock (`TIMED`), so that equal runs have equal digests. It
is kept up to date with each line that is appended, and computed from the file only when a run is resumed or verified.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from minimoe.runs.records import MetricsRow, checked
from minimoe.untrusted import Malformed, parse_json_object

NAME = "metrics.jsonl"
TIMED = re.compile(rb'("(?:step_ms|tokens_per_s|elapsed_s)": )[^,}]*')
EVALUATION = re.compile(rb', "val_.*\}$')  # the end of a line, if its step was evaluated
MOST_SHOWN = 5  # problems of one kind that are listed one by one


class Digest:
    """A running SHA-256 of lines without their newlines."""

    def __init__(self, lines: Iterable[bytes] = ()) -> None:
        self._hash = hashlib.sha256()
        for line in lines:
            self.add(line)

    def add(self, line: bytes) -> None:
        """Add the next line."""
        self._hash.update(TIMED.sub(rb"\1", line) + b"\n")

    def copy(self) -> "Digest":
        """Return another of the same lines, which goes on by itself."""
        other = Digest()
        other._hash = self._hash.copy()
        return other

    def hexdigest(self) -> str:
        """Return the digest of the lines so far."""
        return self._hash.hexdigest()


@dataclass(frozen=True)
class Lines:
    """Lines up to a step that can be read, with the step of each, and what is wrong, a line of text each."""

    kept: list[bytes]
    steps: list[int]
    problems: list[str]


def agree(lines: list[bytes], sha256: str) -> bool:
    """Return True if this is the digest of the lines, or was, before the last of them got the result of its evaluation.

    A checkpoint is saved before the last validation, and a kill may come between the line and the checkpoint's new digest.
    """
    digest = Digest(lines[:-1])
    before = digest.copy()
    for line in lines[-1:]:
        digest.add(line)
        before.add(EVALUATION.sub(b"}", line))
    return sha256 in (digest.hexdigest(), before.hexdigest())


def examine(lines: Iterable[bytes], step: int | None = None, sha256: str | None = None) -> Lines:
    """Find what is wrong with the lines up to a step, or with all. `sha256`: what a checkpoint of that step says; None in older ones."""
    kept: list[bytes] = []
    steps: list[int] = []
    unreadable: list[str] = []
    for number, line in enumerate(lines, start=1):
        try:
            at = step_of_line(line)
        except Malformed as error:
            unreadable.append(f"line {number} cannot be read (damaged): {error}")
            continue
        if step is None or at <= step:
            kept.append(line)
            steps.append(at)
    known = sha256 is not None and agree(kept, sha256)  # lines that they lack were lost, and reported, before that checkpoint
    faults = [] if known else _out_of_sequence(steps, max(steps, default=0) if step is None else step)
    problems = _first_of(unreadable, "lines cannot be read") + _first_of(faults, "faults of this kind")
    if not problems and sha256 is not None and not known:
        problems = [f"the lines of steps 1 to {step} are not those that were written (their SHA-256 is not the checkpoint's)"]
    return Lines(kept, steps, [f"{NAME}: {problem}" for problem in problems])


def step_of_line(line: bytes) -> int:
    """Return the step of a line. Raises `Malformed` if it cannot be read, or if a field has a wrong type."""
    row = parse_json_object(line)
    if row.get("step") is None:
        raise Malformed("names no step")
    return int(checked(row, MetricsRow)["step"])


def _out_of_sequence(steps: list[int], last: int) -> list[str]:
    """Return what keeps the steps from being 1, 2, ... to the last: some have no line, or several, or come too early."""
    found = []
    before = 0
    for step in (*sorted(set(steps)), last + 1):
        if step == before + 2:
            found.append(f"step {before + 1} has no line")
        elif step > before + 2:
            found.append(f"steps {before + 1} to {step - 1} have no line")
        before = step
    found += [f"step {step} has {count} lines" for step, count in Counter(steps).items() if count > 1]
    if not found and steps != sorted(steps):
        found.append("its lines are not in the order of their steps")
    return found


def _first_of(problems: list[str], what: str) -> list[str]:
    """Return the first problems, and how many there are besides."""
    rest = len(problems) - MOST_SHOWN
    return problems[:MOST_SHOWN] + ([f"{rest} more {what}"] if rest > 0 else [])
