// Values from one form into another: cvt between integers and floats of all widths, cvta between spaces of memory, and mov, which also
// takes registers apart and puts them together.
//
// A float becomes an integer by the rounding that the instruction names, and the nearest one that the type has if it is too large. A value
// of 8 bits lies in a register of 16 or more, extended by its sign if it has one.
#include <algorithm>
#include <limits>

#include "rows.h"

namespace ptx {
namespace {

// ---- integers to integers ------------------------------------------------------------------------------------------------------------

// From `S`, read out of a register `R`, to `D`.
template <class D, class S>
struct Cast {
    template <class R> static D of(R value) { return D(S(value)); }
};

// Any widths of registers, and .sat: slower, and rarely used. `immediate` holds a Plan.
struct Plan {
    uint8_t from_bytes, from_register, to_bytes, to_register;
    bool from_signed, to_signed, saturates;
};

template <class T>
T extended(T value, int bytes, bool is_signed) {
    const int above = int(sizeof(T)) - bytes;
    if (!above) return value;
    if (is_signed) return T(int64_t(value << 8 * above) >> 8 * above);
    return value << 8 * above >> 8 * above;
}

void cast_by_plan(Warp& warp, const Instruction& i, uint32_t lanes) {
    Plan plan;
    memcpy(&plan, &i.immediate, sizeof plan);
    const uint8_t* a = warp.row<uint8_t>(i.a);
    uint8_t* to = warp.row<uint8_t>(i.d);
    for_lanes(lanes, [&](int lane) {
        uint64_t bits = 0;
        memcpy(&bits, a + lane * plan.from_register, plan.from_register);
        bits = extended(bits, plan.from_bytes, plan.from_signed);
        if (plan.saturates) {
            using Wide = __int128;
            const Wide value = plan.from_signed ? Wide(int64_t(bits)) : Wide(bits);
            const int width = 8 * plan.to_bytes - plan.to_signed;
            const Wide most = (Wide(1) << width) - 1, least = plan.to_signed ? -most - 1 : 0;
            bits = uint64_t(value < least ? least : value > most ? most : value);
        }
        bits = extended(bits, plan.to_bytes, plan.to_signed);
        memcpy(to + lane * plan.to_register, &bits, plan.to_register);
    });
}

// `f` is called with a value of the integer type.
template <class F>
Run for_any_integer(const Decoder& d, Type type, F f) {
    if (type.bits == 8) return type.kind == 's' ? f(int8_t()) : f(uint8_t());
    return for_integer(d, type, f);
}

// The register that holds a value of that type.
template <class T>
using Register = std::conditional_t<sizeof(T) == 8, uint64_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>>;

bool integer_to_integer(Decoder& d, Type to, Type from) {
    parts_among(d, {"sat"}, 2);
    operand_count(d, 2);
    d.out.a = d.source(1, from), d.out.d = d.target(0, to);
    const uint32_t from_register = d.kernel.widths.at(d.out.a), to_register = d.kernel.widths.at(d.out.d);
    const bool sat = d.statement.has("sat");
    if (from_register < from.bytes() || to_register < to.bytes()) d.unknown("a register is narrower than its type");
    const bool usual = from_register == std::max(from.bytes(), 2u) && to_register == std::max(to.bytes(), 2u);
    if (sat || !usual) {
        const Plan plan{uint8_t(from.bytes()), uint8_t(from_register), uint8_t(to.bytes()), uint8_t(to_register),
                        from.kind == 's',      to.kind == 's',         sat};
        memcpy(&d.out.immediate, &plan, sizeof plan);
        d.out.run = cast_by_plan;
        return true;
    }
    d.out.run = for_any_integer(d, from, [&](auto s) -> Run {
        using S = decltype(s);
        const Type kept = to.bits == 8 ? to : Type{'u', to.bits};
        return for_any_integer(d, kept, [](auto t) -> Run {
            using D = decltype(t);
            return row1<Cast<D, S>, Register<D>, Register<S>>;
        });
    });
    return true;
}

// ---- integers and floats -------------------------------------------------------------------------------------------------------------

// .rn, .rz, .rm, .rp round to a float; .rni, .rzi, .rmi, .rpi to an integer.
int rounding_of(const Decoder& d, const char* suffix) {
    const std::pair<const char*, int> modes[] = {{"rn", FE_TONEAREST}, {"rz", FE_TOWARDZERO}, {"rm", FE_DOWNWARD}, {"rp", FE_UPWARD}};
    for (const auto& [name, mode] : modes) {
        if (d.statement.has((std::string(name) + suffix).c_str())) return mode;
    }
    return -1;
}

bool integer_to_float(Decoder& d, Type to, Type from) {
    parts_among(d, {"rn", "rz", "rm", "rp"}, 2);
    rows_of(d, to, {from});
    const int rounding = rounding_of(d, "");
    if (rounding < 0) d.unknown("it must name a rounding");
    d.out.size = uint32_t(rounding);
    d.out.run = for_any_integer(d, from, [&](auto s) -> Run {
        using S = decltype(s);
        constexpr Run narrow = row1<Cast<float, S>, float, Register<S>>, wide = row1<Cast<double, S>, double, Register<S>>;
        if (rounding == FE_TONEAREST) return to.bits == 64 ? wide : narrow;
        return to.bits == 64 ? Run(rounded<wide>) : Run(rounded<narrow>);
    });
    return true;
}

template <class S>
S to_whole(S x, int mode) {
    switch (mode) {
        case FE_TONEAREST: return std::nearbyint(x);
        case FE_TOWARDZERO: return std::trunc(x);
        case FE_DOWNWARD: return std::floor(x);
        default: return std::ceil(x);
    }
}

// A whole number as an integer. What is no number becomes 0, or, where 64 bits have a part in it, the integer whose first bit alone is set.
template <class D, class S>
D clamped(S whole) {
    constexpr int digits = std::numeric_limits<D>::digits;
    constexpr S above = S(uint64_t(1) << (digits - 1)) * 2;
    constexpr bool any_64 = sizeof(D) == 8 || sizeof(S) == 8;
    if (whole != whole) return any_64 ? D(uint64_t(1) << (8 * sizeof(D) - 1)) : D(0);
    if (whole >= above) return std::numeric_limits<D>::max();
    if (whole < S(std::numeric_limits<D>::min())) return std::numeric_limits<D>::min();
    return D(whole);
}

template <class D, class S>
void float_to_integer(Warp& warp, const Instruction& i, uint32_t lanes) {
    const S* a = warp.row<S>(i.a);
    Register<D>* to = warp.row<Register<D>>(i.d);
    const bool ftz = i.immediate;
    const int mode = int(i.size);
    for_lanes(lanes, [=](int lane) {
        S x = a[lane];
        if constexpr (sizeof(S) == 4) {
            if (ftz) x = flushed(x);
        }
        to[lane] = Register<D>(clamped<D>(to_whole(x, mode)));
    });
}

bool float_to_integer(Decoder& d, Type to, Type from) {
    parts_among(d, {"rni", "rzi", "rmi", "rpi", "ftz", "sat"}, 2);
    rows_of(d, to, {from});
    const int rounding = rounding_of(d, "i");
    if (rounding < 0) d.unknown("it must name a rounding to an integer");
    d.out.size = uint32_t(rounding);
    d.out.immediate = d.statement.has("ftz");
    d.out.run = for_any_integer(d, to, [&](auto t) -> Run {
        using D = decltype(t);
        return from.bits == 64 ? Run(float_to_integer<D, double>) : Run(float_to_integer<D, float>);
    });
    return true;
}

// ---- floats to floats ----------------------------------------------------------------------------------------------------------------

template <int MODE>
struct Whole {
    template <class T> static T of(T a) { return MODE < 0 ? a : to_whole(a, MODE); }
};

template <class F, class D, class S, bool FTZ, bool SAT>
struct Converted {
    static float flush(float x) { return FTZ ? flushed(x) : x; }
    static double flush(double x) { return x; }
    static D of(S a) {
        const D made = flush(D(F::of(flush(a))));
        return SAT ? saturated(made) : canonical(made);
    }
};

template <class F, class D, class S>
Run float_run(bool ftz, bool sat) {
    if (ftz) return sat ? row1<Converted<F, D, S, true, true>, D, S> : row1<Converted<F, D, S, true, false>, D, S>;
    return sat ? row1<Converted<F, D, S, false, true>, D, S> : row1<Converted<F, D, S, false, false>, D, S>;
}

template <class T>
Run whole_run(int rounding, bool ftz, bool sat) {
    switch (rounding) {
        case FE_TONEAREST: return float_run<Whole<FE_TONEAREST>, T, T>(ftz, sat);
        case FE_TOWARDZERO: return float_run<Whole<FE_TOWARDZERO>, T, T>(ftz, sat);
        case FE_DOWNWARD: return float_run<Whole<FE_DOWNWARD>, T, T>(ftz, sat);
        case FE_UPWARD: return float_run<Whole<FE_UPWARD>, T, T>(ftz, sat);
        default: return float_run<Whole<-1>, T, T>(ftz, sat);
    }
}

void narrow_rounded(Warp& warp, const Instruction& i, uint32_t lanes) {
    const Rounding rounding(int(i.size));
    float_run<Whole<-1>, float, double>(i.immediate & 1, i.immediate & 2)(warp, i, lanes);
}

bool float_to_float(Decoder& d, Type to, Type from) {
    const bool ftz = d.statement.has("ftz"), sat = d.statement.has("sat");
    if (to.bits == from.bits) {
        parts_among(d, {"rni", "rzi", "rmi", "rpi", "ftz", "sat"}, 2);
        const int rounding = rounding_of(d, "i");
        d.out.run = to.bits == 64 ? whole_run<double>(rounding, false, sat) : whole_run<float>(rounding, ftz, sat);
    } else if (to.bits == 64) {
        parts_among(d, {"ftz", "sat"}, 2);
        d.out.run = float_run<Whole<-1>, double, float>(ftz, sat);
    } else {
        parts_among(d, {"rn", "rz", "rm", "rp", "ftz", "sat"}, 2);
        const int rounding = rounding_of(d, "");
        if (rounding < 0) d.unknown("it must name a rounding");
        d.out.size = uint32_t(rounding);
        d.out.immediate = ftz | sat << 1;
        d.out.run = rounding == FE_TONEAREST ? float_run<Whole<-1>, float, double>(ftz, sat) : narrow_rounded;
    }
    rows_of(d, to, {from});
    return true;
}

// ---- mov -----------------------------------------------------------------------------------------------------------------------------

template <class T>
void move(Warp& warp, const Instruction& i, uint32_t lanes) {
    const T* a = warp.row<T>(i.a);
    set_row(warp.row<T>(i.d), lanes, [=](int lane) { return a[lane]; });
}

// mov.b64 {%r1, %r2}, %rd1: the first part is the lowest.
template <class Whole, class Part>
void take_apart(Warp& warp, const Instruction& i, uint32_t lanes) {
    const Whole* a = warp.row<Whole>(i.a);
    for (size_t part = 0; part < i.rows.size(); part++) {
        const uint32_t down = uint32_t(8 * sizeof(Part) * part);
        set_row(warp.row<Part>(i.rows[part]), lanes, [=](int lane) { return Part(a[lane] >> down); });
    }
}

template <class Whole, class Part>
void put_together(Warp& warp, const Instruction& i, uint32_t lanes) {
    constexpr size_t parts = sizeof(Whole) / sizeof(Part);
    const Part* from[parts];
    for (size_t part = 0; part < parts; part++) from[part] = warp.row<Part>(i.rows[part]);
    set_row(warp.row<Whole>(i.d), lanes, [&](int lane) {
        Whole value = 0;
        for (size_t part = 0; part < parts; part++) value |= Whole(from[part][lane]) << 8 * sizeof(Part) * part;
        return value;
    });
}

template <template <class, class> class Make>
Run parts_run(const Decoder& d, int whole, size_t parts) {
    if (whole == 32 && parts == 2) return Make<uint32_t, uint16_t>::run;
    if (whole == 64 && parts == 2) return Make<uint64_t, uint32_t>::run;
    if (whole == 64 && parts == 4) return Make<uint64_t, uint16_t>::run;
    d.unknown("it cannot be divided so");
}

template <class Whole, class Part> struct Apart { static constexpr Run run = take_apart<Whole, Part>; };
template <class Whole, class Part> struct Together { static constexpr Run run = put_together<Whole, Part>; };

bool decode_move(Decoder& d) {
    const Type type = d.type();
    parts_among(d, {});
    operand_count(d, 2);
    const std::string &to = d.statement.operands[0], &from = d.statement.operands[1];
    const auto part_type = [&](const std::string& parts) {
        return Type{'b', type.bits / int(1 + std::count(parts.begin(), parts.end(), ','))};
    };
    if (to[0] == '{') {
        d.out.a = row_of(d, 1, type);
        d.out.rows = d.targets(0, part_type(to));
        d.out.run = parts_run<Apart>(d, type.bits, d.out.rows.size());
    } else if (from[0] == '{') {
        d.out.rows = d.sources(1, part_type(from));
        d.out.d = row_of(d, 0, type, true);
        d.out.run = parts_run<Together>(d, type.bits, d.out.rows.size());
    } else {
        d.out.a = d.source(1, type);
        d.out.d = row_of(d, 0, type, true);
        // An address may be asked for in 32 bits, and a special register in 64.
        const uint32_t width = d.kernel.widths.at(d.out.a);
        if (width == type.bytes()) d.out.run = type.bits == 64 ? move<uint64_t> : type.bits == 32 ? move<uint32_t> : move<uint16_t>;
        else if (width == 8 && type.bits == 32) d.out.run = row1<Cast<uint32_t, uint64_t>, uint32_t, uint64_t>;
        else if (width == 4 && type.bits == 64) d.out.run = row1<Cast<uint64_t, uint32_t>, uint64_t, uint32_t>;
        else d.unknown("its registers have different widths");
    }
    const uint32_t part = d.out.rows.empty() ? 0 : part_type(to[0] == '{' ? to : from).bytes();
    for (const uint32_t row : d.out.rows) {
        if (d.kernel.widths.at(row) != part) d.unknown("a part has not its share of the bits");
    }
    return true;
}

// ---- cvta ----------------------------------------------------------------------------------------------------------------------------

void shared_to_generic(Warp& warp, const Instruction& i, uint32_t lanes) {
    const uint64_t* a = warp.row<uint64_t>(i.a);
    set_row(warp.row<uint64_t>(i.d), lanes, [=](int lane) { return a[lane] + SHARED_WINDOW; });
}

void generic_to_shared(Warp& warp, const Instruction& i, uint32_t lanes) {
    const uint64_t* a = warp.row<uint64_t>(i.a);
    uint64_t* to = warp.row<uint64_t>(i.d);
    for_lanes(lanes, [&](int lane) {
        if (a[lane] && !in_shared_window(a[lane])) {
            fail(warp, lane, format("the address %#llx is not in shared memory", (unsigned long long)a[lane]));
        }
        to[lane] = a[lane] ? a[lane] - SHARED_WINDOW : 0;
    });
}

// cvta.space: to a generic address; cvta.to.space: from one. Those of global memory are the same in both.
bool decode_address(Decoder& d) {
    parts_among(d, {"to", "global", "shared", "shared::cta", "const"});
    const Type type = d.type();
    if (type.bits != 64) d.unknown();
    rows_of(d, type, {type});
    const bool shared = d.statement.has("shared") || d.statement.has("shared::cta");
    d.out.run = !shared ? move<uint64_t> : d.statement.has("to") ? generic_to_shared : shared_to_generic;
    return true;
}

}  // namespace

bool decode_convert(Decoder& d) {
    const std::vector<std::string>& parts = d.statement.parts;
    if (parts[0] == "mov") return parts.back() != "pred" && decode_move(d);
    if (parts[0] == "cvta") return decode_address(d);
    if (parts[0] != "cvt") return false;  // of floats of 16 bits: small_floats.cpp
    const Type to = d.type(1), from = d.type();
    const auto is_integer = [](Type type) { return type.kind == 'u' || type.kind == 's'; };
    if (is_integer(to)) return is_integer(from) ? integer_to_integer(d, to, from) : float_to_integer(d, to, from);
    return is_integer(from) ? integer_to_float(d, to, from) : float_to_float(d, to, from);
}

}  // namespace ptx
