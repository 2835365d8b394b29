"""The instructions of a kernel in PTX, as a program whose loops can be found: what ptxas makes machine code of."""

import re

from benchmarks.sass.flow import Instruction

LINE = re.compile(r"^\s*(@!?%\w+\s+)?([a-z]\w*(?:[.:]+\w+)*)\s*(.*?);")
LABEL = re.compile(r"^\s*(\$?\w+):")


def kernel(ptx: str, name: str) -> list[Instruction]:
    """The instructions of one kernel of a PTX text."""
    found = re.search(rf"\.entry {re.escape(name)}\b.*?^\{{(.*?)^\}}", ptx, re.S | re.M)
    if found is None:
        raise LookupError(f"the PTX has no kernel {name}")
    labels: dict[str, int] = {}
    lines: list[tuple[str, str, str]] = []
    for line in statements(found[1]):
        if label := LABEL.match(line):
            labels[label[1]] = len(lines)
        elif instruction := LINE.match(line):
            lines.append(instruction.groups(""))  # type: ignore[arg-type]
    code = []
    for predicate, opcode, operands in lines:
        goes = labels.get(operands.strip()) if opcode.startswith("bra") else None
        ends = opcode.startswith(("bra", "ret", "exit"))
        code.append(Instruction(opcode, operands, () if goes is None or goes >= len(lines) else (goes,), bool(predicate) or not ends))
    return code


def statements(body: str) -> list[str]:
    """The lines of a body: those of an instruction that is written over several, such as wgmma with its registers, joined."""
    joined: list[str] = []
    held = ""
    for line in re.sub(r"//[^\n]*", "", body).splitlines():
        held = f"{held} {line.strip()}".strip()
        if not held or held.endswith((";", ":", "{", "}")) or held.startswith("."):
            joined += [part if part.endswith(":") else f"{part};" for part in held.strip("{} ").split(";") if part.strip()]
            held = ""
    return joined
