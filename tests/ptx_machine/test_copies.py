"""Background copies, mbarriers and fences do on the machine what the PTX ISA says, and their misuse is found."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptx_machine.machine import Fault, unwritten
from ptx_machine.texts import module, run

SEEDS = (0, 1, 2)


def words(n):
    return np.arange(1, n + 1, dtype=np.uint32)


# ---- cp.async ----------------------------------------------------------------------------------------------------------------------------

# Each thread's 16 bytes: %r4 in the tile, %rd4 in x, %rd5 in y.
OWN = """
    shl.b32 %r3, %r1, 4;
    add.u32 %r4, %r2, %r3;
    cvt.u64.u32 %rd3, %r3;
    add.u64 %rd4, %rd1, %rd3;
    add.u64 %rd5, %rd2, %rd3;
"""
COPY = "cp.async.cg.shared.global [%r4], [%rd4], 16;"
TAKE = """
    ld.shared.v4.u32 {%r10, %r11, %r12, %r13}, [%r4];
    st.global.v4.u32 [%rd5], {%r10, %r11, %r12, %r13};
"""
COMMIT, WAIT = "cp.async.commit_group;", "cp.async.wait_group 0;"


def copied(body, threads=64, seed=0, x=None):
    x = words(4 * threads) if x is None else x
    y = unwritten(4 * threads, np.uint32)
    run(OWN + body, x, y, threads=threads, seed=seed)
    return x, y


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("wait", [COMMIT + WAIT, "cp.async.wait_all;", COMMIT + "cp.async.wait_all;"])
def test_a_copy_is_there_after_its_wait(wait, seed):
    x, y = copied(COPY + wait + TAKE, seed=seed)
    assert np.array_equal(x, y)


@pytest.mark.parametrize("space", ["shared", "shared::cta"])
@pytest.mark.parametrize("prefetch", ["", ".L2::128B"])
@pytest.mark.parametrize("size", [4, 8, 16])
def test_copies_have_4_8_or_16_bytes(size, prefetch, space):
    copies = "".join(f"cp.async.ca.{space}.global{prefetch} [%r4+{at}], [%rd4+{at}], {size};\n" for at in range(0, 16, size))
    x, y = copied(copies + COMMIT + WAIT + TAKE)
    assert np.array_equal(x, y)


@given(size=st.sampled_from([4, 8, 16]), data=st.data())
def test_bytes_beyond_the_source_size_are_zeros(size, data):
    source = np.array(data.draw(st.lists(st.integers(0, size), min_size=32, max_size=32)), np.uint32)
    given_bytes = np.random.default_rng(size).integers(1, 255, 32 * size, np.uint8)
    y = unwritten(32 * size // 2, np.uint16).view(np.uint8)
    take = "".join(f"ld.shared.u32 %r10, [%r4+{at}]; st.global.u32 [%rd6+{at}], %r10;\n" for at in range(0, size, 4))
    run(
        f"""
        mul.lo.u32 %r3, %r1, {size};
        add.u32 %r4, %r2, %r3;
        cvt.u64.u32 %rd4, %r3;
        add.u64 %rd5, %rd1, %rd4;
        add.u64 %rd6, %rd2, %rd4;
        mul.wide.u32 %rd7, %r1, 4;
        add.u64 %rd7, %rd3, %rd7;
        ld.global.u32 %r5, [%rd7];
        cp.async.ca.shared.global [%r4], [%rd5], {size}, %r5;
        cp.async.wait_all;
        {take}""",
        given_bytes, y, source,
    )  # fmt: skip
    wanted = given_bytes.reshape(32, size) * (np.arange(size) < source[:, None])
    assert np.array_equal(y.reshape(32, size), wanted)


def test_nothing_is_read_for_a_source_of_no_bytes():
    _, y = copied("mov.u32 %r5, 0; add.u64 %rd4, %rd4, 65536; cp.async.cg.shared.global [%r4], [%rd4], 16, %r5;" + COMMIT + WAIT + TAKE)
    assert not y.any()


TWO = f"""
    {COPY} {COMMIT}
    cp.async.cg.shared.global [%r4+512], [%rd4], 16;
    {COMMIT} cp.async.wait_group 1;
