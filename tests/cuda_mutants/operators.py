"""Lists every mutant of a CUDA C file or of a PTX text: one small change each, by fixed operators that know nothing of the tests.

In CUDA C (`mutants_of_source`):
  comparison   <, <=, >, >= lose or gain their equality; == and != swap
  constant     an integer n becomes n + 1, but for shapes of templates and names of registers
  sign         + and - swap between operands, += and -=
  statement    a call without a result is dropped (a barrier, a wait, a store), or an assignment to an element

In PTX (`mutants_of_ptx`), where line numbers and declarations are left alone:
  synchronise  a barrier, a wait, a commit, a fence, an mbarrier's arrival is dropped
  comparison   setp.lt becomes setp.le, and so on
  offset       the constant of an address grows by the access's size
  constant     an integer added or shifted by n becomes n + 1
  operands     the operands of a subtraction, a shift or a selection swap
  predicate    a guarded instruction, or a branch, is for the other lanes
  fragment     two registers of a vector (of mma, ldmatrix, a 16-byte access) swap
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One change of a text: what lies from `start` to `end` becomes `text`."""

    line: int  # from 1
    operator: str
    start: int
    end: int
    text: str
    before: str  # the line, and what becomes of it
    after: str

    def applied(self, source: str) -> str:
        return source[: self.start] + self.text + source[self.end :]


def mutant(source: str, operator: str, start: int, end: int, text: str) -> Mutant:
    first, last = source.rfind("\n", 0, start) + 1, source.find("\n", end)
    changed = source[first:start] + text + source[end:last]
    return Mutant(source.count("\n", 0, start) + 1, operator, start, end, text, source[first:last].strip(), changed.strip())


# ---- CUDA C ------------------------------------------------------------------------------------------------------------------------------

IGNORED = re.compile(
    r'//[^\n]*|#[^\n]*|"(?:\\.|[^"\n])*"|template\s*<[^>]*>|static_assert\([^\n]*|__launch_bounds__\([^)]*\)|asm volatile[^;]*;'
)
EQUALITY = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "=="}


def mutants_of_source(source: str) -> Iterator[Mutant]:
    """Yield every mutant of a CUDA C file, in the order of operators."""
    plain = IGNORED.sub(lambda match: " " * len(match[0]), source)  # the same places, without what is not code
    for match in re.finditer(r" (<=?|>=?|==|!=) ", plain):
        yield mutant(source, "comparison", match.start(1), match.end(1), EQUALITY[match[1]])
    for match in re.finditer(r"(?<![\w.<])(\d+)(?![\w.>xX])", plain):
        yield mutant(source, "constant", match.start(), match.end(), str(int(match[1]) + 1))
    for match in re.finditer(r" (\+=|-=|\+|-) ", plain):
        sign = match[1]
        yield mutant(source, "sign", match.start(1), match.end(1), sign.replace("+", "m").replace("-", "+").replace("m", "-"))
    for match in re.finditer(r"^[ \t]*(?:[\w:]+(?:<[^;(]*>)?\([^;{}]*\)|[\w.>-]+\[[^;={}]*\] [-+*]?= [^;{}]*);", plain, re.M):
        text = plain[match.start() : match.end()]
        if not re.match(r"\s*(return|const|if|for|while|else)\b", text):
            yield mutant(source, "statement", match.start(), match.end(), ";")


# ---- PTX ---------------------------------------------------------------------------------------------------------------------------------

SYNCHRONISES = re.compile(
    r"^\s*(bar\.(sync|warp)|barrier|cp\.async\.(wait|commit)|fence|membar|mbarrier\.(arrive|init)|wgmma\.(fence|commit|wait))[^;]*;", re.M
)
COMPARED = {"lt": "le", "le": "lt", "gt": "ge", "ge": "gt", "eq": "ne", "ne": "eq", "ltu": "leu", "leu": "ltu", "gtu": "geu", "geu": "gtu"}
SIZES = {"8": 1, "16": 2, "32": 4, "64": 8}


def mutants_of_ptx(ptx: str, kernel: str) -> Iterator[Mutant]:
    """Yield every mutant of one kernel of a PTX text, in the order of operators."""
    found = re.search(rf"\.entry {re.escape(kernel)}\(", ptx)
    if found is None:
        raise LookupError(f"the PTX has no kernel {kernel}")
    begins = ptx.index("{", found.start())
    ends = ptx.find("\n}", begins)
    for operator, pattern, replacement in PTX:
        for match in pattern.finditer(ptx, begins, ends):
            text = replacement(match)
            if text is not None:
                yield mutant(ptx, operator, match.start(), match.end(), text)


def more(match: re.Match[str]) -> str:
    """The last group, a number, grows by one."""
    return match[0][: match.start(match.lastindex or 0) - match.start()] + str(int(match[match.lastindex or 0]) + 1) + ";"


def further(match: re.Match[str]) -> str:
    """An access's address moves on by the access's size."""
    vector = int(match["vector"] or 1)
    return match["head"] + f"+{int(match['offset'] or 0) + vector * SIZES[match['bits']]}]"


def swapped(match: re.Match[str]) -> str | None:
    """The first two registers in braces swap."""
    return None if match["one"] == match["two"] else match["head"] + f"{{{match['two']}, {match['one']}"


PTX = (
    ("synchronise", SYNCHRONISES, lambda match: ""),
    ("comparison", re.compile(r"setp\.(lt|le|gt|ge|eq|ne|ltu|leu|gtu|geu)\."), lambda match: f"setp.{COMPARED[match[1]]}."),
    (
        "offset",
        re.compile(
            r"(?P<head>(?:ld|st)\.(?:global|shared)(?:\.nc)?(?:\.v(?P<vector>\d))?\.[busf](?P<bits>\d+)[^;\[]*\[[^\]+]*)(?:\+(?P<offset>\d+))?\]"
        ),
        further,
    ),
    ("constant", re.compile(r"(?:add|shl|shr|mul\.lo|mul\.wide|and)\.[bsu](?:32|64)\s+[^;]*, (\d+);"), more),
    (
        "operands",
        re.compile(r"(?P<head>(?:sub\.[a-z]\d+|sub\.f32)\s+%\w+, )(?P<a>%\w+), (?P<b>%\w+);"),
        lambda m: f"{m['head']}{m['b']}, {m['a']};",
    ),
    ("operands", re.compile(r"(?P<head>selp\.\w+\s+%\w+, )(?P<a>[^,;]+), (?P<b>[^,;]+), "), lambda m: f"{m['head']}{m['b']}, {m['a']}, "),
    ("predicate", re.compile(r"@(?!!)(%p\d+)"), lambda match: f"@!{match[1]}"),
    (
        "fragment",
        re.compile(r"(?P<head>(?:mma|ldmatrix|ld\.\w+|st\.\w+|ld\.global\.nc)[\w.:]*[^;{]*)\{(?P<one>[^,{}]+), ?(?P<two>[^,{}]+)"),
        swapped,
    ),
)
