"""metrics.jsonl of a run: a line for each step, appended while the run trains, and cut back to a checkpoint when it is resumed."""

import itertools
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from minimoe import files
from minimoe.errors import CheckpointError
from minimoe.runs import metrics_lines
from minimoe.runs.records import loss_of, metrics_row, valid_json, whole_lines, writing
from minimoe.untrusted import Malformed


class MetricsFile:
    """The metrics of the run in a folder. Every method raises `CheckpointError` if the file cannot be read or written."""

    def __init__(self, run: Path) -> None:
        self.path = run / metrics_lines.NAME
        self._known: metrics_lines.Digest | None = None  # the digest of all lines, once it has been computed

    def rows(self) -> list[dict[str, Any]]:
        """Return a dict for every step. An incomplete last line is left out; any other damaged line is an error."""
        rows: list[dict[str, Any]] = []
        for number, line in enumerate(whole_lines(self.path), start=1):
            try:
                rows.append(metrics_row(line))
            except Malformed as error:
                raise CheckpointError(f"{self.path}: line {number} {error}") from None
        return rows

    def losses(self) -> list[float | None]:
        """Return the loss of every step, without keeping the rest of its line; None where it is not finite, or the line is damaged."""
        return [loss_of(line) for line in whole_lines(self.path)]

    def readable_rows(self) -> tuple[list[dict[str, Any]], int]:
        """Return a dict for every line that can be read, and how many cannot: what is left of a damaged file can still be looked at."""
        rows: list[dict[str, Any]] = []
        lines = whole_lines(self.path)
        for line in lines:
            with suppress(Malformed):
                rows.append(metrics_row(line))
        return rows, len(lines) - len(rows)

    def last_row(self) -> dict[str, Any] | None:
        """Return the last line; None if there is none, or if it is damaged."""
        return _last_of(whole_lines(self.path))

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append a line for every row and wait until they are on the disk. NaN and infinity become null."""
        lines = [valid_json(row).encode() for row in rows]
        digest = self._digest()  # of the lines before these
        with writing(self.path):
            files.write_synced(self.path, b"".join(line + b"\n" for line in lines), "ab")
        for line in lines:
            digest.add(line)

    def replace_last(self, row: Mapping[str, Any]) -> None:
        """Write the line of a step again, which is the last or still missing; at any moment the file has the old line or the new one."""
        lines = whole_lines(self.path)
        last = _last_of(lines)
        kept = lines[:-1] if last is not None and last.get("step") == row["step"] else lines
        self._replace([*kept, valid_json(row).encode()])

    def sha256(self) -> str:
        """Return the digest of all lines so far, without the figures of the clock (`metrics_lines.py`)."""
        return self._digest().hexdigest()

    def cut(self, step: int, sha256: str | None = None) -> list[str]:
        """Remove the lines after a step and those that cannot be read; the other lines keep their bytes.

        If lines are damaged or missing, return a line about each, and keep the file as it was beside the new one. An incomplete last line
        is what a kill leaves, and no damage. `sha256`: the digest of the lines up to the step, as its checkpoint has it.
        """
        found = metrics_lines.examine(whole_lines(self.path), step, sha256)
        if not self.path.exists():
            self._known = None
            return found.problems
        problems = found.problems + ([self._keep_damaged()] if found.problems else [])
        self._replace(found.kept)
        return problems

    def _replace(self, lines: list[bytes]) -> None:
        self._known = None
        with writing(self.path):
            files.write_atomically(self.path, b"".join(line + b"\n" for line in lines).decode())

    def _keep_damaged(self) -> str:
        """Copy the file under a name that is free.   -> a line that says which"""
        endings = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
        copies = (self.path.with_name(f"metrics.damaged{ending}.jsonl") for ending in endings)
        copy = next(copy for copy in copies if not copy.exists())
        with writing(copy):
            files.write_synced(copy, self.path.read_bytes(), "xb")
        return f"the damaged file is kept as {copy}"

    def _digest(self) -> metrics_lines.Digest:
        if self._known is None:
            self._known = metrics_lines.Digest(whole_lines(self.path))
        return self._known


def _last_of(lines: list[bytes]) -> dict[str, Any] | None:
    """Return the fields of the last line; None if there is none, or if it is damaged."""
    with suppress(Malformed, IndexError):
        return metrics_row(lines[-1])
    return None
