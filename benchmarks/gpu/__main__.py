"""The command: its parts, each with a share of the time, and the files that it writes. `__init__.py` says what is measured and how."""

import argparse
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import benchmarks.gpu
from benchmarks.gpu import layer, step
from benchmarks.gpu.ceilings import ceilings_of
from benchmarks.gpu.lab import check_card
from benchmarks.gpu.problems import Row, said
from benchmarks.gpu.report import as_markdown, as_text, conclude, failures, sizes
from benchmarks.gpu.sides import compete
from benchmarks.gpu.suite import suite
from benchmarks.gpu.workers import Deadline, machine_facts, measured
from minimoe.errors import UserError

RESERVE = 15.0  # seconds for work in progress when the time is up, and for the report
MEMORY = 0.9  # fraction of the card's memory for sides that are measured together


class Session:
    """The results of one run of the command, and the files that hold them."""

    def __init__(self, out: Path, scale: str) -> None:
        self.out, self.scale = out, scale
        self.log = out / "log.txt"
        self.results: dict[str, Any] = {"scale": scale, "parts": {}}

    @property
    def memory(self) -> float:
        """Bytes of the card that sides may share."""
        return MEMORY * 1e9 * float(self.results.get("machine", {}).get("memory_gb", math.inf))

    def add(self, part: str, rows: list[Row]) -> None:
        """Add rows of a part, and save them at once."""
        self.results.setdefault(part, []).extend({"part": part, **row} for row in rows)
        self.save()
        for row in rows:
            figure = f"{row['ms']:.4f} ms" if "ms" in row else row.get("failed") or f"left out: {row['left_out']}"
            print(f"  {row.get('kernel', part)}, {sizes(row)}, {row['dtype']}, {row['side']}: {figure}", flush=True)

    def save(self) -> None:
        """Write gpu.json, which is whole at any moment."""
        write(self.out / "gpu.json", json.dumps(self.results, indent=1) + "\n")

    def finish(self) -> str:
        """Write all three files.   -> the text"""
        conclude(self.results)
        self.save()
        text = as_text(self.results)
        write(self.out / "gpu.txt", text)
        write(self.out / "gpu.md", as_markdown(self.results))
        return text


def write(path: Path, text: str) -> None:
    """Replace a file in one step: readers see the old text or the new."""
    draft = path.with_suffix(path.suffix + ".part")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)


# ---- the parts -------------------------------------------------------------------------------------------------------------------------


def find_machine(session: Session, deadline: Deadline) -> None:
    session.results["machine"] = machine_facts(session.scale, deadline, session.log)


def run_tests(session: Session, deadline: Deadline) -> None:
    for name, outcome in suite(session.out, deadline):
        session.results.setdefault("tests", {})[name] = outcome
        session.save()


def find_ceilings(session: Session, deadline: Deadline) -> None:
    for rows in measured("ceilings", session.scale, deadline, session.log):
        session.add("ceilings", rows)
        session.results["rates"] = ceilings_of(session.results["ceilings"])


def measure_kernels(session: Session, deadline: Deadline) -> None:
    for rows in measured("kernels", session.scale, deadline, session.log):
        session.add("kernels", rows)


def measure_layer(session: Session, deadline: Deadline) -> None:
    cases = layer.CASES[session.scale]
    weights = [2 if layer.goal_of(case) else 1 for case in cases]  # those with a target take longer
    for i, case in enumerate(cases):
        share = deadline.share(weights[i] / sum(weights[i:]))
        rows = compete(layer.layer_sides(case), case.sizes, case.n, session.scale, share, session.log, session.memory)
        session.add("layer", [{**row, **layer.goal_of(case), "case": case.dtype} for row in rows])


def measure_step(session: Session, deadline: Deadline) -> None:
    for case in step.CASES[session.scale]:
        rows = compete(step.step_sides(case), step.sizes_of(case), case.tokens, session.scale, deadline, session.log)
        session.add("step", [{**row, "goal": "step", "case": case.name} for row in rows])


PARTS: dict[str, tuple[float, Callable[[Session, Deadline], None]]] = {  # with their shares of the time
    "machine": (3, find_machine),
    "tests": (25, run_tests),
    "ceilings": (4, find_ceilings),
    "kernels": (23, measure_kernels),
    "layer": (24, measure_layer),
    "step": (21, measure_step),
}


def run_parts(session: Session, names: list[str], seconds: float) -> None:
    """Run parts one after the other; one that fails is reported, and its remaining time goes to the others."""
    whole = Deadline(seconds)
    for i, name in enumerate(names):
        share, work = PARTS[name]
        rest = sum(PARTS[other][0] for other in names[i:])
        time_of_it = whole.share(share / rest)
        print(f"{name} (up to {time_of_it.left():.0f} s)", flush=True)
        began = time.monotonic()
        session.results["parts"][name] = part = {"state": "stopped"}
        try:
            work(session, time_of_it)
            part["state"] = "done"
        except Exception as error:  # of any kind: it is reported, and the rest continues
            part["state"] = f"failed: {said(error)}"
            print(f"  {part['state']}", flush=True)
        finally:
            part["seconds"] = round(time.monotonic() - began, 1)  # type: ignore[assignment]
            session.finish()


def chosen(parts: list[str] | None) -> list[str]:
    """The parts to run, in order; kernels need the ceilings, and every figure needs its machine."""
    wanted = set(parts or PARTS) | {"machine"}
    if "kernels" in wanted:
        wanted.add("ceilings")
    return [name for name in PARTS if name in wanted]


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=benchmarks.gpu.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where gpu.json, gpu.txt and gpu.md go")
    parser.add_argument("--minutes", type=float, default=8.0, help="minutes for all parts together; default: 8")
    names = ", ".join(PARTS)
    parser.add_argument("--part", action="append", choices=list(PARTS), metavar="NAME", help=f"a part to run; may be repeated: {names}")
    parser.add_argument("--quick", action="store_true", help="only the sizes of the targets")
    options = parser.parse_args(argv)
    if options.minutes * 60.0 <= RESERVE:
        parser.error(f"--minutes {options.minutes:g}: at least {RESERVE / 60.0:g} minutes are needed")
    return options


def stop(*_: Any) -> None:
    """Handle a signal to end as an interrupt."""
    raise KeyboardInterrupt


def main(argv: list[str] | None = None) -> int:
    """Run the command.   -> exit code: 0; 1 if a part or a test failed; 2 for a user's mistake; 130 if interrupted"""
    options = arguments(argv)
    try:
        check_card()
        options.out.mkdir(parents=True, exist_ok=True)
    except (UserError, OSError) as error:
        print(f"benchmarks.gpu: {error}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, stop)
    session = Session(options.out, "quick" if options.quick else "full")
    try:
        run_parts(session, chosen(options.part), options.minutes * 60.0 - RESERVE)
    except KeyboardInterrupt:
        session.results["interrupted"] = True
        session.finish()
        return 130
    print(session.finish())
    return int(failures(session.results))


if __name__ == "__main__":
    sys.exit(main())
