"""Tensor cores do on the machine what the PTX ISA's layouts say, compared with NumPy, and their misuse is found."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptx_machine.machine import Fault, unwritten
from ptx_machine.texts import module, run

SEEDS = (0, 1, 2)
BF16, F16 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)
LANES = np.arange(32)


def draw(seed, *shape, dtype=BF16):
    return np.random.default_rng([seed, *shape]).integers(-8, 9, shape).astype(np.float32).astype(dtype)


def registers(first, n, letter="r"):
    return "{" + ", ".join(f"%{letter}{first + i}" for i in range(n)) + "}"


# ---- ldmatrix and stmatrix ---------------------------------------------------------------------------------------------------------------

# x [32, 8] of 16 bits comes into the tile; %r4 is this thread's row; then registers of 32 bits go to y [n, 32].
MATRICES = """
    shl.b32 %r3, %r1, 4;
    add.u32 %r4, %r2, %r3;
    cvt.u64.u32 %rd3, %r3;
    add.u64 %rd4, %rd1, %rd3;
    ld.global.v4.u32 {%r10, %r11, %r12, %r13}, [%rd4];
    st.shared.v4.u32 [%r4], {%r10, %r11, %r12, %r13};
    bar.sync 0;
    mul.wide.u32 %rd5, %r1, 4;
    add.u64 %rd5, %rd2, %rd5;
