"""Every arithmetic instruction of the machine gives what PTX says, against NumPy and exact fractions, with whole warps and some lanes.

Values are extreme ones (NaN, infinities, zeros of both signs, denormals, the ends of the integers) and random bits, drawn with the seed
that pytest prints (MINIMOE_PTX_SEEDS).
"""

import math
from fractions import Fraction
from zlib import crc32

import numpy as np
import pytest

from ptx_machine.machine import Fault, Module
from ptx_machine.one_instruction import SEED, N, dtype_of, evaluate, flushed, kernel, rounded, values, written

SIGNED, UNSIGNED = ("s16", "s32", "s64"), ("u16", "u32", "u64")
BITS = ("b16", "b32", "b64")
INTEGERS = SIGNED + UNSIGNED


def draws(name):
    return np.random.default_rng([SEED, crc32(name.encode())])


def bits(name):
    return 8 * dtype_of(name).itemsize


def python(oracle, *arrays, to):
    """Apply a function of Python integers to each element, and wrap."""
    mask, dtype = (1 << bits(to)) - 1, dtype_of(to)
    unsigned = [oracle(*map(int, row)) & mask for row in zip(*arrays, strict=True)]
    return np.array(unsigned, f"u{dtype.itemsize}").view(dtype)


def negative(name, array):
    """The same with the other sign; of integers, and floats that are held as bits, with the other highest bit."""
    whole = array.view(f"u{array.itemsize}")
    return (whole ^ whole.dtype.type(1 << (bits(name) - 1))).view(array.dtype)


def check(instruction, to, sources, oracle, drawn=None):
    """Execute `instruction $d, $0, ...` on drawn values, and compare its bits with the oracle's."""
    draw = draws(instruction)
    arrays = [values(name, draw) for name in sources] if drawn is None else drawn(draw)
    if drawn is None and len(sources) > 1 and sources[0] == sources[-1]:  # often equal, or but for their signs
        like, chance = written(negative(sources[0], arrays[0])), draw.random(N)
        arrays[-1] = np.where(chance < 0.1, arrays[0], np.where(chance < 0.2, like, arrays[-1]))
    operands = ", ".join(f"${i}" for i in range(len(sources)))
    made = evaluate(f"{instruction} $d, {operands};", to, *zip(sources, arrays, strict=True))
    with np.errstate(all="ignore"):
        equal_bits(made, np.asarray(oracle(*arrays)).astype(dtype_of(to), copy=False), to, arrays)


def equal_bits(made, expected, to, arrays):
    whole = np.dtype(f"u{made.itemsize}")
    wanted = expected.view(whole).copy()
    got = made.view(whole).copy()
    if to == "f32":
        wanted[np.isnan(expected)] = 0x7FFFFFFF  # the only NaN that a card makes
    elif to == "f64":
        wanted[np.isnan(expected)] = got[np.isnan(made)] = 0x7FF8 << 48
    (wrong,) = np.nonzero(got != wanted)
    first = [(hex(got[i]), hex(wanted[i]), *(array[i] for array in arrays)) for i in wrong[:3]]
    assert not len(wrong), f"{len(wrong)} of {len(made)} differ; made, wanted, sources: {first} (seed {SEED})"


# ---- integers ----------------------------------------------------------------------------------------------------------------------------


def truncated(a, b):
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def divisors(*types):
    """Values, with divisors other than 0."""

    def drawn(draw):
        a, b = (values(name, draw) for name in types)
        return a, np.where(b == 0, b.dtype.type(7), b)

    return drawn


BINARY = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul.lo": lambda a, b: a * b, "min": min, "max": max,
    "div": truncated, "rem": lambda a, b: a - b * truncated(a, b),
}  # fmt: skip


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("operation", BINARY)
def test_operations_on_two_integers_wrap(operation, name):
    drawn = divisors(name, name) if operation in ("div", "rem") else None
    check(f"{operation}.{name}", name, [name, name], lambda a, b: python(BINARY[operation], a, b, to=name), drawn)


