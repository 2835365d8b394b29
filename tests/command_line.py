"""Runs the command line as a user does, in a process of its own, or, for speed, by calling `main` in this one."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from minimoe.cli import main

ROOT = Path(__file__).parent.parent
KEYS = (
    "model.d_model=16", "model.n_layers=1", "model.n_heads=2", "model.n_kv_heads=1", "model.head_dim=8", "model.d_hidden=16",
    "model.max_seq_len=16", "moe.n_experts=4", "moe.d_hidden=16", "train.batch_size=4", "train.seq_len=16", "train.log_every=2",
    "train.warmup_steps=2", "train.backend=numpy",
)  # fmt: skip
TINY = [part for key in KEYS for part in ("--set", key)]
"""Options that make tiny-moe train in milliseconds."""


def sets(*keys: str) -> list[str]:
    return [part for key in keys for part in ("--set", key)]


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "backends"), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "PYTHONUTF8": "1", "OPENBLAS_NUM_THREADS": "1", **more}


def minimoe(folder: Path, *arguments: str, **options: Any) -> "subprocess.CompletedProcess[str]":
    """Run `minimoe ARGUMENTS` in a folder, in a process of its own."""
    command = [sys.executable, "-m", "minimoe", *arguments]
    return subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=120, **options)


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Run `minimoe ARGUMENTS` in the working directory, in this process.   -> exit code, stdout, stderr"""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    out, err = capsys.readouterr()
    code = ended.value.code
    assert isinstance(code, int)
    return code, out, err


def one_line(err: str) -> str:
    """Return the message of an error, which must be one line."""
    assert err.startswith("minimoe: ") and err.endswith("\n") and err.count("\n") == 1, err
    return err.removeprefix("minimoe: ").strip()


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
