"""Time and memory of opening a large model folder: `python -m benchmarks.loading [--gigabytes 2] [--max-memory 1]`.

A Mixtral-shaped folder of random bf16 weights is written to a temporary folder, and opened by a fresh process that reports its
resident memory before, after, and while it generates; with --max-memory its weights take no more than that.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.folders import mixtral_config, write_random
from benchmarks.machine import machine

CHILD = """
import json, sys, time
import numpy as np
import minimoe as mm
from minimoe.backend import load as backend
from minimoe.generation.generation import Sampling, generate_ids

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

path, limit, tokens = sys.argv[1], int(sys.argv[2]) or None, int(sys.argv[3])
mm.set_backend(sys.argv[4])
import minimoe.pretrained.loading
before, began = resident(), time.perf_counter()
model = mm.load(path, max_memory=limit)
opened, after = time.perf_counter() - began, resident()
ids, peak, began = [], 0, time.perf_counter()
for token in generate_ids(model, [1, 2, 3], tokens, Sampling(temperature=0.0)):
    ids.append(token)
    peak = max(peak, resident())
    if len(ids) == 1:
        first, began = time.perf_counter() - began, time.perf_counter()
took = time.perf_counter() - began
touched = sum(int((np.asarray(rows) > 0).sum()) for rows in model.expert_rows)
print(json.dumps({"open_s": opened, "opened_bytes": after - before, "first_token_s": first, "s_per_token": took / max(1, tokens - 1),
                  "generating_bytes": peak - before, "experts_touched": touched, "ids": ids}))
"""


def measure(path: Path, limit: int = 0, tokens: int = 8, backend: str = "numba") -> dict[str, float]:
    """Open a folder in a fresh process and generate."""
    command = [sys.executable, "-c", CHILD, str(path), str(limit), str(tokens), backend]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    result: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--max-memory", type=float, help="gigabytes that the weights may take")
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--backend", default="numba")
    parser.add_argument("--json", type=Path, help="write the figures there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        size = write_random(path, mixtral_config(arguments.gigabytes))
        found = measure(path, int((arguments.max_memory or 0) * 1e9), arguments.tokens, arguments.backend)
    print(f"{size / 1e9:.2f} GB of bf16: opened in {found['open_s']:.2f} s, {found['opened_bytes'] / size:.1%} of its size resident")
    print(f"first token after {found['first_token_s']:.1f} s, then {found['s_per_token']:.2f} s per token")
    print(f"at most {found['generating_bytes'] / 1e9:.2f} GB resident, {found['experts_touched']} experts touched")
    if arguments.json:
        figures = {"machine": machine(), "bytes": size, "max_memory_gb": arguments.max_memory, **found}
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
