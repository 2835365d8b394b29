"""The table of routers: an unknown name raises on every backend, and the documentation says what the table says."""

import re
from pathlib import Path

import numpy as np
import pytest
from ptx_machine.arrays import HostArrays
from ptx_machine.cupy_on_ptx import PtxLoader
from ptx_machine.numba_on_ptx import NumbaCudaOnPtx

import minimoe as mm
from minimoe.backend import load
from minimoe.errors import ConfigError
from minimoe.reference.gating import Gate, Rule
from minimoe.reference.routers import ROUTERS
from minimoe_cupy.gating import CudaGating

ROOT = Path(__file__).resolve().parents[2]
UNKNOWN = {
    "nope": "(known: expert_choice, noisy_topk, sigmoid_bias, softmax_topk, switch, topk_softmax)",
    "softmax_topp": "(did you mean 'softmax_topk'?)",
}


class GatesOfCupy(CudaGating, HostArrays):
    """The gates of cupy, executed by the machine."""

    name = "gates of cupy"

    def __init__(self):
        self.loader = PtxLoader()


BACKENDS = {"numpy": load("numpy"), "numba": load("numba"), "cupy": GatesOfCupy(), "numba-cuda": NumbaCudaOnPtx()}


@pytest.mark.parametrize("name", UNKNOWN)
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_unknown_router_raises_with_the_nearest_name_on_every_backend(backend, name):
    b, z = BACKENDS[backend], np.zeros((3, 4), np.float32)
    with pytest.raises(ConfigError) as forward:
        b.gate(z, None, None, rule=Rule(name, 2))
    gate = Gate(z[:, :2], np.zeros((3, 2), np.int32), z, np.zeros(4, np.int32), z[0])
    with pytest.raises(ConfigError) as backward:
        b.gate_backward(z[:, :2], z[0], gate, None, rule=Rule(name, 2))
    assert str(forward.value) == str(backward.value) == f"no router {name!r} {UNKNOWN[name]}"


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_router_is_no_configuration(name):
    with pytest.raises(ConfigError, match=re.escape(f"moe.router = {name!r} is not one of its values {UNKNOWN[name]}")):
        mm.MoEConfig(router=name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_has_kernels_for_known_routers_alone(backend):
    assert BACKENDS[backend].routers <= set(ROUTERS)
    assert bool(BACKENDS[backend].routers) == (backend != "numpy")


def rows_of(page, first):
    """The cells of each router's row in a page's table whose header starts with `first`."""
    lines = (ROOT / "docs" / page).read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first} |"))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start + 2 : start + 2 + len(ROUTERS)]]
    return {row[0].strip("`"): row[1:] for row in rows}


def test_the_page_on_gating_says_what_the_table_says():
    assert rows_of("gating.md", "`moe.router`") == {name: [r.chosen, r.weight, r.paper] for name, r in ROUTERS.items()}


def test_the_architecture_and_the_default_preset_name_every_router():
    assert list(rows_of("architecture.md", "router")) == list(ROUTERS)
    assert " | ".join(ROUTERS) in mm.config.preset_text("tiny-moe")
