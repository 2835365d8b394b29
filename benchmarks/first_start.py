"""Time from starting `minimoe train` to the end of its first step, from an empty cache of kernels and from a full one.

    python -m benchmarks.first_start [--rounds 5] [--preset tiny-moe] [--out benchmarks/results/first_start.json]

Each round takes a fresh NUMBA_CACHE_DIR: a cold start, a warm start, then `resume` and `generate` on the cold run. Compiled kernels are
counted as files that appear in the cache; a kernel is one file of code. The medians are those of the table. Run it on a quiet machine.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.machine import machine

TRAIN = """
import sys, time
import minimoe as mm
from minimoe.training.trainer import Listener

class FirstStep(Listener):
    def stepped(self, step):
        if step == 1:
            print("FIRST", time.time(), flush=True)

mm.train(sys.argv[1], steps=3, out=sys.argv[2], backend="numba", listener=FirstStep())
"""


def code_files(cache: Path) -> set[str]:
    """The compiled functions that a cache holds."""
    return {path.name for path in cache.rglob("*.nbc")}


def fresh(code: list[str], cache: Path) -> str:
    """The output of a fresh process with this cache."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(cache)}
    done = subprocess.run([sys.executable, *code], capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout


def first_step(preset: str, run: Path, cache: Path) -> tuple[float, int]:
    """Seconds to the end of the first step, and how many functions were compiled in all."""
    known, began = code_files(cache), time.time()
    words = fresh(["-c", TRAIN, preset, str(run)], cache)
    return float(words.split("FIRST")[1].split()[0]) - began, len(code_files(cache) - known)


def measure(preset: str, rounds: int) -> dict[str, list[float]]:
    """Seconds and compiled functions of each round."""
    names = ("cold_s", "warm_s", "cold_kernels", "warm_kernels", "resume_again", "generate_again")
    found: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            cache, cold, warm = (Path(folder) / name for name in ("cache", "cold", "warm"))
            for name, run in (("cold", cold), ("warm", warm)):
                seconds, kernels = first_step(preset, run, cache)
                found[f"{name}_s"].append(seconds)
                found[f"{name}_kernels"].append(kernels)
            commands = {"resume": ["resume", str(cold), "--steps", "4"], "generate": ["generate", str(cold), "--tokens", "8"]}
            for name, command in commands.items():
                before = {path: path.stat().st_mtime_ns for path in cache.rglob("*.nbc")}
                fresh(["-m", "minimoe", *command], cache)
                found[f"{name}_again"].append(sum(path.stat().st_mtime_ns != at for path, at in before.items()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--preset", default="tiny-moe")
    parser.add_argument("--out", type=Path, help="write the figures there as JSON")
    arguments = parser.parse_args()
    found = measure(arguments.preset, arguments.rounds)
    print(f"{arguments.preset}, medians of {arguments.rounds}, {len(os.sched_getaffinity(0))} cores")
    print("start  first step, s   from .. to        functions compiled")
    for name in ("cold", "warm"):
        seconds = found[f"{name}_s"]
        print(f"{name}   {median(seconds):13.2f}   {min(seconds):5.2f} .. {max(seconds):5.2f}    {median(found[f'{name}_kernels']):g}")
    for name in ("resume", "generate"):
        print(f"{name}: compiled again {sum(found[f'{name}_again']):g} functions that training had compiled")
    if arguments.out:
        medians = {f"median_{name}": median(values) for name, values in found.items()}
        figures: dict[str, Any] = {"machine": machine(), "preset": arguments.preset, **medians, "rounds": found}
        arguments.out.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
