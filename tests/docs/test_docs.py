"""The documentation is run: every python block of README.md and docs/*.md, page by page, on NumPy; every link and path is looked up.

A block marked ```python no-run is skipped. A block ```output right after a python block is what that block prints, to the letter.
"""

import ast
import io
import os
import re
from collections.abc import Iterator
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import minimoe as mm
from minimoe.backend import BUILT_IN

ROOT = Path(__file__).resolve().parents[2]
DOCS = sorted(ROOT.glob("docs/*.md"))
PAGES = [page for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS) if page.is_file()]

SKETCHES = {"architecture.md"}  # its blocks are signatures and elisions, to be read
FOLDERS = {"minimoe", "backends", "docs", "tests", "examples", "benchmarks", ".ci"}  # a name that starts so is a path of the repository
SOURCES = {".py", ".md", ".toml", ".cu", ".cuh", ".svg", ".png"}
THE_READERS = {"runs", "exercises"}  # folders that a reader makes
NO_PATHS = {
    ("architecture.md", "backends/numpy/"),  # named as what must not exist
    ("architecture.md", "backends/minimoe_cupy/kernels/*.cu"),  # planned
}


class Block(NamedTuple):
    """A fenced block: its info string, where it starts, what it holds."""

    info: str
    line: int
    text: str


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page, in order."""
    info, start, held = "", 0, []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.startswith("```"):
            held.append(line)
        elif start:
            yield Block(info, start, "\n".join(held) + "\n")
            start = 0
        else:
            info, start, held = line[3:].strip(), number, []
    assert not start, f"{page.name}:{start}: a fence that is never closed"


def prose(page: Path) -> str:
    """The page without its fenced and indented blocks."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"^    .*$", "", text, flags=re.MULTILINE)


def run_page(page: Path) -> int:
    """Run the page's blocks in one namespace; gives how many ran."""
    names: dict[str, Any] = {"__name__": "page"}
    ran, printed = 0, ""
    for block in blocks(page):
        if block.info == "python":
            out = io.StringIO()
            code = compile("\n" * block.line + block.text, str(page), "exec")  # errors then name the page's own line
            with redirect_stdout(out):
                exec(code, names)
            ran, printed = ran + 1, out.getvalue()
        elif block.info == "output":
            shown, got = ([line.rstrip() for line in text.splitlines()] for text in (block.text, printed))
            assert shown == got, f"{page.name}:{block.line}: the block above prints\n{printed}"
    return ran


