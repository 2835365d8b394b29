"""Runs code in a fresh Python process."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def first_words(*, code: str, **environment: str) -> str:
    """Return the output of a fresh process."""
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/backends:{ROOT}/tests", **environment}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr
