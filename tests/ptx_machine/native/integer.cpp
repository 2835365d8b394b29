// Integers: sums, products, quotients, logic, shifts, and their bits.
//
// They wrap, as PTX says. Two things have values that nobody may use (undefined.h), because C and C++ leave them undefined: a division by
// zero, and a shift by the width of a type or more.
#include <algorithm>
#include <cstring>

#include "rows.h"
#include "undefined.h"

namespace ptx {
namespace {

template <class T>
constexpr uint32_t BITS = sizeof(T) * 8;

// The type of twice the width, and the unsigned one of the same.
template <class T> struct Types;
template <> struct Types<int16_t> { using Wide = int32_t; using Unsigned = uint16_t; };
template <> struct Types<uint16_t> { using Wide = uint32_t; using Unsigned = uint16_t; };
template <> struct Types<int32_t> { using Wide = int64_t; using Unsigned = uint32_t; };
template <> struct Types<uint32_t> { using Wide = uint64_t; using Unsigned = uint32_t; };
template <> struct Types<int64_t> { using Wide = __int128; using Unsigned = uint64_t; };
template <> struct Types<uint64_t> { using Wide = unsigned __int128; using Unsigned = uint64_t; };
template <class T> using Wide = typename Types<T>::Wide;
template <class T> using Unsigned = typename Types<T>::Unsigned;

// ---- what is done to a lane ----------------------------------------------------------------------------------------------------------

// `T` is unsigned where a result may wrap; 1u keeps products of 16 bits from becoming signed ones.
struct Add { template <class T> static T of(T a, T b) { return T(a + b); } };
struct Subtract { template <class T> static T of(T a, T b) { return T(a - b); } };
struct Multiply { template <class T> static T of(T a, T b) { return T(1u * a * b); } };
struct MultiplyAdd { template <class T> static T of(T a, T b, T c) { return T(1u * a * b + c); } };
struct And { template <class T> static T of(T a, T b) { return T(a & b); } };
struct Or { template <class T> static T of(T a, T b) { return T(a | b); } };
struct Xor { template <class T> static T of(T a, T b) { return T(a ^ b); } };
struct Not { template <class T> static T of(T a) { return T(~a); } };
struct IsZero { template <class T> static T of(T a) { return T(a == 0); } };
struct Negate { template <class T> static T of(T a) { return T(0u - a); } };
struct Absolute { template <class T> static T of(T a) { return a < 0 ? Negate::of(Unsigned<T>(a)) : a; } };
struct Least { template <class T> static T of(T a, T b) { return b < a ? b : a; } };
struct Most { template <class T> static T of(T a, T b) { return a < b ? b : a; } };

struct AddSaturated {
    static int32_t of(int32_t a, int32_t b) { return int32_t(std::clamp<int64_t>(int64_t(a) + b, INT32_MIN, INT32_MAX)); }
};
struct SubtractSaturated {
    static int32_t of(int32_t a, int32_t b) { return int32_t(std::clamp<int64_t>(int64_t(a) - b, INT32_MIN, INT32_MAX)); }
};

struct MultiplyWide { template <class T> static Wide<T> of(T a, T b) { return Wide<T>(a) * b; } };
struct MultiplyAddWide {
    template <class T> static Wide<T> of(T a, T b, Wide<T> c) {
        using U = Unsigned<Wide<T>>;
        return Wide<T>(U(Wide<T>(a) * b) + U(c));
    }
};
struct MultiplyHigh { template <class T> static T of(T a, T b) { return T((Wide<T>(a) * b) >> BITS<T>); } };
struct MultiplyHighAdd {
    template <class T> static T of(T a, T b, T c) { return T(Unsigned<T>(MultiplyHigh::of(a, b)) + Unsigned<T>(c)); }
};

struct SumOfDifference {  // sad
    template <class T> static T of(T a, T b, T c) {
        using U = Unsigned<T>;
        return T(U(c) + (a < b ? U(b) - U(a) : U(a) - U(b)));
    }
};

// The least integer by -1 wraps to itself.
struct Divide { template <class T> static T of(T a, T b) { return b == T(-1) && T(-1) < 0 ? T(Negate::of(Unsigned<T>(a))) : T(a / b); } };
struct Remainder { template <class T> static T of(T a, T b) { return b == T(-1) && T(-1) < 0 ? T(0) : T(a % b); } };

struct ShiftLeft { template <class T> static T of(T a, uint32_t count) { return T(1u * a << count); } };
struct ShiftRight { template <class T> static T of(T a, uint32_t count) { return T(a >> count); } };

struct CountOnes { template <class T> static uint32_t of(T a) { return uint32_t(__builtin_popcountll(a)); } };
struct CountLeadingZeros {
    template <class T> static uint32_t of(T a) { return a ? uint32_t(__builtin_clzll(a)) - (64 - BITS<T>) : BITS<T>; }
};
struct ReverseBits {
    template <class T> static T of(T a) {
        constexpr T ones = T(0x5555555555555555), twos = T(0x3333333333333333), fours = T(0x0f0f0f0f0f0f0f0f);
        a = (a >> 1 & ones) | (a & ones) << 1;
        a = (a >> 2 & twos) | (a & twos) << 2;
        a = (a >> 4 & fours) | (a & fours) << 4;
        return sizeof(T) == 8 ? T(__builtin_bswap64(a)) : T(__builtin_bswap32(uint32_t(a)));
    }
};

// The place of the first bit from above that is not the sign, or, with SHIFT, how far it must go to be the first of all.
template <bool SHIFT>
struct FindBit {
    template <class T> static uint32_t of(T a) {
        const Unsigned<T> bits = Unsigned<T>(a < 0 ? ~a : a);
        if (!bits) return ~0u;
        const uint32_t zeros = CountLeadingZeros::of(bits);
        return SHIFT ? zeros : BITS<T> - 1 - zeros;
    }
};

// `length` ones from bit `position` on, of which those beyond the type fall away. Only the lowest byte of either counts.
template <class U>
U field(uint32_t position, uint32_t length) {
    position &= 255, length &= 255;
    const U ones = length >= BITS<U> ? U(~U(0)) : U((U(1) << length) - 1);
    return position >= BITS<U> ? U(0) : U(ones << position);
}

struct ExtractField {
    template <class T> static T of(T a, uint32_t position, uint32_t length) {
        position &= 255, length &= 255;
        using U = Unsigned<T>;
        const uint32_t last = std::min(position + length - 1, BITS<T> - 1);
        const bool sign = T(-1) < 0 && length && U(a) >> last & 1;
        const U kept = field<U>(0, position >= BITS<T> ? 0 : std::min(length, BITS<T> - position));
        const U value = position >= BITS<T> ? U(0) : U(U(a) >> position);
        return T((value & kept) | (sign ? U(~kept) : U(0)));
    }
};

struct PermuteBytes {  // each digit of `choice` names a byte of the two; with 8 added, its sign instead
    static uint32_t of(uint32_t a, uint32_t b, uint32_t choice) {
        const uint64_t both = uint64_t(b) << 32 | a;
        uint32_t made = 0;
        for (int place = 0; place < 4; place++) {
            const uint32_t digit = choice >> 4 * place & 15, byte = uint32_t(both >> 8 * (digit & 7)) & 255;
            made |= (digit & 8 ? (byte & 128 ? 255u : 0u) : byte) << 8 * place;
        }
        return made;
    }
};

template <bool LEFT, bool WRAP>
struct FunnelShift {
    static uint32_t of(uint32_t low, uint32_t high, uint32_t count) {
        const uint64_t both = uint64_t(high) << 32 | low;
        count = WRAP ? count & 31 : std::min(count, 32u);
        return LEFT ? uint32_t((both << count) >> 32) : uint32_t(both >> count);
    }
};

// ---- rows that take more -------------------------------------------------------------------------------------------------------------

template <class F, class T>
void divide(Warp& warp, const Instruction& i, uint32_t lanes) {
    T* to = warp.row<T>(i.d);
    const T *a = warp.row<T>(i.a), *b = warp.row<T>(i.b);
    uint32_t by_zero = 0;
    for_lanes(lanes, [&](int lane) {
        by_zero |= uint32_t(!b[lane]) << lane;
        to[lane] = b[lane] ? F::of(a[lane], b[lane]) : T(~T(0));
    });
    if (by_zero) undefine(warp, i.d, by_zero, "a division by zero");
}

template <class F, class T>
void shift(Warp& warp, const Instruction& i, uint32_t lanes) {
    const T* a = warp.row<T>(i.a);
    const uint32_t* counts = warp.row<uint32_t>(i.b);
    uint32_t above = 0;
    for (int lane = 0; lane < LANES; lane++) above |= counts[lane] & ~(BITS<T> - 1);
    if (above) {
        const uint32_t too_far = lanes & bits_where([=](int lane) { return counts[lane] >= BITS<T>; });
        if (too_far) undefine(warp, i.d, too_far, format("a shift by %u of a value of %u bits", counts[__builtin_ctz(too_far)], BITS<T>));
    }
    set_row(warp.row<T>(i.d), lanes, [=](int lane) { return F::of(a[lane], counts[lane] & (BITS<T> - 1)); });
}

template <class T>
void insert_field(Warp& warp, const Instruction& i, uint32_t lanes) {
    const T *a = warp.row<T>(i.a), *b = warp.row<T>(i.b);
    const uint32_t *position = warp.row<uint32_t>(i.c), *length = warp.row<uint32_t>(i.e);
    set_row(warp.row<T>(i.d), lanes, [=](int lane) {
        const T mask = field<T>(position[lane], length[lane]);
        return T((b[lane] & ~mask) | (T(a[lane] << (position[lane] & (BITS<T> - 1))) & mask));
    });
}

void logic3(Warp& warp, const Instruction& i, uint32_t lanes) {
    const uint32_t *a = warp.row<uint32_t>(i.a), *b = warp.row<uint32_t>(i.b), *c = warp.row<uint32_t>(i.c);
    uint32_t chosen[8];  // bit k of the table: the result where a, b and c have the bits of k, a's first
    for (int k = 0; k < 8; k++) chosen[k] = i.immediate >> k & 1 ? ~0u : 0u;
    set_row(warp.row<uint32_t>(i.d), lanes, [&](int lane) {
        const uint32_t x = a[lane], y = b[lane], z = c[lane];
        const uint32_t without = (~y & ~z & chosen[0]) | (~y & z & chosen[1]) | (y & ~z & chosen[2]) | (y & z & chosen[3]);
        const uint32_t with = (~y & ~z & chosen[4]) | (~y & z & chosen[5]) | (y & ~z & chosen[6]) | (y & z & chosen[7]);
        return (~x & without) | (x & with);
    });
}

// ---- decoding ------------------------------------------------------------------------------------------------------------------------

Type without_sign(Type type) { return {'u', type.bits}; }
Type twice(Type type) { return {type.kind, 2 * type.bits}; }

template <class F>
bool unary(Decoder& d, Type type) {
    rows_of(d, type, {type});
    d.out.run = for_integer(d, type, [](auto t) -> Run { return row1<F, decltype(t), decltype(t)>; });
    return true;
}

template <class F>
bool binary(Decoder& d, Type type) {
    rows_of(d, type, {type, type});
    d.out.run = for_integer(d, type, [](auto t) -> Run { return row2<F, decltype(t), decltype(t), decltype(t)>; });
    return true;
}

template <class F>
bool ternary(Decoder& d, Type type) {
    rows_of(d, type, {type, type, type});
    d.out.run = for_integer(d, type, [](auto t) -> Run { using T = decltype(t); return row3<F, T, T, T, T>; });
    return true;
}

// A count of bits: a value of 32 bits from one of 32 or 64.
template <class F>
bool count(Decoder& d, Type type) {
    rows_of(d, WORD, {type});
    const bool is_signed = type.kind == 's';
    if (type.bits == 32) d.out.run = is_signed ? each1<F, uint32_t, int32_t> : each1<F, uint32_t, uint32_t>;
    else if (type.bits == 64) d.out.run = is_signed ? each1<F, uint32_t, int64_t> : each1<F, uint32_t, uint64_t>;
    else d.unknown();
    return true;
}

// .lo, .hi and .wide; a sum with a third operand if the opcode is mad.
bool product(Decoder& d, Type type) {
    parts_among(d, {"lo", "hi", "wide"});
    const bool adds = d.statement.parts[0] == "mad";
    if (d.statement.parts.size() != 3) d.unknown("it must be .lo, .hi or .wide");
    if (d.statement.has("lo")) return adds ? ternary<MultiplyAdd>(d, without_sign(type)) : binary<Multiply>(d, without_sign(type));
    if (d.statement.has("hi")) return adds ? ternary<MultiplyHighAdd>(d, type) : binary<MultiplyHigh>(d, type);
    if (type.bits == 64) d.unknown();
    adds ? rows_of(d, twice(type), {type, type, twice(type)}) : rows_of(d, twice(type), {type, type});
    const auto choose = [&](auto t) -> Run {
        using T = decltype(t);
        return adds ? Run(row3<MultiplyAddWide, Wide<T>, T, T, Wide<T>>) : Run(row2<MultiplyWide, Wide<T>, T, T>);
    };
    const bool is_signed = type.kind == 's';
    d.out.run = type.bits == 16 ? is_signed ? choose(int16_t()) : choose(uint16_t()) : is_signed ? choose(int32_t()) : choose(uint32_t());
    return true;
}

template <class F>
bool quotient(Decoder& d, Type type) {
    rows_of(d, type, {type, type});
    d.out.run = for_integer(d, type, [](auto t) -> Run { return divide<F, decltype(t)>; });
    return true;
}

template <class F>
bool shifted(Decoder& d, Type type) {
    rows_of(d, type, {type, WORD});
    d.out.run = for_integer(d, type, [](auto t) -> Run { return shift<F, decltype(t)>; });
    return true;
}

bool extract_field(Decoder& d, Type type) {
    rows_of(d, type, {type, WORD, WORD});
    if (type.bits < 32) d.unknown();
    d.out.run = for_integer(d, type, [](auto t) -> Run { using T = decltype(t); return row3<ExtractField, T, T, uint32_t, uint32_t>; });
    return true;
}

bool insert_field(Decoder& d, Type type) {
    rows_of(d, type, {type, type, WORD, WORD});
    if (type.bits < 32) d.unknown();
    d.out.run = type.bits == 32 ? insert_field<uint32_t> : insert_field<uint64_t>;
    return true;
}

bool funnel_shift(Decoder& d) {
    parts_among(d, {"l", "r", "clamp", "wrap"});
    rows_of(d, WORD, {WORD, WORD, WORD});
    const bool left = d.statement.has("l"), wrap = d.statement.has("wrap");
    const auto choose = [](auto f) -> Run { return row3<decltype(f), uint32_t, uint32_t, uint32_t, uint32_t>; };
    if (left) d.out.run = wrap ? choose(FunnelShift<true, true>()) : choose(FunnelShift<true, false>());
    else d.out.run = wrap ? choose(FunnelShift<false, true>()) : choose(FunnelShift<false, false>());
    return true;
}

bool logic3(Decoder& d) {
    operand_count(d, 5);
    d.out.immediate = d.literal(4);
    d.out.a = row_of(d, 1, WORD), d.out.b = row_of(d, 2, WORD), d.out.c = row_of(d, 3, WORD);
    d.out.d = row_of(d, 0, WORD, true);
    d.out.run = logic3;
    return true;
}

}  // namespace

bool decode_integer(Decoder& d) {
    static const char* const opcodes[] = {"add", "sub", "mul", "mad", "div", "rem", "min", "max", "abs", "neg", "sad", "and", "or", "xor",
                                          "not", "cnot", "shl", "shr", "shf", "lop3", "popc", "clz", "bfind", "brev", "bfe", "bfi", "prmt"};
    const std::string& opcode = d.statement.parts[0];
    if (std::find(std::begin(opcodes), std::end(opcodes), opcode) == std::end(opcodes)) return false;
    const std::string& last = d.statement.parts.back();
    if (!strchr("us", last[0]) && last != "b16" && last != "b32" && last != "b64") return false;  // of floats or predicates
    const Type type = d.type();
    const auto is = [&](const char* name) { return opcode == name; };
    if (is("mul") || is("mad")) return product(d, type);
    if (is("shf")) return funnel_shift(d);
    if (is("bfind")) {
        parts_among(d, {"shiftamt"});
        return d.statement.has("shiftamt") ? count<FindBit<true>>(d, type) : count<FindBit<false>>(d, type);
    }
    if ((is("add") || is("sub")) && d.statement.has("sat")) {
        parts_among(d, {"sat"});
        if (type.kind != 's' || type.bits != 32) d.unknown(".sat is for s32 alone");
        rows_of(d, type, {type, type});
        d.out.run = is("add") ? row2<AddSaturated, int32_t, int32_t, int32_t> : row2<SubtractSaturated, int32_t, int32_t, int32_t>;
        return true;
    }
    parts_among(d, {});
    if (is("add")) return binary<Add>(d, without_sign(type));
    if (is("sub")) return binary<Subtract>(d, without_sign(type));
    if (is("div")) return quotient<Divide>(d, type);
    if (is("rem")) return quotient<Remainder>(d, type);
    if (is("min")) return binary<Least>(d, type);
    if (is("max")) return binary<Most>(d, type);
    if (is("abs")) return unary<Absolute>(d, type);
    if (is("neg")) return unary<Negate>(d, without_sign(type));
    if (is("sad")) return ternary<SumOfDifference>(d, type);
    if (is("and")) return binary<And>(d, without_sign(type));
    if (is("or")) return binary<Or>(d, without_sign(type));
    if (is("xor")) return binary<Xor>(d, without_sign(type));
    if (is("not")) return unary<Not>(d, without_sign(type));
    if (is("cnot")) return unary<IsZero>(d, without_sign(type));
    if (is("shl")) return shifted<ShiftLeft>(d, without_sign(type));
    if (is("shr")) return shifted<ShiftRight>(d, type);
    if (is("lop3")) return logic3(d);
    if (is("popc")) return count<CountOnes>(d, without_sign(type));
    if (is("clz")) return count<CountLeadingZeros>(d, without_sign(type));
    if (is("bfe")) return extract_field(d, type);
    if (is("bfi")) return insert_field(d, type);
    if (is("brev")) {
        rows_of(d, type, {type});
        if (type.bits < 32) d.unknown();
        d.out.run = type.bits == 32 ? row1<ReverseBits, uint32_t, uint32_t> : row1<ReverseBits, uint64_t, uint64_t>;
        return true;
    }
    // prmt, whose other modes no compiler makes
    rows_of(d, WORD, {WORD, WORD, WORD});
    d.out.run = row3<PermuteBytes, uint32_t, uint32_t, uint32_t, uint32_t>;
    return true;
}

}  // namespace ptx
