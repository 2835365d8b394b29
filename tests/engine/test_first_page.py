"""The engine's first page: `tensor.py` and `backward.py` hold the whole algorithm and fit on a few screens."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import minimoe as mm

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


def test_a_type_checker_knows_the_type_of_an_operators_result(tmp_path):
    pytest.importorskip("mypy")
    script = tmp_path / "script.py"
    script.write_text("import minimoe as mm\nx = mm.tensor([1.0])\nreveal_type((x + 1.0) @ x.reshape(1).T)\nx.backwards()\n")
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path / "cache"), "--follow-imports", "silent", str(script)]
    output = subprocess.run(command, capture_output=True, text=True, cwd=ENGINE.parents[1]).stdout
    assert 'Revealed type is "minimoe.engine.tensor.Tensor"' in output and "backwards" in output