@pytest.mark.parametrize("name", INTEGERS)
def test_products_have_a_low_and_a_high_half_and_may_add(name):
    width, wide = bits(name), f"{name[0]}{2 * bits(name)}"
    check(f"mul.hi.{name}", name, [name] * 2, lambda a, b: python(lambda x, y: x * y >> width, a, b, to=name))
    check(f"mad.lo.{name}", name, [name] * 3, lambda a, b, c: python(lambda x, y, z: x * y + z, a, b, c, to=name))
    check(f"mad.hi.{name}", name, [name] * 3, lambda a, b, c: python(lambda x, y, z: (x * y >> width) + z, a, b, c, to=name))
    check(f"sad.{name}", name, [name] * 3, lambda a, b, c: python(lambda x, y, z: z + abs(x - y), a, b, c, to=name))
    if width < 64:
        check(f"mul.wide.{name}", wide, [name] * 2, lambda a, b: python(lambda x, y: x * y, a, b, to=wide))
        check(f"mad.wide.{name}", wide, [name, name, wide], lambda a, b, c: python(lambda x, y, z: x * y + z, a, b, c, to=wide))


@pytest.mark.parametrize("operation, oracle", [("add", lambda a, b: a + b), ("sub", lambda a, b: a - b)])
def test_saturated_sums_stay_at_the_ends(operation, oracle):
    def clipped(a, b):
        return np.clip(oracle(a.astype(np.int64), b.astype(np.int64)), -(2**31), 2**31 - 1)

    check(f"{operation}.sat.s32", "s32", ["s32", "s32"], clipped)


@pytest.mark.parametrize("name", SIGNED)
def test_signs_of_integers(name):
    check(f"neg.{name}", name, [name], np.negative)
    check(f"abs.{name}", name, [name], np.abs)  # the least integer stays


@pytest.mark.parametrize("name", BITS)
def test_logic_of_bits(name):
    check(f"and.{name}", name, [name] * 2, np.bitwise_and)
    check(f"or.{name}", name, [name] * 2, np.bitwise_or)
    check(f"xor.{name}", name, [name] * 2, np.bitwise_xor)
    check(f"not.{name}", name, [name], np.invert)
    check(f"cnot.{name}", name, [name], lambda a: a == 0)


@pytest.mark.parametrize("table", [0x80, 0x96, 0xE8, 0xCA, 0x01, 0xFE, 0xB1])
def test_lop3_looks_up_each_bit(table):
    def oracle(a, b, c):
        made = np.zeros_like(a)
        for place in range(32):
            k = (a >> place & 1) * 4 + (b >> place & 1) * 2 + (c >> place & 1)
            made |= (table >> k & 1).astype(np.uint32) << place
        return made

    draw = draws(f"lop3 {table}")
    arrays = [values("b32", draw) for _ in range(3)]
    made = evaluate(f"lop3.b32 $d, $0, $1, $2, {table};", "b32", *(("b32", array) for array in arrays))
    equal_bits(made, oracle(*arrays), "b32", arrays)


@pytest.mark.parametrize("name", [*BITS, *SIGNED, *UNSIGNED])
def test_shifts(name):
    def drawn(draw):
        return values(name, draw), draw.integers(0, bits(name), N).astype(np.uint32)

    if name in BITS:
        check(f"shl.{name}", name, [name, "u32"], lambda a, n: python(lambda x, y: x << y, a, n, to=name), drawn)
    check(f"shr.{name}", name, [name, "u32"], lambda a, n: python(lambda x, y: x >> y, a, n, to=name), drawn)


@pytest.mark.parametrize("direction", ["l", "r"])
@pytest.mark.parametrize("mode", ["wrap", "clamp"])
def test_a_funnel_shift_takes_its_word_from_two(direction, mode):
    def shifted(low, high, count):
        count = count & 31 if mode == "wrap" else min(count, 32)
        return (high << 32 | low) << count >> 32 if direction == "l" else (high << 32 | low) >> count

    check(f"shf.{direction}.{mode}.b32", "b32", ["b32"] * 3, lambda a, b, n: python(shifted, a, b, n, to="b32"))


@pytest.mark.parametrize("width", [32, 64])
def test_bits_are_counted_found_and_reversed(width):
    b, u, s = (f"{kind}{width}" for kind in "bus")
    check(f"popc.{b}", "u32", [b], lambda a: python(int.bit_count, a, to="u32"))
    check(f"clz.{b}", "u32", [b], lambda a: python(lambda x: width - x.bit_length(), a, to="u32"))
    check(f"brev.{b}", b, [b], lambda a: python(lambda x: int(f"{x:0{width}b}"[::-1], 2), a, to=b))
    check(f"bfind.{u}", "u32", [u], lambda a: python(lambda x: x.bit_length() - 1, a, to="u32"))
    check(f"bfind.{s}", "u32", [s], lambda a: python(lambda x: (~x if x < 0 else x).bit_length() - 1, a, to="u32"))
    check(f"bfind.shiftamt.{u}", "u32", [u], lambda a: python(lambda x: width - x.bit_length() if x else -1, a, to="u32"))