"""


def store_rows(first, n, letter="r", base="%rd5"):
    return "".join(f"st.global.{'f' if letter == 'f' else 'u'}32 [{base}+{128 * i}], %{letter}{first + i};\n" for i in range(n))


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("trans", ["", ".trans"])
@pytest.mark.parametrize("space", ["shared", "shared::cta"])
def test_a_lane_gets_two_neighbours_of_each_matrix(n, trans, space):
    x, y = np.arange(256, dtype=np.uint16), unwritten((n, 32), np.uint32)
    run(MATRICES + f"ldmatrix.sync.aligned.m8n8.x{n}{trans}.{space}.b16 {registers(20, n)}, [%r4];" + store_rows(20, n), x, y)
    matrices = x.reshape(4, 8, 8)[:n]
    matrices = matrices.transpose(0, 2, 1) if trans else matrices
    assert np.array_equal(y.view(np.uint16).reshape(n, 8, 8), matrices)


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("trans", ["", ".trans"])
def test_stmatrix_is_the_inverse_of_ldmatrix(n, trans):
    x, y = np.arange(256, dtype=np.uint16), unwritten(256, np.uint16)
    run(
        MATRICES + f"""
        ldmatrix.sync.aligned.m8n8.x{n}{trans}.shared.b16 {registers(20, n)}, [%r4];
        add.u32 %r5, %r4, 512;
        stmatrix.sync.aligned.m8n8.x{n}{trans}.shared.b16 [%r5], {registers(20, n)};
        bar.sync 0;
        setp.ge.u32 %p1, %r1, {8 * n};
        @%p1 ret;
        ld.shared.v4.u32 {registers(30, 4)}, [%r5];
        add.u64 %rd6, %rd2, %rd3;
        st.global.v4.u32 [%rd6], {registers(30, 4)};
        """,
        x, y,
    )  # fmt: skip
    assert np.array_equal(y[: 64 * n], x[: 64 * n])


@pytest.mark.parametrize(
    "statements, message",
    [
        ("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r20}, [%r4+8];", "misaligned row of a matrix: offset 8"),
        ("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r20}, [%r4+512];", "nobody wrote"),
        ("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r20}, [%r4+1024];", "1024 bytes: it ends"),
        ("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r4+1024], {%r10, %r11, %r12, %r13};", "1024 bytes: it ends"),
        ("setp.gt.u32 %p1, %r1, 15; @%p1 ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r20}, [%r4];", "waits at a warp operation"),
    ],
)
def test_misuse_of_matrix_loads_is_found(statements, message):
    with pytest.raises(Fault, match=message):
        run(MATRICES + statements, np.zeros(256, np.uint16), np.zeros(32, np.uint32))


def test_a_matrix_load_sees_what_others_wrote_only_after_a_barrier():
    with pytest.raises(Fault, match=r"races with|nobody wrote"):
        run(MATRICES.replace("bar.sync 0;", "") + "xor.b32 %r3, %r3, 512; add.u32 %r4, %r2, %r3; ldmatrix.sync.aligned.m8n8.x4.shared.b16 "
            "{%r20, %r21, %r22, %r23}, [%r4];", np.zeros(512, np.uint16), np.zeros(64, np.uint32), threads=64)  # fmt: skip


@pytest.mark.parametrize("pitch, waves", [(16, 1), (32, 2), (64, 4), (128, 8), (144, 1)])
def test_rows_in_the_same_banks_take_turns(pitch, waves):
    body = f"""
        mul.lo.u32 %r3, %r1, {pitch};
        add.u32 %r4, %r2, %r3;
        mov.u32 %r10, 0;
        st.shared.v4.u32 [%r4], {{%r10, %r10, %r10, %r10}};
        bar.warp.sync 0xffffffff;
        ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r20, %r21, %r22, %r23}}, [%r4];
    """
    counters = run(body, shared=32 * pitch, count=True)
    assert (counters["matrix_loads"], counters["matrix_load_waves"]) == (4, 4 * waves)


# ---- mma.sync ----------------------------------------------------------------------------------------------------------------------------


def fragments_of_rows(matrix, wide):
    """A matrix [8 i, W j] in fragments of 8 rows by `wide` columns, down first.   -> [j, i, 8, wide]"""
    rows, columns = matrix.shape
    return matrix.reshape(rows // 8, 8, columns // wide, wide).transpose(2, 0, 1, 3)


def sums_of(y):
    """Registers [4, 32] as a matrix [16, 8]: two neighbours of row lane / 4, and of the row 8 below."""
    matrix = np.empty((16, 8), np.float32)
    for i in range(4):
        matrix[LANES // 4 + 8 * (i // 2), LANES % 4 * 2 + i % 2] = y[i]
    return matrix


SHAPES = [(16, "bf16"), (8, "bf16"), (16, "f16"), (8, "f16"), (8, "tf32"), (4, "tf32")]


def mma(k, kind, a, b, c):
    """d [16, 8] = a [16, k] b [k, 8] + c, each register in a row of 32 words in global memory."""
    wide = 4 if kind == "tf32" else 8
    parts = [np.ascontiguousarray(fragments_of_rows(matrix, wide)) for matrix in (a, b.T)]
    packed = np.concatenate([part.view(np.uint32).reshape(-1, 32) for part in parts])
    old = np.stack([c[LANES // 4 + 8 * (i // 2), LANES % 4 * 2 + i % 2] for i in range(4)])
    y, n = unwritten((4, 32), np.float32), k // wide
    load = "".join(f"ld.global.u32 %r{10 + i}, [%rd5+{128 * i}];\n" for i in range(3 * n))
    load += "".join(f"ld.global.f32 %f{10 + i}, [%rd6+{128 * i}];\n" for i in range(4))
    counters = run(
        f"""
        mul.wide.u32 %rd4, %r1, 4;
        add.u64 %rd5, %rd1, %rd4;
        add.u64 %rd6, %rd2, %rd4;
        add.u64 %rd7, %rd3, %rd4;
        {load}
        mma.sync.aligned.m16n8k{k}.row.col.f32.{kind}.{kind}.f32
            {registers(20, 4, "f")}, {registers(10, 2 * n)}, {registers(10 + 2 * n, n)}, {registers(10, 4, "f")};
        {store_rows(20, 4, "f", "%rd7")}""",
        packed, np.ascontiguousarray(old), y,
    )  # fmt: skip
    assert counters["products"] == 1
    return sums_of(y)


def dtype_of(kind):
    return {"bf16": BF16, "f16": F16, "tf32": np.dtype(np.float32)}[kind]


@pytest.mark.parametrize("k, kind", SHAPES)
def test_mma_multiplies_in_the_fragments_of_its_shape(k, kind):
    a, b, c = draw(1, 16, k, dtype=dtype_of(kind)), draw(2, k, 8, dtype=dtype_of(kind)), draw(3, 16, 8, dtype=np.float32)
    assert np.array_equal(mma(k, kind, a, b, c), a.astype(np.float32) @ b.astype(np.float32) + c)


@given(seed=st.integers(0, 2**32 - 1), scale=st.sampled_from([1e-3, 1.0, 1e3]))
def test_products_are_exact_and_sums_are_of_floats(seed, scale):
    random = np.random.default_rng(seed)
    a, b = ((random.standard_normal(shape) * scale).astype(BF16) for shape in ((16, 16), (16, 8)))
    got = mma(16, "bf16", a, b, np.zeros((16, 8), np.float32))
    a, b = a.astype(np.float64), b.astype(np.float64)
    assert np.all(np.abs(got - a @ b) <= 16 * 2.0**-24 * (np.abs(a) @ np.abs(b)))


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, 2.0**-14, 2.0**-24, 65504.0, np.inf, -np.inf, np.nan])
def test_every_kind_of_f16_is_widened(value):
    a, b = np.zeros((16, 16), F16), np.zeros((16, 8), F16)
    a[:, 0], b[0] = value, 1
    got = mma(16, "f16", a, b, np.zeros((16, 8), np.float32))
    assert np.array_equal(got, np.full((16, 8), np.float32(np.float16(value))), equal_nan=True)


def test_tf32_ignores_the_lowest_13_bits():
    a, b = np.full((16, 8), 1 + 2.0**-10 + 2.0**-11, np.float32), np.eye(8, dtype=np.float32)
    assert np.array_equal(mma(8, "tf32", a, b, np.zeros((16, 8), np.float32)), np.full((16, 8), 1 + 2.0**-10, np.float32))


@pytest.mark.parametrize(
    "statement",
    [
        "mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%r1, %r2}, {%r1, %r2, %r3, %r4}, {%r5, %r6}, {%r7, %r8};",
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%r1, %r2, %r3, %r4}, {%r1, %r2, %r3, %r4}, {%r5, %r6}, {%r7, %r8, %r9, %r10};",
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f1, %f2, %f3, %f4}, {%r1, %r2}, {%r5, %r6}, {%f1, %f2, %f3, %f4};",
        "ldmatrix.sync.aligned.m8n8.x3.shared.b16 {%r1, %r2, %r3}, [%r4];",
        "ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r1}, [%r4];",
        "wgmma.mma_async.sync.aligned.m64n8k8.f32.tf32.tf32 {%f1, %f2, %f3, %f4}, %rd1, %rd2, %p1, 1, 1;",
        "wgmma.mma_async.sync.aligned.m64n12k16.f32.bf16.bf16 {%f1, %f2, %f3, %f4, %f5, %f6}, %rd1, %rd2, %p1, 1, 1, 0, 0;",
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f1, %f2, %f3, %f4}, %rd1, %rd2, %p1, 2, 1, 0, 0;",
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f1, %f2}, %rd1, %rd2, %p1, 1, 1, 0, 0;",
    ],
)
def test_what_the_machine_does_not_know_is_refused_by_name(statement):
    with pytest.raises(Fault, match=statement.split()[0].replace(".", r"\.")):
        module(statement)


# ---- wgmma: layouts ----------------------------------------------------------------------------------------------------------------------

MODES = {"none": (0, 0), "128": (1, 3), "64": (2, 2), "32": (3, 1)}  # the field of a descriptor, and the bits of the swizzle
SHARED, SHARED_BASE = 32768, 1024
AT = {"A": 0, "B": 16384}


class Operand:
    """One operand in shared memory: [span, 16] as the canonical layouts of the PTX ISA place it, in units of 16 bytes (T elements).

    K-major:   none ((8, m), (T, 2k)) : ((1T, SBO), (1, LBO)),   else ((8, m), (T, 2k)) : ((W T, SBO), (1, T))
    MN-major:  none ((T, 1, m), (8, k)) : ((1, T, SBO), (1T, LBO)),   else ((T, W, m), (8, k)) : ((1, T, LBO), (W T, SBO))
    """

    def __init__(self, name, mode, mn_major, span, gap=0, offset=0):
        self.field, self.bits = MODES[mode]
        self.mn_major, self.start = mn_major, AT[name] + offset
        width, t = 1 << self.bits, 8
        atom = 8 * 16 * width  # bytes
        s, k = np.meshgrid(np.arange(span), np.arange(16), indexing="ij")
        if mode == "none" and not mn_major:  # 8 rows of 16 bytes; then the next 8 of K; then the next 8 rows
            self.leading, self.stride = atom + gap, 2 * atom + 3 * gap
            at = s % 8 * 16 + s // 8 * self.stride + k % 8 * 2 + k // 8 * self.leading
        elif mode == "none":  # 8 rows of K, 16 bytes each; then the next 8 of the span; then the next 8 of K
            self.stride, self.leading = atom + gap, span // 8 * (atom + gap) + gap
            at = s % 8 * 2 + s // 8 * self.stride + k % 8 * 16 + k // 8 * self.leading
        elif not mn_major:
            self.leading, self.stride = 16, atom + gap
            at = s % 8 * 16 * width + s // 8 * self.stride + k * 2
        else:
            self.stride, self.leading = atom + gap, 2 * (atom + gap) + gap
            at = s % t * 2 + s // t % width * 16 + s // t // width * self.leading + k % 8 * 16 * width + k // 8 * self.stride
        at = at + self.start + SHARED_BASE
        self.places = (at ^ ((at >> 7 & (width - 1)) << 4)) - SHARED_BASE

    def put(self, image, matrix):
        image.view(np.uint16)[self.places // 2] = matrix.view(np.uint16)

    @property
    def descriptor(self):
        return (self.start + SHARED_BASE) >> 4 | self.leading >> 4 << 16 | self.stride >> 4 << 32 | self.field << 62


# All threads copy x into the tile; %rd10 and %rd11 are the descriptors, %p1 says whether the first product adds.
FILL = f"""
    mov.u32 %r7, %ntid.x;
    shl.b32 %r7, %r7, 2;
    mov.u32 %r3, 0;
