"""The command: counts all kernels, saves them in benchmarks/results/sass.json, and writes the table in docs/gpu.md."""

import argparse
import os
import time
from importlib.metadata import version
from typing import Any

import benchmarks.sass
from benchmarks.sass.beside import measured
from benchmarks.sass.built import compiler
from benchmarks.sass.counts import rows
from benchmarks.sass.report import RESULTS, as_markdown, load, save, write_page


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sass", description=benchmarks.sass.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--page", action="store_true", help="write the page from the file of the last run, without counting again")
    parser.add_argument("--print", action="store_true", help="print the table, and write neither file nor page")
    cores = min(8, os.cpu_count() or 1)
    parser.add_argument("--processes", type=int, default=cores, help="processes that compile, threads that execute; default: one per core")
    options = parser.parse_args()
    began = time.monotonic()
    results = load() if options.page else counted(options.processes)
    results["measured"] = measured(RESULTS.parent, results["rows"])
    if options.print:
        print(as_markdown(results))
    else:
        save(results)
        write_page(results)
    print(f"{len(results['rows'])} kernels in {time.monotonic() - began:.0f} s")


def counted(processes: int) -> dict[str, Any]:
    """Counts everything anew."""
    major, minor = compiler().version
    facts = {"date": time.strftime("%Y-%m-%d"), "nvrtc": f"{major}.{minor}", "nvjitlink": version("nvidia-nvjitlink")}
    return {**facts, "rows": rows(processes)}


if __name__ == "__main__":
    main()
