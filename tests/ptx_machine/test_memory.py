"""Loads, stores and atomic operations move the right bytes; the machine finds every kind of wrong access, and says nothing of sound ones.

Each kernel is a few lines of PTX between the same first and last ones. They have the thread's number in its block in %t, the block's in %b,
the arguments in %x and %y, the address of thread t's 4 bytes of each in %xt and %yt, and that of its 4 bytes of shared memory in %st.
"""

import re

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ptx_machine.machine import UNWRITTEN, Fault, Module, unwritten

KERNEL = """
.version 8.0
.target sm_90a
.address_size 64
.const .align 4 .b32 squares[4] = {{0, 1, 4, 9}};
.visible .entry kernel(.param .u64 x, .param .u64 y{parameters})
{{
    .reg .pred %p<8>;
    .reg .b16 %h<16>;
    .reg .b32 %t, %b, %s, %st, %r<32>;
    .reg .f32 %f<8>;
    .reg .b64 %x, %y, %xt, %yt, %bytes, %d<16>;
    .shared .align 16 .b8 tile[1024];
    ld.param.u64 %x, [x];
    ld.param.u64 %y, [y];
    mov.u32 %t, %tid.x;
    mov.u32 %b, %ctaid.x;
    mul.wide.u32 %bytes, %t, 4;
    add.s64 %xt, %x, %bytes;
    add.s64 %yt, %y, %bytes;
    mov.u32 %s, tile;
    shl.b32 %st, %t, 2;
    add.u32 %st, %st, %s;
{body}
    ret;
}}
"""
BARRIER = "bar.sync 0;"
FIRST_THREAD = "setp.eq.u32 %p0, %t, 0;"


def launch(body, x=None, y=None, blocks=1, threads=32, args=(), parameters="", **options):
    """Run a kernel of those lines.   -> the machine's counters"""
    x = np.zeros(256, np.int32) if x is None else x
    y = np.zeros(256, np.int32) if y is None else y
    return Module(KERNEL.format(body=body, parameters=parameters)).launch("kernel", (blocks,), (threads,), (x, y, *args), **options)


def assert_fault(message, body, *args, **options):
    with pytest.raises(Fault, match=message) as raised:
        launch(body, *args, **options)
    return str(raised.value)


def int32s(n=256):
    return np.arange(1, n + 1, dtype=np.int32)


# ---- what is moved -----------------------------------------------------------------------------------------------------------------------

TYPES = [  # in memory, and registers that hold a value of it
    ("u8", np.uint8, "h"), ("s8", np.int8, "h"), ("b8", np.uint8, "r"), ("s8", np.int8, "r"), ("u16", np.uint16, "h"),
    ("b16", np.uint16, "h"),
    ("s16", np.int16, "r"), ("u16", np.uint16, "r"), ("u32", np.uint32, "r"), ("s32", np.int32, "r"), ("f32", np.float32, "f"),
    ("b32", np.uint32, "r"), ("s32", np.int32, "d"), ("u64", np.uint64, "d"), ("f64", np.float64, "d"), ("s8", np.int8, "d"),
]  # fmt: skip
SPACES = {  # how the other argument is copied to y: through which memory
    "global": "ld.global.{t} {r}, [%d0]; st.global.{t} [%d1], {r};",
    "nc": "ld.global.nc.{t} {r}, [%d0]; st.global.{t} [%d1], {r};",
    "generic": "ld.{t} {r}, [%d0]; st.{t} [%d1], {r};",
    "modified": "ld.relaxed.gpu.global.{t} {r}, [%d0]; st.release.sys.global.{t} [%d1], {r};",
    "hinted": "ld.volatile.global.{t} {r}, [%d0]; st.global.cs.{t} [%d1], {r};",
    "shared": "ld.global.{t} {r}, [%d0]; st.shared.{t} [%d2], {r}; ld.volatile.shared::cta.{t} {r}, [%d2]; st.global.{t} [%d1], {r};",
    "shared window": "ld.global.{t} {r}, [%d0]; st.{t} [%d3], {r}; ld.{t} {r}, [%d3]; st.global.{t} [%d1], {r};",
}


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("kind, dtype, register", TYPES)
@pytest.mark.parametrize("order", ["forward", "backward"])
def test_a_copy_has_every_byte(space, kind, dtype, register, order):
    for count in (1, 2, 4):
        if np.dtype(dtype).itemsize * count <= 16:
            copy(space, kind, dtype, register, count, order)


def copy(space, kind, dtype, register, count, order):
    size = np.dtype(dtype).itemsize * count
    vector = f"v{count}.{kind}" if count > 1 else kind
    registers = (
        "{" + ", ".join(f"%{register}{9 + i if register == 'd' else 1 + i}" for i in range(count)) + "}" if count > 1 else f"%{register}9"
    )
    registers = registers.replace("%f9", "%f1")
    index = "mov.u32 %r0, %t;" if order == "forward" else "sub.u32 %r0, 31, %t;"
    places = f"""
        {index}
        mul.wide.u32 %d4, %r0, {size};
        add.s64 %d0, %x, %d4;
        add.s64 %d1, %y, %d4;
        mul.wide.u32 %d2, %s, 1;
        add.s64 %d2, %d2, %d4;
        cvta.shared.u64 %d3, %d2;
    """
    x = np.random.default_rng(0).integers(0, 256, 32 * size, dtype=np.uint8).view(dtype)
    y = np.zeros_like(x)
    launch(places + SPACES[space].format(t=vector, r=registers), x, y)
    assert x.tobytes() == y.tobytes()