FILL:
    shl.b32 %r4, %r1, 2;
    add.u32 %r4, %r4, %r3;
    cvt.u64.u32 %rd4, %r4;
    add.u64 %rd4, %rd1, %rd4;
    ld.global.u32 %r5, [%rd4];
    add.u32 %r4, %r4, %r2;
    st.shared.u32 [%r4], %r5;
    add.u32 %r3, %r3, %r7;
    setp.lt.u32 %p2, %r3, {SHARED};
    @%p2 bra FILL;
    ld.global.u64 %rd10, [%rd3];
    ld.global.u64 %rd11, [%rd3+8];
    ld.global.u32 %r6, [%rd3+16];
    setp.ne.u32 %p1, %r6, 0;
"""
FENCES = "fence.proxy.async.shared::cta; bar.sync 0;"
FENCE, COMMIT, WAIT = "wgmma.fence.sync.aligned;", "wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned 0;"


def product(n, kind="bf16", a="%rd10", b="%rd11", adds="%p1", tail="1, 1, 0, 0", first=0):
    return f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{kind}.{kind} {registers(first, n // 2, 'f')}, {a}, {b}, {adds}, {tail};\n"


def set_sums(n, value=0.0, first=0):
    bits = np.float32(value).view(np.uint32)
    return "".join(f"mov.f32 %f{first + i}, 0f{bits:08X};\n" for i in range(n // 2))


def take_sums(n, first=0, rows=0):
    """Sum i of thread t < 128 to y [i + rows, t]."""
    stores = "".join(f"st.global.f32 [%rd21+{512 * (i + rows)}], %f{first + i};\n" for i in range(n // 2))
    return "mul.wide.u32 %rd21, %r1, 4; add.u64 %rd21, %rd2, %rd21;\n" + stores


def multiply(body, n, image, descriptors, adds=0, threads=128, seed=0, products=1):
    """Run a kernel on 128 threads whose sums go to y.   -> each [64, n]"""
    words = np.array([*descriptors, adds], np.uint64)
    y = unwritten((products * n // 2, 128), np.float32)
    run(FILL + body, image.view(np.uint32), y, words, threads=threads, shared=SHARED, seed=seed)
    thread, results = np.arange(128), np.empty((products, 64, n), np.float32)
    for p in range(products):
        for i in range(n // 2):
            row = thread // 32 * 16 + thread % 32 // 4 + 8 * (i // 2 % 2)
            results[p, row, i // 4 * 8 + thread % 4 * 2 + i % 2] = y[p * n // 2 + i]
    return results[0] if products == 1 else results


def prepared(n, mode_a="128", mode_b="128", mn_a=0, mn_b=0, kind="bf16", **more):
    """-> a [64, 16], b [n, 16], shared memory with both, their descriptors"""
    a, b = draw(1, 64, 16, dtype=dtype_of(kind)), draw(2, n, 16, dtype=dtype_of(kind))
    left, right = Operand("A", mode_a, mn_a, 64, **more), Operand("B", mode_b, mn_b, n, **more)
    image = np.full(SHARED, 0x7F, np.uint8)  # elsewhere: large numbers, which would show in the sums
    left.put(image, a)
    right.put(image, b)
    return a, b, image, (left.descriptor, right.descriptor)


def wide(x):
    return x.astype(np.float32)


def simple(n, kind="bf16", mn_a=0, mn_b=0):
    return FENCES + set_sums(n) + FENCE + product(n, kind, tail=f"1, 1, {mn_a}, {mn_b}") + COMMIT + WAIT + take_sums(n)


@pytest.mark.parametrize("seed", SEEDS[:2])
@pytest.mark.parametrize("gap", [0, 1024])
@pytest.mark.parametrize("mn_a, mn_b", [(0, 0), (0, 1), (1, 0), (1, 1)])
@pytest.mark.parametrize("mode", MODES)
def test_operands_lie_in_the_canonical_layouts(mode, mn_a, mn_b, gap, seed):
    n = 64 if mode == "128" else 24
    a, b, image, descriptors = prepared(n, mode, mode, mn_a, mn_b, gap=gap)
    assert np.array_equal(multiply(simple(n, mn_a=mn_a, mn_b=mn_b), n, image, descriptors, seed=seed), wide(a) @ wide(b).T)


@pytest.mark.parametrize("n", range(8, 257, 8))
def test_every_number_of_columns_is_multiplied(n):
    a, b, image, descriptors = prepared(n, "none", "32" if n % 16 else "64", 1, 0)
    assert np.array_equal(multiply(simple(n, mn_a=1), n, image, descriptors), wide(a) @ wide(b).T)


@pytest.mark.parametrize("mode_a", MODES)
@pytest.mark.parametrize("mode_b", MODES)
def test_operands_may_have_different_modes(mode_a, mode_b):
    a, b, image, descriptors = prepared(32, mode_a, mode_b)
    assert np.array_equal(multiply(simple(32), 32, image, descriptors), wide(a) @ wide(b).T)


@pytest.mark.parametrize("step", range(4))
def test_a_k_major_operand_may_begin_at_any_16_of_its_row(step):
    a, b, image, descriptors = prepared(64)
    image[:] = 0x7F  # not where the first 16 of K would be
    for name, matrix in (("A", a), ("B", b)):
        at = AT[name] + SHARED_BASE + np.arange(64)[:, None] * 128 + (np.arange(16) + 16 * step) * 2
        image.view(np.uint16)[((at ^ ((at >> 7 & 7) << 4)) - SHARED_BASE) // 2] = matrix.view(np.uint16)
    moved = [descriptor + 2 * step for descriptor in descriptors]
    assert np.array_equal(multiply(simple(64), 64, image, moved), wide(a) @ wide(b).T)


def test_f16_is_multiplied_too():
    a, b, image, descriptors = prepared(16, kind="f16")
    assert np.array_equal(multiply(simple(16, "f16"), 16, image, descriptors), wide(a) @ wide(b).T)


@pytest.mark.parametrize("signs", [(1, 1), (-1, 1), (1, -1), (-1, -1)])
def test_operands_may_be_negated(signs):
    a, b, image, descriptors = prepared(16)
    body = FENCES + set_sums(16) + FENCE + product(16, tail=f"{signs[0]}, {signs[1]}, 0, 0") + COMMIT + WAIT + take_sums(16)
    assert np.array_equal(multiply(body, 16, image, descriptors), signs[0] * signs[1] * wide(a) @ wide(b).T)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("adds", [0, 1])
def test_products_follow_each_other_in_the_same_sums(adds, seed):
    a, b, image, descriptors = prepared(32)
    body = (
        FENCES
        + set_sums(32, 5)
        + "setp.eq.u32 %p3, 0, 0;"
        + FENCE
        + product(32)
        + product(32, adds="%p3")
        + COMMIT
        + product(32, adds="%p3")
    )
    got = multiply(body + COMMIT + WAIT + take_sums(32), 32, image, descriptors, adds, seed=seed)
    assert np.array_equal(got, 3 * wide(a) @ wide(b).T + 5 * adds)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_wait_for_all_but_one_group_gives_the_older_sums(seed):
    a, b, image, descriptors = prepared(16)
    body = (
        FENCES + set_sums(16) + set_sums(16, first=100) + FENCE + product(16) + COMMIT + product(16, tail="-1, 1, 0, 0", first=100) + COMMIT
    )
    body += "wgmma.wait_group.sync.aligned 1;" + take_sums(16) + WAIT + take_sums(16, first=100, rows=8)
    got = multiply(body, 16, image, descriptors, seed=seed, products=2)
    wanted = wide(a) @ wide(b).T
    assert np.array_equal(got, [wanted, -wanted])


# %r40 .. %r43: the fragments of A, from x, whose rows lie there as they are.
FRAGMENTS = """
    and.b32 %r30, %r1, 31;
    shr.u32 %r31, %r1, 5;
    shr.u32 %r32, %r30, 2;
    mad.lo.u32 %r32, %r31, 16, %r32;
    and.b32 %r33, %r30, 3;
    shl.b32 %r34, %r32, 5;
    mad.lo.u32 %r34, %r33, 4, %r34;
    add.u32 %r34, %r34, %r2;
    ld.shared.u32 %r40, [%r34];
    ld.shared.u32 %r41, [%r34+256];
    ld.shared.u32 %r42, [%r34+16];
    ld.shared.u32 %r43, [%r34+272];
