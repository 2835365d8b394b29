"""Print the figures of the code's structure, counted from its sources: `python -m benchmarks.structure [PATH]`.

PATH is a clone of minimoe, by default this one. The rule, over the Python files of `minimoe/`:

- A module is a file, and its lines are all lines of its text. A room is a file or a folder directly in `minimoe/`. Folders that are no
  packages, such as the templates of `minimoe backends new`, are left out.
- An arrow points from a module to a module of minimoe that it imports, also inside functions and under `TYPE_CHECKING`; several imports
  of the same module are one arrow. `from minimoe.engine import ops` is an arrow to `engine/ops.py`.
- Arrows to `minimoe/__init__.py` are not counted, since it finds its names lazily; `__main__.py` is left out.
- A circle is a set of two or more modules, each of which reaches all the others (a strongly connected component).
- Levels are the number of modules on the longest chain of arrows that meets no module twice.

Arrows, circles and levels between rooms follow the same rule; one room has one arrow to another, however many modules draw it.
"""

import argparse
import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "minimoe"
Graph = dict[str, set[str]]


def modules(root: Path) -> dict[str, Path]:
    """Every module of the package, by its dotted name."""
    found = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if not all((root.joinpath(*parts[:depth]) / "__init__.py").is_file() for depth in range(1, len(parts))):
            continue
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(tree: ast.AST, names: set[str], module: str) -> Iterator[tuple[str, bool]]:
    """The modules that a file imports, and whether it does so inside a function."""

    def walk(node: ast.AST, inside: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, inside) for alias in child.names if alias.name in names)
            elif isinstance(child, ast.ImportFrom):
                if child.level:
                    raise ValueError(f"{module}: a relative import, line {child.lineno}; this counts absolute ones")
                for alias in child.names:
                    submodule = f"{child.module}.{alias.name}"
                    target = submodule if submodule in names else child.module
                    if target in names:
                        yield target, inside
            else:
                yield from walk(child, inside or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))

    yield from walk(tree, False)


def graph(root: Path) -> tuple[Graph, Graph]:
    """The arrows from each module, and those of them that are drawn only inside functions."""
    found = modules(root)
    everything: Graph = {}
    inside_only: Graph = {}
    for module, path in found.items():
        if module == f"{PACKAGE}.__main__":
            continue
        pairs = {pair for pair in imported(ast.parse(path.read_text(encoding="utf-8")), set(found), module) if pair[0] != module}
        everything[module] = {target for target, _ in pairs} - {PACKAGE}
        inside_only[module] = everything[module] - {target for target, inside in pairs if not inside}
    return everything, inside_only


def room_of(module: str) -> str:
    """The file or folder of `minimoe/` that a module belongs to."""
    return "__init__" if module == PACKAGE else module.split(".")[1]


def by_room(arrows: Graph) -> Graph:
    """The arrows between rooms."""
    rooms: Graph = {}
    for module, targets in arrows.items():
        room = room_of(module)
        rooms.setdefault(room, set()).update(map(room_of, targets))
    return {room: targets - {room} for room, targets in rooms.items()}


def reach(arrows: Graph) -> Graph:
    """Everything that each module reaches along arrows."""
    reached = {}
    for start in arrows:
        seen: set[str] = set()
        waiting = list(arrows[start])
        while waiting:
            target = waiting.pop()
            if target not in seen:
                seen.add(target)
                waiting += arrows.get(target, ())
        reached[start] = seen
    return reached


def circles(arrows: Graph) -> list[list[str]]:
    """Every set of two or more modules that all reach each other."""
    reached = reach(arrows)
    sets = {tuple(sorted({a} | {b for b in reached[a] if a in reached.get(b, ())})) for a in arrows}
    return [list(members) for members in sorted(sets) if len(members) > 1]


def levels(arrows: Graph) -> int:
    """The length of the longest chain that meets no module twice."""
    circle = {name: set(members) for members in circles(arrows) for name in members}

    @cache
    def longest(name: str) -> int:
        return along(name, frozenset())

    def along(name: str, passed: frozenset[str]) -> int:
        """The length of the longest chain from here that avoids `passed`, modules of the same circle."""
        below = 0
        for target in arrows.get(name, ()):
            if target not in circle.get(name, ()):
                below = max(below, longest(target))
            elif target not in passed | {name}:
                below = max(below, along(target, passed | {name}))
        return 1 + below

    return max(map(longest, arrows))


def structure(root: Path) -> dict[str, int]:
    """Every figure, by name."""
    arrows, inside = graph(root)
    sources = [path.read_text(encoding="utf-8") for path in modules(root).values()]
    rooms = by_room(arrows)
    return {
        "files": len(sources),
        "lines": sum(len(text.splitlines()) for text in sources),
        "rooms at the top": len(rooms),
        "levels of imports": levels(arrows),
        "arrows between modules": sum(map(len, arrows.values())),
        "of these, inside functions only": sum(map(len, inside.values())),
        "circles of modules": len(circles(arrows)),
        "levels of rooms": levels(rooms),
        "arrows between rooms": sum(map(len, rooms.values())),
        "circles of rooms": len(circles(rooms)),
    }


def table(before: dict[str, int], now: dict[str, int]) -> str:
    """The figures of two clones side by side, as Markdown."""
    rows = [f"| {name} | {before[name]:,} | {value:,} |" for name, value in now.items()]
    return "\n".join(["| `minimoe/` | before | now |", "| --- | ---: | ---: |", *rows])


def write_table(text: str) -> None:
    """Put the table between its marks in docs/architecture.md."""
    page = ROOT / "docs" / "architecture.md"
    start, rest = page.read_text(encoding="utf-8").split("<!-- structure:begin -->\n")
    end = rest.split("<!-- structure:end -->\n")[1]
    page.write_text(f"{start}<!-- structure:begin -->\n{text}\n<!-- structure:end -->\n{end}", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", nargs="?", type=Path, default=ROOT, help="a clone of minimoe (default: this one)")
    parser.add_argument("--before", type=Path, help="an older clone: print both side by side, as Markdown")
    parser.add_argument("--write", action="store_true", help="with --before: put the table into docs/architecture.md")
    options = parser.parse_args()
    figures = structure(options.path)
    if options.before:
        both = table(structure(options.before), figures)
        print(both)
        if options.write:
            write_table(both)
    else:
        for name, value in figures.items():
            print(f"{name:31} {value:7,}")
