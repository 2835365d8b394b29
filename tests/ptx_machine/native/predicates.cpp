// Comparisons and predicates: setp and set, selp and slct, logic of predicates, and isspacep.
//
// A predicate is a mask, one bit per lane. A comparison makes the mask of all lanes at once, and those that do not take part keep their
// bits.
#include <algorithm>

#include "rows.h"

namespace ptx {
namespace {

// ---- comparisons ---------------------------------------------------------------------------------------------------------------------

struct Equal { template <class T> static bool of(T a, T b) { return a == b; } };
struct Less { template <class T> static bool of(T a, T b) { return a < b; } };
struct LessOrEqual { template <class T> static bool of(T a, T b) { return a <= b; } };
struct Ordered { template <class T> static bool of(T a, T b) { return a == a && b == b; } };
// The other way round, and with the operands exchanged. Of floats, what is not less is greater, equal, or compared with a NaN (.geu).
template <class F> struct Not { template <class T> static bool of(T a, T b) { return !F::of(a, b); } };
template <class F> struct Swap { template <class T> static bool of(T a, T b) { return F::of(b, a); } };
struct NotEqual { template <class T> static bool of(T a, T b) { return Ordered::of(a, b) && a != b; } };
template <class F> struct Ftz { static bool of(float a, float b) { return F::of(flushed(a), flushed(b)); } };

// The mask of all lanes.
using Compare = uint32_t (*)(Warp&, const Instruction&);

template <class F, class T>
uint32_t compare(Warp& warp, const Instruction& i) {
    const T *a = warp.row<T>(i.a), *b = warp.row<T>(i.b);
    return bits_where([=](int lane) { return F::of(a[lane], b[lane]); });
}

// setp d, a, b
template <Compare compare>
void set_predicate(Warp& warp, const Instruction& i, uint32_t lanes) {
    set_bits(warp.bits(i.d), lanes, compare(warp, i));
}

// What follows a comparison: setp p|q, a, b, {!}c makes two predicates, and combines both with a third (`set` makes one number).
enum Combiner : int64_t { NOTHING, AND, OR, XOR, OPERATION = 3, NEGATED = 4 };

uint32_t combined(Warp& warp, const Instruction& i, uint32_t bits) {
    if ((i.immediate & OPERATION) == NOTHING) return bits;
    const uint32_t other = i.immediate & NEGATED ? ~warp.bits(i.c) : warp.bits(i.c);
    return (i.immediate & OPERATION) == AND ? bits & other : (i.immediate & OPERATION) == OR ? bits | other : bits ^ other;
}

template <Compare compare>
void set_two_predicates(Warp& warp, const Instruction& i, uint32_t lanes) {
    const uint32_t bits = compare(warp, i), first = combined(warp, i, bits), second = combined(warp, i, ~bits);
    set_bits(warp.bits(i.d), lanes, first);
    if (i.e != NONE) set_bits(warp.bits(i.e), lanes, second);
}

template <Compare compare>
void set_number(Warp& warp, const Instruction& i, uint32_t lanes) {
    const uint32_t bits = combined(warp, i, compare(warp, i)), yes = i.size;
    set_row(warp.row<uint32_t>(i.d), lanes, [=](int lane) { return bits >> lane & 1 ? yes : 0u; });
}

struct Runs {
    Run plain, two, number;
};

template <class F, class T>
constexpr Runs RUNS{set_predicate<compare<F, T>>, set_two_predicates<compare<F, T>>, set_number<compare<F, T>>};

template <class T>
Runs integer_comparison(const Decoder& d, const std::string& how) {
    if (how == "eq") return RUNS<Equal, T>;
    if (how == "ne") return RUNS<Not<Equal>, T>;
    if (how == "lt" || how == "lo") return RUNS<Less, T>;
    if (how == "le" || how == "ls") return RUNS<LessOrEqual, T>;
    if (how == "gt" || how == "hi") return RUNS<Swap<Less>, T>;
    if (how == "ge" || how == "hs") return RUNS<Swap<LessOrEqual>, T>;
    d.unknown();
}

template <class F, class T>
Runs maybe_ftz(const Decoder& d) {
    if constexpr (sizeof(T) == 4) {
        if (d.statement.has("ftz")) return RUNS<Ftz<F>, T>;
    }
    return RUNS<F, T>;
}

template <class T>
Runs float_comparison(const Decoder& d, const std::string& how) {
    if (how == "eq") return maybe_ftz<Equal, T>(d);
    if (how == "ne") return maybe_ftz<NotEqual, T>(d);
    if (how == "lt") return maybe_ftz<Less, T>(d);
    if (how == "le") return maybe_ftz<LessOrEqual, T>(d);
    if (how == "gt") return maybe_ftz<Swap<Less>, T>(d);
    if (how == "ge") return maybe_ftz<Swap<LessOrEqual>, T>(d);
    if (how == "equ") return maybe_ftz<Not<NotEqual>, T>(d);
    if (how == "neu") return maybe_ftz<Not<Equal>, T>(d);
    if (how == "ltu") return maybe_ftz<Not<Swap<LessOrEqual>>, T>(d);
    if (how == "leu") return maybe_ftz<Not<Swap<Less>>, T>(d);
    if (how == "gtu") return maybe_ftz<Not<LessOrEqual>, T>(d);
    if (how == "geu") return maybe_ftz<Not<Less>, T>(d);
    if (how == "num") return maybe_ftz<Ordered, T>(d);
    if (how == "nan") return maybe_ftz<Not<Ordered>, T>(d);
    d.unknown();
}

Runs comparison(const Decoder& d, Type type, const std::string& how) {
    if (type.kind == 'f' && type.bits >= 32) return type.bits == 64 ? float_comparison<double>(d, how) : float_comparison<float>(d, how);
    if (type.kind == 'b' && how != "eq" && how != "ne") d.unknown("bits are equal or not, and have no order");
    if (type.kind == 's' && how.size() == 2 && (how == "lo" || how == "ls" || how == "hi" || how == "hs")) d.unknown();
    const bool is_signed = type.kind == 's';
    switch (type.kind == 'f' || type.kind == 'h' ? 0 : type.bits) {
        case 16: return is_signed ? integer_comparison<int16_t>(d, how) : integer_comparison<uint16_t>(d, how);
        case 32: return is_signed ? integer_comparison<int32_t>(d, how) : integer_comparison<uint32_t>(d, how);
        case 64: return is_signed ? integer_comparison<int64_t>(d, how) : integer_comparison<uint64_t>(d, how);
        default: d.unknown();
    }
}

// setp.how{.and}{.ftz}.type p{|q}, a, b{, {!}c}      set.how{.and}{.ftz}.to.type d, a, b{, {!}c}
bool decode_comparison(Decoder& d) {
    const std::vector<std::string>& parts = d.statement.parts;
    const bool number = parts[0] == "set";
    const size_t types = number ? 2 : 1;
    if (parts.size() < 2 + types) d.unknown();
    const Type type = d.type();
    const Runs runs = comparison(d, type, parts[1]);
    parts_among(d, {parts[1].c_str(), "and", "or", "xor", "ftz"}, types);
    if (d.statement.has("ftz") && (type.kind != 'f' || type.bits != 32)) d.unknown();
    const int64_t combiner = d.statement.has("and") ? AND : d.statement.has("or") ? OR : d.statement.has("xor") ? XOR : NOTHING;
    operand_count(d, combiner ? 4 : 3);
    d.out.a = row_of(d, 1, type), d.out.b = row_of(d, 2, type);
    d.out.immediate = combiner;
    if (combiner) {
        std::string other = d.statement.operands[3];
        if (other[0] == '!') d.out.immediate |= NEGATED, other = other.substr(1);
        d.out.c = d.source(other, PREDICATE);
    }
    if (number) {
        const Type to = d.type(1);
        if (to.bits != 32 || to.kind == 'b') d.unknown();
        d.out.size = to.kind == 'f' ? bits_as<uint32_t>(1.0f) : ~0u;
        d.out.d = row_of(d, 0, to, true);
        d.out.run = runs.number;
        return true;
    }
    const std::string& targets = d.statement.operands[0];
    const size_t bar = targets.find('|');
    const auto trimmed = [](const std::string& text) {
        const size_t from = text.find_first_not_of(" \t");
        return text.substr(from, text.find_last_not_of(" \t") - from + 1);
    };
    d.out.d = d.target(trimmed(targets.substr(0, bar)), PREDICATE);
    if (bar != std::string::npos) d.out.e = d.target(trimmed(targets.substr(bar + 1)), PREDICATE);
    d.out.run = bar != std::string::npos || combiner ? runs.two : runs.plain;
    return true;
}

// ---- choices -------------------------------------------------------------------------------------------------------------------------

template <class T>
void choose_by_predicate(Warp& warp, const Instruction& i, uint32_t lanes) {
    const T *a = warp.row<T>(i.a), *b = warp.row<T>(i.b);
    const uint32_t bits = warp.bits(i.c);
    set_row(warp.row<T>(i.d), lanes, [=](int lane) { return bits >> lane & 1 ? a[lane] : b[lane]; });
}

// With .ftz a negative denormal is -0, which is not less than 0.
template <class T, class C, bool FTZ>
void choose_by_sign(Warp& warp, const Instruction& i, uint32_t lanes) {
    const T *a = warp.row<T>(i.a), *b = warp.row<T>(i.b);
    const C* c = warp.row<C>(i.c);
    set_row(warp.row<T>(i.d), lanes, [=](int lane) { return (FTZ ? C(flushed(float(c[lane]))) : c[lane]) >= 0 ? a[lane] : b[lane]; });
}

template <class F>
Run for_bits(const Decoder& d, Type type, F f) {
    switch (type.bits) {
        case 16: return f(uint16_t());
        case 32: return f(uint32_t());
        case 64: return f(uint64_t());
        default: d.unknown();
    }
}

bool decode_choice(Decoder& d) {
    if (d.statement.parts[0] == "selp") {
        const Type type = d.type();
        parts_among(d, {});
        rows_of(d, type, {type, type, PREDICATE});
        d.out.run = for_bits(d, type, [](auto t) -> Run { return choose_by_predicate<decltype(t)>; });
        return true;
    }
    const Type type = d.type(1), by = d.type();
    parts_among(d, {"ftz"}, 2);
    const bool ftz = d.statement.has("ftz");
    if (by.bits != 32 || (by.kind != 's' && by.kind != 'f')) d.unknown();
    rows_of(d, type, {type, type, by});
    const bool is_float = by.kind == 'f';
    if (ftz && !is_float) d.unknown();
    d.out.run = for_bits(d, type, [=](auto t) -> Run {
        using T = decltype(t);
        return !is_float ? choose_by_sign<T, int32_t, false> : ftz ? choose_by_sign<T, float, true> : choose_by_sign<T, float, false>;
    });
    return true;
}

// ---- logic ---------------------------------------------------------------------------------------------------------------------------

void and_predicates(Warp& w, const Instruction& i, uint32_t lanes) { set_bits(w.bits(i.d), lanes, w.bits(i.a) & w.bits(i.b)); }
void or_predicates(Warp& w, const Instruction& i, uint32_t lanes) { set_bits(w.bits(i.d), lanes, w.bits(i.a) | w.bits(i.b)); }
void xor_predicates(Warp& w, const Instruction& i, uint32_t lanes) { set_bits(w.bits(i.d), lanes, w.bits(i.a) ^ w.bits(i.b)); }
void not_predicate(Warp& w, const Instruction& i, uint32_t lanes) { set_bits(w.bits(i.d), lanes, ~w.bits(i.a)); }
void move_predicate(Warp& w, const Instruction& i, uint32_t lanes) { set_bits(w.bits(i.d), lanes, w.bits(i.a)); }

bool decode_logic(Decoder& d) {
    const std::string& opcode = d.statement.parts[0];
    parts_among(d, {});
    if (opcode == "not" || opcode == "mov") {
        rows_of(d, PREDICATE, {PREDICATE});
        d.out.run = opcode == "not" ? not_predicate : move_predicate;
    } else {
        rows_of(d, PREDICATE, {PREDICATE, PREDICATE});
        d.out.run = opcode == "and" ? and_predicates : opcode == "or" ? or_predicates : xor_predicates;
    }
    return true;
}

// isspacep: is it a generic address of that space?
template <bool SHARED>
void in_space(Warp& warp, const Instruction& i, uint32_t lanes) {
    const uint64_t* a = warp.row<uint64_t>(i.a);
    set_bits(warp.bits(i.d), lanes, bits_where([=](int lane) { return in_shared_window(a[lane]) == SHARED; }));
}

bool decode_space(Decoder& d) {
    if (d.statement.parts.size() != 2) d.unknown();
    const std::string& space = d.statement.parts[1];
    const bool shared = space == "shared" || space == "shared::cta";
    if (!shared && space != "global") d.unknown();
    rows_of(d, PREDICATE, {Type{'b', 64}});
    d.out.run = shared ? in_space<true> : in_space<false>;
    return true;
}

}  // namespace

bool decode_predicates(Decoder& d) {
    const std::string& opcode = d.statement.parts[0];
    if (opcode == "setp" || opcode == "set") return decode_comparison(d);
    if (opcode == "selp" || opcode == "slct") return decode_choice(d);
    if (opcode == "isspacep") return decode_space(d);
    const bool logic = opcode == "and" || opcode == "or" || opcode == "xor" || opcode == "not" || opcode == "mov";
    return logic && d.statement.parts.back() == "pred" && decode_logic(d);
}

}  // namespace ptx
