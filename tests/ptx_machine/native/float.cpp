// Floats: sums, products, fma, quotients, roots, and the functions that a card approximates.
//
// They round as IEEE and PTX say, to nearest unless the instruction names another rounding. An approximation (`.approx`, `.full`) gives the
// function's value rounded to float, since its error is the card's affair; where PTX says that it gives something else, for huge divisors,
// it does that. bf16 and half are computed in double and rounded once.
#include <algorithm>
#include <limits>

#include "rows.h"

namespace ptx {
namespace {

// ---- what is done to a lane ----------------------------------------------------------------------------------------------------------

struct Add { template <class T> static T of(T a, T b) { return a + b; } };
struct Subtract { template <class T> static T of(T a, T b) { return a - b; } };
struct Multiply { template <class T> static T of(T a, T b) { return a * b; } };
struct MultiplyAdd { template <class T> static T of(T a, T b, T c) { return std::fma(a, b, c); } };
struct Divide { template <class T> static T of(T a, T b) { return a / b; } };
struct Reciprocal { template <class T> static T of(T a) { return T(1) / a; } };
struct SquareRoot { template <class T> static T of(T a) { return std::sqrt(a); } };
struct Negate { template <class T> static T of(T a) { return -a; } };
struct Absolute { template <class T> static T of(T a) { return std::fabs(a); } };
struct CopySign { template <class T> static T of(T a, T b) { return std::copysign(b, a); } };  // the sign of the first, on the second

// A NaN loses against a number, and -0 is less than +0.
struct Least {
    template <class T> static T of(T a, T b) {
        const bool first = a < b || (a == b && std::signbit(a)) || b != b;
        return first ? a : b;
    }
};
struct Most {
    template <class T> static T of(T a, T b) {
        const bool first = b < a || (a == b && std::signbit(b)) || b != b;
        return first ? a : b;
    }
};
// .NaN: a NaN wins.
template <class F>
struct OrNan {
    template <class T> static T of(T a, T b) { return a != a || b != b ? T(NAN) : F::of(a, b); }
};

// div.approx multiplies by a reciprocal, which is 0 for divisors beyond 2^126.
struct DivideByReciprocal {
    static float of(float a, float b) {
        const float size = std::fabs(b);
        return size > 0x1p126f && size < HUGE_VALF ? a * std::copysign(0.0f, b) : a / b;
    }
};

struct Logarithm { static float of(float a) { return float(std::log2(double(a))); } };
struct Sine { static float of(float a) { return float(std::sin(double(a))); } };
struct Cosine { static float of(float a) { return float(std::cos(double(a))); } };
struct Tangent { static float of(float a) { return float(std::tanh(double(a))); } };
struct ReciprocalRoot {
    static float of(float a) { return float(1.0 / std::sqrt(double(a))); }
    static double of(double a) { return 1.0 / std::sqrt(a); }
};

// The rough approximations of doubles, where programs begin to refine: only the upper word is read, and only it is written.
template <class F>
struct UpperWord {
    static double upper(double x) { return bits_as<double>(bits_as<uint64_t>(x) & 0xffffffff00000000ull); }
    static double flushed(double x) { return std::fabs(x) < 0x1p-1022 ? std::copysign(0.0, x) : x; }
    static double of(double a) {
        const double made = F::of(flushed(upper(a)));
        return made != made ? made : upper(flushed(made));
    }
};

// ---- what its modifiers add ----------------------------------------------------------------------------------------------------------

// The result and the sources as .ftz and .sat want them, and NaNs as on a card.
template <class F, bool FTZ = false, bool SAT = false>
struct Result {
    static float enter(float x) { return FTZ ? flushed(x) : x; }
    static double enter(double x) { return x; }
    static float leave(float x) { return SAT ? saturated(enter(x)) : canonical(enter(x)); }
    static double leave(double x) { return SAT ? saturated(x) : x; }
    template <class... T>
    static auto of(T... values) { return leave(F::of(enter(values)...)); }
};

// neg, abs and copysign change bits, of NaNs too.
template <class F>
struct Flushed {
    template <class... T>
    static auto of(T... values) { return F::of(Result<F, true>::enter(values)...); }
};

// In a format of 16 bits. fma is exact but for its sum, which is rounded to odd first.
template <class Format, class F>
struct InSmall {
    template <class... T>
    static uint16_t of(T... values) { return Format::narrow(F::of(Format::widen(values)...)); }
};
struct MultiplyAddOdd { static double of(double a, double b, double c) { return sum_to_odd(a * b, c); } };

// In both halves of a word.
template <class F>
struct Packed {
    template <class... T>
    static uint32_t of(T... words) {
        return uint32_t(F::of(uint16_t(words >> 16)...)) << 16 | F::of(uint16_t(words)...);
    }
};

struct NegateBits { static uint16_t of(uint16_t a) { return a ^ 0x8000; } };
struct AbsoluteBits { static uint16_t of(uint16_t a) { return a & 0x7fff; } };

// 2^x by its Taylor series around the nearest integer, in double: within 1e-11 of its value before it is rounded. Where 1.5 * 2^52 is added,
// that integer is in the lowest bits, from where it is added to the exponent.
// Simple loops over rows become vector instructions; one loop for all of it does not.
template <bool FTZ>
void power_of_two(Warp& warp, const Instruction& i, uint32_t lanes) {
    using As = Result<void, FTZ>;
    constexpr double SHIFT = 0x1.8p52, LN_2 = 0.693147180559945309417;
    constexpr double terms[] = {1.0 / 40320, 1.0 / 5040, 1.0 / 720, 1.0 / 120, 1.0 / 24, 1.0 / 6, 0.5, 1.0, 1.0};
    const float* a = warp.row<float>(i.a);
    float x[LANES], y[LANES];
    for (int lane = 0; lane < LANES; lane++) {
        const float entered = As::enter(a[lane]), least = entered < -160.0f ? -160.0f : entered;
        x[lane] = least > 160.0f ? 160.0f : least;
    }
    for (int lane = 0; lane < LANES; lane++) {
        const double shifted = x[lane] + SHIFT, t = (x[lane] - (shifted - SHIFT)) * LN_2;
        double sum = 1.0 / 362880;
        for (const double term : terms) sum = sum * t + term;
        y[lane] = float(bits_as<double>(bits_as<uint64_t>(sum) + (bits_as<uint64_t>(shifted) << 52)));
    }
    set_row(warp.row<float>(i.d), lanes, [&](int lane) { return As::leave(x[lane] != x[lane] ? x[lane] : y[lane]); });
}

// ---- decoding ------------------------------------------------------------------------------------------------------------------------

// A row of the same type from 1, 2 or 3 others.
template <class F, class T, int SOURCES>
constexpr Run row_run() {
    if constexpr (SOURCES == 1) return row1<F, T, T>;
    else if constexpr (SOURCES == 2) return row2<F, T, T, T>;
    else return row3<F, T, T, T, T>;
}

template <class F, class T, int SOURCES>
constexpr Run each_run() {
    if constexpr (SOURCES == 1) return each1<F, T, T>;
    else if constexpr (SOURCES == 2) return each2<F, T, T, T>;
    else return each3<F, T, T, T, T>;
}

void sources_of(Decoder& d, Type type, int count) {
    if (count == 1) rows_of(d, type, {type});
    else if (count == 2) rows_of(d, type, {type, type});
    else rows_of(d, type, {type, type, type});
}

// The rounding that the opcode names, or to nearest.
int rounding_of(const Decoder& d) {
    return d.statement.has("rz") ? FE_TOWARDZERO : d.statement.has("rm") ? FE_DOWNWARD : d.statement.has("rp") ? FE_UPWARD : FE_TONEAREST;
}

// An IEEE operation on f32 or f64, with .rn, .rz, .rm, .rp, .ftz and .sat.
template <class F, class T, int SOURCES, bool FTZ, bool SAT>
Run ieee_run(bool to_nearest) {
    constexpr Run run = row_run<Result<F, FTZ, SAT>, T, SOURCES>();
    return to_nearest ? run : rounded<run>;
}

template <class F, int SOURCES>
bool ieee(Decoder& d, Type type) {
    parts_among(d, {"rn", "rz", "rm", "rp", "ftz", "sat"});
    const int rounding = rounding_of(d);
    const bool nearest = rounding == FE_TONEAREST, ftz = d.statement.has("ftz"), sat = d.statement.has("sat");
    sources_of(d, type, SOURCES);
    d.out.size = uint32_t(rounding);
    if (type.bits == 64) {
        if (ftz || sat) d.unknown();
        d.out.run = ieee_run<F, double, SOURCES, false, false>(nearest);
    } else if (ftz) {
        d.out.run = sat ? ieee_run<F, float, SOURCES, true, true>(nearest) : ieee_run<F, float, SOURCES, true, false>(nearest);
    } else {
        d.out.run = sat ? ieee_run<F, float, SOURCES, false, true>(nearest) : ieee_run<F, float, SOURCES, false, false>(nearest);
    }
    return true;
}

// bf16, half, and pairs of them.
template <class F, int SOURCES>
bool small(Decoder& d) {
    const std::string& name = d.statement.parts.back();
    parts_among(d, {"rn", "NaN"});
    const bool pair = name == "bf16x2" || name == "f16x2", is_bf16 = name == "bf16" || name == "bf16x2";
    sources_of(d, {'b', pair ? 32 : 16}, SOURCES);
    using OfBf16 = InSmall<Bf16, F>;
    using OfHalf = InSmall<Half, F>;
    if (pair) d.out.run = is_bf16 ? each_run<Packed<OfBf16>, uint32_t, SOURCES>() : each_run<Packed<OfHalf>, uint32_t, SOURCES>();
    else d.out.run = is_bf16 ? each_run<OfBf16, uint16_t, SOURCES>() : each_run<OfHalf, uint16_t, SOURCES>();
    return true;
}

template <class F>
bool small_bits(Decoder& d) {
    const bool pair = d.statement.parts.back() == "bf16x2" || d.statement.parts.back() == "f16x2";
    parts_among(d, {});
    sources_of(d, {'b', pair ? 32 : 16}, 1);
    d.out.run = pair ? row1<Packed<F>, uint32_t, uint32_t> : row1<F, uint16_t, uint16_t>;
    return true;
}

// An operation on f32 or f64 that rounds nothing: its functions for f32, for f32 with .ftz, and for f64.
bool exact(Decoder& d, Type type, int sources, Run narrow, Run narrow_ftz, Run wide) {
    const bool ftz = d.statement.has("ftz");
    sources_of(d, type, sources);
    if (type.bits == 64 && ftz) d.unknown();
    d.out.run = type.bits == 64 ? wide : ftz ? narrow_ftz : narrow;
    return true;
}

template <class F, int SOURCES>
bool bits_of(Decoder& d, Type type) {
    parts_among(d, {"ftz"});
    return exact(d, type, SOURCES, row_run<F, float, SOURCES>(), row_run<Flushed<F>, float, SOURCES>(), row_run<F, double, SOURCES>());
}

template <class F>
bool choice(Decoder& d, Type type) {
    parts_among(d, {"ftz", "NaN"});
    if (d.statement.has("NaN")) {
        if (type.bits == 64) d.unknown();
        using N = OrNan<F>;
        return exact(d, type, 2, row_run<Result<N>, float, 2>(), row_run<Result<N, true>, float, 2>(), nullptr);
    }
    return exact(d, type, 2, row_run<Result<F>, float, 2>(), row_run<Result<F, true>, float, 2>(), row_run<Result<F>, double, 2>());
}

// An approximation for f32: the functions without and with .ftz, for rows whose lanes become vectors, ...
bool approximation(Decoder& d, Type type, int sources, Run run, Run run_ftz) {
    parts_among(d, {"approx", "full", "ftz"});
    if (type.bits != 32) d.unknown();
    return exact(d, type, sources, run, run_ftz, nullptr);
}

template <class F, int SOURCES>
bool approximation(Decoder& d, Type type) {
    return approximation(d, type, SOURCES, row_run<Result<F>, float, SOURCES>(), row_run<Result<F, true>, float, SOURCES>());
}

// ... and for each lane by itself.
template <class F>
bool approximate(Decoder& d, Type type) {
    return approximation(d, type, 1, each1<Result<F>, float, float>, each1<Result<F, true>, float, float>);
}

template <class F>
bool upper_word(Decoder& d, Type type) {
    parts_among(d, {"approx", "ftz"});
    if (!d.statement.has("ftz")) d.unknown();
    sources_of(d, type, 1);
    d.out.run = row1<UpperWord<F>, double, double>;
    return true;
}

// testp: a predicate that says what kind of number it is.
template <class T>
bool is_normal(T x) {
    return std::fabs(x) >= std::numeric_limits<T>::min() && std::fabs(x) < HUGE_VAL;
}

template <class T, class Holds>
uint32_t tested(Warp& warp, const Instruction& i, Holds holds) {
    const T* a = warp.row<T>(i.a);
    return bits_where([=](int lane) { return holds(a[lane]); });
}

template <class T>
void test(Warp& warp, const Instruction& i, uint32_t lanes) {
    uint32_t bits = 0;
    switch (i.immediate) {
        case 0: bits = tested<T>(warp, i, [](T x) { return std::fabs(x) < HUGE_VAL; }); break;
        case 1: bits = tested<T>(warp, i, [](T x) { return std::fabs(x) == HUGE_VAL; }); break;
        case 2: bits = tested<T>(warp, i, [](T x) { return x == x; }); break;
        case 3: bits = tested<T>(warp, i, [](T x) { return x != x; }); break;
        case 4: bits = tested<T>(warp, i, [](T x) { return is_normal(x); }); break;
        case 5: bits = tested<T>(warp, i, [](T x) { return std::fabs(x) < HUGE_VAL && !is_normal(x) && x != 0; }); break;
    }
    set_bits(warp.bits(i.d), lanes, bits);
}

bool test_property(Decoder& d, Type type) {
    static const char* const properties[] = {"finite", "infinite", "number", "notanumber", "normal", "subnormal"};
    parts_among(d, {"finite", "infinite", "number", "notanumber", "normal", "subnormal"});
    if (d.statement.parts.size() != 3) d.unknown();
    rows_of(d, PREDICATE, {type});
    d.out.immediate = std::find(std::begin(properties), std::end(properties), d.statement.parts[1]) - std::begin(properties);
    d.out.run = type.bits == 64 ? test<double> : test<float>;
    return true;
}

}  // namespace

bool decode_float(Decoder& d) {
    static const char* const opcodes[] = {"add", "sub",  "mul", "fma",      "mad",  "div", "rcp", "sqrt", "rsqrt", "neg",
                                          "abs", "min", "max", "copysign", "testp", "ex2", "lg2", "sin",  "cos",   "tanh"};
    const std::string &opcode = d.statement.parts[0], &last = d.statement.parts.back();
    if (std::find(std::begin(opcodes), std::end(opcodes), opcode) == std::end(opcodes)) return false;
    const auto is = [&](const char* name) { return opcode == name; };
    if (last == "bf16" || last == "bf16x2" || last == "f16" || last == "f16x2") {
        if (is("add")) return small<Add, 2>(d);
        if (is("sub")) return small<Subtract, 2>(d);
        if (is("mul")) return small<Multiply, 2>(d);
        if (is("fma")) return small<MultiplyAddOdd, 3>(d);
        if (is("min")) return d.statement.has("NaN") ? small<OrNan<Least>, 2>(d) : small<Least, 2>(d);
        if (is("max")) return d.statement.has("NaN") ? small<OrNan<Most>, 2>(d) : small<Most, 2>(d);
        if (is("neg")) return small_bits<NegateBits>(d);
        if (is("abs")) return small_bits<AbsoluteBits>(d);
        d.unknown();
    }
    const Type type = d.type();
    if (type.kind != 'f') d.unknown();
    const bool approx = d.statement.has("approx"), full = d.statement.has("full");
    if (is("add")) return ieee<Add, 2>(d, type);
    if (is("sub")) return ieee<Subtract, 2>(d, type);
    if (is("mul")) return ieee<Multiply, 2>(d, type);
    if (is("fma") || is("mad")) return ieee<MultiplyAdd, 3>(d, type);
    if (is("neg")) return bits_of<Negate, 1>(d, type);
    if (is("abs")) return bits_of<Absolute, 1>(d, type);
    if (is("copysign")) return bits_of<CopySign, 2>(d, type);
    if (is("min")) return choice<Least>(d, type);
    if (is("max")) return choice<Most>(d, type);
    if (is("testp")) return test_property(d, type);
    if (is("div") && approx) return approximation<DivideByReciprocal, 2>(d, type);
    if (is("div")) return full ? approximation<Divide, 2>(d, type) : ieee<Divide, 2>(d, type);
    if (is("rcp") && type.bits == 64 && approx) return upper_word<Reciprocal>(d, type);
    if (is("rsqrt") && type.bits == 64) return upper_word<ReciprocalRoot>(d, type);
    if (is("rcp")) return approx ? approximation<Reciprocal, 1>(d, type) : ieee<Reciprocal, 1>(d, type);
    if (is("sqrt")) return approx ? approximation<SquareRoot, 1>(d, type) : ieee<SquareRoot, 1>(d, type);
    if (is("rsqrt")) return approximation<ReciprocalRoot, 1>(d, type);
    if (is("ex2")) return approximation(d, type, 1, power_of_two<false>, power_of_two<true>);
    if (is("lg2")) return approximate<Logarithm>(d, type);
    if (is("sin")) return approximate<Sine>(d, type);
    if (is("cos")) return approximate<Cosine>(d, type);
    return approximate<Tangent>(d, type);
}

}  // namespace ptx