def place_and_length(*types):
    def drawn(draw):
        near = [draw.choice([0, 1, 5, 15, 31, 32, 33, 63, 64, 70, 255, 256, 257 + 2], N).astype(np.uint32) for _ in range(2)]
        return *(values(name, draw) for name in types), *near

    return drawn


@pytest.mark.parametrize("name", ["u32", "s32", "u64", "s64"])
def test_fields_of_bits_are_taken_out(name):
    width = bits(name)

    def field(a, place, length):
        place, length, a = place & 255, length & 255, a & ((1 << width) - 1)
        sign = name[0] == "s" and length > 0 and a >> min(place + length - 1, width - 1) & 1
        return sum((a >> place + i & 1 if i < length and place + i < width else sign) << i for i in range(width))

    check(f"bfe.{name}", name, [name, "u32", "u32"], lambda *x: python(field, *x, to=name), place_and_length(name))


@pytest.mark.parametrize("name", ["b32", "b64"])
def test_fields_of_bits_are_put_in(name):
    def field(a, b, place, length):
        place, length = place & 255, length & 255
        mask = sum(1 << i for i in range(place, min(place + length, bits(name))))
        return (b & ~mask) | (a << place & mask)

    check(f"bfi.{name}", name, [name, name, "u32", "u32"], lambda *x: python(field, *x, to=name), place_and_length(name, name))


def test_prmt_chooses_bytes_or_their_signs():
    def permuted(a, b, choice):
        both, made = (b << 32 | a).to_bytes(8, "little"), 0
        for place in range(4):
            digit = choice >> 4 * place & 15
            byte = both[digit & 7]
            made |= (255 * (byte >> 7) if digit & 8 else byte) << 8 * place
        return made

    check("prmt.b32", "b32", ["b32"] * 3, lambda *x: python(permuted, *x, to="b32"))


# ---- floats ------------------------------------------------------------------------------------------------------------------------------


def exactly(name, mode, function, zero, special, *arrays):
    """Apply a function of fractions and round; where a value or the result is not finite, NumPy's function gives it."""
    made = np.array(special(*arrays), dtype_of(name))
    for i, row in enumerate(zip(*map(np.ndarray.tolist, arrays), strict=True)):
        if all(map(math.isfinite, row)):
            exact = function(*map(Fraction, row))
            if exact is None:
                continue  # a division by zero, or the root of a negative number
            value = rounded(exact, name, mode)
            made[i] = math.copysign(value, zero(mode, *row) if exact == 0 else (1 if exact > 0 else -1))
    return made


def sign_of_sum(mode, a, b):
    """Of a sum that is zero: that of both, or of an exact difference."""
    if a == b == 0 and math.copysign(1, a) == math.copysign(1, b):
        return a
    return -1.0 if mode == "rm" else 1.0


def sign_of_product(mode, a, b):
    return math.copysign(1, a) * math.copysign(1, b)


def sign_of_fma(mode, a, b, c):
    return sign_of_sum(mode, math.copysign(0.0 if Fraction(a) * Fraction(b) == 0 else 1.0, sign_of_product(mode, a, b)), c)


def fma_special(a, b, c):
    return a.astype(np.longdouble) * b + c


IEEE = {
    "add": (2, lambda a, b: a + b, sign_of_sum, np.add),
    "sub": (2, lambda a, b: a - b, lambda mode, a, b: sign_of_sum(mode, a, -b), np.subtract),
    "mul": (2, lambda a, b: a * b, sign_of_product, np.multiply),
    "div": (2, lambda a, b: a / b if b else None, sign_of_product, np.divide),
    "rcp": (1, lambda a: 1 / a if a else None, None, np.reciprocal),
    "fma": (3, lambda a, b, c: a * b + c, sign_of_fma, fma_special),
}


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize("name", ["f32", "f64"])
@pytest.mark.parametrize("operation", IEEE)
def test_operations_on_floats_round_once(operation, name, mode):
    count, function, zero, special = IEEE[operation]
    check(f"{operation}.{mode}.{name}", name, [name] * count, lambda *x: exactly(name, mode, function, zero, special, *x))