"""


@pytest.mark.parametrize("seed", SEEDS)
def test_a_wait_for_all_but_one_group_waits_for_the_older(seed):
    x, y = copied(TWO + TAKE + WAIT, threads=32, seed=seed)
    assert np.array_equal(x, y)


@pytest.mark.parametrize("seed", SEEDS)
def test_lanes_have_groups_of_their_own(seed):
    """Odd lanes commit an empty group after their copy, so that waiting for all but one is enough for them, and not for the others."""
    body = "and.b32 %r5, %r1, 1; setp.eq.u32 %p1, %r5, 1;" + COPY + COMMIT + "@%p1 cp.async.commit_group; cp.async.wait_group 1;"
    y = unwritten(128, np.uint32)
    x = words(128)
    run(OWN + body + "@!%p1 bra DONE;" + TAKE + "DONE:" + WAIT, x, y, seed=seed)
    assert np.array_equal(y.reshape(32, 4)[1::2], x.reshape(32, 4)[1::2])
    with pytest.raises(Fault, match="under way"):
        run(OWN + body + "@%p1 bra DONE;" + TAKE + "DONE:" + WAIT, x, y, seed=seed)


FAULTY_COPIES = {
    "read before the wait": (COPY + COMMIT + TAKE + WAIT, "a copy is under way"),
    "written before the wait": (COPY + COMMIT + "st.shared.u32 [%r4], %r1;" + WAIT, "a copy is under way"),
    "wait for too few groups": (COPY + COMMIT + "cp.async.wait_group 1;" + TAKE + WAIT, "a copy is under way"),
    "the younger of two groups": (TWO + "ld.shared.u32 %r10, [%r4+512];" + WAIT, "a copy is under way"),
    "no commit": (COPY + WAIT + TAKE, "a copy is under way"),
    "no commit, not read": (COPY + WAIT, r"cp.async, PTX line \d+\) was not committed when its thread ends"),
    "no wait": (COPY + COMMIT, r"cp.async, PTX line \d+\) is still under way when its thread ends"),
    "misaligned target": ("cp.async.cg.shared.global [%r4+8], [%rd4], 16;" + COMMIT + WAIT, "misaligned copy: 16 bytes to offset 8"),
    "misaligned source": ("cp.async.ca.shared.global [%r4], [%rd4+4], 8;" + COMMIT + WAIT, "misaligned copy: 8 bytes from"),
    "source beyond its array": (
        "cp.async.cg.shared.global [%r4], [%rd4+16], 16;" + COMMIT + WAIT,
        "read of 16 bytes of global memory outside",
    ),
    "target beyond shared memory": ("cp.async.cg.shared.global [%r4+1024], [%rd4], 16;" + COMMIT + WAIT, "after its end"),
    "reads more than it writes": ("mov.u32 %r5, 16; cp.async.ca.shared.global [%r4], [%rd4], 8, %r5;" + COMMIT + WAIT, "told to read 16"),
    "one into another": (COPY + COPY + COMMIT + WAIT, "where one is still under way"),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("fault", FAULTY_COPIES)
def test_misuse_of_a_copy_is_found(fault, seed):
    body, message = FAULTY_COPIES[fault]
    with pytest.raises(Fault, match=message):
        copied(body, seed=seed)


NEIGHBOUR = "xor.b32 %r6, %r3, 512; add.u32 %r4, %r2, %r6;"  # a thread of the other warp


@pytest.mark.parametrize("seed", SEEDS)
def test_other_threads_copies_need_a_barrier_after_the_wait(seed):
    x, y = copied(COPY + COMMIT + WAIT + "bar.sync 0;" + NEIGHBOUR + TAKE, seed=seed)
    assert np.array_equal(y.reshape(2, -1), x.reshape(2, -1)[::-1])
    for body in (COPY + COMMIT + WAIT + NEIGHBOUR + TAKE, COPY + COMMIT + "bar.sync 0;" + NEIGHBOUR + TAKE + WAIT):
        with pytest.raises(Fault, match=r"races with|nobody wrote|under way"):
            copied(body, seed=seed)


def test_a_source_that_is_written_before_the_wait_is_copied_late():
    x = words(256)
    _, y = copied(COPY + COMMIT + "st.global.u32 [%rd4], %r1;" + WAIT + TAKE, x=x)
    assert np.array_equal(y.reshape(64, 4)[:, 0], np.arange(64))


def test_copies_are_counted():
    x, y = words(128), unwritten(128, np.uint32)
    counters = run(OWN + COPY + COMMIT + WAIT + TAKE, x, y, count=True)
    assert counters["copied_bytes"] == 512
    assert (counters["global_loads"], counters["global_load_sectors"], counters["global_load_bytes"]) == (1, 16, 512)


# ---- mbarrier ----------------------------------------------------------------------------------------------------------------------------

# The second warp writes its words; the first waits for them and stores them to y. The barrier is the tile's last 8 bytes.
BARRIER = "[%r2+1016]"
START = f"""
    setp.ne.u32 %p1, %r1, 0;
    @%p1 bra INITIALISED;
    mov.u32 %r9, COUNT;
    mbarrier.init.shared::cta.b64 {BARRIER}, %r9;