@pytest.mark.parametrize("kind, dtype", [("u8", np.uint8), ("s8", np.int8), ("u16", np.uint16), ("s16", np.int16)])
def test_a_load_of_a_narrow_number_extends_it(kind, dtype):
    x = np.linspace(np.iinfo(dtype).min, np.iinfo(dtype).max, 32).astype(dtype)
    y = np.zeros(32, np.int32)
    size = x.itemsize
    launch(f"mul.wide.u32 %d0, %t, {size}; add.s64 %d0, %d0, %x; ld.global.{kind} %r1, [%d0]; st.global.u32 [%yt], %r1;", x, y)
    assert np.array_equal(y, x)


@pytest.mark.parametrize(
    "declared, kind, value, register",
    [(".u8", "u8", np.uint8(200), "h1"), (".s8", "s8", np.int8(-3), "r1"), (".s16", "s16", np.int16(-300), "r1"),
     (".u32", "u32", np.uint32(7), "r1"),
     (".s32", "s32", np.int32(-7), "d1"), (".f32", "f32", np.float32(1.5), "f1"), (".f64", "f64", np.float64(-2.5), "d1"),
     (".u8", "u8", np.True_, "h1")],
)  # fmt: skip
def test_parameters_of_every_type_are_read(declared, kind, value, register):
    y = np.zeros(1, np.int64)
    width = {"h": "b16", "r": "b32", "f": "f32", "d": "b64"}[register[0]]
    launch(
        f"ld.param.{kind} %{register}, [z]; {FIRST_THREAD} @%p0 st.global.{width} [%y], %{register};",
        y=y,
        args=(value,),
        parameters=f", .param {declared} z",
    )
    wide = {"h": np.uint16, "r": np.int32, "f": np.float32, "d": np.float64 if kind == "f64" else np.int64}[register[0]]
    assert y.view(wide)[0] == value


def test_a_part_of_a_parameter_is_read_with_an_offset():
    y = np.zeros(1, np.uint32)
    launch(
        f"ld.param.u16 %r1, [z+2]; {FIRST_THREAD} @%p0 st.global.u32 [%y], %r1;",
        y=y,
        args=(np.uint32(0x12345678),),
        parameters=", .param .u32 z",
    )
    assert y[0] == 0x1234


def test_constant_memory_is_read():
    y = np.zeros(4, np.int32)
    launch("mov.u64 %d0, squares; add.s64 %d0, %d0, %bytes; ld.const.u32 %r1, [%d0]; st.global.u32 [%yt], %r1;", y=y, threads=4)
    assert y.tolist() == [0, 1, 4, 9]


def test_lanes_that_do_not_take_part_keep_their_registers_and_write_nothing():
    y = np.full(32, 5, np.int32)
    launch("mov.u32 %r1, 7; setp.lt.u32 %p1, %t, 10; @%p1 ld.global.u32 %r1, [%xt]; @!%p1 st.global.u32 [%yt], %r1;", int32s(), y)
    assert y.tolist() == [5] * 10 + [7] * 22


def test_generic_addresses_of_one_warp_may_lie_in_both_memories():
    y = np.zeros(32, np.int32)
    body = """
        mul.wide.u32 %d0, %st, 1;
        cvta.shared.u64 %d0, %d0;
        st.shared.u32 [%st], %t;
        setp.lt.u32 %p1, %t, 16;
        @%p1 mov.u64 %d0, %xt;
        ld.u32 %r1, [%d0];
        st.global.u32 [%yt], %r1;
    """
    launch(body, int32s(), y)
    assert y.tolist() == list(range(1, 17)) + list(range(16, 32))


ATOMICS = {
    "add.u32": (np.uint32, lambda old, b: old + b), "add.s32": (np.int32, lambda old, b: old + b),
    "add.u64": (np.uint64, lambda old, b: old + b),
    "add.f32": (np.float32, lambda old, b: old + b), "add.f64": (np.float64, lambda old, b: old + b),
    "min.s32": (np.int32, min), "min.u32": (np.uint32, min), "max.s32": (np.int32, max), "max.u64": (np.uint64, max),
    "min.s64": (np.int64, min),
    "and.b32": (np.uint32, lambda old, b: old & b), "or.b32": (np.uint32, lambda old, b: old | b),
    "xor.b64": (np.uint64, lambda old, b: old ^ b),
    "exch.b32": (np.uint32, lambda _, b: b), "exch.b64": (np.uint64, lambda _, b: b),
    "inc.u32": (np.uint32, lambda old, b: type(b)(0) if old >= b else old + type(b)(1)),
    "dec.u32": (np.uint32, lambda old, b: b if old == 0 or old > b else old - type(b)(1)),
}  # fmt: skip


@pytest.mark.parametrize("operation", ATOMICS)
@pytest.mark.parametrize("space", ["shared", "global"])
@given(data=st.data())
@settings(max_examples=5)
def test_atomic_operations_leave_the_result_and_return_what_was_there(operation, space, data):
    dtype, step = ATOMICS[operation]
    small = st.integers(0, 40).map(dtype)
    old, b = data.draw(small), data.draw(small)
    x, y = np.array([old, b], dtype), np.zeros(2, dtype)
    bits = x.itemsize * 8
    kind = f"{operation.split('.')[1]}"
    register = {32: "r", 64: "d"}[bits] if kind[0] != "f" else {32: "f", 64: "d"}[bits]
    place = "%s" if space == "shared" else "%y"
    body = f"""
        {FIRST_THREAD}
        @!%p0 bra END;
        ld.global.b{bits} %{register}1, [%x];
        ld.global.b{bits} %{register}2, [%x+{x.itemsize}];
        st.{space}.b{bits} [{place}], %{register}1;
        atom.{space}.{operation} %{register}3, [{place}], %{register}2;
        st.global.b{bits} [%y+{x.itemsize}], %{register}3;
        ld.{space}.b{bits} %{register}4, [{place}];
        st.global.b{bits} [%y], %{register}4;
    END:
    """
    launch(body, x, y)
    assert y.tolist() == [step(old, b), old]


