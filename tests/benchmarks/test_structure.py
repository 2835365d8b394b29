"""benchmarks/structure.py counts files, levels, arrows and circles from the sources."""

from pathlib import Path

import pytest

from benchmarks.structure import circles, levels, structure


def write(root: Path, sources: dict[str, str]) -> Path:
    for name, text in sources.items():
        path = root / "minimoe" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    return write(tmp_path, {
        "__init__.py": "",
        "__main__.py": "from minimoe.top import run",
        "top.py": "import minimoe.engine.ops\nfrom minimoe.engine import ops, tensor\n\n\ndef run():\n    from minimoe import errors\n",
        "errors.py": "VALUE = 1\n",
        "engine/__init__.py": "from minimoe.engine.ops import add",
        "engine/ops.py": "from minimoe.engine.tensor import Tensor",
        "engine/tensor.py": "import numpy\nfrom minimoe.errors import VALUE",
    })  # fmt: skip


def test_imports_inside_functions_count_and_repeated_ones_are_one_arrow(clone: Path) -> None:
    found = structure(clone)
    assert found["files"] == 7 and found["lines"] == 12
    assert found["arrows between modules"] == 6  # top: ops, tensor, errors; engine: ops; ops: tensor; tensor: errors
    assert found["of these, inside functions only"] == 1
    assert found["rooms at the top"] == 4 and found["arrows between rooms"] == 3
    assert found["levels of imports"] == 4 and found["levels of rooms"] == 3


def test_what_is_copied_and_not_imported_is_no_module(clone: Path) -> None:
    before = structure(clone)
    write(clone, {"engine/templates/one/package/__init__.py": "from . import part", "engine/templates/one/package/part.py": ""})
    assert structure(clone) == before


def test_a_circle_is_found_and_is_as_many_levels_as_its_longest_chain(clone: Path) -> None:
    write(clone, {"errors.py": "from minimoe.engine import ops"})
    found = structure(clone)
    assert found["circles of modules"] == 1 and found["circles of rooms"] == 1
    assert found["levels of imports"] == 4
    assert circles({"a": {"b"}, "b": {"a", "c"}, "c": set(), "d": {"d"}}) == [["a", "b"]]
    assert levels({"a": {"b"}, "b": {"a", "c"}, "c": set()}) == 3


def test_the_code_of_minimoe_has_no_circle() -> None:
    found = structure(Path(__file__).resolve().parents[2])
    assert found["circles of modules"] == 0 and found["circles of rooms"] == 0