INITIALISED:
    bar.sync 0;
    and.b32 %r3, %r1, 31;
    shl.b32 %r3, %r3, 2;
    add.u32 %r4, %r2, %r3;
    cvt.u64.u32 %rd3, %r3;
    add.u64 %rd4, %rd1, %rd3;
    add.u64 %rd5, %rd2, %rd3;
    setp.lt.u32 %p2, %r1, 32;
    @%p2 bra CONSUMER;
"""
PRODUCE = "ld.global.u32 %r10, [%rd4]; st.shared.u32 [%r4], %r10;"
ARRIVE = f"mbarrier.arrive.shared::cta.b64 _, {BARRIER};"
AWAIT = f"""
AGAIN:
    mbarrier.try_wait.parity.shared::cta.b64 %p3, {BARRIER}, PARITY;
    @!%p3 bra AGAIN;
"""
CONSUME = "ld.shared.u32 %r11, [%r4]; st.global.u32 [%rd5], %r11;"


def handed_over(producer, consumer, count=32, parity=0, seed=0, start=START, x=None):
    x, y = words(32) if x is None else x, unwritten(32, np.uint32)
    body = start + producer + "\n ret;\nCONSUMER:\n" + consumer
    run(body.replace("COUNT", str(count)).replace("PARITY", str(parity)), x, y, threads=64, seed=seed)
    return x, y


@pytest.mark.parametrize("seed", range(5))
def test_what_came_before_an_arrival_is_seen_after_the_wait(seed):
    x, y = handed_over(PRODUCE + ARRIVE, AWAIT + CONSUME, seed=seed)
    assert np.array_equal(x, y)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("wait", ["test_wait", "try_wait"])
def test_one_arrival_may_count_as_many(wait, seed):
    arrive = f"setp.ne.u32 %p4, %r1, 32; @%p4 ret; mov.u32 %r12, 32; mbarrier.arrive.release.cta.shared::cta.b64 %rd9, {BARRIER}, %r12;"
    x, y = handed_over(PRODUCE + "bar.warp.sync 0xffffffff;" + arrive, AWAIT.replace("try_wait", wait) + CONSUME, seed=seed)
    assert np.array_equal(x, y)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_state_names_the_phase_to_wait_for(seed):
    """All threads arrive and wait for their own phase, twice."""
    phase = f"""
        mbarrier.arrive.shared::cta.b64 %rd9, {BARRIER};
    LABEL:
        mbarrier.test_wait.shared::cta.b64 %p3, {BARRIER}, %rd9;
        @!%p3 bra LABEL;
    """
    start = START.replace("@%p2 bra CONSUMER;", phase.replace("LABEL", "FIRST") + "@%p2 bra CONSUMER;")
    again = phase.replace("LABEL", "SECOND")
    x, y = handed_over(PRODUCE + again, again.replace("SECOND", "THIRD") + CONSUME, count=64, start=start, seed=seed)
    assert np.array_equal(x, y)


def test_a_state_of_an_old_phase_is_refused():
    once = f"mbarrier.arrive.shared::cta.b64 %rd9, {BARRIER};"
    body = once + once.replace("%rd9", "%rd10") * 2 + f"mbarrier.test_wait.shared::cta.b64 %p3, {BARRIER}, %rd9;"
    with pytest.raises(Fault, match="neither of its phase nor of the one before"):
        handed_over("", body, count=32)


GENERIC = "cvt.u64.u32 %rd8, %r2; cvta.shared.u64 %rd8, %rd8;"


def test_a_generic_address_may_name_the_barrier():
    arrive = GENERIC + "mbarrier.arrive.b64 _, [%rd8+1016];"
    x, y = handed_over(PRODUCE + arrive, GENERIC + AWAIT.replace("%r2", "%rd8").replace(".shared::cta", "") + CONSUME)
    assert np.array_equal(x, y)
    with pytest.raises(Fault, match="not in shared memory"):
        handed_over(arrive.replace("%rd8+1016", "%rd1"), "")


def test_an_invalidated_barrier_may_be_initialised_again():
    again = f"""
        setp.ne.u32 %p4, %r1, 0;
        @%p4 bra ON;
        mbarrier.inval.shared::cta.b64 {BARRIER};
        mov.u32 %r9, 32;
        mbarrier.init.shared::cta.b64 {BARRIER}, %r9;
    ON:
        bar.sync 0;
    """
    x, y = handed_over(PRODUCE + ARRIVE, AWAIT + CONSUME, count=7, start=START.replace("bar.sync 0;", "bar.sync 0;" + again, 1))
    assert np.array_equal(x, y)


FAULTY_BARRIERS = {
    "no wait": (PRODUCE + ARRIVE, CONSUME, {}, "races with|nobody wrote"),
    "arrives before it writes": (ARRIVE + PRODUCE, AWAIT + CONSUME, {}, "races with|nobody wrote"),
    "never initialised": (ARRIVE, "", {"start": START.replace("@%p1 bra INIT", "bra INIT")}, "no mbarrier was initialised at offset 1016"),
    "waits for a barrier that is not there": ("", AWAIT.replace("1016", "1008"), {}, "no mbarrier was initialised at offset 1008"),
    "no barrier after the initialisation": (
        PRODUCE + ARRIVE,
        AWAIT,
        {"start": START.replace("bar.sync 0;", "")},
        "no mbarrier was init|thread 0 initialised the mbarrier .* no barrier has come between",
    ),
    "too many arrivals of one thread": (
        f"mov.u32 %r12, 33; mbarrier.arrive.shared::cta.b64 %rd9, {BARRIER}, %r12;",
        "",
        {},
        "overrun: 33 arrive, and 32",
    ),
    "no arrivals": (f"mov.u32 %r12, 0; mbarrier.arrive.shared::cta.b64 %rd9, {BARRIER}, %r12;", "", {}, "counts as none"),
    "no count": ("", "", {"count": 0}, "an mbarrier for 0 arrivals"),
    "initialised again": (
        "",
        f"bar.warp.sync 0xffffffff; mov.u32 %r9, 1; mbarrier.init.shared::cta.b64 {BARRIER}, %r9;",
        {},
        "is in use; mbarrier.inval",
    ),
    "invalidated in a phase": (
        ARRIVE,
        f"setp.ne.u32 %p4, %r1, 0; @%p4 ret; mbarrier.inval.shared::cta.b64 {BARRIER};",
        {"count": 64},
        "in the middle of a phase|no mbarrier was init",
    ),
    "overwritten": ("", f"st.shared.u32 {BARRIER}, %r1; {ARRIVE}", {}, "was overwritten|races with|no barrier has come between"),
    "misaligned": (ARRIVE.replace("1016", "1012"), "", {}, "misaligned mbarrier: offset 1012"),
    "completes a phase that it must not": (
        f"mov.u32 %r12, 32; mbarrier.arrive.noComplete.shared::cta.b64 %rd9, {BARRIER}, %r12;",
        "",
        {},
        "noComplete of 32 completes",
    ),
    "too few arrivals": (PRODUCE + ARRIVE, AWAIT + CONSUME, {"count": 33}, "does not end: .* offset 1016 .*phase 0, misses 1 of 33"),
    "wrong parity, too late": (PRODUCE + ARRIVE + ARRIVE, AWAIT + CONSUME, {}, "does not end: .*wrong parity"),
    "wrong parity, too early": (PRODUCE + ARRIVE, AWAIT + CONSUME, {"parity": 1}, "races with|nobody wrote|does not end"),
    "no parity": (PRODUCE + ARRIVE, AWAIT + CONSUME, {"parity": 2}, "a phase of parity 2"),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("fault", FAULTY_BARRIERS)
def test_misuse_of_an_mbarrier_is_found(fault, seed):
    producer, consumer, given_arguments, message = FAULTY_BARRIERS[fault]
    with pytest.raises(Fault, match=message):
        handed_over(producer, consumer, seed=seed, **given_arguments)


# ---- copies that arrive at an mbarrier ---------------------------------------------------------------------------------------------------

COPY_WORD = "cp.async.ca.shared.global [%r4], [%rd4], 4;"
COUNTED = COPY_WORD + f"cp.async.mbarrier.arrive.noinc.shared::cta.b64 {BARRIER};"


@pytest.mark.parametrize("seed", SEEDS)
def test_copies_arrive_when_they_are_done(seed):
    x, y = handed_over(COUNTED, AWAIT + CONSUME, seed=seed)
    assert np.array_equal(x, y)


@pytest.mark.parametrize("seed", SEEDS)
def test_copies_that_add_their_arrival_need_another_one(seed):
    x, y = handed_over(COUNTED.replace(".noinc", "") + ARRIVE, AWAIT + CONSUME, seed=seed)
    assert np.array_equal(x, y)


@pytest.mark.parametrize(
    "producer, consumer, message",
    [
        (COUNTED, CONSUME, "under way|nobody wrote|races with"),
        (COUNTED + COPY_WORD.replace("%r4", "%r4+512"), AWAIT, "was not committed when its thread ends"),
        (COUNTED + COUNTED.replace("%r4", "%r4+512"), "", "overrun"),
        (COUNTED + ARRIVE, "", "overrun"),
    ],
)
def test_misuse_of_copies_that_arrive_is_found(producer, consumer, message):
    with pytest.raises(Fault, match=message):
        handed_over(producer, consumer)


# ---- cp.async.bulk -----------------------------------------------------------------------------------------------------------------------

# One thread copies 128 bytes of x into the tile.
EXPECT = f"mov.u32 %r12, BYTES; mbarrier.arrive.expect_tx.shared::cta.b64 _, {BARRIER}, %r12;"
BULK = f"mov.u32 %r13, 128; cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r2], [%rd1], %r13, {BARRIER};"
FIRST = "setp.ne.u32 %p4, %r1, 32; @%p4 ret;"


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("space", ["shared::cluster", "shared::cta"])
def test_a_bulk_copy_is_there_after_its_bytes_arrived(seed, space):
    producer = FIRST + EXPECT.replace("BYTES", "128") + BULK.replace("shared::cluster", space)
    x, y = handed_over(producer, AWAIT + CONSUME, count=1, seed=seed)
    assert np.array_equal(x, y)


def test_bytes_may_be_expected_before_the_arrival():
    expect = f"mov.u32 %r12, 128; mbarrier.expect_tx.relaxed.cta.shared::cta.b64 {BARRIER}, %r12;"
    x, y = handed_over(FIRST + expect + BULK + ARRIVE, AWAIT + CONSUME, count=1)
    assert np.array_equal(x, y)


FAULTY_BULK_COPIES = {
    "read too early": (EXPECT + BULK, CONSUME, "under way|nobody wrote|races with"),
    "more bytes than expected": (EXPECT.replace("BYTES", "64") + BULK, AWAIT + CONSUME, "brought 64 bytes more to an mbarrier than"),
    "fewer bytes than expected": (
        EXPECT.replace("BYTES", "256") + BULK,
        AWAIT + CONSUME,
        "does not end: .*misses 0 of 1 arrivals and 128 bytes",
    ),
    "no bytes expected": (ARRIVE + BULK, AWAIT + CONSUME, "under way|brought 128 bytes more|nobody wrote|races with"),
    "too many bytes expected": (EXPECT.replace("BYTES", "1048576"), "", "has at most 1048575"),
    "not waited for": (EXPECT + BULK, "", "was not waited for when its block ends"),
    "expected and not copied": (EXPECT, "", "expects 128 bytes more when its block ends"),
    "misaligned size": (EXPECT + BULK.replace("r13, 128", "r13, 120"), AWAIT, "misaligned bulk copy: 120 bytes"),
    "misaligned target": (EXPECT + BULK.replace("[%r2]", "[%r2+8]"), AWAIT, "misaligned bulk copy: .* offset 8 "),
    "source beyond its array": (EXPECT + BULK.replace("[%rd1]", "[%rd1+16]"), AWAIT, "outside"),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("fault", FAULTY_BULK_COPIES)
def test_misuse_of_a_bulk_copy_is_found(fault, seed):
    producer, consumer, message = FAULTY_BULK_COPIES[fault]
    with pytest.raises(Fault, match=message):
        handed_over(FIRST + producer.replace("BYTES", "128"), consumer, count=1, seed=seed)


# The block writes its tile; then one thread copies it to y.
STORE = "cp.async.bulk.global.shared::cta.bulk_group [%rd2], [%r2], %r13; "
STORED = (OWN, "ld.global.v4.u32 {%r10, %r11, %r12, %r13}, [%rd4]; st.shared.v4.u32 [%r4], {%r10, %r11, %r12, %r13};")
FENCE = "fence.proxy.async.shared::cta;"
LAST = "bar.sync 0; setp.ne.u32 %p4, %r1, 32; @%p4 ret; mov.u32 %r13, 1024;"
COMMIT_BULK, WAIT_BULK = "cp.async.bulk.commit_group;", "cp.async.bulk.wait_group 0;"


def stored(body, seed=0):
    x, y = words(256), unwritten(256, np.uint32)
    run("".join(STORED) + body, x, y, threads=64, seed=seed)
    return x, y


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("fence", [FENCE, "fence.proxy.async;", "fence.proxy.async.shared::cluster;"])
@pytest.mark.parametrize("wait", [WAIT_BULK, "cp.async.bulk.wait_group.read 0;"])
def test_a_bulk_copy_brings_shared_memory_to_an_array(wait, fence, seed):
    x, y = stored(fence + LAST + STORE + COMMIT_BULK + wait, seed)
    assert np.array_equal(x, y)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_bulk_copys_source_may_be_overwritten_once_it_is_read(seed):
    overwrite = "st.shared.u32 [%r2], %r1;"
    x, y = stored(FENCE + LAST + STORE + COMMIT_BULK + "cp.async.bulk.wait_group.read 0;" + overwrite + WAIT_BULK, seed)
    assert np.array_equal(x, y)
    with pytest.raises(Fault, match=r"no fence\.proxy\.async"):
        stored(FENCE + LAST + STORE + COMMIT_BULK + overwrite + WAIT_BULK, seed)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    "body, message",
    [
        (LAST + STORE + COMMIT_BULK + WAIT_BULK, "no fence.proxy.async"),
        ("fence.proxy.async.global;" + LAST + STORE + COMMIT_BULK + WAIT_BULK, "no fence.proxy.async"),
        ("bar.sync 0;" + FENCE + LAST + STORE + COMMIT_BULK + WAIT_BULK, None),
        (LAST + FENCE + STORE + COMMIT_BULK + WAIT_BULK, "no fence.proxy.async"),
        (FENCE + LAST + STORE + COMMIT_BULK, "still reads shared memory when its thread ends"),
        (FENCE + LAST + STORE + WAIT_BULK, "was not committed when its thread ends"),
        (FENCE + LAST + STORE + COMMIT_BULK + "cp.async.bulk.wait_group 1;", "still reads shared memory"),
        (FENCE + LAST + STORE.replace("[%rd2]", "[%rd2+8]") + COMMIT_BULK + WAIT_BULK, "misaligned bulk copy"),
        (FENCE + LAST + STORE.replace("[%rd2]", "[%rd2+16]") + COMMIT_BULK + WAIT_BULK, "outside"),
    ],
)
def test_misuse_of_a_bulk_copy_to_an_array_is_found(body, message, seed):
    if message is None:
        assert np.array_equal(*stored(body, seed))
        return
    with pytest.raises(Fault, match=message):
        stored(body, seed)


# ---- fences, and what the machine does not know ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fence", ["membar.cta", "membar.gl", "membar.sys", "fence.sc.gpu", "fence.acq_rel.cta", "fence.mbarrier_init.release.cluster"]
)
def test_fences_of_one_proxy_change_nothing(fence):
    x, y = copied(COPY + COMMIT + WAIT + fence + ";" + TAKE)
    assert np.array_equal(x, y)


@pytest.mark.parametrize(
    "statement",
    [
        "fence.proxy.tensormap::generic.release.gpu;",
        "fence.proxy.alias;",
        "cp.async.cg.shared.global [%r4], [%rd4], 8;",
        "cp.async.ca.shared.global [%r4], [%rd4], 12;",
        "cp.async.bulk.tensor.1d.shared::cluster.global.mbarrier::complete_tx::bytes [%r2], [%rd1, {%r3}], [%r4];",
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%r2], [%rd1], %r3, [%r4], %rs1;",
        "mbarrier.arrive_drop.shared::cta.b64 %rd9, [%r2];",
        "mbarrier.pending_count.b64 %r3, %rd9;",
        "mbarrier.try_wait.parity.shared::cta.b64.strange %p1, [%r2], 0;",
    ],
)
def test_what_the_machine_does_not_know_is_refused_by_name(statement):
    with pytest.raises(Fault, match=statement.split()[0].rstrip(";").replace(".", r"\.")):
        module(OWN + statement)