@pytest.mark.parametrize("seed", [0, 3, 4])
def test_lanes_and_blocks_that_count_with_atomics_get_different_numbers(seed):
    x, y = np.zeros(1, np.uint32), np.zeros(96, np.uint32)
    body = """
        atom.global.add.u32 %r1, [%x], 1;
        mul.wide.u32 %d0, %r1, 4;
        add.s64 %d0, %d0, %y;
        mad.lo.s32 %r2, %b, 32, %t;
        st.global.u32 [%d0], %r2;
        red.global.max.u32 [%x], 1;
    """
    launch(body, x, y, blocks=3, seed=seed)
    assert x[0] == 96 and sorted(y) == list(range(96))
    assert (y.tolist() == sorted(y)) == (seed == 0)


def test_compare_and_swap_lets_one_lane_through():
    x, y = np.zeros(1, np.uint32), np.zeros(32, np.uint32)
    launch("add.u32 %r2, %t, 1; atom.global.cas.b32 %r1, [%x], 0, %r2; st.global.u32 [%yt], %r1;", x, y)
    assert x[0] == 1 and y.tolist() == [0] + [1] * 31


@pytest.mark.parametrize(
    "line, why",
    [("ld.local.u32 %r1, [%d1];", "no local memory"), ("st.local.u32 [%d1], %r1;", "no local memory"),
     ("ld.global.frob.u32 %r1, [%x];", r"\.frob"),
     ("ld.shared::cluster.u32 %r1, [%s];", "shared::cluster"), ("ld.global.v4.f64 {%d1, %d2, %d3, %d4}, [%x];", "16 bytes"),
     ("ld.global.u64 %r1, [%x];", "narrower"), ("ld.param.u64 %d1, [q];", "no such parameter"),
     ("ld.param.u64 %d1, [x+4];", "beyond the parameter"),
     ("atom.global.add.f16 %h1, [%x], %h2;", "does not know"), ("atom.shared.inc.s32 %r1, [%s], %r2;", "does not know"),
     ("ld.global.v2.u32 {%r1, %r2, %r3}, [%x];", "length")],
)  # fmt: skip
def test_what_the_machine_does_not_know_is_refused_when_a_kernel_is_loaded(line, why):
    with pytest.raises(Fault, match=f"PTX line 24: .*{why}"):
        Module(KERNEL.format(body=line, parameters=""))


# ---- bounds and alignment ----------------------------------------------------------------------------------------------------------------


def test_an_access_beyond_an_array_is_found_to_the_byte_and_the_array_is_named():
    x, y = int32s(64), np.zeros(63, np.int32)
    body = "ld.global.u32 %r1, [%xt]; st.global.u32 [%yt], %r1;"
    launch(body, x, np.zeros(64, np.int32), threads=64)
    message = assert_fault(
        r"thread 63: write of 4 bytes of global memory outside argument 1, int32\[63\]: it ends 4 bytes after the array's 252",
        body,
        x,
        y,
        threads=64,
    )
    assert "PTX line 24" in message and "st.global.u32" in message
    assert y.tolist() == list(range(1, 33)) + [0] * 31  # the first warp was done, and the other wrote nothing


@pytest.mark.parametrize(
    "line, message",
    [("ld.global.u32 %r1, [%x+-4];", r"read of 4 bytes .* outside argument 0, int32\[64\]: it begins 4 bytes before"),
     ("ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%x+256];", "it ends 16 bytes after the array's 256"),
     ("ld.global.u8 %r1, [%x+256];", "read of 1 bytes .* it ends 1 bytes after"),
     ("ld.global.u16 %r1, [%xt+254];", "thread 1: .*it ends 4 bytes after"),
     ("ld.u32 %r1, [%x+400];", "it ends 148 bytes after"), ("ld.global.u32 %r1, [64];", "address 0x40, which is in no array"),
     ("mul.wide.u32 %d1, %st, 1; ld.global.u32 %r1, [%d1];", "may be one of shared memory"),
     ("atom.global.add.u32 %r1, [%y+256], 1;", r"atomic update of 4 bytes .* outside argument 1"),
     ("ld.shared.u32 %r1, [%s+1024];",
     "read of 4 bytes of shared memory at offset 1024, which has 1024 bytes: it ends 4 bytes after its end"),
     ("st.shared.u32 [%s+-4], %t;", "write of 4 bytes of shared memory at offset -4, .* it ends 4 bytes before its start"),
     ("st.shared.u32 [%st+904], %t;", "thread 30: write of 4 bytes of shared memory at offset 1024"),
     ("mov.u64 %d1, %x; ld.shared.u32 %r1, [%d1];", "is not an address of shared memory"),
     ("ld.global.u32 %r1, [%xt+2];", "misaligned read of 4 bytes at byte 2 of argument 0.* not a multiple of 4"),
     ("ld.global.v2.u32 {%r1, %r2}, [%xt];", "thread 1: misaligned read of 8 bytes at byte 4"),
     ("st.global.v4.u32 [%yt], {%t, %t, %t, %t};", "misaligned write of 16 bytes"),
     ("st.shared.u32 [%st+1], %t;", "misaligned write of 4 bytes of shared memory at offset 1: .* not a multiple of 4"),
     ("st.shared.v4.u32 [%s+8], {%t, %t, %t, %t};", "misaligned write of 16 bytes of shared memory at offset 8")],
)  # fmt: skip
def test_accesses_outside_and_misaligned_ones_are_faults(line, message):
    assert_fault(message, line, np.zeros(64, np.int32), np.zeros(64, np.int32))


