"""Writes the report of `minimoe backends check`: how many cases passed, which failed, and what to fix first."""

from __future__ import annotations

import textwrap
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from minimoe.hints import command
from minimoe.testing.results import CRASHED, FAILED, PASSED, STATUSES, TIMEOUT, Listed, Result

COLUMNS = 80
HEADINGS = {FAILED: "FAILED", TIMEOUT: "TIMED OUT", CRASHED: "CRASHED"}


@dataclass
class Report:
    """The results of a check so far."""

    backend: str
    selection: dict[str, Any]  # the arguments of `cases`
    cases: list[Listed] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def bad(self) -> list[Result]:
        return [result for result in self.results if result.status != PASSED]

    @property
    def not_run(self) -> int:
        return len(self.cases) - len(self.results)

    @property
    def conforms(self) -> bool:
        """True if every chosen case passed."""
        return not self.bad and not self.not_run

    def to_dict(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        counts = Counter(result.status for result in self.results)
        results = [
            {
                "name": result.case.name, "level": result.case.level, "kernel": result.case.kernel, "status": result.status,
                "seconds": round(result.seconds, 4), "message": result.message,
            }
            for result in self.results
        ]  # fmt: skip
        return {
            "backend": self.backend, "cases": len(self.cases), "failed": {str(result.case): result.message for result in self.bad},
            "selection": self.selection, "conforms": self.conforms, "seconds": round(self.seconds, 3),
            "summary": {**{status: counts[status] for status in STATUSES}, "not_run": self.not_run}, "results": results,
        }  # fmt: skip

    def text(self) -> str:
        """Return the failures of the lowest level in full, the names of the others, and a line with the numbers."""
        return "\n".join([*self._failures(), self._total()])

    def _total(self) -> str:
        counts = Counter(result.status for result in self.results)
        parts = [f"{counts[PASSED]} passed", f"{counts[FAILED]} failed"]
        more = ((counts[TIMEOUT], "timed out"), (counts[CRASHED], "crashed"), (self.not_run, "not run"))
        parts += [f"{count} {what}" for count, what in more if count]
        minutes, seconds = divmod(round(self.seconds), 60)
        text = f"{self.backend}: {', '.join(parts)} in {minutes}:{seconds:02d}"
        if not self.conforms:
            return text
        where = [f" in {self.selection['kernel']}"] if self.selection.get("kernel") else []
        where += [f" at level {self.selection['level']}"] if self.selection.get("level") else []
        where += [", as far as --quick looks"] if self.selection.get("quick") else []
        return f"{text}: it conforms{''.join(where)}"

    def _failures(self) -> list[str]:
        """Return the failures of the lowest level (only its own kernels' if any of them failed), and the names of the others."""
        failed, lines = self.bad, []
        if not failed:
            return []
        lowest = [result for result in failed if result.case.level == failed[0].case.level]
        shown = [result for result in lowest if result.case.own or result.status != FAILED] or lowest
        for result in shown:
            text = textwrap.fill(
                result.message, COLUMNS, initial_indent="  ", subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
            )
            lines.append(f"{HEADINGS[result.status]} {result.case.name}, level {result.case.level}\n{text}\n")
        rest: dict[str, dict[str, None]] = {}
        for result in failed:
            if result not in shown:
                rest.setdefault(result.case.level, {})[result.case.kernel] = None
        if rest:
            levels = "; ".join(f"{level}: {', '.join(kernels)}" for level, kernels in rest.items())
            text = f"Failed too, and may pass when {'this does' if len(shown) == 1 else 'these do'}: {levels}"
            lines.append(textwrap.fill(text, COLUMNS, break_on_hyphens=False) + "\n")
        first = shown[0].case.kernel
        return [*lines, f"Fix {first} first, then check again:", f"  {command('backends', 'check', self.backend, '--kernel', first)}\n"]
