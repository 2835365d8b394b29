// Instructions that compute a row from rows: one function for each operation and type, made from what the operation does to one lane.
//
//     struct Add { template <class T> static T of(T a, T b) { return a + b; } };
//     d.out.run = row2<Add, float, float, float>;      // to[lane] = Add::of(a[lane], b[lane])
#pragma once
#include <initializer_list>

#include "decode.h"
#include "numbers.h"

namespace ptx {

using Run = Instruction::Run;

template <class F, class D, class A>
void row1(Warp& warp, const Instruction& i, uint32_t lanes) {
    const A* a = warp.row<A>(i.a);
    set_row(warp.row<D>(i.d), lanes, [=](int lane) { return D(F::of(a[lane])); });
}

template <class F, class D, class A, class B>
void row2(Warp& warp, const Instruction& i, uint32_t lanes) {
    const A* a = warp.row<A>(i.a);
    const B* b = warp.row<B>(i.b);
    set_row(warp.row<D>(i.d), lanes, [=](int lane) { return D(F::of(a[lane], b[lane])); });
}

template <class F, class D, class A, class B, class C>
void row3(Warp& warp, const Instruction& i, uint32_t lanes) {
    const A* a = warp.row<A>(i.a);
    const B* b = warp.row<B>(i.b);
    const C* c = warp.row<C>(i.c);
    set_row(warp.row<D>(i.d), lanes, [=](int lane) { return D(F::of(a[lane], b[lane], c[lane])); });
}

// The same for what no vector instruction does: only the lanes that take part are computed.
template <class F, class D, class A>
void each1(Warp& warp, const Instruction& i, uint32_t lanes) {
    D* to = warp.row<D>(i.d);
    const A* a = warp.row<A>(i.a);
    for_lanes(lanes, [=](int lane) { to[lane] = D(F::of(a[lane])); });
}

template <class F, class D, class A, class B>
void each2(Warp& warp, const Instruction& i, uint32_t lanes) {
    D* to = warp.row<D>(i.d);
    const A* a = warp.row<A>(i.a);
    const B* b = warp.row<B>(i.b);
    for_lanes(lanes, [=](int lane) { to[lane] = D(F::of(a[lane], b[lane])); });
}

template <class F, class D, class A, class B, class C>
void each3(Warp& warp, const Instruction& i, uint32_t lanes) {
    D* to = warp.row<D>(i.d);
    const A* a = warp.row<A>(i.a);
    const B* b = warp.row<B>(i.b);
    const C* c = warp.row<C>(i.c);
    for_lanes(lanes, [=](int lane) { to[lane] = D(F::of(a[lane], b[lane], c[lane])); });
}

// With a rounding that the instruction names: `size` holds it.
template <Run run>
void rounded(Warp& warp, const Instruction& i, uint32_t lanes) {
    const Rounding rounding(int(i.size));
    run(warp, i, lanes);
}

// Writes the bits of a predicate for the lanes that take part.
inline void set_bits(uint32_t& to, uint32_t lanes, uint32_t bits) { to = (to & ~lanes) | (bits & lanes); }

// A bit for each lane that `holds`, whether it takes part or not.
template <class F>
inline uint32_t bits_where(F holds) {
    uint32_t bits = 0;
    for (int lane = 0; lane < LANES; lane++) bits |= uint32_t(holds(lane)) << lane;
    return bits;
}

// ---- while decoding ------------------------------------------------------------------------------------------------------------------

// Each part of the opcode between its name and its `types` last parts must be one of these: what else stands there is unknown.
inline void parts_among(const Decoder& d, std::initializer_list<const char*> known, size_t types = 1) {
    const std::vector<std::string>& parts = d.statement.parts;
    for (size_t i = 1; i + types < parts.size(); i++) {
        bool found = false;
        for (const char* part : known) found = found || parts[i] == part;
        if (!found) d.unknown(format("the machine does not know '.%s' there", parts[i].c_str()).c_str());
    }
}

inline void operand_count(const Decoder& d, size_t count) {
    if (d.statement.operands.size() != count) d.unknown(format("%zu operands are expected", count).c_str());
}

// The row of a source or target, which must be as wide as its type: a narrower one would be read beyond its end.
inline uint32_t row_of(Decoder& d, int operand, Type type, bool writes = false) {
    const uint32_t row = writes ? d.target(operand, type) : d.source(operand, type);
    const uint32_t width = type.kind == 'p' ? 0 : type.bits == 8 ? 2 : type.bytes();
    if (d.kernel.widths.at(row) != width) {
        const char* text = d.statement.operands[size_t(operand)].c_str();
        d.unknown(format("operand %d, '%s', does not have %d bits", operand + 1, text, type.bits).c_str());
    }
    return row;
}

// Rows of the operands "d, a", "d, a, b", ... with these types.
inline void rows_of(Decoder& d, Type to, std::initializer_list<Type> from) {
    operand_count(d, 1 + from.size());
    uint32_t* const places[] = {&d.out.a, &d.out.b, &d.out.c, &d.out.e};
    int operand = 1;
    for (const Type type : from) {
        *places[operand - 1] = row_of(d, operand, type);
        operand++;
    }
    d.out.d = row_of(d, 0, to, true);
}

constexpr Type PREDICATE{'p', 0}, WORD{'b', 32};

// The function for an integer type: `f` is called with a value of the C++ type.
template <class F>
Run for_integer(const Decoder& d, Type type, F f) {
    const bool is_signed = type.kind == 's';
    switch (type.bits) {
        case 16: return is_signed ? f(int16_t()) : f(uint16_t());
        case 32: return is_signed ? f(int32_t()) : f(uint32_t());
        case 64: return is_signed ? f(int64_t()) : f(uint64_t());
        default: d.unknown();
    }
}

}  // namespace ptx
