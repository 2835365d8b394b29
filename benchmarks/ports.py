"""Step times of the worked ports of examples/ beside NumPy's and Numba's: plain steps, and recorded ones where the port can record.

`python -m benchmarks.ports [NAME ...] [--model micro micro-moe] [--rounds 7] [--threads 2] [--out FILE.json]` measures
the ports named, by default each whose library is installed, on models of `benchmarks/models.py`: a small dense and a small routed one.
It prints a Markdown table.

- Each side has its own process, so that libraries' imports and threads do not affect others, and takes its turn in each round (`turns.py`);
  figures are medians over all rounds. Ratios are to NumPy's plain step of the same run: 0.50 is twice as fast as NumPy.
- First: the first step, in seconds, with all compiling. A recorded step is compiled in it, or in one of the next few.
- Memory: the peak of the process less what it held before the model was made; most of it is the compiler's where one compiles.
- XLA takes as many threads as there are cores, whatever `--threads` says.

`--profile NAME` shows instead where the time of a port's recorded step goes: on the host by function, for JAX also by XLA's operation.
"""

import argparse
import cProfile
import gzip
import json
import pstats
import re
import sys
import tempfile
from collections import Counter
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.machine import machine
from benchmarks.models import case
from benchmarks.peers import Side, Step, step_on
from benchmarks.turns import measure
from minimoe.backend import Backend, load
from minimoe.errors import UserError

EXAMPLES = Path(__file__).parents[1] / "examples"
BUILT_IN = ("numpy", "numba")
LIBRARIES = {"torch": "torch", "jax": "jax", "mlx": "mlx.core", "tinygrad": "tinygrad"}


def port(name: str) -> Backend:
    """Return a built-in backend, or that of examples/backend_NAME, which need not be installed."""
    if name in BUILT_IN:
        return load(name)
    sys.path.insert(0, str(EXAMPLES / f"backend_{name}"))
    made: Backend = import_module(f"minimoe_{name}").backend()
    return made


def port_step(model: Any, name: str, threads: int, recorded: bool) -> Step:
    """Return a training step of a model on a backend, as `peers.step_on` does."""
    return step_on(model, port(name), threads, recorded)


def installed() -> list[str]:
    """Return the ports that are here and whose libraries are installed."""
    return [name for name, library in LIBRARIES.items() if (EXAMPLES / f"backend_{name}").exists() and find_spec(library.split(".")[0])]


def sides(names: list[str], threads: int) -> dict[str, Side]:
    """Return each backend's plain step and, if it can record, its recorded one."""
    found = {}
    for name in (*BUILT_IN, *names):
        libraries = (
            "minimoe.model.transformer",
            "minimoe.training.optim",
            *([LIBRARIES[name]] if name in LIBRARIES else [f"minimoe_{name}"]),
        )
        for kind in ("plain",) if name in ("numpy", "torch") else ("plain", "recorded"):
            found[f"{name}, {kind}"] = Side("minimoe", libraries, port_step, (name, threads, kind == "recorded"))
    return found


def markdown(results: dict[str, Any]) -> str:
    """Return a table with a row for each side and model."""
    lines = [
        "| model | backend | step | first, s | median, ms | times NumPy's | memory, MB |",
        "| --- | --- | --- | --: | --: | --: | --: |",
    ]
    for model, rows in results["models"].items():
        numpy = rows["numpy, plain"].get("median_ms", float("nan"))
        for side, row in rows.items():
            cells = [model, *side.split(", ")]
            if "failed" in row:
                lines.append(f"| {' | '.join(cells)} | failed: {row['failed']} | | | |")
                continue
            cells += [f"{row['first_ms'] / 1e3:.1f}", f"{row['median_ms']:.1f}", f"{row['median_ms'] / numpy:.2f}"]
            lines.append(f"| {' | '.join(cells)} | {row['peak_less_libraries_mb']:,.0f} |")
    return "\n".join(lines)


def profile(name: str, model: str, threads: int, steps: int = 20) -> None:
    """Print where the time of recorded steps goes."""
    step = port_step(case(model), name, threads, True)
    for _ in range(4):
        step()
    if name == "jax":
        print(xla_operations(step, steps))
    watch = cProfile.Profile()
    watch.enable()
    for _ in range(steps):
        step()
    watch.disable()
    print(f"host time of {steps} recorded steps, by function:")
    pstats.Stats(watch).sort_stats("tottime").print_stats(12)


def xla_operations(step: Step, steps: int) -> str:
    """Return the largest kinds of XLA's operations by their time in a step, as JAX's profiler saw them. Threads overlap."""
    import jax

    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(steps):
                step()
        trace = next(Path(folder).rglob("*.trace.json.gz"))
        events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    spent: Counter[str] = Counter()
    for event in events:
        operation = event.get("args", {}).get("hlo_op")
        if operation is not None:
            spent[re.sub(r"[.\d]+$", "", operation)] += event["dur"]
    lines = [f"{microseconds / steps / 1e3:8.2f} ms  {operation}" for operation, microseconds in spent.most_common(15)]
    return "\n".join([f"XLA's operations in a step, {sum(spent.values()) / steps / 1e3:.1f} ms in all threads:", *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"ports: {', '.join(LIBRARIES)}")
    parser.add_argument("--model", nargs="+", default=["micro", "micro-moe"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--patience", type=float, default=600.0, help="seconds that a side has for an answer, its first step included")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    parser.add_argument("--profile", metavar="NAME")
    options = parser.parse_args()
    unknown = [name for name in (*options.names, *([options.profile] if options.profile else [])) if name not in (*LIBRARIES, *BUILT_IN)]
    if unknown:
        raise UserError(f"no port {unknown[0]!r}: there are {', '.join(LIBRARIES)}")
    if options.profile:
        profile(options.profile, options.model[-1], options.threads)
        return
    results: dict[str, Any] = {"machine": machine(), "threads": options.threads, "rounds": options.rounds, "models": {}}
    console = Console(stderr=True)
    for name in options.model:
        chosen = sides(options.names or installed(), options.threads)
        results["models"][name] = measure(case(name), chosen, options.rounds, options.threads, options.patience, console)
    print(markdown(results))
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"benchmarks.ports: {error}")