"""


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("mn_b", [0, 1])
def test_the_first_operand_may_be_in_registers(mn_b, seed):
    a, b, image, descriptors = prepared(64, mn_b=mn_b)
    image[: 64 * 32] = a.view(np.uint8).ravel()
    body = FENCES + FRAGMENTS + set_sums(64) + FENCE + product(64, a=registers(40, 4), tail=f"1, 1, {mn_b}") + COMMIT + WAIT + take_sums(64)
    assert np.array_equal(multiply(body, 64, image, descriptors, seed=seed), wide(a) @ wide(b).T)


def test_products_are_counted():
    _, _, image, descriptors = prepared(32)
    words = np.array([*descriptors, 0], np.uint64)
    y = unwritten((16, 128), np.float32)
    counters = run(FILL + simple(32), image.view(np.uint32), y, words, threads=128, shared=SHARED)
    assert counters["async_product_flops"] == 2 * 64 * 32 * 16


# ---- wgmma: misuse -----------------------------------------------------------------------------------------------------------------------

SET, TAKE, N = set_sums(16), take_sums(16), 16
P = product(N)
THE_FOURTH = "setp.lt.u32 %p4, %r1, 96;"
FAULTY_PRODUCTS = {
    "no fence.proxy.async": ("bar.sync 0;" + SET + FENCE + P + COMMIT + WAIT, "no fence.proxy.async by that thread"),
    "fence.proxy.async after the barrier": ("bar.sync 0; fence.proxy.async;" + SET + FENCE + P + COMMIT + WAIT, "no fence.proxy.async"),
    "no barrier": ("fence.proxy.async;" + SET + FENCE + P + COMMIT + WAIT, "races with|nobody wrote|and barrier after it"),
    "no wgmma.fence": (FENCES + SET + P + COMMIT + WAIT, "no wgmma.fence before the first product"),
    "no wgmma.fence after the sums were set": (FENCES + FENCE + SET + P + COMMIT + WAIT, "no wgmma.fence between an access to %f0"),
    "no wgmma.fence after the sums were read": (
        FENCES + SET + FENCE + P + COMMIT + WAIT + TAKE + P + COMMIT + WAIT,
        "no wgmma.fence between",
    ),
    "no wgmma.fence after one fragment was set": (
        FENCES + FRAGMENTS + SET + FENCE + "mov.u32 %r42, 0;" + product(N, a=registers(40, 4), tail="1, 1, 0") + COMMIT + WAIT,
        "access to %r42 and the product that uses it as a fragment",
    ),
    "sums read before the wait": (FENCES + SET + FENCE + P + COMMIT + TAKE + WAIT, "read of %f0, which is a sum of a product under way"),
    "sums read before the commit": (FENCES + SET + FENCE + P + TAKE + COMMIT + WAIT, "read of %f0, which is a sum of a product under way"),
    "wait for too few groups": (FENCES + SET + FENCE + P + COMMIT + "wgmma.wait_group.sync.aligned 1;" + TAKE + WAIT, "read of %f0"),
    "sums written before the wait": (FENCES + SET + FENCE + P + COMMIT + "mov.f32 %f7, 0f00000000;" + WAIT, "write to %f7, which is a sum"),
    "fragment written before the wait": (
        FENCES + FRAGMENTS + SET + FENCE + product(N, a=registers(40, 4), tail="1, 1, 0") + COMMIT + "mov.u32 %r43, 0;" + WAIT,
        "write to %r43, which is a fragment",
    ),
    "a sum as a fragment": (
        FENCES + SET + "mov.b32 %r0, 0;" + FENCE + P + product(N, a="{%f0, %f1, %f2, %f3}", first=100, tail="1, 1, 0") + COMMIT + WAIT,
        "%f0 is a fragment, and a product under way uses it as a sum",
    ),
    "another shape in the same sums": (
        FENCES + SET + FENCE + P + product(8, adds="%p1") + COMMIT + WAIT,
        "%f0 is a sum of a product of another shape",
    ),
    "no commit": (FENCES + SET + FENCE + P + WAIT, r"\(wgmma, PTX line \d+\) was not committed when its warp ends"),
    "no wait": (FENCES + SET + FENCE + P + COMMIT, r"\(wgmma, PTX line \d+\) was not waited for when its warp ends"),
    "one lane has another descriptor": (
        FENCES + SET + FENCE + "setp.eq.u32 %p3, %r1, 37; @%p3 add.u64 %rd11, %rd11, 64;" + P + COMMIT + WAIT,
        "thread 37: the lanes of a warp give different descriptors of operand B",
    ),
    "one lane adds": (FENCES + SET + FENCE + "setp.eq.u32 %p1, %r1, 37;" + P + COMMIT + WAIT, "do not agree whether"),
    "one warp has another descriptor": (
        FENCES + SET + FENCE + THE_FOURTH + "@!%p4 add.u64 %rd10, %rd10, 64;" + P + COMMIT + WAIT,
        "the warps of a warpgroup issue different products",
    ),
    "one warp adds": (
        FENCES + SET + FENCE + THE_FOURTH + "setp.ge.u32 %p1, %r1, 96;" + P + COMMIT + WAIT,
        "the warps of a warpgroup issue different products",
    ),
    "one warp issues another instruction": (
        FENCES + SET + FENCE + THE_FOURTH + "@%p4 bra ONE;" + P + "bra BOTH; ONE:" + P + "BOTH:" + COMMIT + WAIT,
        "different products: another warp's is in PTX line",
    ),
    "one warp issues none": (
        FENCES + SET + FENCE + THE_FOURTH + "@!%p4 bra DONE;" + P + "DONE:" + COMMIT + WAIT,
        "of its warpgroup's 1 products|of which warp 3 has ended without it",
    ),
    "one warp issues one too few": (
        FENCES + SET + FENCE + P + THE_FOURTH + "@!%p4 bra DONE;" + P + "DONE:" + COMMIT + WAIT,
        "of its warpgroup's 2 products|of which warp 3 has ended without it",
    ),
    "half a warp": (
        FENCES + SET + FENCE + "and.b32 %r20, %r1, 16; setp.eq.u32 %p3, %r20, 0; @%p3 bra DONE;" + P + "DONE:" + COMMIT + WAIT,
        "waits at a warp operation|\\.aligned",
    ),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("fault", FAULTY_PRODUCTS)
def test_misuse_of_a_product_is_found(fault, seed):
    body, message = FAULTY_PRODUCTS[fault]
    _, _, image, descriptors = prepared(N)
    with pytest.raises(Fault, match=message):
        multiply(body, N, image, descriptors, seed=seed)


def test_a_block_of_two_warps_has_no_warpgroup():
    with pytest.raises(Fault, match="four warps; the block has 2"):
        run(
            f"setp.eq.u32 %p1, 0, 0; mov.u64 %rd11, {Operand('B', 'none', 0, 8).descriptor};"
            + FENCE
            + product(8, a="{%r10, %r10, %r10, %r10}", tail="1, 1, 0"),
            threads=64,
            shared=SHARED,
        )


# The second warpgroup overwrites an operand between the issue and the wait of the first, as a copying group would that is told too early.
OVERWRITE = """
    setp.lt.u32 %p5, %r1, 128;
    @%p5 bra MULTIPLY;
    bar.sync 1, 256;
    mov.u32 %r20, 0;
    sub.u32 %r21, %r1, 128;
    shl.b32 %r21, %r21, 2;
    add.u32 %r21, %r21, %r2;
    st.shared.u32 [%r21], %r20;
    bar.sync 2, 256;
    ret;
