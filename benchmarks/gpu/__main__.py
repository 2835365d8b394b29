"""The command: its parts, each with a share of the time, and the files that it leaves. What is measured stands in `__init__.py`."""

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

RESERVE = 15.0  # seconds, for what is under way when the time is up, and for the report
MEMORY = 0.9  # of the card's, for what is measured side by side


class Run:
    """A run's results, and the files that they are kept in."""

    def __init__(self, out: Path, scale: str) -> None:
        self.out, self.scale = out, scale
        self.log = out / "log.txt"
        self.results: dict[str, Any] = {"scale": scale, "parts": {}}

    @property
    def memory(self) -> float:
        """Bytes of the card that sides may share."""
        return MEMORY * 1e9 * float(self.results.get("machine", {}).get("memory_gb", math.inf))

    def add(self, part: str, rows: list[Row]) -> None:
        """Rows of a part, kept at once."""
        self.results.setdefault(part, []).extend({"part": part, **row} for row in rows)
        self.save()
        for row in rows:
            figure = f"{row['ms']:.4f} ms" if "ms" in row else row.get("failed") or f"left out: {row['left_out']}"
            print(f"  {row.get('kernel', part)}, {sizes(row)}, {row['dtype']}, {row['side']}: {figure}", flush=True)

    def save(self) -> None:
        """gpu.json, whole at any moment."""
        write(self.out / "gpu.json", json.dumps(self.results, indent=1) + "\n")

    def finish(self) -> str:
        """All three files; gives the text."""
        conclude(self.results)
        self.save()
        text = as_text(self.results)
        write(self.out / "gpu.txt", text)
        write(self.out / "gpu.md", as_markdown(self.results))
        return text


def write(path: Path, text: str) -> None:
    """A file that is the old one or the new one, whenever one looks."""
    draft = path.with_suffix(path.suffix + ".part")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)


# ---- the parts -------------------------------------------------------------------------------------------------------------------------


def find_machine(run: Run, deadline: Deadline) -> None:
    run.results["machine"] = machine_facts(run.scale, deadline, run.log)


def run_tests(run: Run, deadline: Deadline) -> None:
    for name, outcome in suite(run.out, deadline):
        run.results.setdefault("tests", {})[name] = outcome
        run.save()


def find_ceilings(run: Run, deadline: Deadline) -> None:
    for rows in measured("ceilings", run.scale, deadline, run.log):
        run.add("ceilings", rows)
        run.results["rates"] = ceilings_of(run.results["ceilings"])


def measure_kernels(run: Run, deadline: Deadline) -> None:
    for rows in measured("kernels", run.scale, deadline, run.log):
        run.add("kernels", rows)


def measure_layer(run: Run, deadline: Deadline) -> None:
    cases = layer.CASES[run.scale]
    weights = [2 if layer.goal_of(case) else 1 for case in cases]  # those with a target take longer
    for i, case in enumerate(cases):
        share = deadline.share(weights[i] / sum(weights[i:]))
        rows = compete(layer.layer_sides(case), case.sizes, case.n, run.scale, share, run.log, run.memory)
        run.add("layer", [{**row, **layer.goal_of(case), "case": case.dtype} for row in rows])


def measure_step(run: Run, deadline: Deadline) -> None:
    for case in step.CASES[run.scale]:
        rows = compete(step.step_sides(case), step.sizes_of(case), case.tokens, run.scale, deadline, run.log)
        run.add("step", [{**row, "goal": "step", "case": case.name} for row in rows])


PARTS: dict[str, tuple[float, Callable[[Run, Deadline], None]]] = {  # with their shares of the time
    "machine": (3, find_machine),
    "tests": (25, run_tests),
    "ceilings": (4, find_ceilings),
    "kernels": (23, measure_kernels),
    "layer": (24, measure_layer),
    "step": (21, measure_step),
}


def run_parts(run: Run, names: list[str], seconds: float) -> None:
    """One after the other; one that fails says so, and what it leaves of its time is the others'."""
    whole = Deadline(seconds)
    for i, name in enumerate(names):
        share, work = PARTS[name]
        rest = sum(PARTS[other][0] for other in names[i:])
        time_of_it = whole.share(share / rest)
        print(f"{name} (up to {time_of_it.left():.0f} s)", flush=True)
        began = time.monotonic()
        run.results["parts"][name] = part = {"state": "stopped"}
        try:
            work(run, time_of_it)
            part["state"] = "done"
        except Exception as error:  # of whatever kind: it is reported, and the rest goes on
            part["state"] = f"failed: {said(error)}"
            print(f"  {part['state']}", flush=True)
        finally:
            part["seconds"] = round(time.monotonic() - began, 1)  # type: ignore[assignment]
            run.finish()


def chosen(parts: list[str] | None) -> list[str]:
    """Parts in their order; kernels want ceilings to be measured against, and every figure its machine."""
    wanted = set(parts or PARTS) | {"machine"}
    if "kernels" in wanted:
        wanted.add("ceilings")
    return [name for name in PARTS if name in wanted]


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=benchmarks.gpu.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where gpu.json, gpu.txt and gpu.md go")
    parser.add_argument("--minutes", type=float, default=8.0, help="of all parts together; default: 8")
    parser.add_argument("--part", action="append", choices=list(PARTS), metavar="NAME", help=f"once for each wanted: {', '.join(PARTS)}")
    parser.add_argument("--quick", action="store_true", help="the targets' sizes alone")
    options = parser.parse_args(argv)
    if options.minutes * 60.0 <= RESERVE:
        parser.error(f"--minutes {options.minutes:g}: at least {RESERVE / 60.0:g} minutes are needed")
    return options


def stop(*_: Any) -> None:
    """A signal to end is an interrupt."""
    raise KeyboardInterrupt


def main(argv: list[str] | None = None) -> int:
    """0; 1 where a part or a test failed; 2 for what a user can put right; 130 when interrupted."""
    options = arguments(argv)
    try:
        check_card()
        options.out.mkdir(parents=True, exist_ok=True)
    except (UserError, OSError) as error:
        print(f"benchmarks.gpu: {error}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, stop)
    run = Run(options.out, "quick" if options.quick else "full")
    try:
        run_parts(run, chosen(options.part), options.minutes * 60.0 - RESERVE)
    except KeyboardInterrupt:
        run.results["interrupted"] = True
        run.finish()
        return 130
    print(run.finish())
    return int(failures(run.results))


if __name__ == "__main__":
    sys.exit(main())
