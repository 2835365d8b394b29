// cvt to and from the floats of 16 bits: bf16, half, and pairs of them; and to tf32, which has 19 bits in a register of 32.
//
// Everything is rounded once, from a double that has the source's value: a half or a float has it exactly, and an integer of 64 bits is
// rounded to odd. bf16 from float, which every kernel in bf16 does all the time, has functions of its own that work on whole rows.
#include <algorithm>
#include <limits>

#include "rows.h"

namespace ptx {
namespace {

constexpr int64_t RELU = 1, SATFINITE = 2, SAT = 4, FTZ = 8;  // options, in `immediate`

// The row that a value of 16 bits or fewer lies in.
struct Bf16Bits { uint16_t bits; };
struct HalfBits { uint16_t bits; };

inline double value_of(Bf16Bits x, int64_t) { return Bf16::widen(x.bits); }
inline double value_of(HalfBits x, int64_t) { return Half::widen(x.bits); }
inline double value_of(float x, int64_t options) { return options & FTZ ? flushed(x) : x; }
inline double value_of(double x, int64_t) { return x; }
inline double value_of(uint64_t x, int64_t) { return sum_to_odd(double(x >> 32) * 0x1p32, double(uint32_t(x))); }
inline double value_of(int64_t x, int64_t) { return sum_to_odd(double(x >> 32) * 0x1p32, double(uint32_t(x))); }
template <class T>
inline double value_of(T x, int64_t) { return double(x); }

template <class Format>
uint16_t narrowed(double x, const Instruction& i) {
    if (i.immediate & RELU && x < 0) x = 0.0;
    if (i.immediate & SAT) return Format::narrow(saturated(x), int(i.size));
    const uint16_t bits = Format::narrow(x, int(i.size));
    if (i.immediate & SATFINITE && (bits & 0x7fff) == Format::INFINITE) return bits - 1;
    return i.immediate & RELU && bits == 0x8000 ? 0 : bits;
}

template <class Format, class S>
void narrow(Warp& warp, const Instruction& i, uint32_t lanes) {
    const S* a = warp.row<S>(i.a);
    uint16_t* to = warp.row<uint16_t>(i.d);
    for_lanes(lanes, [&](int lane) { to[lane] = narrowed<Format>(value_of(a[lane], i.immediate), i); });
}

// The first source becomes the upper half.
template <class Format>
void narrow_pair(Warp& warp, const Instruction& i, uint32_t lanes) {
    const float *a = warp.row<float>(i.a), *b = warp.row<float>(i.b);
    uint32_t* to = warp.row<uint32_t>(i.d);
    for_lanes(lanes, [&](int lane) {
        const uint32_t high = narrowed<Format>(value_of(a[lane], i.immediate), i), low = narrowed<Format>(value_of(b[lane], i.immediate), i);
        to[lane] = high << 16 | low;
    });
}

struct ToBf16 { static uint16_t of(float a) { return bf16_of_float(a); } };
struct ToBf16Pair {
    static uint32_t of(float high, float low) { return uint32_t(bf16_of_float(high)) << 16 | bf16_of_float(low); }
};

template <class Format, class D>
struct Widen {
    static D of(uint16_t bits) { return canonical(D(Format::widen(bits))); }
};
struct WidenBf16 { static float of(uint16_t bits) { return canonical(float_of_bf16(bits)); } };

// To the nearest number with 10 bits after the point, and away from zero in the middle.
struct ToTf32 {
    static uint32_t of(float a) { return a != a ? FLOAT_NAN : (bits_as<uint32_t>(a) + 0x1000) & ~0x1fffu; }
};

template <class Format>
Run narrow_run(const Decoder& d, Type from, const std::string& name) {
    if (name == "bf16") return narrow<Format, Bf16Bits>;
    if (name == "f16") return narrow<Format, HalfBits>;
    if (from.kind == 'f') return from.bits == 64 ? narrow<Format, double> : narrow<Format, float>;
    return for_integer(d, from, [](auto s) -> Run { return narrow<Format, decltype(s)>; });
}

bool to_small(Decoder& d, const std::string& to, const std::string& from) {
    parts_among(d, {"rn", "rz", "rm", "rp", "relu", "satfinite", "sat", "ftz"}, 2);
    const auto has = [&](const char* part) { return d.statement.has(part); };
    const bool pair = to == "bf16x2" || to == "f16x2", is_bf16 = to == "bf16" || to == "bf16x2";
    if (!has("rn") && !has("rz") && !has("rm") && !has("rp")) d.unknown("it must name a rounding");
    d.out.size = uint32_t(has("rz") ? FE_TOWARDZERO : has("rm") ? FE_DOWNWARD : has("rp") ? FE_UPWARD : FE_TONEAREST);
    d.out.immediate = (has("relu") ? RELU : 0) | (has("satfinite") ? SATFINITE : 0) | (has("sat") ? SAT : 0) | (has("ftz") ? FTZ : 0);
    const bool usual = is_bf16 && has("rn") && !d.out.immediate && from == "f32";
    if (pair) {
        if (from != "f32") d.unknown();
        rows_of(d, WORD, {type_of(from), type_of(from)});
        d.out.run = usual ? row2<ToBf16Pair, uint32_t, float, float> : is_bf16 ? narrow_pair<Bf16> : narrow_pair<Half>;
        return true;
    }
    rows_of(d, {'b', 16}, {type_of(from)});
    if (usual) d.out.run = row1<ToBf16, uint16_t, float>;
    else d.out.run = is_bf16 ? narrow_run<Bf16>(d, type_of(from), from) : narrow_run<Half>(d, type_of(from), from);
    return true;
}

bool from_small(Decoder& d, const std::string& to, const std::string& from) {
    parts_among(d, {}, 2);
    const Type type = type_of(to);
    if (type.kind != 'f' || type.bits < 32) d.unknown();
    rows_of(d, type, {Type{'b', 16}});
    const bool is_bf16 = from == "bf16";
    if (type.bits == 64) d.out.run = is_bf16 ? each1<Widen<Bf16, double>, double, uint16_t> : each1<Widen<Half, double>, double, uint16_t>;
    else d.out.run = is_bf16 ? row1<WidenBf16, float, uint16_t> : each1<Widen<Half, float>, float, uint16_t>;
    return true;
}

}  // namespace

bool decode_small_floats(Decoder& d) {
    const std::vector<std::string>& parts = d.statement.parts;
    if (parts[0] != "cvt" || parts.size() < 3) return false;
    const std::string &to = parts[parts.size() - 2], &from = parts.back();
    const auto is_small = [](const std::string& name) { return name == "bf16" || name == "f16" || name == "bf16x2" || name == "f16x2"; };
    if (is_small(to)) return to_small(d, to, from);
    if (is_small(from)) return from_small(d, to, from);
    if (to != "tf32") return false;
    if (parts.size() != 4 || parts[1] != "rna" || from != "f32") d.unknown();
    rows_of(d, WORD, {type_of(from)});
    d.out.run = row1<ToTf32, uint32_t, float>;
    return true;
}

}  // namespace ptx
