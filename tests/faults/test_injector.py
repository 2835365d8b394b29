"""Kills, torn writes and errors at system calls: a sample of the injector's trials in every run, all of them with --all."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import environment

ROOT = Path(__file__).parents[2]
SEED = os.environ.get("MINIMOE_FAULTS_SEED", "0")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="faults are injected by LD_PRELOAD, on Linux")


def injector(*arguments: str, timeout: float = 300) -> "subprocess.CompletedProcess[str]":
    path = os.pathsep.join([str(ROOT / "tests"), environment()["PYTHONPATH"]])
    command = [sys.executable, "-m", "faults.injector", *arguments]
    return subprocess.run(command, env=environment(PYTHONPATH=path), capture_output=True, text=True, timeout=timeout)


def test_gpp_is_there_to_compile_the_library() -> None:
    assert shutil.which("g++"), "install g++ (Debian: apt-get install g++)"


def test_a_sample_of_faults_leaves_what_an_unbroken_run_leaves() -> None:
    done = injector("--sample", "40", "--seed", SEED)
    print(done.stdout)
    assert done.returncode == 0 and "0 faults, of them 0 wrong results" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("phase", ["train", "pipe", "resume", "convert", "upcycle", "prepare"])
def test_every_fault_leaves_what_an_unbroken_run_leaves(phase: str) -> None:
    done = injector("--phase", phase, timeout=3600)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_sample_of_kills_leaves_whole_tokens_or_none() -> None:
    done = injector("--phase", "prepare", "--kills", "--sample", "20", "--seed", SEED)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_resume_that_forgets_is_found() -> None:
    """The injector can fail: without the optimizer's moments a resumed run ends with other weights."""
    done = injector("--phase", "resume", "--kills", "--sample", "8", "--plant", "forget the optimizer")
    found = re.search(r"^(\d+) faults, of them (\d+) wrong results$", done.stdout, re.MULTILINE)
    assert done.returncode == 1 and found is not None and int(found[2]) >= 4, done.stdout + done.stderr


def test_a_write_that_is_not_atomic_is_found() -> None:
    done = injector("--phase", "train", "--kills", "--call", "env.json", "--plant", "write in place")
    assert done.returncode == 1 and "env.json" in done.stdout, done.stdout + done.stderr
