"""Kills training at random moments, resumes it, and compares it with a run that was never stopped.

    python tests/kill_resume.py --times 20 --seed 0 [--start seed|weights|frozen|adapters]

Each try starts `minimoe train` in a process of its own, ends it with SIGKILL after a delay drawn uniformly from a whole run's time (so also
within an accumulation, or while a checkpoint is written), and resumes it. Each resumed process is killed with probability 1/2. At the end
the SHA-256 of the weights and of the optimizer's state, the metrics except timings, the samples and the best checkpoint's name must equal
those of the unbroken run. `--start`: weights from the seed, from a run that was trained before, the same with parameters frozen, or with
adapters.
"""

import argparse
import hashlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tiny_runs import untimed, write_text

STEPS = 24
KEYS = [
    "model.d_model=16", "model.n_layers=2", "model.n_heads=2", "model.n_kv_heads=1", "model.head_dim=8", "model.d_hidden=16",
    "model.max_seq_len=16", "model.dropout=0.1", "moe.n_experts=4", "moe.router=sigmoid_bias", "moe.jitter=0.1", "train.batch_size=4",
    "train.seq_len=16", "train.accumulate=3", "train.checkpoint_every=3", "train.eval_every=4", "train.eval_batches=2", "train.log_every=2",
    "train.warmup_steps=2", "train.lr=1e-2", "train.keep=1", "train.sample_every=5", "train.patience=9",
]  # fmt: skip


def command(verb: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "minimoe", verb, *arguments, "--quiet"]


STARTS = {
    "seed": [], "weights": ["--init", "SOURCE"], "frozen": ["--init", "SOURCE", "--freeze", "embed*", "--freeze", "*.router.*"],
    "adapters": ["--init", "SOURCE", "--set", "lora.rank=2"],
}  # fmt: skip


def arguments_for(start: str, folder: Path) -> list[str]:
    """Write a text, train a source if the run starts from one, and return the arguments that differ between the starts."""
    given = ["--data", str(write_text(folder))]
    if start != "seed":
        run_for([*train_command(given, folder / "source"), "--seed", "1"], None)
    return [*given, *(part.replace("SOURCE", str(folder / "source")) for part in STARTS[start])]


def train_command(given: list[str], out: Path) -> list[str]:
    keys = [part for key in KEYS for part in ("--set", key)]
    options = [*given, "--steps", str(STEPS), "--out", str(out), "--backend", "numpy", "--threads", "1"]
    return command("train", "tiny-moe", *options, *keys)


def run_for(arguments: list[str], seconds: float | None) -> int:
    """Run a command, and kill it after `seconds`.   -> its exit code, negative if it was killed"""
    with subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            _, errors = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            _, errors = process.communicate()
    if process.returncode > 0:
        raise SystemExit(f"{' '.join(arguments[:5])} failed: {errors.strip()}")
    return process.returncode


def is_finished(run: Path) -> bool:
    try:
        return bool(json.loads((run / "status.json").read_text())["state"] == "finished")
    except (OSError, ValueError):
        return False


def next_command(given: list[str], run: Path) -> list[str]:
    """Resume; if the kill came before there was a run, start again."""
    if (run / "config.toml").is_file():
        return command("resume", str(run))
    shutil.rmtree(run, ignore_errors=True)
    return train_command(given, run)


def trace(run: Path) -> dict[str, Any]:
    """Return everything that must be equal."""
    last = run / "checkpoints" / f"step-{STEPS:06d}"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    state = json.loads((last / "state.json").read_text())
    state.pop("elapsed_s")
    return {
        "weights": hashlib.sha256((last / "model.safetensors").read_bytes()).hexdigest(),
        "optimizer": hashlib.sha256((last / "optimizer.safetensors").read_bytes()).hexdigest(),
        "metrics": untimed(rows),
        "samples": (run / "samples.jsonl").read_text(),
        "state": state,
        "kept": sorted(entry.name for entry in (run / "checkpoints").iterdir()),
        "best": (run / "checkpoints" / "best").read_text(),
    }


def step_reached(run: Path) -> str:
    """Return the name of the newest checkpoint after a kill."""
    found = sorted((run / "checkpoints").glob("step-*")) if (run / "checkpoints").is_dir() else []
    return found[-1].name if found else "before the first checkpoint"


def attempt(given: list[str], run: Path, whole: float, draw: random.Random) -> list[str]:
    """Train, with one or more kills.   -> where each kill came; none if the run ended before it"""
    killed: list[str] = []
    delay: float | None = draw.uniform(0.0, whole)
    while not is_finished(run):
        if run_for(next_command(given, run), delay) < 0:
            killed.append(f"{delay:.2f} s ({step_reached(run)})")
        delay = draw.uniform(0.0, whole) if draw.random() < 0.5 else None
    return killed


def attempt_with_a_kill(given: list[str], run: Path, whole: float, draw: random.Random) -> list[str]:
    """Repeat `attempt` with shorter delays until a kill came before the end, since machines are not always equally busy."""
    killed = attempt(given, run, whole, draw)
    while not killed:
        shutil.rmtree(run)
        whole *= 0.8
        killed = attempt(given, run, whole, draw)
    return killed


def main(times: int, seed: int, start: str = "seed") -> int:
    """Compare `times` broken runs with an unbroken one. -> the number of differences"""
    draw, differences = random.Random(seed), 0
    with tempfile.TemporaryDirectory() as folder:
        given = arguments_for(start, Path(folder))
        run_for(train_command(given, Path(folder) / "unbroken"), None)
        began = time.perf_counter()
        run_for(train_command(given, Path(folder) / "timed"), None)  # the second, when the files lie in the system's memory
        whole = time.perf_counter() - began
        expected = trace(Path(folder) / "unbroken")
        for number in range(1, times + 1):
            run = Path(folder) / f"try-{number}"
            killed = attempt_with_a_kill(given, run, whole, draw)
            got = trace(run)
            wrong = [key for key in expected if got[key] != expected[key]]
            differences += bool(wrong)
            verdict = f"DIFFERENT: {', '.join(wrong)}" if wrong else f"equal {got['weights'][:12]}"
            print(f"{number:3d}: {verdict}; killed after {', '.join(killed)}", flush=True)
    print(f"{times - differences} of {times} equal the unbroken run ({whole:.2f} s)")
    return differences


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", choices=STARTS, default="seed")
    asked = parser.parse_args()
    raise SystemExit(1 if main(asked.times, asked.seed, asked.start) else 0)