@pytest.mark.parametrize("operation", ["add", "sub", "mul"])
def test_the_rounding_may_be_left_out(operation):
    for name in ("f32", "f64"):
        check(f"{operation}.{name}", name, [name] * 2, IEEE[operation][3])


@pytest.mark.parametrize("name", ["f32", "f64"])
def test_square_roots_round_once(name):
    check(f"sqrt.rn.{name}", name, [name], np.sqrt)

    def bounds(mode, x):
        nearest = np.sqrt(x)
        made = nearest.copy()
        for i in np.nonzero(np.isfinite(x) & (x > 0))[0]:
            error = Fraction(float(nearest[i])) ** 2 - Fraction(float(x[i]))
            if mode == "rp" and error < 0:
                made[i] = np.nextafter(nearest[i], nearest.dtype.type(np.inf))
            elif mode in ("rm", "rz") and error > 0:
                made[i] = np.nextafter(nearest[i], nearest.dtype.type(0))
        return made

    for mode in ("rz", "rm", "rp"):
        check(f"sqrt.{mode}.{name}", name, [name], lambda x, mode=mode: bounds(mode, x))


@pytest.mark.parametrize("operation", ["add", "sub", "mul", "div", "fma", "rcp"])
def test_ftz_makes_zeros_of_denormals_before_and_after(operation):
    count, function, zero, special = IEEE[operation]

    def oracle(*x):
        return flushed(exactly("f32", "rn", function, zero, special, *map(flushed, x)))

    check(f"{operation}.rn.ftz.f32", "f32", ["f32"] * count, oracle)


def saturated(x):
    return np.where(x > 0, np.minimum(x, 1), 0).astype(x.dtype)


@pytest.mark.parametrize("operation", ["add", "sub", "mul"])
@pytest.mark.parametrize("ftz", ["", ".ftz"])
def test_sat_stays_between_0_and_1_and_has_no_nan(operation, ftz):
    flush = flushed if ftz else lambda x: x
    check(f"{operation}{ftz}.sat.f32", "f32", ["f32"] * 2, lambda a, b: saturated(flush(IEEE[operation][3](flush(a), flush(b)))))


def ordered(choose, a, b):
    """min or max, where a NaN loses and -0 is less than +0."""
    zeros = (a == 0) & (b == 0)
    negative = np.signbit(a) | np.signbit(b) if choose is np.fmin else np.signbit(a) & np.signbit(b)
    return np.where(zeros, np.where(negative, -0.0, 0.0), choose(a, b)).astype(a.dtype)


@pytest.mark.parametrize("name, choose", [("min", np.fmin), ("max", np.fmax)])
def test_a_nan_loses_in_min_and_max_unless_it_is_asked_for(name, choose):
    check(f"{name}.f32", "f32", ["f32"] * 2, lambda a, b: ordered(choose, a, b))
    check(f"{name}.f64", "f64", ["f64"] * 2, lambda a, b: ordered(choose, a, b))
    check(f"{name}.ftz.f32", "f32", ["f32"] * 2, lambda a, b: ordered(choose, flushed(a), flushed(b)))
    check(f"{name}.NaN.f32", "f32", ["f32"] * 2, lambda a, b: np.where(np.isnan(a) | np.isnan(b), np.nan, ordered(choose, a, b)))


@pytest.mark.parametrize("name", ["f32", "f64"])
def test_signs_of_floats_are_bits(name):
    whole = f"b{bits(name)}"
    sign = dtype_of(whole).type(1 << (bits(name) - 1))

    def in_bits(oracle):
        return lambda *x: oracle(*(array.view(dtype_of(whole)) for array in x))

    def check_bits(instruction, count, oracle):
        draw = draws(instruction)
        arrays = [values(name, draw) for _ in range(count)]
        operands = ", ".join(f"${i}" for i in range(count))
        made = evaluate(f"{instruction} $d, {operands};", name, *((name, array) for array in arrays))
        assert np.array_equal(made.view(dtype_of(whole)), in_bits(oracle)(*arrays))

    check_bits(f"neg.{name}", 1, lambda a: a ^ sign)
    check_bits(f"abs.{name}", 1, lambda a: a & ~sign)
    check_bits(f"copysign.{name}", 2, lambda a, b: (a & sign) | (b & ~sign))


