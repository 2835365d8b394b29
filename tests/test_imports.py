"""No module of minimoe is loaded by a computed name, so `lint-imports` sees every import."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOADERS = {"import_module", "__import__", "spec_from_file_location", "run_module", "run_path"}
MAY_LOAD = {"minimoe/__init__.py", "minimoe/backend.py"}  # public names, and the table of backends


def test_only_the_public_names_and_the_table_of_backends_load_modules_by_name() -> None:
    found = set()
    for path in (ROOT / "minimoe").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = getattr(node, "id", None) or getattr(node, "attr", None) or getattr(node, "name", None)
            if name in LOADERS:
                found.add(path.relative_to(ROOT).as_posix())
    assert found == MAY_LOAD
