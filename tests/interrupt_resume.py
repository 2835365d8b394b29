"""Interrupts training at random moments, resumes it, and compares it with a run that was never stopped.

    python tests/interrupt_resume.py --times 20 --seed 0 [--start seed|weights|frozen|adapters]

Each try starts `minimoe train` in a process of its own, sends SIGINT after a delay drawn uniformly from a whole run's time (so also within
an evaluation, or while a checkpoint is written), and resumes it; each resumed process is interrupted with probability 1/2. Whenever a
process has ended, the newest checkpoint must hold every step that the metrics and the status claim: at most the step in hand is lost. At
the end everything must equal the unbroken run, as in kill_resume.py.
"""

import argparse
import json
import random
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from kill_resume import STARTS, arguments_for, is_finished, next_command, run_for, trace, train_command

INTERRUPTED = (130, -signal.SIGINT)  # a shell shows 130 for both; Python does the second if it was within `exec`, as dataclasses are


def interrupt(arguments: list[str], delay: float) -> int:
    """Run a command with SIGINT as a terminal has it, and send one after a delay.   -> its exit code"""
    options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(arguments, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler), **options) as process:
        try:
            process.wait(timeout=delay)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    # Python itself was starting: before it handles signals the system ends it, and after that it has nobody who catches the interrupt
    silent = process.returncode == -signal.SIGINT and not errors
    starting = silent or (process.returncode in (1, -signal.SIGINT) and errors.rstrip().endswith("KeyboardInterrupt"))
    said = process.returncode in INTERRUPTED and errors.startswith("minimoe: ") and errors.count("\n") == 1
    if process.returncode != 0 and not said and not starting:
        raise SystemExit(f"{' '.join(arguments[:5])} ended with {process.returncode}: {errors.strip()}")
    return process.returncode


def unsaved(run: Path) -> str:
    """Return what the run's files claim beyond its newest checkpoint; empty if that holds all."""
    if not (run / "config.toml").is_file():
        return ""
    newest = max((int(folder.name[5:]) for folder in (run / "checkpoints").glob("step-*")), default=0)
    metrics = run / "metrics.jsonl"
    lines = len(metrics.read_text().splitlines()) if metrics.is_file() else 0
    status = json.loads((run / "status.json").read_text()) if (run / "status.json").is_file() else {"state": "none", "step": 0}
    claimed = {"metrics": lines, "status": status["step"]}
    return ", ".join(f"{name} {step} of {newest} saved" for name, step in claimed.items() if step > newest)


def attempt(given: list[str], run: Path, whole: float, draw: random.Random) -> tuple[int, list[str]]:
    """Train with one or more interrupts.   -> how many ended a process, and what was claimed but not saved after any"""
    ended, wrong = 0, []
    delay: float | None = draw.uniform(0.0, whole)
    while not is_finished(run):
        if delay is None:
            run_for(next_command(given, run), None)
        elif interrupt(next_command(given, run), delay) != 0:
            ended += 1
            wrong += [problem for problem in (unsaved(run),) if problem]
        delay = draw.uniform(0.0, whole) if draw.random() < 0.5 else None
    return ended, wrong


def attempt_with_an_interrupt(given: list[str], run: Path, whole: float, draw: random.Random) -> tuple[int, list[str]]:
    """Repeat `attempt` with shorter delays until an interrupt came before the end, since machines are not always equally busy."""
    ended, wrong = attempt(given, run, whole, draw)
    while not ended and not wrong:
        shutil.rmtree(run)
        whole *= 0.8
        ended, wrong = attempt(given, run, whole, draw)
    return ended, wrong


def main(times: int, seed: int, start: str = "seed") -> int:
    """Compare `times` interrupted runs with an unbroken one. -> the number of those that differ or that lost a step"""
    draw, failed = random.Random(seed), 0
    with tempfile.TemporaryDirectory() as folder:
        given = arguments_for(start, Path(folder))
        run_for(train_command(given, Path(folder) / "unbroken"), None)
        began = time.perf_counter()
        run_for(train_command(given, Path(folder) / "timed"), None)  # the second, when the files lie in the system's memory
        whole = time.perf_counter() - began
        expected = trace(Path(folder) / "unbroken")
        for number in range(1, times + 1):
            run = Path(folder) / f"try-{number}"
            ended, wrong = attempt_with_an_interrupt(given, run, whole, draw)
            got = trace(run)
            wrong += [f"{key} differs" for key in expected if got[key] != expected[key]]
            failed += bool(wrong)
            print(f"{number:3d}: {'; '.join(wrong) or 'equal'}; processes ended by an interrupt: {ended}", flush=True)
            shutil.rmtree(run)
    print(f"{times - failed} of {times} equal the unbroken run and lost nothing (seed {seed}, {whole:.2f} s)")
    return failed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", choices=STARTS, default="seed")
    asked = parser.parse_args()
    raise SystemExit(1 if main(asked.times, asked.seed, asked.start) else 0)
