"""A first start of the backend `numba`: helper processes compile the kernels of a configuration, and whatever happens to them it trains."""

import os
import subprocess
import sys
import time

import pytest
from fresh_process import ROOT, first_words
from tiny_runs import tiny, write_text

import minimoe as mm
from minimoe_numba import ahead
from minimoe_numba.helpers import Helpers
from minimoe_numba.kernel import Kernel

CONFIGURATIONS = {
    "default": {},
    "layer norm, learned positions": {"model": {"norm": "layer", "position": "learned", "activation": "gelu"}},
    "dense, lion": {"dense": True, "optimizer": "lion"},
    "sigmoid_bias, dropout, sgd": {"moe": {"router": "sigmoid_bias"}, "model": {"dropout": 0.1}, "optimizer": "sgd"},
}

TRAIN = """
import minimoe as mm
from tiny_runs import tiny, weights_of, write_text
from pathlib import Path
folder = Path(FOLDER)
run = mm.train(tiny(write_text(folder), backend="numba", steps=3), root=folder)
import hashlib
from minimoe_numba.helpers import helpers
print("SUM", hashlib.sha256(weights_of(run.path, 3)).hexdigest())
print("HELPERS", sum(len(each.processes) for each in helpers), [p.poll() for each in helpers for p in each.processes])
"""


def trained(folder, **environment):
    """The words of a fresh process that trains 3 steps, with the cache in this folder."""
    folder.mkdir(exist_ok=True)
    code = f"FOLDER = {str(folder)!r}\n" + TRAIN
    return first_words(code=code, NUMBA_CACHE_DIR=str(folder.parent / "cache"), **environment)


def word_after(words, name):
    return words.split(name, 1)[1].split("\n", 1)[0].strip()


@pytest.mark.parametrize("keys", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_the_kernels_of_a_configuration_are_those_that_its_steps_call(keys, tmp_path, monkeypatch):
    called = set()
    run = Kernel.__call__

    def noted(self, *args):
        called.add(f"{self.function.__module__.rpartition('.')[2]}.{self.name}")
        run(self, *args)

    monkeypatch.setattr(Kernel, "__call__", noted)
    config = tiny(write_text(tmp_path), backend="numba", steps=2, batch_size=8, **keys)
    mm.train(config, root=tmp_path)
    expected = {name for name in ahead.kernels_of(config) if "." in name}
    few_rows = {"few_rows.hidden_slices", "few_rows.output_slices"}  # an evaluation's last batch may be small
    assert expected - called == set()
    assert called - expected <= few_rows


def test_helpers_compile_what_the_main_process_then_loads(tmp_path):
    cold = trained(tmp_path / "cold", OMP_NUM_THREADS="2")
    assert word_after(cold, "HELPERS").startswith("2")
    assert len(list((tmp_path / "cache").rglob("*.nbi"))) > 20
    warm = trained(tmp_path / "warm", OMP_NUM_THREADS="2")
    assert word_after(warm, "HELPERS").startswith("0")
    assert word_after(cold, "SUM") == word_after(warm, "SUM")


def test_one_core_starts_no_helper(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(ahead, "start_helpers", lambda *given: started.append(given))
    monkeypatch.setattr(ahead, "compilable", lambda name: Missing)
    monkeypatch.setattr(ahead, "helpers", [])
    config = tiny(write_text(tmp_path))
    for threads, starts in (("1", 0), ("4", 1)):
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        ahead.prepare(config)
        assert len(started) == starts


class Missing:
    """A kernel that the cache lacks."""

    @staticmethod
    def is_cached():
        return False


def test_a_helper_that_dies_leaves_its_kernel_to_the_main_process(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    helpers = Helpers(["gemm", "pool"], 2)
    began = time.monotonic()
    helpers.wait_for("gemm")
    helpers.wait_for("pool")
    assert time.monotonic() - began < 30
    assert helpers.unfinished == set() and helpers.running == 0


def test_closing_ends_every_helper():
    helpers = Helpers(["gemm", "attention.attention_heads"], 2)
    deadline = time.monotonic() + 30
    while len(helpers.processes) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    helpers.close()
    assert [process.returncode is not None for process in helpers.processes] == [True, True]


def test_a_helper_ends_with_its_input():
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/backends"}
    done = subprocess.run([sys.executable, "-m", "minimoe_numba.helper"], input="", env=environment, timeout=120, check=False)
    assert done.returncode == 0


def test_a_helper_imports_nothing_from_the_current_folder_that_this_process_would_not(tmp_path, monkeypatch):
    (tmp_path / "signal.py").write_text("open('imported', 'w').close()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "cache"))
    helpers = Helpers(["arrays.clear"], 1)
    helpers.wait_for("arrays.clear")
    helpers.close()
    assert not (tmp_path / "imported").exists() and list((tmp_path / "cache").rglob("*.nbi"))