def anchors(page: Path) -> set[str]:
    """The fragments of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ +(.+)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


def named_paths(page: Path) -> Iterator[str]:
    """Paths in backticks: of a known folder, or with a slash and the suffix of a source file."""
    for name in re.findall(r"`([^`\n]+)`", prose(page)):
        if not re.fullmatch(r"[\w.*-]+(/[\w.*-]+)*/?", name) or "/" not in name:
            continue
        first = name.split("/")[0]
        if (first in FOLDERS or Path(name).suffix in SOURCES) and first not in THE_READERS and (page.name, name) not in NO_PATHS:
            yield name


@cache
def definitions(path: Path) -> frozenset[str]:
    """The functions, classes and assigned names of a Python file, those of a class as Class.name."""

    def within(body: list[ast.stmt], prefix: str) -> Iterator[str]:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                yield prefix + node.name
            if isinstance(node, ast.ClassDef):
                yield from within(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.If):  # declared for the type checker
                yield from within(node.body, prefix)
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                yield from (prefix + target.id for target in targets if isinstance(target, ast.Name))

    return frozenset(within(ast.parse(path.read_text(encoding="utf-8")).body, ""))


def undefined(text: str) -> list[str]:
    """Return the names `file.py:name`, in backticks, that a text has and the repository lacks."""
    missing = []
    for file, name in re.findall(r"`([\w./-]+\.py):([\w.]+)`", text):
        if not (ROOT / file).is_file() or name not in definitions(ROOT / file):
            missing.append(f"{file}:{name}")
    return missing


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in SKETCHES], ids=lambda page: page.name)
def test_the_blocks_of_a_page_run_and_print_what_it_says(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with mm.use_backend("numpy"):
        ran = run_page(page)
    written_as = page.read_text(encoding="utf-8").count("\n```python\n")
    assert ran == written_as


@pytest.mark.parametrize("page", [*PAGES, ROOT / "backends" / "README.md"], ids=lambda page: f"{page.parent.name}/{page.name}")
def test_every_relative_link_of_a_page_leads_somewhere(page: Path) -> None:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, fragment = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (fragment and target.suffix == ".md" and fragment not in anchors(target)):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_names_exists(page: Path) -> None:
    places = [ROOT, page.parent, ROOT / "minimoe"]
    missing = [name for name in named_paths(page) if not any(any(place.glob(name.rstrip("/"))) for place in places)]
    assert not missing


@pytest.mark.parametrize("page", [*PAGES, ROOT / "backends" / "README.md"], ids=lambda page: f"{page.parent.name}/{page.name}")
def test_every_function_that_a_page_names_with_its_file_is_defined_there(page: Path) -> None:
    assert not undefined(prose(page))


def test_the_bridge_page_names_every_function_of_the_example() -> None:
    text = (ROOT / "docs" / "from-micromoe.md").read_text(encoding="utf-8")
    tree = ast.parse((ROOT / "examples" / "micromoe.py").read_text(encoding="utf-8"))
    names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    assert len(names) > 15 and [name for name in names if f"| `examples/micromoe.py:{name}` |" not in text] == []


def test_a_name_that_a_file_does_not_define_is_found() -> None:
    there = "`minimoe/layers/moe.py:MoE.__call__`, `minimoe/backend.py:load`"
    gone = "`minimoe/backend.py:nothing`, `minimoe/layers/moe.py:MoE.nothing`, `minimoe/nothing.py:load`"
    assert undefined(there) == [] and len(undefined(gone)) == 3


def test_a_wrong_output_and_a_block_that_fails_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python\nprint(1)\n```\n\n```output\n1\n```\n")
    assert run_page(page) == 1
    page.write_text("```python\nprint(1)\n```\n\n```output\n2\n```\n")
    with pytest.raises(AssertionError, match="prints"):
        run_page(page)
    page.write_text("```python no-run\n1 / 0\n```\n\n```python\n1 / 0\n```\n")
    with pytest.raises(ZeroDivisionError):
        run_page(page)


def test_the_map_of_the_readme_has_every_folder_and_file_of_the_package() -> None:
    shown = (ROOT / "README.md").read_text(encoding="utf-8").split("\nminimoe/\n")[1].split("\nbackends/")[0]
    named = {line.split()[0] for line in shown.splitlines()}
    public = {"nn.py", "ops.py", "optim.py", "__init__.py", "__main__.py"}  # names of modules that are in the map
    files = {path.name for path in (ROOT / "minimoe").glob("*.py")} - public
    assert named == files | {f"{path.parent.name}/" for path in (ROOT / "minimoe").glob("*/__init__.py")}


def test_the_picture_of_the_architecture_shows_every_folder_and_every_backend() -> None:
    from docs import plots

    folders = {path.parent.name for path in (ROOT / "minimoe").glob("*/__init__.py")}
    assert {name for name, _ in plots.FOLDERS} == folders | {"backend"}
    assert set(plots.BACKENDS) == {*BUILT_IN, "yours"}


def test_the_plots_are_those_that_the_pages_show_and_are_drawn_the_same_twice(tmp_path: Path) -> None:
    from docs import plots

    shown = {link for page in DOCS for link in re.findall(r"\]\((images/[^)\s]+)\)", prose(page))}
    first, second = (plots.draw_all(tmp_path / name) for name in ("first", "second"))
    assert {f"images/{path.name}" for path in first} <= shown
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert all(os.path.getsize(ROOT / "docs" / "images" / path.name) > 1000 for path in first)
