"""Conversions, moves, comparisons and predicates of the machine give what PTX says, with whole warps and some lanes.

Values are drawn as in test_arithmetic.py.
"""

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

from ptx_machine.machine import Fault, Module
from ptx_machine.one_instruction import N, dtype_of, evaluate, flushed, kernel, rounded, values
from ptx_machine.test_arithmetic import bits, check, draws, equal_bits, python

INTEGERS = ("s16", "s32", "s64", "u16", "u32", "u64")
BYTES = ("s8", "u8")
SMALL = {"bf16": ml_dtypes.bfloat16, "f16": np.float16}

# ---- integers ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", [*INTEGERS, *BYTES])
@pytest.mark.parametrize("source", [*INTEGERS, *BYTES])
def test_integers_become_wider_and_narrower(source, to):
    held = {"s8": "s16", "u8": "u16"}.get(to, to)  # registers have 16 bits and more
    check(f"cvt.{to}.{source}", held, [source], lambda a: a.astype(dtype_of(to)).astype(dtype_of(held)))

    def clipped(a):
        info = np.iinfo(dtype_of(to))
        return python(lambda x: min(max(x, int(info.min)), int(info.max)), a, to=held)

    check(f"cvt.sat.{to}.{source}", held, [source], clipped)


@pytest.mark.parametrize("to", ["u32", "s64"])
def test_a_register_may_be_wider_than_the_type_that_is_read_or_written(to):
    x = values("u32", draws("wider"))
    for source in ("s8", "u8", "s16", "u16"):
        made = evaluate(f"cvt.{to}.{source} $d, $0;", to, ("u32", x))
        assert np.array_equal(made, x.astype(dtype_of(source)).astype(dtype_of(to)))
    made = evaluate("cvt.s8.s32 $d, $0;", to, ("u32", x))
    assert np.array_equal(made, x.astype(np.int8).astype(dtype_of(to)))


# ---- integers and floats -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize("source", [*INTEGERS, *BYTES])
def test_integers_become_floats_rounded_once(source, mode):
    for to in ("f32", "f64"):
        check(f"cvt.{mode}.{to}.{source}", to, [source], lambda a, to=to: [rounded(Fraction(x), to, mode) for x in a.tolist()])


WHOLE = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}


@pytest.mark.parametrize("mode", WHOLE)
@pytest.mark.parametrize("source", ["f32", "f64"])
def test_floats_become_the_nearest_integer_that_there_is(source, mode):
    for to in (*INTEGERS, *BYTES):
        held = {"s8": "s16", "u8": "u16"}.get(to, to)
        info = np.iinfo(dtype_of(to))
        no_number = 1 << (bits(to) - 1) if 64 in (bits(to), bits(source)) else 0

        def whole(x, info=info, no_number=no_number):
            if math.isnan(x):
                return no_number
            return int(info.min if x < 0 else info.max) if math.isinf(x) else min(max(WHOLE[mode](x), int(info.min)), int(info.max))

        def oracle(a, to=to, held=held, whole=whole):
            mask = (1 << bits(to)) - 1
            exact = np.array([whole(x) & mask for x in a.tolist()], np.uint64)
            return exact.astype(f"u{bits(to) // 8}").view(dtype_of(to)).astype(dtype_of(held))

        check(f"cvt.{mode}.{to}.{source}", held, [source], oracle)
        if source == "f32":
            check(f"cvt.{mode}.ftz.{to}.f32", held, [source], lambda a, oracle=oracle: oracle(flushed(a)))


@pytest.mark.parametrize("name", ["f32", "f64"])
def test_floats_become_whole(name):
    functions = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
    for mode, function in functions.items():
        check(f"cvt.{mode}.{name}.{name}", name, [name], function)
    check(f"cvt.sat.{name}.{name}", name, [name], lambda a: np.where(a > 0, np.minimum(a, 1), 0))


def test_floats_become_doubles_and_doubles_floats():
    check("cvt.f64.f32", "f64", ["f32"], lambda a: a.astype(np.float64))
    check("cvt.ftz.f64.f32", "f64", ["f32"], lambda a: flushed(a).astype(np.float64))
    check("cvt.ftz.f32.f32", "f32", ["f32"], flushed)
    check("cvt.rn.f32.f64", "f32", ["f64"], lambda a: a.astype(np.float32))
    check("cvt.rn.ftz.sat.f32.f64", "f32", ["f64"], lambda a: np.where(a > 0, np.minimum(flushed(a.astype(np.float32)), 1), 0))
    for mode in ("rz", "rm", "rp"):
        check(f"cvt.{mode}.f32.f64", "f32", ["f64"], lambda a, mode=mode: narrowed(a, "f32", mode))


