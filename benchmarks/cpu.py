"""A whole training step on the CPU: minimoe beside PyTorch, torch.compile and transformers, and beside the matrix products alone.

`python -m benchmarks.cpu [NAME ...] [--backend numba] [--rounds 15] [--threads 2] [--no-compile] [--out FILE.json] [--plot FILE.svg]`
measures the models of `benchmarks/models.py`, or presets by name. `benchmarks/peers.py` says what a step is and which peers there are.

- Each side has its own process, so that its threads, memory and settings do not affect others; all have the same number of threads.
- The first step is reported separately, because it includes compilation; "ready" is the time from the start of the process to the end of
  that step, including imports and making the model. Some untimed steps follow, then rounds in which every side takes its turn, so that
  a machine that slows down slows all of them. Nothing runs for 50 ms before each turn: the threads of most libraries spin for some
  milliseconds after their last work, and would take the next side's cores. The first step of a turn is not counted: in training a step
  follows a step, not a pause. If steps are short, a turn has several.
- Ratios are of medians: a peer's over the row's, so 2.00 is twice as fast as the best peer.
- Matrix products alone: the products of one step with weights (forward, dx and dw), by NumPy into existing arrays; each expert has an
  even share of rows. Attention's own products are neither timed nor counted. The column of that name is their time over the row's: how
  near a step comes to the speed of its products (minimoe's own product is faster than NumPy's, so it can exceed 100%).
- Memory is the peak of the process, and that peak less what the process held before the model was made, that is without the libraries.
"""

import argparse
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.machine import machine
from benchmarks.models import NAMES, Case, case, products
from benchmarks.peers import sides
from benchmarks.turns import measure
from minimoe.errors import UserError

CACHES = ("TORCHINDUCTOR_CACHE_DIR", "NUMBA_CACHE_DIR")


def with_ratios(case: Case, rows: dict[str, Any]) -> dict[str, Any]:
    """A model's entry in the JSON file. Each row gets the medians of the best peer, best eager peer and products over its own."""
    found = {"tokens": case.tokens, "product_gflop": sum(p.training_flops for p in products(case)) / 1e9, "sides": rows}
    measured = [row for row in rows.values() if "failed" not in row]

    def best(*kinds: str) -> float:
        return min((row["median_ms"] for row in measured if row["kind"] in kinds), default=math.nan)

    peers, eager, alone = best("eager", "compiled"), best("eager"), best("products")
    for row in measured:
        if row["kind"] == "products":
            row["gflop_per_s"] = found["product_gflop"] / row["median_ms"] * 1e3
        else:
            own = row["median_ms"]
            ratios = {"over_best_peer": peers / own, "over_best_eager": eager / own, "products_share": alone / own}
            row |= {name: ratio for name, ratio in ratios.items() if not math.isnan(ratio)}
    return found


def table(name: str, found: dict[str, Any]) -> Table:
    """A table with a row for each side; one that failed says why."""
    title = f"{name}: {found['tokens']} tokens a step, {found['product_gflop']:.3g} GFLOP of products with weights"
    shown = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", caption_justify="left", padding=(0, 1, 0, 0))
    shown.add_column("side", no_wrap=True)
    for head in ("ready", "first", "median", "fastest", "tokens/s", "peak MB", "less libs", "best peer /", "best eager /", "products"):
        shown.add_column(head, justify="right", no_wrap=True)
    failures = [f"{side}: {row['failed']}" for side, row in found["sides"].items() if "failed" in row]
    shown.caption = escape("\n".join(failures)) or None
    for side, row in found["sides"].items():
        if "failed" in row:
            shown.add_row(side, "failed")
            continue
        share = f"{row['gflop_per_s']:.0f} GFLOP/s" if "gflop_per_s" in row else percent(row.get("products_share"))
        clocks = [f"{row['ready_s']:.1f} s", *(f"{row[f'{name}_ms']:,.1f} ms" for name in ("first", "median", "fastest"))]
        megabytes = [f"{row[name]:,.0f}" for name in ("peak_mb", "peak_less_libraries_mb")]
        ratios = [times(row.get("over_best_peer")), times(row.get("over_best_eager")), share]
        style = "bold" if row["kind"] == "minimoe" else None
        shown.add_row(side, *clocks, f"{row['tokens_per_s']:,.0f}", *megabytes, *ratios, style=style)
    return shown


def times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}"


def percent(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.0%}"


@contextmanager
def surroundings(threads: int, cold: bool) -> Iterator[None]:
    """Set what every side inherits: the number of threads, and with `cold` empty folders for compiled code."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
        os.environ[name] = str(threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        if cold:
            os.environ |= {name: str(Path(folder) / name) for name in CACHES}
        yield


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"models ({', '.join(NAMES)}: the default) or presets")
    parser.add_argument("--backend", action="append", metavar="NAME", help="of minimoe, once for each; default: numba")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2, help="of every side")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile")
    parser.add_argument("--side", action="append", metavar="TEXT", help="only the sides with this text in their name, and the products")
    parser.add_argument("--patience", type=float, default=300.0, help="seconds that a side has for an answer, its first step included")
    parser.add_argument("--cold", action="store_true", help="start with no compiler's cache, so that first steps contain all compiling")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    models = [case(name) for name in options.names or NAMES]
    console = Console(width=None if sys.stdout.isatty() else 180)
    results: dict[str, Any] = {
        "machine": machine(),
        "threads": options.threads,
        "rounds": options.rounds,
        "cold": options.cold,
        "models": {},
    }
    console.print(", ".join(f"{name} {value}" for name, value in results["machine"].items()), f"threads {options.threads}", sep=", ")
    with surroundings(options.threads, options.cold):
        for model in models:
            name = model.name
            chosen = sides(model, options.backend or ["numba"], options.threads, not options.no_compile)
            wanted = ("matrix products", *(options.side or [""]))
            chosen = {side: how for side, how in chosen.items() if any(text in side for text in wanted)}
            console.print(f"\n{name}")
            rows = measure(model, chosen, options.rounds, options.threads, options.patience, console)
            results["models"][name] = with_ratios(model, rows)
            console.print(table(name, results["models"][name]))
            if options.out:
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    if options.plot:
        from benchmarks.plot_cpu import draw

        draw(results, options.plot)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"benchmarks.cpu: {error}")