APPROXIMATIONS = {
    "ex2.approx": np.exp2, "lg2.approx": np.log2, "sin.approx": np.sin, "cos.approx": np.cos, "tanh.approx": np.tanh,
    "rcp.approx": np.reciprocal, "sqrt.approx": np.sqrt, "rsqrt.approx": lambda x: 1 / np.sqrt(x),
}  # fmt: skip


@pytest.mark.parametrize(
    "operation, ftz", [(name, ftz) for name in APPROXIMATIONS for ftz in ("", ".ftz") if name + ftz != "tanh.approx.ftz"]
)
def test_approximations_are_close_to_the_function(operation, ftz):
    flush = flushed if ftz else lambda x: x
    draw = draws(operation)
    x = values("f32", draw)
    if operation == "ex2.approx":  # most random floats are far beyond its range
        x = np.where(draw.random(N) < 0.5, draw.uniform(-160, 140, N), x).astype(np.float32)
    made = evaluate(f"{operation}{ftz}.f32 $d, $0;", "f32", ("f32", x))
    with np.errstate(all="ignore"):
        exact = APPROXIMATIONS[operation](flush(x).astype(np.float64))
        expected = flush(exact.astype(np.float32))
        ulp = np.spacing(np.abs(expected)).astype(np.float64)
        ulp[~np.isfinite(ulp)] = 0.0
        same = (made == expected) | (np.isnan(made) & np.isnan(expected)) | (np.abs(made - exact) <= 0.6 * ulp)
    assert same.all(), (x[~same][:4], made[~same][:4], expected[~same][:4], SEED)
    zeros = expected == 0
    assert np.array_equal(np.signbit(made[zeros]), np.signbit(expected[zeros]))


def test_quotients_that_are_approximated():
    def full(a, b):
        return a / b

    def approximate(a, b):
        beyond = (np.abs(b) > 2.0**126) & np.isfinite(b)  # the reciprocal of such a divisor counts as zero
        return np.where(beyond, a * np.copysign(np.float32(0), b), a / b)

    check("div.full.f32", "f32", ["f32"] * 2, full)
    check("div.approx.f32", "f32", ["f32"] * 2, approximate)
    check("div.approx.ftz.f32", "f32", ["f32"] * 2, lambda a, b: flushed(approximate(flushed(a), flushed(b))))


def test_doubles_are_approximated_by_their_upper_words():
    def upper(x):
        x = (x.view(np.uint64) & np.uint64(0xFFFFFFFF00000000)).view(np.float64)
        return np.where(np.abs(x) < np.finfo(np.float64).tiny, np.copysign(0.0, x), x)

    check("rcp.approx.ftz.f64", "f64", ["f64"], lambda x: upper(1 / upper(x)))
    check("rsqrt.approx.ftz.f64", "f64", ["f64"], lambda x: upper(1 / np.sqrt(upper(x))))


@pytest.mark.parametrize("name", ["f32", "f64"])
def test_testp_says_what_kind_of_number_it_is(name):
    tiny = np.finfo(dtype_of(name)).tiny
    oracles = {
        "finite": np.isfinite, "infinite": np.isinf, "number": lambda x: ~np.isnan(x), "notanumber": np.isnan,
        "normal": lambda x: np.isfinite(x) & (np.abs(x) >= tiny), "subnormal": lambda x: (x != 0) & (np.abs(x) < tiny),
    }  # fmt: skip
    for kind, oracle in oracles.items():
        check(f"testp.{kind}.{name}", "pred", [name], oracle)


# ---- what is refused ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "instruction",
    ["add.cc.u32 $d, $0, $0;", "mul.lo.s32 $d, $0;", "add.s64 $d, $0, $0;", "add.rn.u32 $d, $0, $0;", "mul24.lo.u32 $d, $0, $0;",
     "prmt.b32.f4e $d, $0, $0, $0;", "fma.rn.f64 $d, $0, $0, $0;", "shl.wide.b32 $d, $0, 1;", "mul.u32 $d, $0, $0;"],
)  # fmt: skip
def test_an_unknown_variant_is_refused_when_the_module_is_loaded(instruction):
    with pytest.raises(Fault, match="PTX line"):
        Module(kernel(instruction, "u32", ["u32"]))