def test_alignment_is_that_of_the_allocation_and_not_of_the_processor():
    x = np.zeros(9, np.int32)
    body = f"{FIRST_THREAD} @%p0 ld.global.v2.u32 {{%r1, %r2}}, [%x];"
    launch(body, x[2:])
    assert_fault("misaligned read of 8 bytes at byte 0 of argument 0", body, x[1:])


def test_a_store_through_the_address_of_another_array_is_a_fault():
    body = f"mov.u64 %d1, {1 << 40}; sub.u64 %d1, %yt, %d1; st.global.u32 [%d1], %t;"
    assert_fault("write of argument 0.* through the address of another array", body)


# ---- memory that nobody wrote ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, kind", [(np.float32, "f32"), (np.int32, "u32"), (np.uint16, "u16"), (np.uint8, "u8"), (np.float64, "f64")])
def test_a_read_of_an_array_where_nobody_wrote_is_a_fault(dtype, kind):
    x = unwritten(64, dtype)
    x[:32] = 0
    size, register = x.itemsize, {"f32": "f1", "u32": "r1", "u16": "h1", "u8": "h1", "f64": "d9"}[kind]
    body = f"mul.wide.u32 %d0, %t, {size}; add.s64 %d0, %d0, %x; ld.global.{kind} %{register}, [%d0];"
    launch(body, x, threads=32)
    assert_fault(f"thread 32: read of argument 0.* at byte {32 * size}, which nobody wrote", body, x, threads=33)


def test_one_unwritten_half_of_a_word_is_found_where_elements_are_halves():
    x = np.zeros(64, np.uint16)
    x[37] = UNWRITTEN
    body = f"{FIRST_THREAD} @%p0 ld.global.v4.u32 {{%r1, %r2, %r3, %r4}}, [%x+64];"
    assert_fault("at byte 74, which nobody wrote", body, x)
    launch(body, x.view(np.int32))  # as an int32 it may be any number


def test_what_the_kernel_wrote_is_written_even_if_it_looks_as_if_it_was_not():
    y = unwritten(32, np.uint16)
    body = "mul.wide.u32 %d0, %t, 2; add.s64 %d0, %d0, %y; {write} ld.global.u16 %h2, [%d0];"
    assert_fault("nobody wrote", body.format(write=""), y=y)
    launch(body.format(write=f"mov.u16 %h1, {UNWRITTEN}; st.global.u16 [%d0], %h1;"), y=y)


def test_an_atomic_operation_on_memory_that_nobody_wrote_is_a_fault():
    assert_fault("atomic update of argument 1.* nobody wrote", "atom.global.add.u32 %r1, [%y], 1;", y=unwritten(4, np.int32))
    assert_fault("atomic update of shared memory that nobody wrote", "atom.shared.add.u32 %r1, [%s], 1;")


@pytest.mark.parametrize(
    "write, read, message",
    [("", "ld.shared.u32 %r1, [%st];", r"thread 0: read of shared memory that nobody wrote \(offset 0\)"),
     ("setp.ne.u32 %p1, %t, 9; @%p1 st.shared.u32 [%st], %t;", "ld.shared.u32 %r1, [%st];", r"thread 9: .*nobody wrote \(offset 36\)"),
     ("st.shared.u16 [%st], %r1;", "ld.shared.u32 %r1, [%st];", r"nobody wrote \(offset 2\)"),
     ("st.shared.u8 [%st+1], %r1;", "ld.shared.u16 %r1, [%st];", r"nobody wrote \(offset 0\)"),
     (f"{FIRST_THREAD} @%p0 st.shared.v2.u32 [%s], {{%t, %t}};",
     "ld.shared.v4.u32 {%r1, %r2, %r3, %r4}, [%s];", r"nobody wrote \(offset 8\)")],
)  # fmt: skip
def test_a_read_of_shared_memory_where_nobody_wrote_is_a_fault(write, read, message):
    assert_fault(message, f"mov.u32 %r1, 1; {write} {BARRIER} {read}")


def test_shared_memory_is_new_for_each_block():
    body = f"setp.eq.u32 %p1, %b, 0; @%p1 st.shared.u32 [%st], %t; {BARRIER} ld.shared.u32 %r1, [%st];"
    assert_fault("block 1, thread 0: read of shared memory that nobody wrote", body, blocks=2)


def test_any_value_may_be_written_to_shared_memory():
    launch(f"mov.u32 %r1, {UNWRITTEN * 65537}; st.shared.u32 [%st], %r1; ld.shared.u32 %r2, [%st];")


# ---- races in shared memory --------------------------------------------------------------------------------------------------------------

OTHER = "xor.b32 %r8, %t, {flip}; shl.b32 %r9, %r8, 2; add.u32 %r9, %r9, %s;"  # another thread's place, in %r9
READ, WRITE, UPDATE = "read", "write", "atomic update"
RACES = [(a, b) for a in (READ, WRITE, UPDATE) for b in (READ, WRITE, UPDATE) if WRITE in (a, b) or a != b]
FIRSTS = {READ: "ld.shared.u32 %r1, [%st];", WRITE: "st.shared.u32 [%st], %t;", UPDATE: "atom.shared.add.u32 %r1, [%st], 1;"}
SECONDS = {READ: "ld.shared.u32 %r1, [%r9];", WRITE: "st.shared.u32 [%r9], %t;", UPDATE: "atom.shared.add.u32 %r1, [%r9], 1;"}
INITIALISE = f"st.shared.u32 [%st], %t; {BARRIER}"


