"""The processors and the memory that control groups leave to a process, on file trees as Linux has them."""

import json
import os

import pytest
from tiny_runs import tiny, write_text

import minimoe as mm
from minimoe import machine
from minimoe.training.surroundings import limited_threads
from minimoe_numba.machine import default_threads

MIB = 2**20


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Make a tree of control groups: `own` is /proc/self/cgroup, `files` maps paths below /sys/fs/cgroup to their text."""
    monkeypatch.setattr(machine, "GROUPS", tmp_path / "groups")
    monkeypatch.setattr(machine, "OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(machine, "allowed_processors", lambda: 8)
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)

    def make(own, files):
        (tmp_path / "own").write_text(own)
        for name, text in files.items():
            file = tmp_path / "groups" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)

    return make


QUOTAS = {
    "version 2, a container's root": ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5, 2),
    "version 2, no limit": ("0::/\n", {"cpu.max": "max 100000\n"}, None, 8),
    "version 2, the own group": ("0::/a/b\n", {"a/b/cpu.max": "300000 100000\n", "cpu.max": "max 100000"}, 3.0, 3),
    "version 2, a group above": ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "200000 100000"}, 2.0, 2),
    "version 2, both": ("0::/a/b\n", {"a/b/cpu.max": "700000 100000\n", "a/cpu.max": "400000 100000"}, 4.0, 4),
    "version 2, less than one": ("0::/\n", {"cpu.max": "10000 100000\n"}, 0.1, 1),
    "version 2, more than there are": ("0::/\n", {"cpu.max": "6400000 100000\n"}, 64.0, 8),
    "version 2, a path of the host's": ("0::/../../x\n", {"cpu.max": "100000 50000\n"}, 2.0, 2),
    "version 1": ("4:cpu,cpuacct:/a\n", {"cpu/a/cpu.cfs_quota_us": "250000\n", "cpu/a/cpu.cfs_period_us": "100000\n"}, 2.5, 3),
    "version 1, the host's path": ("4:cpu:/docker/1\n", {"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "50000\n"}, 2.0, 2),
    "version 1, no limit": ("4:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None, 8),
    "damaged": ("0::/\nx\n:\n", {"cpu.max": "\n"}, None, 8),
    "no period": ("0::/\n", {"cpu.max": "100000 0\n"}, None, 8),
    "no Linux": ("", {}, None, 8),
}


@pytest.mark.parametrize("own, files, quota, processors", QUOTAS.values(), ids=QUOTAS)
def test_a_quota_limits_the_processors(own, files, quota, processors, groups):
    groups(own, files)
    assert machine.cpu_quota() == quota and machine.usable_processors() == processors
    assert default_threads() == processors


MEMORY = {
    "the root": ("0::/\n", {"memory.max": f"{64 * MIB}\n"}, 64),
    "the own group": ("0::/a\n", {"a/memory.max": f"{32 * MIB}\n", "memory.max": f"{64 * MIB}\n"}, 32),
    "a group above": ("0::/a/b\n", {"a/b/memory.max": "max\n", "a/memory.max": f"{48 * MIB}\n"}, 48),
    "version 1": ("9:memory:/a\n", {"memory/a/memory.limit_in_bytes": f"{40 * MIB}\n"}, 40),
    "version 1, no limit": ("9:memory:/\n", {"memory/memory.limit_in_bytes": "9223372036854771712\n"}, None),
    "no limit": ("0::/\n", {"memory.max": "max\n"}, None),
}


@pytest.mark.parametrize("own, files, mib", MEMORY.values(), ids=MEMORY)
def test_memory_is_that_of_the_smallest_group(own, files, mib, groups):
    groups(own, files)
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert machine.machine_memory() == (physical if mib is None else mib * MIB)


def test_what_the_user_asks_for_is_kept(groups, monkeypatch):
    groups("0::/\n", {"cpu.max": "200000 100000\n"})
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert default_threads() == 5


class Threads:
    """A backend that notes how many threads it is to use."""

    def __init__(self):
        self.asked = []

    def use_threads(self, count):
        self.asked.append(count)


@pytest.mark.parametrize("quota, threads, variable, asked", [
    ("200000 100000", 0, None, [2, 0]), ("max 100000", 0, None, []), ("200000 100000", 3, None, [3, 0]), ("200000 100000", 0, "4", []),
])  # fmt: skip
def test_a_training_keeps_to_the_quota_unless_it_is_told_otherwise(quota, threads, variable, asked, groups, monkeypatch):
    groups("0::/\n", {"cpu.max": quota})
    if variable:
        monkeypatch.setenv("OPENBLAS_NUM_THREADS", variable)
    backend = Threads()
    with limited_threads(threads, backend):
        pass
    assert backend.asked == asked


def test_a_run_records_the_quota_and_its_threads(groups, tmp_path):
    groups("0::/\n", {"cpu.max": "150000 100000\n"})
    run = mm.train(tiny(write_text(tmp_path), steps=1), root=tmp_path)
    recorded = json.loads((run.path / "env.json").read_text())
    assert (recorded["cpu_quota"], recorded["threads"]) == (1.5, 2)
