"""samples.jsonl of a run: what its model did every `train.sample_every` steps, a line each, cut back to a checkpoint when it is resumed."""

from pathlib import Path
from typing import Any

from msgspec import Struct

from minimoe import files
from minimoe.errors import CheckpointError
from minimoe.runs.records import Count, checked, valid_json, whole_lines, writing
from minimoe.untrusted import Malformed, parse_json_object

NAME = "samples.jsonl"


class Sample(Struct):
    """A line: `text` is None, and `error` says why, where the model could show nothing."""

    step: Count
    text: str | None = None
    cut: bool = False
    error: str | None = None


class SamplesFile:
    """The samples of the run in a folder. Every method raises `CheckpointError` if the file cannot be read or written."""

    def __init__(self, run: Path) -> None:
        self.path = run / NAME

    def rows(self) -> list[dict[str, Any]]:
        """Return a dict for every sample; none if there is no file. An incomplete last line is left out; other damage is an error."""
        rows, problems = self._read()
        if problems:
            raise CheckpointError(f"{self.path}: {problems[0]}")
        return rows

    def append(self, row: dict[str, Any]) -> None:
        """Append a line and wait until it is on the disk."""
        with writing(self.path):
            files.write_synced(self.path, valid_json(row).encode() + b"\n", "ab")

    def cut(self, step: int) -> list[str]:
        """Remove the lines after a step, and those that cannot be read.   -> a line about each of the latter"""
        if not self.path.exists():
            return []
        rows, problems = self._read()
        with writing(self.path):
            files.write_atomically(self.path, "".join(valid_json(row) + "\n" for row in rows if row["step"] <= step))
        return [f"{NAME}: {problem}: it is removed" for problem in problems]

    def _read(self) -> tuple[list[dict[str, Any]], list[str]]:
        """Return the lines that can be read, and what is wrong with the others."""
        rows: list[dict[str, Any]] = []
        problems: list[str] = []
        for number, line in enumerate(whole_lines(self.path), start=1):
            try:
                rows.append(checked(parse_json_object(line), Sample))
            except Malformed as error:
                problems.append(f"line {number} cannot be read (damaged): {error}")
        return rows, problems
