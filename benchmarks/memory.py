"""The effect of the allocator's settings: a training step with glibc's defaults, with freed memory kept, and with huge pages as well.

`python -m benchmarks.memory [tiny] [--backend numba] [--rounds 5]`. Each measurement has its own process, in turns; figures are the median
over its steps, then over the rounds. Page faults are those of one step.
"""

import argparse
import multiprocessing
import resource
import statistics
import time
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import models
from benchmarks.machine import machine

SETTINGS = {"default": None, "freed memory kept": False, "kept, in huge pages": True}


def measure(name: str, backend: str, huge_pages: bool | None, answer: Any) -> None:
    import minimoe_numba
    import minimoe_numpy
    from minimoe_numpy.memory import keep_freed_memory

    def chosen() -> bool:
        return False if huge_pages is None else keep_freed_memory(huge_pages)

    for module in (minimoe_numba, minimoe_numpy):
        setattr(module, "keep_freed_memory", chosen)  # noqa: B010
    from benchmarks.peers import minimoe_step

    step = minimoe_step(models.case(name), backend, 2)
    for _ in range(4):
        step()
    times, faults = [], resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    answer.put((statistics.median(times) * 1e3, (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults) / 10))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", default="tiny")
    parser.add_argument("--backend", default="numba")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    context, results = multiprocessing.get_context("spawn"), {setting: [] for setting in SETTINGS}  # type: ignore[var-annotated]
    for _ in range(options.rounds):
        for setting, huge_pages in SETTINGS.items():
            answer = context.Queue()
            process = context.Process(target=measure, args=(options.name, options.backend, huge_pages, answer))
            process.start()
            results[setting].append(answer.get())
            process.join()
    console = Console()
    console.print(machine())
    table = Table("glibc's malloc", "ms per step", "fastest round", "page faults per step", title=f"{options.name} on {options.backend}")
    for setting, rows in results.items():
        times, faults = zip(*rows, strict=True)
        table.add_row(setting, f"{statistics.median(times):.1f}", f"{min(times):.1f}", f"{statistics.median(faults):,.0f}")
    console.print(table)


if __name__ == "__main__":
    main()
