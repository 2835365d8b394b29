"""The recipes of CONTRIBUTING.md, performed on a copy of the repository.

A block ```python recipe says in its first line where its lines go: `# FILE: in class NAME`, `in NAME` (a dict or a list),
`before class NAME`, `among the imports` or `at the end`. The blocks ```bash recipe are the commands that must then succeed.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from textwrap import dedent, indent
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("minimoe", "backends/minimoe_numpy", "backends/minimoe_numba", "tests/engine/test_gradients.py", "pyproject.toml")


class Recipe(NamedTuple):
    """The steps of a section: (file, where, lines), and commands."""

    steps: list[tuple[str, str, str]]
    commands: list[str]


def recipe(heading: str) -> Recipe:
    """The blocks of CONTRIBUTING.md under a heading."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.split(f"\n### {heading}\n")[1].split("\n### ")[0].split("\n## ")[0]
    found = Recipe([], [])
    for language, block in re.findall(r"^ *```(python|bash) recipe\n(.*?)^ *```$", section, re.MULTILINE | re.DOTALL):
        lines = dedent(block)
        if language == "bash":
            found.commands.extend(lines.splitlines())
            continue
        first, body = lines.split("\n", 1)
        match = re.fullmatch(r"# (\S+): (.+)", first)
        assert match, f"CONTRIBUTING.md, {heading}: {first!r} does not say where the block goes"
        found.steps.append((match[1], match[2], body))
    return found


def put(path: Path, where: str, body: str) -> None:
    """Insert the lines of a step; a line of a dict replaces the one that has its key."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if where == "at the end":
        lines += ["\n\n", body]
    elif where == "among the imports":
        first = next(node for node in ast.parse("".join(lines)).body if isinstance(node, ast.ImportFrom))
        lines.insert(first.lineno - 1, body)
    elif where.startswith("before class "):
        node = definition(lines, where.split()[-1])
        lines.insert(node.lineno - 1, body + "\n\n")
    elif where.startswith("in class "):
        node = definition(lines, where.split()[-1])
        lines.insert(node.end_lineno or 0, "\n" + indent(body, "    "))
    else:
        node = definition(lines, where.removeprefix("in "))
        key = f"    {body.split(':')[0]}:"
        replaced = [i for i in range(node.lineno, node.end_lineno or 0) if lines[i].startswith(key)]
        for i in replaced:
            del lines[i]
        lines.insert(replaced[0] if replaced else node.lineno, indent(body, "    "))
    path.write_text("".join(lines), encoding="utf-8")


def definition(lines: list[str], name: str) -> ast.stmt:
    """The class, or the assignment, of that name at the top of a file."""
    for node in ast.parse("".join(lines)).body:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        if getattr(node, "name", None) == name or any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return node
    raise AssertionError(f"no {name} at the top of the file")


def run(copy: Path, command: str) -> "subprocess.CompletedProcess[str]":
    """A command of a recipe, in the copy."""
    words = command.replace("minimoe ", f"{sys.executable} -m minimoe ", 1) if command.startswith("minimoe ") else command
    words = words.replace("python ", f"{sys.executable} ", 1) if words.startswith("python ") else words
    env = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}  # the copy knows no options of these tests
    env["PYTHONPATH"] = f"{copy}{os.pathsep}{copy / 'backends'}"
    return subprocess.run(words, shell=True, cwd=copy, env=env, capture_output=True, text=True, timeout=300)


def perform(copy: Path, steps: list[tuple[str, str, str]]) -> None:
    for file, where, body in steps:
        put(copy / file, where, body)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository's packages and the tests that a recipe runs."""
    root = tmp_path_factory.mktemp("copy")
    for name in COPIED:
        target = root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, target)
    return root


def test_an_operation_is_added_by_its_recipe_and_missed_until_it_has_examples(copy: Path) -> None:
    operation = recipe("An operation")
    assert len(operation.steps) == 7 and len(operation.commands) == 3
    perform(copy, operation.steps[:5])
    missed = run(copy, operation.commands[0])
    assert missed.returncode == 1 and "squared_relu" in missed.stdout
    perform(copy, operation.steps[5:])
    for command in operation.commands:
        done = run(copy, command)
        assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr


def test_a_kernel_is_added_by_its_recipe_and_a_wrong_one_is_found(copy: Path) -> None:
    kernel = recipe("A kernel")
    assert len(kernel.steps) == 2 and len(kernel.commands) == 2
    perform(copy, kernel.steps)
    for command in kernel.commands:
        done = run(copy, command)
        assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr
    listed = json.loads(run(copy, "minimoe backends --json").stdout)
    assert listed["numba"]["kernels"]["squared_relu_backward"] == "hand-written"
    file = copy / "backends" / "minimoe_numba" / "activation.py"
    file.write_text(file.read_text().replace("(positive + positive)", "positive"))
    wrong = run(copy, kernel.commands[1])
    assert wrong.returncode == 1 and "squared_relu_backward" in wrong.stdout


def test_a_step_that_names_no_place_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file.py"
    file.write_text("A = {\n    'x': 1,\n}\n")
    put(file, "in A", "'y': 2,\n")
    put(file, "in A", "'x': 3,\n")
    assert file.read_text() == "A = {\n    'y': 2,\n    'x': 3,\n}\n"
    with pytest.raises(AssertionError, match="no B"):
        put(file, "in B", "'y': 2,\n")