@pytest.mark.parametrize("first, second", RACES)
@pytest.mark.parametrize("flip", [1, 32, 96])  # a lane of the same warp, and of others
@pytest.mark.parametrize("seed", [0, 5])
def test_accesses_of_two_threads_to_shared_memory_race_without_a_barrier(first, second, flip, seed):
    before = f"{INITIALISE} {OTHER.format(flip=flip)} {FIRSTS[first]}"
    kinds = f"{first} of .* races with an? {second}|{second} of .* races with an? {first}"  # as the schedule has them
    message = assert_fault(kinds, f"{before} {SECONDS[second]}", threads=128, seed=seed)
    assert re.search(r"by thread \d+", message)
    launch(f"{before} {BARRIER} {SECONDS[second]}", threads=128, seed=seed)
    if flip == 1:
        launch(f"{before} bar.warp.sync 0xffffffff; {SECONDS[second]}", threads=128, seed=seed)


def test_a_barrier_of_the_warp_does_not_order_other_warps():
    body = f"{INITIALISE} {OTHER.format(flip=32)} st.shared.u32 [%st], %t; bar.warp.sync 0xffffffff; ld.shared.u32 %r1, [%r9];"
    assert_fault("races with", body, threads=64)


def test_a_race_names_the_line_of_the_earlier_write():
    message = assert_fault(
        "races with a write by thread 1 ", f"st.shared.u32 [%st], %t;\n\n{OTHER.format(flip=1)} ld.shared.u32 %r1, [%r9];"
    )
    assert "thread 0: read" in message and "(PTX line 24)" in message and "at PTX line 26" in message


def test_lanes_that_write_one_place_at_once_race():
    assert_fault("write of shared memory that races with a write by thread \\d+", "st.shared.u32 [%s], %t;")
    assert_fault(r"write of argument 1, .* that races with a write by thread 0", "st.global.u32 [%y], %t;")


SOUND = {
    "own place without a barrier": "st.shared.u32 [%st], %t; ld.shared.u32 %r1, [%st]; st.shared.u32 [%st], %r1; ld.shared.u32 %r1, [%st];",
    "all read what one wrote": f"{FIRST_THREAD} @%p0 st.shared.u32 [%s], %t; {BARRIER} ld.shared.u32 %r1, [%s]; "
    f"{BARRIER} @%p0 st.shared.u32 [%s], %t;",
    "one sums what all wrote": f"""
        {INITIALISE} {FIRST_THREAD} @!%p0 bra END;
        ld.shared.v4.u32 {{%r1, %r2, %r3, %r4}}, [%s]; ld.shared.u64 %d1, [%s+256]; st.shared.u64 [%s+256], %d1;
    END: {BARRIER} ld.shared.u32 %r1, [%st];""",
    "atomics to one place": f"{FIRST_THREAD} @%p0 st.shared.u32 [%s], %t; {BARRIER} atom.shared.add.u32 %r1, [%s], 1; "
    f"red.shared.add.u32 [%s], 1; {BARRIER} ld.shared.u32 %r1, [%s];",
    "neighbours write halves": f"shl.b32 %r1, %t, 1; add.u32 %r1, %r1, %s; st.shared.u16 [%r1], %t; "
    f"{BARRIER} setp.lt.u32 %p1, %t, 64; @%p1 ld.shared.u32 %r1, [%st];",
    "neighbours write bytes": f"add.u32 %r1, %t, %s; st.shared.u8 [%r1], %t; ld.shared.u8 %r2, [%r1]; "
    f"{BARRIER} setp.lt.u32 %p1, %t, 32; @%p1 ld.shared.u32 %r1, [%st];",
    "double buffers": f"""
        mov.u32 %r5, 0;
    LOOP:
        and.b32 %r6, %r5, 1; shl.b32 %r6, %r6, 9; add.u32 %r7, %st, %r6; st.shared.u32 [%r7], %r5; {BARRIER}
        {OTHER.format(flip=77)} add.u32 %r9, %r9, %r6; ld.shared.u32 %r1, [%r9];
        add.u32 %r5, %r5, 1; setp.lt.u32 %p1, %r5, 9; @%p1 bra LOOP;
    """,
}  # fmt: skip


@pytest.mark.parametrize("name", SOUND)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_sound_uses_of_shared_memory_are_silent(name, seed):
    launch(SOUND[name], threads=128, blocks=3, seed=seed)


def test_a_granule_that_becomes_smaller_keeps_what_is_known():
    first = f"{FIRST_THREAD} @%p0 st.shared.v4.u32 [%s], {{%t, %t, %t, %t}};"
    small = "setp.eq.u32 %p1, %t, 33; @%p1 st.shared.u8 [%s+5], %r1;"
    assert_fault("write of shared memory that races with a write by thread 0 .*offset 5", f"mov.u32 %r1, 1; {first} {small}", threads=64)
    launch(f"mov.u32 %r1, 1; {first} {BARRIER} {small} @%p0 ld.shared.u8 %r1, [%s+4];", threads=64)
    assert_fault("races", f"mov.u32 %r1, 1; {first} {BARRIER} {small} @%p0 ld.shared.u32 %r1, [%s+4];", threads=64)


