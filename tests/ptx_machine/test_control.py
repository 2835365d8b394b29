"""Control flow and warps: branches and where lanes meet, predicated ends, barriers that count and reduce, votes, matches, reductions."""

import numpy as np
import pytest

from ptx_machine.machine import Fault, Module
from ptx_machine.texts import module, run

SEEDS = (0, 1, 2, 3)
LANES = np.arange(32)
STORE = "mul.wide.u32 %rd60, %r1, 4; add.s64 %rd60, %rd1, %rd60; st.global.u32 [%rd60], %r9;"


def result(body, threads=32, seed=0):
    """What each thread has in %r9 at the end."""
    y = np.zeros(threads, np.uint32)
    run(f"{body} {STORE}", y, threads=threads, seed=seed)
    return y


# ---- branches ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_lanes_that_branch_apart_meet_again(seed):
    body = """
        setp.lt.u32 %p1, %r1, 10; mov.u32 %r9, 1;
        @%p1 bra SMALL; add.u32 %r9, %r9, 100; bra.uni DONE;
        SMALL: add.u32 %r9, %r9, 10;
        DONE: vote.sync.ballot.b32 %r8, %p1, -1; add.u32 %r9, %r9, %r8;
    """
    assert (result(body, seed=seed) == np.where(LANES < 10, 11, 101) + 1023).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_loop_runs_as_often_as_each_lane_says(seed):
    body = "mov.u32 %r9, 0; LOOP: add.u32 %r9, %r9, 1; setp.lt.u32 %p1, %r9, %r1; @%p1 bra LOOP;"
    assert (result(body, seed=seed) == np.maximum(LANES, 1)).all()


def test_a_thread_ends_where_its_predicate_says():
    y = np.zeros(32, np.uint32)
    run(f"setp.ge.u32 %p1, %r1, 20; @%p1 exit; mov.u32 %r9, 7; {STORE}", y)
    assert (y == np.where(LANES < 20, 7, 0)).all()


def test_a_branch_that_was_taken_to_be_uniform_is_not():
    with pytest.raises(Fault, match="uniform is taken by some lanes only"):
        result("mov.u32 %r9, 0; setp.lt.u32 %p1, %r1, 10; @%p1 bra.uni DONE; DONE: add.u32 %r9, %r9, 1;")


# ---- operations of a warp ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation, wanted", [("min", -31), ("max", 0), ("add", -496)])
def test_integers_are_reduced_over_a_warp(operation, wanted):
    got = result(f"neg.s32 %r7, %r1; redux.sync.{operation}.s32 %r9, %r7, -1;")
    assert (got.view(np.int32) == wanted).all()


@pytest.mark.parametrize("operation, wanted", [("and", 4), ("or", 31 | 4), ("xor", 0)])
def test_bits_are_reduced_over_a_warp(operation, wanted):
    assert (result(f"or.b32 %r7, %r1, 4; redux.sync.{operation}.b32 %r9, %r7, -1;") == wanted).all()


def test_a_reduction_of_floats_is_refused():
    with pytest.raises(Fault, match="does not know"):
        module("redux.sync.min.f32 %f1, %f2, -1;", 1)


