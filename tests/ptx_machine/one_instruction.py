"""Executes one instruction on many values, and draws values that are hard to get right.

    evaluate("fma.rn.f32 $d, $0, $1, $2;", "f32", ("f32", a), ("f32", b), ("f32", c))

A PTX kernel loads a value of each source per thread, executes the instruction, and stores the result. It runs twice: once with whole warps,
and once with some lanes only, where the others must keep what they had.
"""

from fractions import Fraction

import numpy as np

from ptx_machine.machine import UNWRITTEN, Module
from ptx_machine.schedules import SEEDS

SEED = SEEDS[0]  # pytest prints it
N = 1024

DTYPES = {f"{kind}{bits}": np.dtype(f"{kind}{bits // 8}") for kind in "iu" for bits in (8, 16, 32, 64)} | {
    "f16": np.dtype("u2"), "bf16": np.dtype("u2"), "f32": np.dtype("f4"), "f64": np.dtype("f8"), "pred": np.dtype("u2"),
    "bf16x2": np.dtype("u4"), "f16x2": np.dtype("u4"), "tf32": np.dtype("u4"),
}  # fmt: skip


def dtype_of(name):
    """The NumPy type that holds values of a PTX type; floats of 16 bits are held as their bits, a predicate as 0 or 1."""
    return DTYPES[name.replace("s", "i").replace("b", "u") if name[0] in "sb" and name[1:].isdigit() else name]


