"""The command `python -m tests.ptx_machine`: what it lists, traces and counts, and its one line for what is wrong."""

import re

import pytest

from minimoe_cupy.loader import KERNELS
from tests.ptx_machine.__main__ import main

DISPATCH = str(KERNELS / "dispatch.cu")
VALUES = ("x=float32[4,3]", "inverse=int32[4,1]", "rows=float32[4,3]:0", "n_tokens=4", "width=1", "d_model=3")  # as in docs/gpu.md


def test_the_kernels_of_a_file_are_listed(capsys):
    assert main([DISPATCH]) == 0
    assert capsys.readouterr().out.startswith("dispatch<class T, int V>(const T* x, const int* inverse, ")


def test_a_kernel_runs_on_small_arrays_and_its_first_warp_is_traced(capsys):
    assert main([DISPATCH, "dispatch<float, 1>", *VALUES, "--trace"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("ffffffff  and.b32" in line for line in lines) and any("00000007  st.global.f32" in line for line in lines)
    assert lines[-1].startswith("rows = [0. 1. 2. 0. ")  # one warp, so the first token alone


def test_what_a_launch_costs_is_counted(capsys):
    assert main([DISPATCH, "dispatch<float, 1>", *VALUES, "--count", "--seed", "7"]) == 0
    assert "           1  global stores\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "given, words",
    [
        (["dispatch<float, 1>", "z=3"], "no parameter z: it has x, inverse"),
        (["dispatch<float>"], "dispatch is a template of <T, V>"),
        (["dispatch<float, 1>", "x=int32[4]"], "x is an array of float32, not int32"),
        (["dispatch<float, 1>", *VALUES, "--trace", "--warp", "2:1"], "--warp 2:1: the launch has 1 blocks of 1 warps"),
        (["dispatch<float, 1>", *VALUES[:-1], "d_model=13"], "dispatch<float, 1>: block 0, thread 12: .* outside "),
    ],
)
def test_what_is_wrong_is_said_in_a_line(given, words, capsys):
    assert main([DISPATCH, *given]) == 2
    said = capsys.readouterr().err
    assert said.startswith("dispatch.cu: ") and said.count("\n") == 1
    assert re.search(words, said), said
