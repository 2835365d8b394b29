"""Reads the integer constants of kernels from their source, so that tile sizes, threads and stages are written once, where the kernel is.

constant("route.cu", "PAIRS")                       # constexpr int ROUNDS = 8, PAIRS = THREADS * ROUNDS;
constant("attention_dq_bf16.cu", "OTHER", W=96)     # template <int W> constexpr int OTHER = W <= 64 ? 64 : 32;
"""

import re
from functools import cache

from minimoe_cupy.loader import KERNELS


@cache
def definitions(file: str) -> dict[str, str]:
    """Returns the C expression of each `constexpr int` at the top level of a kernel file or of a header that it includes, by name."""
    text = re.sub(r"//[^\n]*", "", (KERNELS / file).read_text(encoding="utf-8"))
    found: dict[str, str] = {}
    for header in re.findall(r'^#include "(\w+\.cuh)"', text, re.M):
        found |= definitions(header)
    for statement in re.findall(r"^constexpr int ([^;]+);", text, re.M):
        for definition in statement.split(", "):
            name, _, expression = definition.partition(" = ")
            found[name] = expression
    return found


def constant(file: str, name: str, **template: int) -> int:
    """Returns a constant that `file` defines or includes, given its template arguments by name. Raises LookupError if there is none."""
    known = definitions(file)
    if name not in known:
        raise LookupError(f"{file} defines no constant {name}, and no template argument of that name is given")
    expression = as_python(known[name])
    used = {word: template[word] if word in template else constant(file, word, **template) for word in re.findall(r"[A-Z]\w*", expression)}
    return int(eval(expression, {"__builtins__": {}}, used))


def as_python(expression: str) -> str:
    """Translates a C expression of integers: a ? b : c, && and ||, whole division, and templates used with their own parameters (X<W>)."""
    condition, question, branches = expression.partition(" ? ")
    if question:
        yes, _, no = branches.partition(" : ")
        return f"(({as_python(yes)}) if ({as_python(condition)}) else ({as_python(no)}))"
    plain = re.sub(r"(\w)<[\w, ]+>", r"\1", expression)
    return plain.replace("&&", " and ").replace("||", " or ").replace("/", "//")