def test_lanes_with_one_value_are_matched():
    got = result("shr.u32 %r7, %r1, 3; match.any.sync.b32 %r9, %r7, -1;")
    assert (got == np.uint32(0xFF) << (LANES // 8 * 8).astype(np.uint32)).all()
    assert not result("match.all.sync.b32 %r9|%p2, %r1, -1;").any()
    assert (result("mov.u32 %r7, 5; match.all.sync.b32 %r9|%p2, %r7, -1; selp.u32 %r9, %r9, 1, %p2;") == 0xFFFFFFFF).all()


def test_a_vote_is_uniform_where_all_agree():
    body = "setp.lt.u32 %p1, %r1, {}; vote.sync.uni.pred %p2, %p1, -1; selp.u32 %r9, 1, 0, %p2;"
    assert result(body.format(32)).all() and not result(body.format(9)).any()


def test_lanes_know_which_of_them_are_active():
    body = "mov.u32 %r9, 0; setp.lt.u32 %p1, %r1, 5; @!%p1 bra DONE; activemask.b32 %r9; DONE: bar.warp.sync -1;"
    assert (result(body) == np.where(LANES < 5, 31, 0)).all()


# ---- barriers ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("operation, wanted", [("popc.u32 %r9", 70), ("or.pred %p2", 1), ("and.pred %p2", 0)])
def test_a_barrier_reduces_over_the_block(operation, wanted, seed):
    store = "" if "popc" in operation else "selp.u32 %r9, 1, 0, %p2;"
    got = result(f"setp.lt.u32 %p1, %r1, 70; bar.red.{operation}, 0, %p1; {store}", threads=96, seed=seed)
    assert (got == wanted).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_warps_that_arrive_let_those_that_wait_go_on(seed):
    body = """
        setp.ge.u32 %p1, %r1, 32; @%p1 bra WAIT;
        mov.u32 %r7, 42; st.shared.u32 [%r2], %r7; bar.arrive 1, 64; mov.u32 %r9, 0; bra.uni DONE;
        WAIT: bar.sync 1, 64; ld.shared.u32 %r9, [%r2];
        DONE:
    """.replace("st.shared", "setp.eq.u32 %p3, %r1, 0; @%p3 st.shared")
    assert result(body, threads=64, seed=seed).tolist() == [0] * 32 + [42] * 32


FAULTS = {
    "lanes name different barriers": ("and.b32 %r7, %r1, 1; bar.sync %r7, 32;", "it comes to another barrier"),
    "lanes name different counts": (
        "and.b32 %r7, %r1, 1; shl.b32 %r7, %r7, 5; add.u32 %r7, %r7, 32; bar.sync 1, %r7;",
        "for another number of",
    ),
    "no such barrier": ("bar.sync 16, 32;", "barrier 16: a block has 16"),
    "half a warp": ("bar.sync 1, 48;", "a barrier of 48 threads"),
    "it polls for ever": ("LOOP: nanosleep.u32 20; bra LOOP;", "the kernel does not end"),
}


@pytest.mark.parametrize("what", FAULTS)
def test_a_barrier_that_cannot_work_is_a_fault(what):
    body, words = FAULTS[what]
    with pytest.raises(Fault, match=words):
        result(f"mov.u32 %r9, 0; {body}")


def test_those_that_arrive_are_waited_for():
    with pytest.raises(Fault, match="32 threads arrived at barrier 1, and nobody waited"):
        result("mov.u32 %r9, 0; setp.lt.u32 %p1, %r1, 32; @!%p1 bra DONE; bar.arrive 1, 64; DONE:", threads=64)


# ---- what is refused when a kernel is loaded ---------------------------------------------------------------------------------------------

HEADER = ".version 8.6\n.target sm_90a\n.address_size 64\n"
REFUSED = {
    "local memory": ("{ .local .align 4 .b8 depot[8]; ret; }", "PTX line 4: local memory"),
    "an operand too few": ("{ .reg .b32 %r<4>; add.s32 %r1, %r2; ret; }", "add.s32 %r1, %r2: 3 operands are expected"),
    "cp.async with a predicate": (
        "{ .reg .pred %p<2>; .reg .b64 %rd<4>; cp.async.cg.shared.global [%rd1], [%rd2], 16, %p1; ret; }",
        "number of bytes",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_ptx_that_the_machine_does_not_know_is_refused_with_its_line(what):
    body, words = REFUSED[what]
    with pytest.raises(Fault, match=words):
        Module(f"{HEADER}.visible .entry k() {body}\n")


def test_a_function_that_is_called_is_refused():
    with pytest.raises(Fault, match="a function that is called"):
        Module(f"{HEADER}.func f() {{ ret; }}\n.visible .entry k() {{ ret; }}\n")


def test_launch_bounds_have_up_to_three_directions():
    bounded = Module(f"{HEADER}.visible .entry k() .maxntid 16, 16, 1 {{ ret; }}\n")
    bounded.launch("k", (1,), (256,), ())
    with pytest.raises(Fault, match="257 threads in a block: the kernel is bounded to 256"):
        bounded.launch("k", (1,), (257,), ())