# An access: the block, the thread, what it does, the bytes, and where, in units of them.
ACCESSES = st.tuples(
    st.integers(0, 1),
    st.sampled_from([0, 1, 5, 33, 64, 70]),
    st.sampled_from([READ, WRITE, UPDATE]),
    st.sampled_from([1, 2, 4, 8]),
    st.integers(0, 3),
)
PROGRAMS = st.lists(st.lists(ACCESSES, max_size=4), min_size=1, max_size=4)  # phases, with barriers between


def span(access):
    _, _, kind, size, at = access
    size = max(size, 4) if kind == UPDATE else size
    return range(size * at, size * at + size)


def as_text(access, space, base):
    bits = 8 * len(span(access))
    register, place = "%d9" if bits == 64 else "%r9", f"[{base}+{span(access).start}]"
    line = {
        READ: f"ld.{space}.b{bits} {register}, {place};", WRITE: f"st.{space}.b{bits} {place}, {register};",
        UPDATE: f"atom.{space}.exch.b{bits} {register}, {place}, {register};",
    }[access[2]]  # fmt: skip
    return f"setp.eq.u32 %p1, %t, {access[1]}; setp.eq.and.u32 %p1, %b, {access[0]}, %p1; @%p1 {line}"


def unordered(phases, space):
    """Pairs of accesses of different threads, one of them a write, that no barrier puts in an order: those that race."""
    placed = [(phase, access) for phase, accesses in enumerate(phases) for access in accesses]
    for i, (phase, a) in enumerate(placed):
        for other_phase, b in placed[:i]:
            overlap = span(a).start < span(b).stop and span(b).start < span(a).stop
            conflict = overlap and a[:2] != b[:2] and {a[2], b[2]} not in ({READ}, {UPDATE})
            if conflict and (phase == other_phase if a[0] == b[0] else space == "global"):
                yield a, b


@pytest.mark.parametrize("space, base", [("shared", "%s"), ("global", "%y")])
@example([[(0, 0, WRITE, 1, 0), (0, 0, UPDATE, 1, 0), (0, 5, UPDATE, 1, 0), (0, 5, READ, 1, 0)]], 0)  # an update does not hide the write
@example([[(0, 0, WRITE, 1, 0), (0, 0, UPDATE, 1, 0), (1, 0, UPDATE, 1, 0), (1, 0, READ, 1, 0)]], 0)
@example([[(0, 0, WRITE, 1, 0)], [(0, 0, UPDATE, 1, 0), (0, 5, UPDATE, 1, 0), (0, 5, READ, 1, 0)]], 0)
@given(PROGRAMS, st.sampled_from([0, 0, 1, 2]))
@settings(max_examples=150)
def test_accesses_race_exactly_if_no_barrier_is_between(space, base, phases, seed):
    body = "mov.u32 %r9, 1; mov.u64 %d9, 1; setp.lt.u32 %p1, %t, 8; @%p1 st.shared.u32 [%st], %t;"
    body += "".join(BARRIER + "".join(as_text(access, space, base) for access in phase) for phase in phases)
    found = list(unordered(phases, space))
    try:
        launch(body, threads=96, blocks=2, seed=seed)
    except Fault as fault:
        assert "races with" in str(fault) and found, (body, fault)
    else:  # of several atomic updates by one block only the last is known
        assert all(UPDATE in (a[2], b[2]) and a[0] == b[0] for a, b in found), body


def test_checks_go_on_when_a_warp_has_synchronised_millions_of_times():
    loop = "mov.u32 %r5, 0; LOOP: bar.warp.sync 0xffffffff; add.u32 %r5, %r5, 1; setp.lt.u32 %p1, %r5, 2200000; @%p1 bra LOOP;"
    body = f"{INITIALISE} {loop} ld.shared.u32 %r1, [%st]; {BARRIER} {OTHER.format(flip=32)} ld.shared.u32 %r1, [%r9];"
    launch(body, threads=64)
    assert_fault("races with", f"{body} st.shared.u32 [%st], %t;", threads=64)


# ---- races in global memory --------------------------------------------------------------------------------------------------------------

GLOBAL = {READ: "ld.global.u32 %r1, [%y];", WRITE: "st.global.u32 [%y], %b;", UPDATE: "atom.global.add.u32 %r1, [%y], 1;"}


