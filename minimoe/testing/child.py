"""The process in which `watched.py` runs cases: loads a backend, runs its cases, and reports a line of JSON for each thing that happens.

{"cases": [...]} once, then {"begun": number} and {"ended": [status, seconds, message]} for each case, or {"error": text} for a mistake of
the user. What a backend prints goes to standard error, so that it does not mix with these lines.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import threading
from dataclasses import astuple
from typing import Any

from minimoe.errors import UserError


def main(name: str, selection: dict[str, Any], first: int, limit: float) -> None:
    """Run the cases of a backend from number `first` on. Ends when standard input does, which is when the parent is gone."""
    reports = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it, and ends this process
    threading.Thread(target=_end_with_parent, daemon=True).start()
    faulthandler.enable()  # says where it crashed

    def report(**what: Any) -> None:
        reports.write(json.dumps(what) + "\n")
        reports.flush()

    from minimoe.backend import load
    from minimoe.testing.cases import cases
    from minimoe.testing.results import check_here, listed

    try:
        backend = load(name)
        chosen = cases(backend, **selection)
    except UserError as error:
        report(error=str(error))
        return
    report(cases=[astuple(listed(backend, case)) for case in chosen])
    for number, result in check_here(backend, chosen, first):
        if result is None:
            report(begun=number)
            faulthandler.dump_traceback_later(limit, exit=True)  # says where it hangs; its thread needs no interpreter
        else:
            faulthandler.cancel_dump_traceback_later()
            report(ended=[result.status, result.seconds, result.message])


def _end_with_parent() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)
