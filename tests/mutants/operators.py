"""Lists every mutant of a source file: one small, mechanical change each, by operators that are fixed here and know nothing of the suite.

comparison        <, <=, >, >= lose or gain their equality, and turn around; == and != swap, is and is not, in and not in; min and max,
                  minimum and maximum swap; `not x` and `~x` become x
constant          an integer n becomes n + 1, a number x 1.01 x (0.0: 0.01); True and False swap
sign              + and - swap, += and -=, np.add and np.subtract; -x becomes x
axis              axis=-1 becomes 0, axis=0 becomes -1, axis=n n - 1; x.T becomes x
slice bound       a bound b that is written out in x[b:b], slice(b, b) or range(b, b) becomes b + 1, and b - 1
dtype             np.float32 and np.float64 swap, np.int32 and np.int64; np.uint64 becomes np.int64, np.bool_ np.int32; x.dtype becomes
                  np.float32, and np.float64; x.astype(t) becomes x
dropped statement a call, an assignment with an operation, an assignment to an element or to a name that has a value already, a bare return
buffer reuse      what np.empty, zeros, ones, full (and _like) make is made once for each shape and dtype, and comes back as the last user
                  left it; what a function returns is copied into such a buffer, unless `out` was given; x.copy() becomes x; a scratch
                  buffer gets the name of the next one in its file

Not mutated: annotations, strings, imports, and defaults of parameters, which loading compares with the contract's. A constant or statement
is changed by the most specific operator alone: bounds and axes do not count as constants.
"""

import ast
from dataclasses import dataclass
from pathlib import Path

COMPARISONS = {
    "<": ("<=", ">="), "<=": ("<", ">"), ">": (">=", "<="), ">=": (">", "<"), "==": ("!=",), "!=": ("==",), "is": ("is not",),
    "is not": ("is",), "in": ("not in",), "not in": ("in",),
}  # fmt: skip
SWAPPED = {"min": "max", "max": "min", "minimum": "maximum", "maximum": "minimum"}
SIGNS = {"add": "subtract", "subtract": "add"}
DTYPES = {
    "float32": "float64", "float64": "float32", "int32": "int64", "int64": "int32", "uint64": "int64", "bool_": "int32",
}  # fmt: skip
MAKERS = ("empty", "zeros", "ones", "full", "empty_like", "zeros_like", "ones_like", "full_like")
HELPER = "from mutants.reused import made_once, returned_in"


@dataclass(frozen=True)
class Mutant:
    """One change of one file: its text from `start` to `end` becomes `text`."""

    file: str
    line: int
    function: str  # the innermost function around it, "" for a module's or class's own statements
    operator: str
    start: int
    end: int
    text: str
    before: str  # the lines that it changes, and what they become
    after: str

    def key(self) -> tuple[str, str, str, str, str]:
        """Return what names it as long as its lines stay the same, wherever they move."""
        return self.file, self.function, self.operator, self.before, self.after

    def applied(self, source: str) -> str:
        """Return the mutated source; a last line imports what reused buffers need."""
        return f"{source[: self.start]}{self.text}{source[self.end :]}\n{HELPER}  # noqa\n"


def mutants_of(path: Path) -> list[Mutant]:
    """Return all mutants of a file, in the order of the text."""
    found = Finder(path.name, path.read_text(encoding="utf-8"))
    found.visit(found.tree)
    return sorted(found.mutants, key=lambda mutant: (mutant.start, mutant.end, mutant.operator, mutant.text))