@pytest.mark.parametrize("first, second", RACES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_blocks_race_in_global_memory(first, second, seed):
    body = f"setp.eq.u32 %p1, %b, 0; @%p1 {GLOBAL[first]} @!%p1 {GLOBAL[second]}"
    kinds = f"{second} of argument 1.* races with an? ({first}|{second}) by|{first} of argument 1.* races with an? {second} by"
    message = assert_fault(kinds, body, blocks=3, threads=1, seed=seed)
    assert re.search(r"by (thread 0 of block \d|several blocks)", message)
    launch(body, blocks=1, threads=1, seed=seed)


@pytest.mark.parametrize("kind", [READ, UPDATE])
def test_reads_of_blocks_do_not_race_and_neither_do_atomic_updates(kind):
    launch(GLOBAL[kind] + "setp.eq.u32 %p1, %b, 9; @%p1 st.global.u32 [%y], %b;", blocks=3)


def test_a_race_in_global_memory_names_the_block_and_the_line():
    message = (
        r"block 1, thread 0: write of argument 1, int32\[256\] at byte 0 that races with a write by thread 0 of block 0 \(PTX line 24\)"
    )
    assert_fault(message, GLOBAL[WRITE], blocks=2, threads=1)


@pytest.mark.parametrize("flip", [1, 32])
@pytest.mark.parametrize("seed", [0, 1])
def test_threads_of_a_block_race_in_global_memory_without_a_barrier(flip, seed):
    other = f"xor.b32 %r8, %t, {flip}; mul.wide.u32 %d1, %r8, 4; add.s64 %d1, %d1, %y;"
    for first, second in [
        ("st.global.u32 [%yt], %t;", "ld.global.u32 %r1, [%d1];"),
        ("ld.global.u32 %r1, [%yt];", "st.global.u32 [%d1], %t;"),
    ]:
        assert_fault("races with a (read|write) by thread", f"{other} {first} {second}", threads=64, seed=seed)
        launch(f"{other} {first} {BARRIER} {second}", threads=64, seed=seed)


def test_arguments_that_overlap_share_their_records():
    memory = np.zeros(300, np.int32)
    body = "ld.global.u32 %r1, [%xt]; {between} st.global.u32 [%yt], %r1;"
    launch(body.format(between=""), memory, memory)  # in place
    launch(body.format(between=""), memory[:32], memory[32:])
    launch(body.format(between=BARRIER), memory[:256], memory[1:257])
    assert_fault("races with a read by thread 1", body.format(between=""), memory[:256], memory[1:257])
    assert_fault("races with a (read|write) by thread", body.format(between=BARRIER), memory[32:], memory[:256], blocks=2)


@pytest.mark.parametrize("order", ["part, whole, part", "part, part, whole"])
def test_parts_that_only_the_whole_joins_share_its_records(order):
    memory = np.zeros(128, np.int32)
    whole, y, z = ("y", memory, memory[64:]) if order == "part, whole, part" else ("z", memory[64:], memory)
    part = "z" if whole == "y" else "y"
    body = f"""
        ld.param.u64 %d1, [{part}];
        ld.param.u64 %d2, [{whole}];
        add.s64 %d1, %d1, %bytes;
        add.s64 %d2, %d2, %bytes;
        st.global.u32 [%d1], %t;
    """
    launch(f"{body} ld.global.u32 %r1, [%d2+256];", memory[:32], y, args=(z,), parameters=", .param .u64 z")
    options = {"args": (z,), "parameters": ", .param .u64 z"}
    assert_fault("races with a write by thread 1 ", f"{body} ld.global.u32 %r1, [%d2+260];", memory[:32], y, **options)


def test_memory_that_the_launch_writes_must_not_be_read_as_constant():
    assert_fault(
        r"read of argument 1.* that thread 0 \(PTX line 24\) writes: ld.global.nc", "st.global.u32 [%yt], %t;\nld.global.nc.u32 %r1, [%yt];"
    )
    assert_fault("write of argument 1.* that thread 0 reads with ld.global.nc", "ld.global.nc.u32 %r1, [%yt]; st.global.u32 [%yt], %t;")
    body = "setp.eq.u32 %p1, %b, {writer}; @%p1 st.global.u32 [%yt], %t; @!%p1 ld.global.nc.u32 %r1, [%yt];"
    assert_fault("ld.global.nc", body.format(writer=0), blocks=2)
    assert_fault("ld.global.nc", body.format(writer=1), blocks=2)
    launch("st.global.u32 [%yt], %t; ld.global.nc.u32 %r1, [%yt+512]; ld.global.nc.u32 %r1, [%xt];")


OWN = "mad.lo.s32 %r2, %b, 32, %t; mul.wide.u32 %d1, %r2, {size}; add.s64 %d1, %d1, %y;"
SOUND_GLOBAL = {
    "own elements": OWN.format(size=4) + "st.global.u32 [%d1], %t; ld.global.u32 %r1, [%d1]; st.global.u32 [%d1], %r1;",
    "own bytes": OWN.format(size=1) + "ld.global.u8 %r1, [%d1]; st.global.u8 [%d1], %r1; ld.global.u8 %r1, [%d1];",
    "own halves": OWN.format(size=2) + "st.global.u16 [%d1], %r1;",
    "all read x": OWN.format(size=4) + "ld.global.u32 %r1, [%x]; ld.global.nc.v4.u32 {%r4, %r5, %r6, %r7}, [%x]; st.global.u32 [%d1], %r1;",
    "all read y, which is written elsewhere": OWN.format(size=4) + "ld.global.u32 %r1, [%y+1000]; st.global.u32 [%d1], %r1;",
    "atomics": "atom.global.add.u32 %r1, [%y], 1; red.global.min.u32 [%y], 1;",
}


@pytest.mark.parametrize("name", SOUND_GLOBAL)
@pytest.mark.parametrize("seed", [0, 1])
def test_sound_uses_of_global_memory_are_silent(name, seed):
    launch("mov.u32 %r1, 1;" + SOUND_GLOBAL[name], blocks=5, threads=32, seed=seed)


def test_blocks_in_several_threads_of_the_processor_are_checked_too():
    body = OWN.format(size=4) + "st.global.u32 [%d1], %r2;"
    module = Module(KERNEL.format(body=body, parameters=""))
    y = np.zeros(32 * 64, np.int32)
    module.launch("kernel", (64,), (32,), (np.zeros(1, np.int32), y), threads=2)
    assert np.array_equal(y, np.arange(32 * 64))
    racing = Module(KERNEL.format(body="st.global.u32 [%yt], %t;", parameters=""))
    with pytest.raises(Fault, match="races with a write by thread"):
        racing.launch("kernel", (64,), (32,), (np.zeros(1, np.int32), y), threads=2)


# ---- copies and the async proxy ----------------------------------------------------------------------------------------------------------

COPY = "setp.lt.u32 %p1, %t, 8; shl.b32 %r4, %t, 4; add.u32 %r4, %r4, %s; mul.wide.u32 %d1, %t, 16; add.s64 %d1, %d1, %x; "
COPY += "@%p1 cp.async.cg.shared.global [%r4], [%d1], 16;"
DONE = "cp.async.wait_all;"


@pytest.mark.parametrize(
    "body, message",
    [(f"{COPY} {BARRIER} ld.shared.u32 %r1, [%st]; {DONE}", "read of shared memory into which a copy is under way, begun by thread 0"),
     (f"{COPY} {DONE} ld.shared.u32 %r1, [%st];", r"read of shared memory that races with a write by thread 0 \(PTX line 24\)"),
     (f"{COPY} {BARRIER} st.shared.u32 [%s], %t; {DONE}", "races|under way, begun by thread 0"),
     (f"{COPY} {COPY} {DONE}", "a copy into shared memory begins where one is still under way, begun by thread 0"),
     (f"{INITIALISE} ld.shared.u32 %r1, [%st]; {COPY} {DONE}", "write of shared memory that races with a read by thread")],
)  # fmt: skip
def test_shared_memory_that_a_copy_writes_is_nobodys_until_it_is_done(body, message):
    assert_fault(message, body, int32s())
    y = np.zeros(32, np.int32)
    launch(f"{INITIALISE} {COPY} {DONE} {BARRIER} ld.shared.u32 %r1, [%st]; st.global.u32 [%yt], %r1;", int32s(), y)
    assert np.array_equal(y, int32s(32))


FENCE = "fence.proxy.async;"
STORE = f"""{FIRST_THREAD} @%p0 cp.async.bulk.global.shared::cta.bulk_group [%y], [%s], 256;
    @%p0 cp.async.bulk.commit_group; @%p0 cp.async.bulk.wait_group 0;"""


@pytest.mark.parametrize("before", ["", f"st.shared.u32 [%st], %t; {FENCE} {BARRIER}"])
def test_the_async_proxy_sees_what_was_written_before_a_fence_and_a_barrier(before):
    y = np.zeros(64, np.int32)
    launch(f"{before} st.shared.u32 [%st], %t; {FENCE} {BARRIER} {STORE}", y=y, threads=64)
    assert y.tolist() == list(range(64))
    wrong = "async proxy .* reads shared memory that thread 0 .* wrote, and no fence.proxy.async by that thread "
    assert_fault(wrong + "has made visible", f"{before} st.shared.u32 [%st], %t; {BARRIER} {STORE}", threads=64)
    late = f"{before} st.shared.u32 [%st], %t; {BARRIER} {FENCE} {STORE}"
    assert_fault("async proxy .* reads shared memory that thread 32 .* wrote, and no fence.proxy.async", late, threads=64)


# ---- counters ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line, sectors",
    [("ld.global.u32 %r1, [%xt];", 4), ("ld.global.u32 %r1, [%x];", 1), ("ld.global.u32 %r1, [%xt+4];", 5), ("ld.global.u8 %r1, [%xt];", 4),
     ("shl.b64 %d1, %bytes, 3; add.s64 %d1, %d1, %x; ld.global.u32 %r1, [%d1];", 32),
     ("shl.b64 %d1, %bytes, 2; add.s64 %d1, %d1, %x; ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%d1];", 16)],
)  # fmt: skip
def test_sectors_of_a_request_are_counted(line, sectors):
    counters = launch(line, count=True)
    size = 16 if "v4" in line else 1 if "u8" in line else 4
    assert (counters["global_loads"], counters["global_load_sectors"], counters["global_load_bytes"]) == (1, sectors, 32 * size)
    assert counters["global_stores"] == counters["shared_requests"] == 0
    assert launch(line)["global_loads"] == 0  # counting takes time, and is asked for


