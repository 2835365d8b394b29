"""Reads SASS, the machine code of NVIDIA's cards, as nvdisasm prints it, and counts what its loops do.

nvdisasm comes with the wheel `nvidia-cuda-nvdisasm`; it needs no card. NVIDIA documents the opcodes by a line each ("CUDA Binary
Utilities"). Those that matter here: HMMA and HGMMA multiply on the tensor cores (the second one by four warps, without waiting for the
result), FFMA is a multiply-add, LDG and STG access global memory, LDGSTS copies from global to shared memory without a register, LDL and
STL access local memory, WARPGROUP.ARRIVE stands before a chain of HGMMA and WARPGROUP.DEPBAR waits for chains.
"""

import re
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from shutil import which

from benchmarks.sass.flow import Instruction, blocks_of, loops_of, main_loop

FUNCTION = re.compile(r"^\.text\.(\w+):$", re.M)
LABEL = re.compile(r"^(\.L_\w+):")
LINE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(@!?\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
TARGET = re.compile(r"`\(([.$\w]+)\)")
REGISTER = re.compile(r"\bR(\d+)\b")
TENSOR = ("HMMA", "HGMMA", "IMMA", "QGMMA")
ACCESSES = ("LDG", "STG", "LDGSTS", "RED", "ATOMG")
WAITS = ("WARPGROUP.ARRIVE", "WARPGROUP.DEPBAR")
WAYS = 32  # through the code, at most, that are followed from one place
ENDS = ("BRA", "EXIT", "RET", "BRX", "JMP", "BSYNC", "KILL")


@dataclass(frozen=True)
class Counted:
    """Counts of the instructions in the machine code of one kernel."""

    instructions: int  # in the whole kernel
    loop: int  # instructions in the main loop, once through all of its branches; 0 without a loop
    loop_tensor: int  # of them, HMMA or HGMMA
    loop_fma: int  # of them, FFMA
    tile: int  # instructions in the outermost loop around it, itself if there is none
    copies: int  # in the loop that has most of them, copies from global to shared memory that the thread does not wait for (LDGSTS)
    groups: int  # of such copies, how many groups are under way at once
    chain: int  # the most HGMMA in a row without a wait between them; 0 without HGMMA
    loads: int  # the most global loads of a thread that are under way at once: issued before the first use of any of them
    load_bytes: int  # of each of those loads
    local: int  # loads and stores of local memory

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


def nvdisasm() -> str:
    """The path of the disassembler. Raises RuntimeError where there is none."""
    try:
        for file in files("nvidia-cuda-nvdisasm") or ():
            if file.name in ("nvdisasm", "nvdisasm.exe"):
                return str(file.locate())
    except PackageNotFoundError:
        pass
    found = which("nvdisasm")
    if found is None:
        raise RuntimeError("nvdisasm was not found: pip install nvidia-cuda-nvdisasm")
    return found


def disassemble(cubin: Path) -> dict[str, list[Instruction]]:
    """Every function of a file of machine code, by its mangled name."""
    done = subprocess.run([nvdisasm(), "-c", "-ndf", str(cubin)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"nvdisasm: {done.stderr.strip()}")
    return functions(done.stdout)


def functions(text: str) -> dict[str, list[Instruction]]:
    """The functions of a listing of nvdisasm."""
    _, *parts = FUNCTION.split(text)
    return {name: instructions(body) for name, body in zip(parts[::2], parts[1::2], strict=True)}


def instructions(text: str) -> list[Instruction]:
    """The instructions of one function, without the NOPs that fill its end."""
    labels: dict[str, int] = {}
    lines: list[re.Match[str]] = []
    for line in text.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(lines)
        elif found := LINE.match(line):
            lines.append(found)
    code: list[Instruction] = []
    for predicate, opcode, operands in (found.groups() for found in lines):
        named, name = TARGET.search(operands), opcode.partition(".")[0]
        if name == "CALL" and named and named[1] in labels:
            name = "BRA"  # to a place in the kernel: a jump that does not come back, unlike a call of a function
        place = labels.get(named[1]) if named and name in ("BRA", "JMP", "BSSY") else None
        condition = predicate or opcode == "BRA.DIV" or name == "BSSY" or re.match(r"!?U?P\d,", operands)
        code.append(Instruction(opcode, operands, () if place is None else (place,), bool(condition) or name not in ENDS))
    while len(code) > 1 and (code[-1].name == "NOP" or code[-1].targets == (len(code) - 1,)):  # the end is filled: a branch to itself, NOPs
        code.pop()
    return joined([replace(each, targets=tuple(target for target in each.targets if target < len(code))) for each in code])


def joined(code: Sequence[Instruction]) -> list[Instruction]:
    """Lets each BSYNC go to where its lanes meet: the place that BSSY gave to the same barrier register on the way there."""
    result = [replace(each, targets=()) if each.name == "BSSY" else each for each in code]
    known: dict[int, dict[str, int]] = {}
    waiting: list[tuple[int, dict[str, int]]] = [(0, {})]
    while waiting:
        at, places = waiting.pop()
        while at < len(code) and at not in known:
            known[at] = places
            each, barrier = code[at], code[at].operands.partition(",")[0]
            if each.name == "BSSY" and each.targets:
                places = {**places, barrier: each.targets[0]}
            elif each.name == "BSYNC" and barrier in places:
                result[at] = replace(each, targets=(places[barrier],))
            waiting += [(target, places) for target in result[at].targets]
            if not each.goes_on:
                break
            at += 1
    return result


def counted(code: Sequence[Instruction]) -> Counted:
    """Counts in the code of one kernel. Its main loop is the innermost one with the most tensor-core instructions, or without any of them
    the most multiply-adds, or without any the most accesses to global memory."""
    tensor, fma, access, copies, local = (
        {i for i, each in enumerate(code) if each.name in names} for names in (TENSOR, ("FFMA",), ACCESSES, ("LDGSTS",), ("LDL", "STL"))
    )
    loops = loops_of(code)
    main = main_loop(loops, tensor, fma, access)
    loop = set(main.body) if main else set()
    tile = max((len(each.body) for each in loops if loop and loop <= set(each.body)), default=0)
    loads, width = loads_in_flight(code)
    return Counted(
        instructions=len(code), loop=len(loop), loop_tensor=len(loop & tensor), loop_fma=len(loop & fma), tile=tile,
        copies=max((len(copies.intersection(each.body)) for each in loops), default=0), groups=groups_of(code) if copies else 0,
        chain=longest_chain(code), loads=loads, load_bytes=width, local=len(local),
    )  # fmt: skip


def groups_of(code: Sequence[Instruction]) -> int:
    """How many groups of copies are under way at once: one more than the most that a wait leaves."""
    left = [re.fullmatch(r"SB0, 0x([0-9a-f]+)", each.operands) for each in code if each.opcode == "DEPBAR.LE"]
    return 1 + max((int(found[1], 16) for found in left if found), default=0)


def longest_chain(code: Sequence[Instruction]) -> int:
    """The most HGMMA in a row without a wait between them."""
    longest = current = 0
    for each in code:
        if each.name == "HGMMA":
            current += 1
            longest = max(longest, current)
        elif each.opcode.startswith(WAITS) or not each.goes_on:
            current = 0
    return longest


def loads_in_flight(code: Sequence[Instruction]) -> tuple[int, int]:
    """-> of the widest global loads, how many are under way at once at most, and the bytes of each

    Loads are under way from their issue to the first instruction that names a register that they write. Of the ways through the code those
    are followed on which the most are: a way on which no more are under way at a block than on an earlier one ends there.
    """
    blocks = blocks_of(code) if code else []
    at = {block.start: number for number, block in enumerate(blocks)}
    before: dict[int, list[frozenset[int]]] = {}  # the loads under way where a block begins
    most: dict[int, int] = {}
    waiting: list[tuple[int, frozenset[int]]] = [(0, frozenset())] if blocks else []
    while waiting:
        number, under_way = waiting.pop()
        seen = before.setdefault(number, [])
        if len(seen) == WAYS or any(under_way <= other for other in seen):
            continue
        seen.append(under_way)
        for i in blocks[number]:
            under_way = after(code, i, under_way)
            if code[i].name == "LDG":
                size = width_of(code[i].opcode)
                most[size] = max(most.get(size, 0), sum(width_of(code[other].opcode) == size for other in under_way))
        last = code[blocks[number].stop - 1]
        starts = (*last.targets, *([blocks[number].stop] if last.goes_on else []))
        waiting += [(at[start], under_way) for start in starts if start in at]
    width = max(most, default=0)
    return most.get(width, 0), width


def after(code: Sequence[Instruction], i: int, under_way: frozenset[int]) -> frozenset[int]:
    """The loads under way after instruction i, of those that were before it."""
    named = {int(number) for number in REGISTER.findall(code[i].operands)}
    if code[i].name != "LDG":
        return frozenset(load for load in under_way if not named.intersection(written(code[load])))
    own = written(code[i])
    return frozenset(load for load in under_way if load != i and not (named | set(own)).intersection(written(code[load]))) | {i}


def written(load: Instruction) -> range:
    """The registers that a load writes."""
    found = REGISTER.search(load.operands)
    first = int(found[1]) if found else 0
    return range(first, first + max(1, width_of(load.opcode) // 4))


def width_of(opcode: str) -> int:
    """The bytes that one thread accesses."""
    for suffix in opcode.split("."):
        if suffix in ("128", "64"):
            return int(suffix) // 8
        if suffix in ("U8", "S8"):
            return 1
        if suffix in ("U16", "S16"):
            return 2
    return 4