def narrowed(a, to, mode):
    made = a.astype(dtype_of(to))
    for i, x in enumerate(a.tolist()):
        if math.isfinite(x):
            made[i] = math.copysign(rounded(Fraction(x), to, mode), x)
    return made


# ---- floats of 16 bits -------------------------------------------------------------------------------------------------------------------


def small_bits(a, to, mode="rn"):
    """The bits of numbers rounded once to bf16 or half; a NaN is 0x7fff."""
    numbers = np.array([math.copysign(rounded(Fraction(x), to, mode), x) if math.isfinite(x) else x for x in a.tolist()])
    made = numbers.astype(np.float32).astype(SMALL[to]).view(np.uint16).copy()
    made[np.isnan(numbers)] = 0x7FFF
    return made


def wide(a, name):
    return a.view(SMALL[name]).astype(np.float64)


@pytest.mark.parametrize("to", SMALL)
def test_floats_become_bf16_and_half(to):
    for source in ("f32", "f64"):
        for mode in ("rn", "rz", "rm", "rp"):
            check(f"cvt.{mode}.{to}.{source}", to, [source], lambda a, mode=mode: small_bits(a, to, mode))
    check(f"cvt.rn.relu.{to}.f32", to, ["f32"], lambda a: small_bits(np.where(a < 0, 0, np.abs(a)), to))

    def finite(a):
        made, infinity = small_bits(a, to), 0x7F80 if to == "bf16" else 0x7C00
        return np.where(made & 0x7FFF == infinity, made - 1, made)

    check(f"cvt.rn.satfinite.{to}.f32", to, ["f32"], finite)
    check(f"cvt.rn.ftz.{to}.f32", to, ["f32"], lambda a: small_bits(flushed(a), to))


@pytest.mark.parametrize("to", SMALL)
@pytest.mark.parametrize("source", INTEGERS)
def test_integers_become_bf16_and_half_rounded_once(source, to):
    def exactly(a):
        numbers = np.array([rounded(Fraction(x), to) for x in a.tolist()])
        return numbers.astype(np.float32).astype(SMALL[to]).view(np.uint16)

    check(f"cvt.rn.{to}.{source}", to, [source], exactly)


@pytest.mark.parametrize("source", SMALL)
def test_bf16_and_half_become_floats(source):
    check(f"cvt.f32.{source}", "f32", [source], lambda a: wide(a, source))
    check(f"cvt.f64.{source}", "f64", [source], lambda a: wide(a, source))
    other = "f16" if source == "bf16" else "bf16"
    check(f"cvt.rn.{other}.{source}", other, [source], lambda a: small_bits(wide(a, source), other))


def pairs(a, b):
    return a.astype(np.uint32) << 16 | b


@pytest.mark.parametrize("to", SMALL)
def test_two_floats_become_a_pair_with_the_first_above(to):
    check(f"cvt.rn.{to}x2.f32", f"{to}x2", ["f32"] * 2, lambda a, b: pairs(small_bits(a, to), small_bits(b, to)))
    check(f"cvt.rz.{to}x2.f32", f"{to}x2", ["f32"] * 2, lambda a, b: pairs(small_bits(a, to, "rz"), small_bits(b, to, "rz")))

    def positive(a):
        return small_bits(np.where(a < 0, 0, np.abs(a)), to)

    check(f"cvt.rn.relu.{to}x2.f32", f"{to}x2", ["f32"] * 2, lambda a, b: pairs(positive(a), positive(b)))


def test_tf32_keeps_ten_bits():
    def oracle(a):
        made = (a.view(np.uint32) + 0x1000) & 0xFFFFE000
        return np.where(np.isnan(a), 0x7FFFFFFF, made)

    check("cvt.rna.tf32.f32", "tf32", ["f32"], oracle)


