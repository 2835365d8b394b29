"""Damaged files of every kind are opened or refused in a line, within two seconds and 500 MiB: `fuzz.py` says what is judged.

Here it runs in a process of its own, whose memory it can measure. What it prints, its seed first, is shown if it finds a fault.
"""

import subprocess
import sys
import time
from pathlib import Path
from random import Random

import pytest
from command_line import environment
from faults.fuzz import CORPUS, Judge, inputs
from faults.kinds import Kind, make_kinds
from faults.mutations import mutate_bytes

from minimoe.errors import UserError

ROOT = Path(__file__).parents[2]


def fuzzed(mutations: int, seed: int) -> None:
    command = [sys.executable, "-m", "faults.fuzz", "--mutations", str(mutations), "--seed", str(seed)]
    paths = environment(RUST_BACKTRACE="0")
    paths["PYTHONPATH"] += f":{ROOT / 'tests'}"
    done = subprocess.run(command, env=paths, capture_output=True, text=True, timeout=7200)
    assert done.returncode == 0, f"{done.stdout[-10_000:]}\n{done.stderr[-2000:]}"
    assert f"seed {seed}\n" in done.stdout and done.stdout.endswith(" 0 fault\n")


def test_a_thousand_damaged_files_and_the_kept_ones_are_opened_or_refused_in_a_line() -> None:
    fuzzed(1000, seed=0)


def test_fifty_thousand_damaged_files_are_opened_or_refused_in_a_line() -> None:
    fuzzed(50_000, seed=1)


# ---- the judge itself --------------------------------------------------------------------------------------------------------


def refuse(folder: Path) -> None:
    raise UserError("x.json: not JSON")


def swear(folder: Path) -> None:
    raise UserError("two\x00\x1b[31m")


def crash(folder: Path) -> None:
    raise RecursionError("too deep")


def panic(folder: Path) -> None:
    raise type("PanicException", (BaseException,), {})("index out of bounds")


def work(folder: Path) -> None:
    began = time.process_time()
    while time.process_time() < began + 0.2:
        pass


def wait(folder: Path) -> None:
    time.sleep(60)


@pytest.mark.parametrize("use, found", [
    (lambda folder: None, "opened"), (refuse, "refused"), (swear, "refused"), (crash, "RecursionError at "), (panic, "PanicException at "),
    (work, "takes 0.2 s (opened)"), (wait, "waits for more than 1 s"),
])  # fmt: skip
def test_a_planted_fault_is_told_from_a_refusal(tmp_path: Path, use, found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("faults.fuzz.MOST_WAITING", 1.0 if use is wait else 20.0)
    monkeypatch.setattr("faults.fuzz.MOST_SECONDS", 0.15)
    assert Judge(tmp_path).verdict(Kind("planted", "x.json", (b"{}",), mutate_bytes, use), b"{").startswith(found)


def test_a_mutation_depends_on_the_seed_the_kind_and_its_number_alone(tmp_path: Path) -> None:
    kind = Kind("planted", "x.json", (b'{"a": [1, 2, 3]}',), mutate_bytes, refuse)
    ten = list(inputs(kind, 7, 10))
    assert list(inputs(kind, 7, 20))[:11] == ten and ten != list(inputs(kind, 8, 10))
    assert mutate_bytes(Random(0), b"") is not None


def test_every_folder_of_the_corpus_belongs_to_a_kind_and_is_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIMOE_CACHE_DIR", str(tmp_path / "cache"))
    kinds = {kind.name for kind in make_kinds(tmp_path)}
    kept = list(CORPUS.glob("*/*"))
    assert kept and {path.parent.name for path in kept} <= kinds
    assert max(path.stat().st_size for path in kept) < 20_000