def evaluate(text, to, *sources):
    """Execute an instruction on N values of each source, with whole warps and with some lanes.   -> the results as `to`

    In its text, $d is the target and $0, $1, ... are the sources. In braces it may be more than one instruction.
    """
    draw = np.random.default_rng(SEED)
    (n,) = {len(values) for _, values in sources}
    assert n % 128 == 0
    module = Module(kernel(text, to, [name for name, _ in sources]))
    arrays = [np.ascontiguousarray(values, dtype_of(name)) for name, values in sources]
    before = draw.integers(0, 2 if to == "pred" else 256, n * dtype_of(to).itemsize, np.uint8).view(dtype_of(to))
    if to == "pred":
        before = draw.integers(0, 2, n).astype(dtype_of(to))
    before = written(before)
    every, some = before.copy(), before.copy()
    module.launch("kernel", (n // 128,), (128,), (every, np.ones(n, np.uint8), *arrays), seed=SEED)
    lanes = draw.random(n) < 0.6
    module.launch("kernel", (n // 128,), (128,), (some, lanes.astype(np.uint8), *arrays), seed=SEED)
    bits = np.dtype(f"u{before.itemsize}")
    same = some.view(bits) == np.where(lanes, every.view(bits), before.view(bits))
    if to == "f64":  # which of two NaNs goes on is the processor's choice
        same |= lanes & np.isnan(some) & np.isnan(every)
    assert same.all(), "with some lanes it does something else"
    return every


def register(name):
    return {"pred": ".pred", "f32": ".f32", "f64": ".f64"}.get(name, f".b{max(8 * dtype_of(name).itemsize, 16)}")


def kernel(text, to, types):
    """The PTX: the parameters are the results, a byte per thread that says whether it takes part, and the sources."""
    names = ["to", "lanes", *(f"source{i}" for i in range(len(types)))]
    sizes = [dtype_of(to).itemsize, 1, *(dtype_of(name).itemsize for name in types)]
    lines = [f".reg {register(name)} s{i};" for i, name in enumerate(types)]
    for name, size in zip(names, sizes, strict=True):
        lines += [f".reg .b64 {name}_at;", f"ld.param.u64 {name}_at, [{name}];", f"cvta.to.global.u64 {name}_at, {name}_at;"]
        lines += [f"mad.wide.u32 {name}_at, i, {size}, {name}_at;"]
    for i, name in enumerate(types):
        if name == "pred":
            lines += [f"ld.global.u16 half, [source{i}_at];", f"setp.ne.u16 s{i}, half, 0;"]
        else:
            lines += [f"ld.global.{'u8' if sizes[i + 2] == 1 else f'b{8 * sizes[i + 2]}'} s{i}, [source{i}_at];"]
    for i in range(len(types)):
        text = text.replace(f"${i}", f"s{i}")
    text = text.replace("$d", "d")
    if to == "pred":
        load = ["ld.global.u16 half, [to_at];", "setp.ne.u16 d, half, 0;"]
        store = ["selp.u16 half, 1, 0, d;", "st.global.u16 [to_at], half;"]
    else:
        load, store = [f"ld.global.b{8 * sizes[0]} d, [to_at];"], [f"st.global.b{8 * sizes[0]} [to_at], d;"]
    body = "\n".join([
        ".reg .pred takes_part, other;", ".reg .b32 i, block, size, word;", ".reg .b16 half;", f".reg {register(to)} d;",
        "mov.u32 i, %tid.x;", "mov.u32 block, %ctaid.x;", "mov.u32 size, %ntid.x;", "mad.lo.u32 i, block, size, i;", *lines, *load,
        "ld.global.u8 half, [lanes_at];", "setp.ne.u16 takes_part, half, 0;", "@!takes_part bra DONE;", text, "DONE:", *store, "ret;",
    ])  # fmt: skip
    parameters = ", ".join(f".param .u64 {name}" for name in names)
    return f".version 8.0\n.target sm_90a\n.address_size 64\n.visible .entry kernel({parameters})\n{{\n{body}\n}}\n"


# ---- values ------------------------------------------------------------------------------------------------------------------------------


def values(name, draw, n=N):
    """Half of them extreme, half random bits or random numbers."""
    dtype = dtype_of(name)
    if name == "pred":
        return draw.integers(0, 2, n).astype(dtype)
    bits = draw.integers(0, 256, n * dtype.itemsize, np.uint8).view(dtype)
    if name in ("f32", "f64"):
        info = np.finfo(dtype)
        few = [0.0, 1.0, 0.5, 1.5, 2.5, 3.0, 2.0**24, 2.0**31, 2.0**63, 2.0**126, 1e10, np.inf]
        few += [1 + odd * 2.0**-place for place in (8, 11, 24) for odd in (1, 3)]  # in the middle of two bf16, halves or floats
        few += [info.max, info.tiny, info.smallest_subnormal, info.tiny / 3]
        extreme = np.array([*few, *np.negative(few), np.nan], dtype)
        usual = (draw.standard_normal(n) * 10.0 ** draw.integers(-3, 6, n)).astype(dtype)
        plain = np.where(draw.random(n) < 0.5, bits, usual)
    else:
        whole = np.dtype(f"i{dtype.itemsize}") if dtype.kind == "i" else dtype
        info = np.iinfo(whole)
        extreme = np.array([0, 1, 2, 3, 7, info.max, info.max - 1, info.min, info.min + 1, info.max // 2, info.max // 2 + 1], dtype)
        if name in ("bf16", "f16"):
            infinity = 0x7F80 if name == "bf16" else 0x7C00
            extreme = np.array([0, 1, 2, infinity - 1, infinity, 0x7FFF, 0x3F80, 0x3C00, 0x0080, 0x007F, 0x0400, 0x03FF], dtype)
            extreme = np.concatenate([extreme, extreme | 0x8000])
        plain = np.where(draw.random(n) < 0.5, bits, draw.integers(0, 40, n).astype(dtype))
    return written(np.where(draw.random(n) < 0.5, draw.choice(extreme, n), plain).astype(dtype))


def written(array):
    """Return the array without the bit pattern that marks unwritten memory."""
    halves = array.view(np.uint16)
    halves[halves == UNWRITTEN] += 1
    return array


def flushed(x):
    """Denormals as zeros of their sign."""
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x).astype(np.float32)


# ---- rounding, exactly -------------------------------------------------------------------------------------------------------------------

FORMATS = {"f16": (10, -14, 15), "bf16": (7, -126, 127), "f32": (23, -126, 127), "f64": (52, -1022, 1023)}


def rounded(exact, name, mode="rn"):
    """A fraction as the float that the mode chooses, without a sign for zero."""
    mantissa, least, most = FORMATS[name]
    if exact == 0:
        return 0.0
    size, negative = abs(exact), exact < 0
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= Fraction(2) ** exponent > size
    quantum = Fraction(2) ** (max(exponent, least) - mantissa)
    whole, rest = divmod(size, quantum)
    rest /= quantum
    if mode == "rn":
        away = rest > Fraction(1, 2) or (rest == Fraction(1, 2) and whole % 2)
    else:
        away = rest and mode == ("rm" if negative else "rp")
    result = (whole + bool(away)) * quantum
    if result >= Fraction(2) ** (most + 1):
        outward = mode == "rn" or mode == ("rm" if negative else "rp")
        result = float("inf") if outward else (2 - Fraction(2) ** -mantissa) * Fraction(2) ** most
    return -float(result) if negative else float(result)