class Finder(ast.NodeVisitor):
    """Walks a file's tree and notes every mutant."""

    def __init__(self, file: str, source: str) -> None:
        self.file, self.source, self.tree = file, source, ast.parse(source)
        self.mutants: list[Mutant] = []
        self.lines = [0]
        for line in source.splitlines(keepends=True):
            self.lines.append(self.lines[-1] + len(line))
        self.function, self.bound, self.has_out = "", set[str](), False
        self.scratch = sorted({call.args[0].value for call in ast.walk(self.tree) if is_scratch(call)})
        self.special: set[int] = set()  # ids of nodes that are bounds or axes
        self.sites = 0

    # ---- noting ------------------------------------------------------------------------------------------------------------------

    def span(self, node: ast.AST) -> tuple[int, int]:
        """Return where a node's text starts and ends; these files are ASCII in code, so that columns count characters."""
        return self.lines[node.lineno - 1] + node.col_offset, self.lines[node.end_lineno - 1] + node.end_col_offset

    def segment(self, node: ast.AST) -> str:
        start, end = self.span(node)
        return self.source[start:end]

    def note(self, operator: str, node: ast.AST, text: str) -> None:
        self.note_at(operator, *self.span(node), text)

    def note_at(self, operator: str, start: int, end: int, text: str) -> None:
        if text == self.source[start:end]:
            return
        first = self.source.rfind("\n", 0, start) + 1
        last = self.source.find("\n", end)
        before, after = self.source[first:last], self.source[first:start] + text + self.source[end:last]
        shown = [" ".join(lines.split()) for lines in (before, after)]
        line = self.source.count("\n", 0, start) + 1
        self.mutants.append(Mutant(self.file, line, self.function, operator, start, end, text, *shown))

    # ---- what is walked ----------------------------------------------------------------------------------------------------------

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        outer = self.function, self.bound, self.has_out
        arguments = [arg.arg for arg in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        self.function, self.bound, self.has_out = node.name, set(arguments), "out" in arguments
        for statement in node.body:  # neither annotations nor defaults
            self.visit(statement)
        self.function, self.bound, self.has_out = outer

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_Import(self, node: ast.Import) -> None:
        pass

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        pass

    def visit_Compare(self, node: ast.Compare) -> None:
        operands = [node.left, *node.comparators]
        for left, right in zip(operands, operands[1:], strict=False):
            start, end = self.span(left)[1], self.span(right)[0]
            between = self.source[start:end].strip(" ()\n")
            for other in COMPARISONS[" ".join(between.split())]:
                at = start + self.source[start:end].index(between)
                self.note_at("comparison", at, at + len(between), other)
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.Not | ast.Invert):
            self.note("comparison", node, f"({self.segment(node.operand)})")
        elif isinstance(node.op, ast.USub) and id(node) not in self.special:
            self.note("sign", node, f"({self.segment(node.operand)})")
        if id(node) not in self.special:
            self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if id(node) in self.special or node.value is None:
            return
        if isinstance(node.value, bool):
            self.note("constant", node, str(not node.value))
        elif isinstance(node.value, int):
            self.note("constant", node, str(node.value + 1))
        elif isinstance(node.value, float):
            self.note("constant", node, f"{1.01 * node.value if node.value else 0.01:.10g}")

    def visit_BinOp(self, node: ast.BinOp) -> None:
        if isinstance(node.op, ast.Add | ast.Sub):
            start, end = self.span(node.left)[1], self.span(node.right)[0]
            sign = "+" if isinstance(node.op, ast.Add) else "-"
            at = start + self.source[start:end].index(sign)
            self.note_at("sign", at, at + 1, "-" if sign == "+" else "+")
        self.generic_visit(node)

    def visit_Slice(self, node: ast.Slice) -> None:
        for bound in (node.lower, node.upper):
            self.note_bound(bound)
        self.generic_visit(node)

    def note_bound(self, bound: ast.expr | None) -> None:
        if bound is None or (isinstance(bound, ast.Constant) and bound.value is None):
            return
        text = self.segment(bound)
        self.special.add(id(bound))
        for change in ("+ 1", "- 1"):
            self.note("slice bound", bound, f"({text} {change})" if isinstance(bound, ast.Name | ast.Constant) else f"(({text}) {change})")

    def visit_Attribute(self, node: ast.Attribute) -> None:
        _, end = self.span(node)
        name = end - len(node.attr)
        of_numpy = isinstance(node.value, ast.Name) and node.value.id == "np"
        if node.attr in SWAPPED:
            self.note_at("comparison", name, end, SWAPPED[node.attr])
        if of_numpy and node.attr in SIGNS:
            self.note_at("sign", name, end, SIGNS[node.attr])
        if of_numpy and node.attr in DTYPES:
            self.note_at("dtype", name, end, DTYPES[node.attr])
        if node.attr == "dtype" and not of_numpy:
            self.note("dtype", node, "np.float32")
            self.note("dtype", node, "np.float64")
        if node.attr == "T":
            self.note("axis", node, self.segment(node.value))
        self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        if node.id in ("min", "max") and isinstance(node.ctx, ast.Load):
            self.note("comparison", node, SWAPPED[node.id])

    def visit_keyword(self, node: ast.keyword) -> None:
        if node.arg == "axis":
            text = self.segment(node.value)
            other = {"-1": "0", "0": "-1"}.get(text) or str(int(text) - 1)
            self.note("axis", node.value, other)
            self.special.update(id(part) for part in ast.walk(node.value))
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        text = self.segment(node)
        if isinstance(node.func, ast.Name) and node.func.id in ("range", "slice"):
            for argument in node.args:
                self.note_bound(argument)
        if isinstance(node.func, ast.Attribute):
            of = self.segment(node.func.value)
            if node.func.attr == "astype":
                self.note("dtype", node, of)
            if node.func.attr == "copy":
                self.note("buffer reuse", node, of)
            if of == "np" and node.func.attr in MAKERS:
                self.sites += 1
                self.note("buffer reuse", node, f"made_once({self.sites}, {text})")
        if is_scratch(node) and len(self.scratch) > 1:
            position = self.scratch.index(node.args[0].value)
            self.note("buffer reuse", node.args[0], f'"{self.scratch[(position + 1) % len(self.scratch)]}"')
        self.generic_visit(node)

    # ---- statements --------------------------------------------------------------------------------------------------------------

    def visit_Expr(self, node: ast.Expr) -> None:
        if not isinstance(node.value, ast.Constant):  # a docstring
            self.note("dropped statement", node, "pass")
            self.visit(node.value)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self.note("dropped statement", node, "pass")
        if isinstance(node.op, ast.Add | ast.Sub):
            start, end = self.span(node.target)[1], self.span(node.value)[0]
            sign = "+=" if isinstance(node.op, ast.Add) else "-="
            at = start + self.source[start:end].index(sign)
            self.note_at("sign", at, at + 2, "-=" if sign == "+=" else "+=")
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        names = [part for target in node.targets for part in (target.elts if isinstance(target, ast.Tuple) else [target])]
        if self.function and all(not isinstance(part, ast.Name) or part.id in self.bound for part in names):
            self.note("dropped statement", node, "pass")
        self.generic_visit(node)
        self.bound.update(part.id for part in names if isinstance(part, ast.Name))

    def visit_Return(self, node: ast.Return) -> None:
        if node.value is None:
            self.note("dropped statement", node, "pass")
            return
        if not isinstance(node.value, ast.Constant):
            self.sites += 1
            text = self.segment(node.value)
            reused = f"returned_in({self.sites}, ({text}))"
            self.note("buffer reuse", node.value, f"({text}) if out is not None else {reused}" if self.has_out else reused)
        self.visit(node.value)

    def visit_For(self, node: ast.For) -> None:
        self.bound.update(part.id for part in ast.walk(node.target) if isinstance(part, ast.Name))
        self.generic_visit(node)


def is_scratch(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "_scratch"
