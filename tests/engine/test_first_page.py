"""The engine's first page: `tensor.py` and `backward.py` hold the whole algorithm and fit on a few screens."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import minimoe as mm
from minimoe.engine.operators import Operators

ENGINE = Path(mm.__file__).parent / "engine"
PAGE = ("tensor.py", "backward.py")


def test_the_two_files_have_at_most_220_lines_formatted_at_100_columns():
    command = [sys.executable, "-m", "ruff", "format", "--isolated", "--line-length", "100", "--stdin-filename", "page.py", "-"]
    formatted = [subprocess.run(command, input=(ENGINE / name).read_text(), capture_output=True, text=True, check=True) for name in PAGE]
    assert sum(len(run.stdout.splitlines()) for run in formatted) <= 220
    assert [run.stdout for run in formatted] == [(ENGINE / name).read_text() for name in PAGE]


@pytest.mark.parametrize("name", PAGE)
def test_a_line_of_them_holds_at_most_one_statement(name):
    statements = [node for node in ast.walk(ast.parse((ENGINE / name).read_text())) if isinstance(node, ast.stmt)]
    lines = [node.lineno for node in statements]
    assert len(lines) == len(set(lines))


OPERATORS = [
    "__add__", "__radd__", "__sub__", "__rsub__", "__mul__", "__rmul__", "__truediv__", "__rtruediv__", "__neg__", "__pow__", "__matmul__",
    "__rmatmul__", "__getitem__", "sum", "mean", "max", "reshape", "permute", "exp", "log", "sqrt", "tanh", "astype", "backward",
]  # fmt: skip


@pytest.mark.parametrize("name", OPERATORS)
def test_a_method_of_tensor_has_its_own_name_and_a_docstring(name):
    method = getattr(mm.Tensor, name)
    assert method.__name__ == name and method.__doc__


@pytest.mark.parametrize("name", [name for name in OPERATORS if name != "backward"])
def test_a_type_checker_sees_that_a_method_of_tensor_gives_a_tensor(name):
    assert mm.Tensor.__orig_bases__[-1] == Operators["Tensor"]
    assert getattr(mm.Tensor, name).__annotations__["return"] == "Result"