def fma_small(name):
    def oracle(a, b, c):
        with np.errstate(all="ignore"):
            numbers = wide(a, name) * wide(b, name) + wide(c, name)
        made = small_bits(numbers, name)
        for i, row in enumerate(zip(wide(a, name).tolist(), wide(b, name).tolist(), wide(c, name).tolist(), strict=True)):
            if all(map(math.isfinite, row)):
                x, y, z = map(Fraction, row)
                if x * y + z:
                    made[i] = small_bits(np.array([rounded(x * y + z, name)]), name)[0]
        return made

    return oracle


SMALL_OPERATIONS = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


@pytest.mark.parametrize("name", SMALL)
def test_arithmetic_in_16_bits_rounds_once(name):
    def in_halves(oracle):
        """For both halves of a word."""
        halves = [lambda x, down=down: (x >> down).astype(np.uint16) for down in (16, 0)]
        return lambda *x: pairs(*(oracle(*map(half, x)) for half in halves))

    for operation, function in SMALL_OPERATIONS.items():
        oracle = lambda a, b, function=function: small_bits(function(wide(a, name), wide(b, name)), name)  # noqa: E731
        check(f"{operation}.{name}", name, [name] * 2, oracle)
        check(f"{operation}.rn.{name}x2", f"{name}x2", [f"{name}x2"] * 2, in_halves(oracle))
    check(f"fma.rn.{name}", name, [name] * 3, fma_small(name))
    check(f"fma.rn.{name}x2", f"{name}x2", [f"{name}x2"] * 3, in_halves(fma_small(name)))
    check(f"neg.{name}", name, [name], lambda a: a ^ 0x8000)
    check(f"abs.{name}x2", f"{name}x2", [f"{name}x2"], lambda a: a & 0x7FFF7FFF)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("operation, choose", [("min", np.fmin), ("max", np.fmax)])
def test_least_and_most_in_16_bits(operation, choose, name):
    def oracle(a, b):
        x, y = wide(a, name), wide(b, name)
        made = small_bits(choose(x, y), name)
        zeros = (x == 0) & (y == 0)
        sign = np.signbit(x) | np.signbit(y) if operation == "min" else np.signbit(x) & np.signbit(y)
        return np.where(zeros, np.where(sign, 0x8000, 0), made)

    check(f"{operation}.{name}", name, [name] * 2, oracle)

    def or_nan(a, b):
        return np.where(np.isnan(wide(a, name)) | np.isnan(wide(b, name)), 0x7FFF, oracle(a, b))

    check(f"{operation}.NaN.{name}", name, [name] * 2, or_nan)


# ---- comparisons -------------------------------------------------------------------------------------------------------------------------

