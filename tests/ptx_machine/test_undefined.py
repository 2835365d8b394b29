"""Nobody may use the result of a division by zero or of a shift by the width of its type or more; a compiler may compute it."""

import numpy as np
import pytest

from ptx_machine.machine import Fault
from ptx_machine.one_instruction import N, dtype_of, evaluate, values
from ptx_machine.test_arithmetic import INTEGERS, bits, draws


@pytest.mark.parametrize("instruction", ["shl.b16", "shl.b32", "shl.b64", "shr.u16", "shr.s32", "shr.u64"])
def test_a_shift_by_the_width_or_more_is_a_fault(instruction):
    name = instruction[-3:]
    counts = np.zeros(N, np.uint32)
    counts[45] = bits(name)
    with pytest.raises(Fault, match=rf"a shift by {bits(name)} of a value of {bits(name)} bits"):
        evaluate(f"{instruction} $d, $0, $1;", name, (name, values(name, draws("shift"))), ("u32", counts))
    # another value may be chosen, and lanes that take no part may hold anything
    chosen = f"setp.lt.u32 p, $1, {bits(name)}; selp.b{bits(name)} $d, $d, $0, p;"
    evaluate(f"{{.reg .pred p; {instruction} $d, $0, $1; {chosen}}}", name, (name, np.ones(N)), ("u32", counts))
    evaluate(f"{{.reg .pred p; setp.lt.u32 p, $1, {bits(name)}; @p {instruction} $d, $0, $1;}}", name, (name, np.ones(N)), ("u32", counts))


@pytest.mark.parametrize("instruction", [f"{operation}.{name}" for operation in ("div", "rem") for name in INTEGERS])
def test_a_division_by_zero_is_a_fault(instruction):
    name = instruction[-3:]
    b = np.ones(N, dtype_of(name))
    b[77] = 0
    with pytest.raises(Fault, match=r"thread 77: use of d.* a division by zero at PTX line .*st\.global"):
        evaluate(f"{instruction} $d, $0, $1;", name, (name, np.ones(N)), (name, b))


CHOSEN = """{
    .reg .pred zero, even, p<4>; .reg .b32 %r<9>;
    setp.eq.u32 zero, $1, 0;
    rem.u32 %r1, $0, $1;
    add.u32 %r2, %r1, 1;
    INSTRUCTION
}"""
UNUSED = {
    "a choice of the other value": "selp.u32 $d, 7, %r2, zero;",
    "and with no bit": "selp.u32 %r3, 0, -1, zero; and.b32 $d, %r2, %r3;",
    "or with every bit": "selp.u32 %r3, -1, 0, zero; or.b32 $d, %r3, %r2;",
    "and with false": "setp.eq.u32 even, %r1, 0; not.pred p1, zero; and.pred p2, even, p1; selp.u32 $d, 1, 0, p2;",
    "or with true": "setp.eq.u32 even, %r1, 0; or.pred p2, zero, even; selp.u32 $d, 1, 0, p2;",
    "the register is written again": "@zero mov.u32 %r1, 5; mov.u32 $d, %r1;",
    "a value that nobody reads": "mov.u32 %r4, %r2; mov.u32 $d, 1;",
}
USED = {
    "what is stored": "mov.u32 $d, %r2;",
    "a branch": "setp.eq.u32 even, %r2, 4; @even bra NEXT; NEXT: mov.u32 $d, 1;",
    "a predicate": "setp.eq.u32 even, %r2, 4; mov.u32 $d, 1; @even mov.u32 $d, 2;",
    "an address": ".shared .b32 tile[64]; .reg .b32 base; mov.u32 base, tile; mad.lo.u32 %r5, %r2, 4, base; ld.shared.u32 $d, [%r5];",
    "another lane": "shfl.sync.bfly.b32 $d, %r2, 1, 31, -1;",
    "a choice by it": "setp.eq.u32 even, %r2, 4; selp.u32 $d, 1, 2, even;",
    "a choice of it": "not.pred p1, zero; selp.u32 $d, 7, %r2, p1;",
    "or with no bit": "or.b32 $d, %r2, 0;",
    "only some lanes write again": "@!zero mov.u32 %r1, 5; mov.u32 $d, %r1;",
}


def quotients():
    draw = draws("divisors")
    return ("u32", draw.integers(0, 99, N)), ("u32", draw.integers(0, 3, N))


@pytest.mark.parametrize("instruction", UNUSED.values(), ids=UNUSED)
def test_a_compiler_may_divide_by_zero_for_a_value_that_nobody_uses(instruction):
    evaluate(CHOSEN.replace("INSTRUCTION", instruction), "u32", *quotients())


@pytest.mark.parametrize("instruction", USED.values(), ids=USED)
def test_nobody_may_use_what_a_division_by_zero_gave(instruction):
    with pytest.raises(Fault, match=r"use of .* which is undefined: it comes from a division by zero at PTX line \d+"):
        evaluate(CHOSEN.replace("INSTRUCTION", instruction), "u32", *quotients())
