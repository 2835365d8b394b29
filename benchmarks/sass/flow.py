"""The loops of a program: its instructions in order, basic blocks between its branches, and natural loops.

A branch back to a block that dominates it closes a loop, whose body is every block from which the branch is reached without passing the
head (Aho, Sethi, Ullman 1986). This also finds parts of a loop that a compiler has moved to the end of the kernel, such as waits.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Instruction:
    """One instruction, of PTX or of SASS."""

    opcode: str  # with its suffixes: LDG.E.128, or ld.global.v4.f32
    operands: str = ""
    targets: tuple[int, ...] = ()  # the instructions that a branch may go to, by their index
    goes_on: bool = True  # whether the next instruction may follow: False after a branch or an exit without a condition

    @property
    def name(self) -> str:
        """The opcode without its suffixes."""
        return self.opcode.partition(".")[0]


@dataclass(frozen=True)
class Loop:
    """A loop by the indices of its instructions, in order."""

    head: int
    body: tuple[int, ...]


def blocks_of(code: Sequence[Instruction]) -> list[range]:
    """The basic blocks: runs of instructions that are entered only at their start and left only at their end."""
    starts = {0, *(target for each in code for target in each.targets)}
    starts |= {i + 1 for i, each in enumerate(code) if (each.targets or not each.goes_on) and i + 1 < len(code)}
    bounds = [*sorted(starts), len(code)]
    return [range(first, last) for first, last in zip(bounds, bounds[1:], strict=False)]


def loops_of(code: Sequence[Instruction]) -> list[Loop]:
    """All natural loops; those with one head are one loop."""
    if not code:
        return []
    blocks = blocks_of(code)
    at = {block.start: number for number, block in enumerate(blocks)}
    after = [next_blocks(code[block.stop - 1], block.stop, at) for block in blocks]
    before: list[list[int]] = [[] for _ in blocks]
    for number, following in enumerate(after):
        for each in following:
            before[each].append(number)
    dominators = dominators_of(after, before)
    bodies: dict[int, set[int]] = {}
    for number, following in enumerate(after):
        for head in following:
            if head in dominators.get(number, ()):
                bodies.setdefault(head, {head}).update(reaching(number, head, before))
    return [Loop(blocks[head].start, tuple(sorted(i for number in body for i in blocks[number]))) for head, body in bodies.items()]


def next_blocks(last: Instruction, following: int, at: dict[int, int]) -> list[int]:
    """The blocks that may follow one whose last instruction is given."""
    starts = [*last.targets, *([following] if last.goes_on else [])]
    return [at[start] for start in starts if start in at]


def dominators_of(after: Sequence[Sequence[int]], before: Sequence[Sequence[int]]) -> dict[int, set[int]]:
    """The blocks that every way from the first block to each reachable block passes, itself included."""
    reachable = reached(0, after)
    order = [number for number in range(len(after)) if number in reachable]
    found = {number: set(order) for number in order} | {0: {0}}
    changed = True
    while changed:
        changed = False
        for number in order[1:]:
            common = set.intersection(*(found[each] for each in before[number] if each in reachable)) | {number}
            if common != found[number]:
                found[number], changed = common, True
    return found


def reached(start: int, after: Sequence[Sequence[int]]) -> set[int]:
    seen, waiting = {start}, [start]
    while waiting:
        for each in after[waiting.pop()]:
            if each not in seen:
                seen.add(each)
                waiting.append(each)
    return seen


def reaching(end: int, head: int, before: Sequence[Sequence[int]]) -> set[int]:
    """The blocks from which `end` is reached without passing `head`, and `end`."""
    seen, waiting = {head, end}, [end] if end != head else []
    while waiting:
        for each in before[waiting.pop()]:
            if each not in seen:
                seen.add(each)
                waiting.append(each)
    return seen


def main_loop(loops: Sequence[Loop], *works: Iterable[int]) -> Loop | None:
    """The innermost loop with the most work, by the first of `works` that occurs in a loop; each is the indices of some instructions."""
    for work in map(frozenset, works):
        counts = {loop: len(work.intersection(loop.body)) for loop in loops}
        working = [loop for loop in loops if counts[loop]]
        inner = [loop for loop in working if not any(other.head != loop.head and set(other.body) < set(loop.body) for other in working)]
        if inner:
            return max(inner, key=lambda loop: (counts[loop], -loop.head))
    return None