def test_stores_and_lanes_that_do_not_take_part_are_counted():
    counters = launch("setp.lt.u32 %p1, %t, 8; @%p1 st.global.u32 [%yt], %t;", count=True)
    assert (counters["global_stores"], counters["global_store_sectors"], counters["global_store_bytes"]) == (1, 1, 32)


@pytest.mark.parametrize(
    "scale, width, waves, ideal",
    [(4, 1, 1, 1), (8, 1, 2, 1), (16, 1, 4, 1), (20, 1, 1, 1), (0, 1, 1, 1), (8, 2, 2, 2), (16, 2, 4, 2), (16, 4, 4, 4), (20, 1, 1, 1)],
)  # fmt: skip
def test_waves_of_shared_memory_are_counted(scale, width, waves, ideal):
    vector = {1: "u32", 2: "v2.u32", 4: "v4.u32"}[width]
    registers = "%r11" if width == 1 else "{" + ", ".join(f"%r{11 + i}" for i in range(width)) + "}"
    fill = "shl.b32 %r1, %t, 5; add.u32 %r1, %r1, %s; " + "".join(f"st.shared.v4.u32 [%r1+{16 * i}], {{%t, %t, %t, %t}};" for i in range(2))
    before = launch(fill + BARRIER, count=True)
    after = launch(f"{fill} {BARRIER} mad.lo.s32 %r2, %t, {scale}, %s; ld.shared.{vector} {registers}, [%r2];", count=True)
    counted = [after[name] - before[name] for name in ("shared_requests", "shared_waves", "shared_ideal_waves")]
    assert counted == [1, waves, ideal]


def test_messages_have_no_line_breaks_and_one_place():
    message = assert_fault("nobody wrote", "ld.shared.u32 %r1, [%st];")
    assert "\n" not in message and len(re.findall("PTX line", message)) == 1