MULTIPLY:
"""


@pytest.mark.parametrize("seed", SEEDS)
def test_an_operand_that_is_overwritten_before_the_wait_shows(seed):
    _, _, image, descriptors = prepared(N)
    body = FENCES + OVERWRITE + SET + FENCE + P + COMMIT + "bar.sync 1, 256;" + WAIT + "bar.sync 2, 256;" + TAKE
    with pytest.raises(Fault, match=r"races with|no fence\.proxy\.async"):
        multiply(body.replace(FENCES, "fence.proxy.async; bar.sync 0;"), N, image, descriptors, threads=256, seed=seed)


def test_an_operand_may_be_overwritten_after_the_wait():
    a, b, image, descriptors = prepared(N)
    body = FENCES + OVERWRITE + SET + FENCE + P + COMMIT + WAIT + "bar.sync 1, 256; bar.sync 2, 256;" + TAKE
    assert np.array_equal(multiply(body, N, image, descriptors, threads=256), wide(a) @ wide(b).T)


def field(at, value):
    return value << at


A_START, LEADING, STRIDE = 0, 16, 32
WRONG_DESCRIPTORS = {
    "base alignment": (field(A_START, 128 >> 4), {}, "operand A begins at byte 128 of its 1024-byte swizzle pattern"),
    "the last chunk of a row": (field(A_START, 112 >> 4), {}, "operand A begins at byte 112 of its 1024-byte swizzle pattern"),
    "base alignment, 64": (field(A_START, 64 >> 4), {"mode_a": "64"}, "operand A begins at byte 64 of its 512-byte swizzle pattern"),
    "base alignment, 32": (field(A_START, 16 >> 4), {"mode_a": "32"}, "operand A begins at byte 16 of its 256-byte swizzle pattern"),
    "base alignment, MN-major": (field(A_START, 32 >> 4), {"mn_a": 1}, "operand A begins at byte 32 of its 1024-byte swizzle pattern"),
    "base offset": (field(49, 1), {}, "the machine knows no base offset, and that of operand A is 1"),
    "bits of no field": (field(14, 1), {}, "has bits that no field has"),
    "leading offset of a K-major operand": (field(LEADING, 511), {}, "the leading offset of operand A is 8192 bytes"),
    "stride beyond shared memory": (field(STRIDE, 8192 >> 4), {}, "operand A is not within shared memory .32768 bytes.: .[0-9]+, 0."),
    "leading offset beyond shared memory": (
        field(LEADING, 32768 >> 4),
        {"mode_a": "none"},
        r"operand A is not within shared memory .*, 8\)",
    ),
    "start below shared memory": (-field(A_START, SHARED_BASE >> 4), {}, "operand A is not within shared memory .*offset -1024"),
}


@pytest.mark.parametrize("wrong", WRONG_DESCRIPTORS)
def test_a_wrong_descriptor_is_found(wrong):
    change, layout, message = WRONG_DESCRIPTORS[wrong]
    _, _, image, (a, b) = prepared(N, **layout)
    with pytest.raises(Fault, match=message):
        multiply(simple(N, mn_a=layout.get("mn_a", 0)), N, image, (a + change, b))


@pytest.mark.parametrize("change", [field(STRIDE, 1), field(62, 1), field(62, 2), field(A_START, 2), field(A_START, 64)])
def test_a_descriptor_of_other_places_gives_other_sums(change):
    a, b, image, (left, right) = prepared(N)
    with np.errstate(invalid="ignore"):
        try:
            got = multiply(simple(N), N, image, (left + change, right))
        except Fault:
            return
    assert not np.array_equal(got, wide(a) @ wide(b).T)