COMPARISONS = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}
WORDS = {"lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}


def close(*types):
    """Values of which many are equal."""

    def drawn(draw):
        a, *others = (values(name, draw) for name in types)
        return a, np.where(draw.random(N) < 0.3, a, others[0]), *others[1:]

    return drawn


@pytest.mark.parametrize("how", COMPARISONS)
def test_integers_are_compared(how):
    for name in INTEGERS:
        check(f"setp.{how}.{name}", "pred", [name] * 2, COMPARISONS[how], close(name, name))
    for name in ("b16", "b32", "b64") if how in ("eq", "ne") else ():
        check(f"setp.{how}.{name}", "pred", [name] * 2, COMPARISONS[how], close(name, name))


@pytest.mark.parametrize("how", WORDS)
def test_unsigned_integers_are_compared_by_other_names(how):
    for name in ("u16", "u32", "u64"):
        check(f"setp.{how}.{name}", "pred", [name] * 2, WORDS[how], close(name, name))


def float_comparison(how):
    """eq, ...: false with a NaN; equ, ...: true with one."""
    if how in ("num", "nan"):
        return lambda a, b: (np.isnan(a) | np.isnan(b)) == (how == "nan")
    return lambda a, b: np.where(np.isnan(a) | np.isnan(b), len(how) == 3, COMPARISONS[how[:2]](a, b))


@pytest.mark.parametrize("how", [*COMPARISONS, *(f"{how}u" for how in COMPARISONS), "num", "nan"])
def test_floats_are_compared(how):
    oracle = float_comparison(how)
    check(f"setp.{how}.f32", "pred", ["f32"] * 2, oracle, close("f32", "f32"))
    check(f"setp.{how}.f64", "pred", ["f64"] * 2, oracle, close("f64", "f64"))
    check(f"setp.{how}.ftz.f32", "pred", ["f32"] * 2, lambda a, b: oracle(flushed(a), flushed(b)), close("f32", "f32"))


COMBINERS = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


@pytest.mark.parametrize("negated", ["", "!"])
@pytest.mark.parametrize("combiner", COMBINERS)
def test_a_comparison_is_combined_with_a_predicate_and_negated_into_a_second(combiner, negated):
    draw = draws(combiner + negated)
    a, b, c = close("f32", "f32", "pred")(draw)
    less, other = a < b, c.astype(bool) != bool(negated)
    sources = ("f32", a), ("f32", b), ("pred", c)
    expected = COMBINERS[combiner](less, other), COMBINERS[combiner](~less, other)
    assert np.array_equal(evaluate(f"setp.lt.{combiner}.f32 $d, $0, $1, {negated}$2;", "pred", *sources), expected[0])
    assert np.array_equal(evaluate(f"setp.lt.{combiner}.f32 $d|other, $0, $1, {negated}$2;", "pred", *sources), expected[0])
    assert np.array_equal(evaluate(f"setp.lt.{combiner}.f32 other | $d, $0, $1, {negated}$2;", "pred", *sources), expected[1])
    assert np.array_equal(evaluate("setp.lt.f32 _|$d, $0, $1;", "pred", *sources[:2]), ~less)
    made = evaluate(f"set.lt.{combiner}.u32.f32 $d, $0, $1, {negated}$2;", "u32", *sources)
    assert np.array_equal(made, np.where(expected[0], 0xFFFFFFFF, 0))


def test_set_makes_a_number_of_a_comparison():
    check("set.ge.f32.s32", "f32", ["s32"] * 2, np.greater_equal, close("s32", "s32"))
    check("set.neu.ftz.u32.f32", "u32", ["f32"] * 2, lambda a, b: np.where(float_comparison("neu")(flushed(a), flushed(b)), 2**32 - 1, 0))


# ---- choices and predicates --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["b16", "s16", "u16", "b32", "s32", "u32", "f32", "b64", "s64", "u64", "f64"])
def test_a_value_is_chosen_by_a_predicate_or_a_sign(name):
    whole = np.dtype(f"u{bits(name) // 8}")
    draw = draws(f"selp {name}")
    a, b, c, x, y = (values(kind, draw) for kind in (name, name, "pred", "s32", "f32"))
    sources = (name, a), (name, b)

    def chosen(condition):
        return np.where(condition, a.view(whole), b.view(whole))

    assert np.array_equal(evaluate(f"selp.{name} $d, $0, $1, $2;", name, *sources, ("pred", c)).view(whole), chosen(c))
    assert np.array_equal(evaluate(f"slct.{name}.s32 $d, $0, $1, $2;", name, *sources, ("s32", x)).view(whole), chosen(x >= 0))
    assert np.array_equal(evaluate(f"slct.ftz.{name}.f32 $d, $0, $1, $2;", name, *sources, ("f32", y)).view(whole), chosen(flushed(y) >= 0))


def test_logic_of_predicates():
    for operation, oracle in COMBINERS.items():
        check(f"{operation}.pred", "pred", ["pred"] * 2, oracle)
    check("not.pred", "pred", ["pred"], np.logical_not)
    check("mov.pred", "pred", ["pred"], np.asarray)
    for literal, value in ((0, 0), (1, 1), (-1, 1)):
        assert (evaluate(f"mov.pred $d, {literal};", "pred", ("pred", np.zeros(128))) == value).all()


# ---- mov and cvta ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["b16", "u16", "s16", "b32", "u32", "s32", "f32", "b64", "u64", "s64", "f64"])
def test_mov_copies_bits(name):
    x = values(name, draws(name))
    assert evaluate(f"mov.{name} $d, $0;", name, (name, x)).tobytes() == x.tobytes()


def test_mov_takes_registers_apart_and_puts_them_together():
    draw = draws("mov")
    x, y = values("b64", draw), values("b32", draw)
    for part, text in enumerate(("{$d, _}", "{_, $d}")):
        assert np.array_equal(evaluate(f"mov.b64 {text}, $0;", "b32", ("b64", x)), (x >> 32 * part).astype(np.uint32))
        assert np.array_equal(evaluate(f"mov.b32 {text}, $0;", "b16", ("b32", y)), (y >> 16 * part).astype(np.uint16))
    for part in range(4):
        text = ", ".join("$d" if i == part else f"h{i}" for i in range(4))
        made = evaluate(f"{{.reg .b16 h<4>; mov.b64 {{{text}}}, $0;}}", "b16", ("b64", x))
        assert np.array_equal(made, (x >> 16 * part).astype(np.uint16))
    halves = [values("b16", draw) for _ in range(4)]
    together = sum(half.astype(np.uint64) << 16 * i for i, half in enumerate(halves))
    assert np.array_equal(evaluate("mov.b64 $d, {$0, $1, $2, $3};", "b64", *(("b16", half) for half in halves)), together)
    assert np.array_equal(evaluate("mov.b32 $d, {$0, $1};", "b32", *(("b16", half) for half in halves[:2])), together.astype(np.uint32))
    assert np.array_equal(evaluate("mov.b64 $d, {$0, $1};", "f64", ("b32", y), ("b32", y)).view(np.uint64), y * np.uint64(2**32 + 1))


def test_literals_are_values_of_the_type():
    zeros = ("u32", np.zeros(128))
    for text, to, value in (
        ("mov.f32 $d, 0f3FC00000;", "f32", 1.5), ("mov.f64 $d, 0dBFF8000000000000;", "f64", -1.5), ("mov.u32 $d, -1;", "u32", 2**32 - 1),
        ("mov.b64 $d, 0x10;", "b64", 16), ("mov.u64 $d, -2;", "u64", 2**64 - 2), ("mov.u16 $d, -3;", "u16", 2**16 - 3),
    ):  # fmt: skip
        assert (evaluate(text, to, zeros) == dtype_of(to).type(value)).all()


def test_special_registers_are_moved():
    made = evaluate("mov.u32 $d, %laneid;", "u32", ("u32", np.zeros(N)))
    assert np.array_equal(made, np.arange(N) % 32)


def test_an_address_in_shared_memory_becomes_generic_and_comes_back():
    zeros = ("u32", np.zeros(128))
    declared = ".shared .align 4 .b32 array[128]; .reg .b64 %rd<4>; .reg .b32 word; mul.wide.u32 %rd2, i, 4;"
    there = f"{declared} mov.u64 %rd1, array; add.u64 %rd1, %rd1, %rd2; cvta.shared.u64 %rd3, %rd1;"
    made = evaluate(f"{{{there} st.u32 [%rd3], i; ld.shared.u32 $d, [%rd1];}}", "u32", zeros)
    assert np.array_equal(made, np.arange(128))
    made = evaluate(f"{{{there} cvta.to.shared.u64 %rd0, %rd3; st.shared.u32 [%rd1], i; ld.shared.u32 $d, [%rd0];}}", "u32", zeros)
    assert np.array_equal(made, np.arange(128))
    assert evaluate(f"{{{there} isspacep.shared $d, %rd3;}}", "pred", zeros).all()
    assert not evaluate(f"{{{there} isspacep.global $d, %rd3;}}", "pred", zeros).any()
    assert evaluate("isspacep.global $d, to_at;", "pred", zeros).all()


def test_a_global_address_cannot_become_one_of_shared_memory():
    with pytest.raises(Fault, match="is not in shared memory"):
        evaluate("{.reg .b64 %rd1; cvta.to.shared.u64 %rd1, to_at; mov.u32 $d, 0;}", "u32", ("u32", np.zeros(128)))


# ---- what is refused ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "instruction",
    ["cvt.f32.u32 d, $0;", "cvt.rn.e4m3x2.f32 $d, $0, $0;", "cvt.rzi.f32.u32 $d, $0;", "setp.lt.b32 other, $0, 1;",
     "setp.equ.u32 other, $0, 1;", "setp.lt.and.u32 other, $0, 1;", "mov.b32 {$d, $d}, $0;", "mov.u64 $d, $0;", "cvt.u32.u64 $d, $0;",
     "selp.u64 $d, $0, $0, other;"],
)  # fmt: skip
def test_an_unknown_variant_is_refused_when_the_module_is_loaded(instruction):
    with pytest.raises(Fault, match="PTX line"):
        Module(kernel(instruction, "u32", ["u32"]))


def test_a_nan_has_the_bits_that_a_card_gives_it():
    zeros = np.zeros(128, np.float32)
    made = evaluate("div.rn.f32 $d, $0, $0;", "f32", ("f32", zeros))
    equal_bits(made, np.full(128, np.nan, np.float32), "f32", [zeros])
    assert (made.view(np.uint32) == 0x7FFFFFFF).all()
