// Atomic operations: atom, which returns the old value, and red, which does not.
//
// Lanes of a warp go one after the other, from a random one on if the launch has a seed: a card promises no order. Blocks of a kernel that
// has atomics in global memory run one after another (Kernel::global_atomics), so that a seed gives the same order each time.
#include <algorithm>
#include <cstring>

#include "access.h"

namespace ptx {

namespace {

// The new value, of the old one, the operand b, and for cas c.
struct Add { template <class T> static T of(T old, T b, T) { return T(old + b); } };
struct Min { template <class T> static T of(T old, T b, T) { return std::min(old, b); } };
struct Max { template <class T> static T of(T old, T b, T) { return std::max(old, b); } };
struct And { template <class T> static T of(T old, T b, T) { return T(old & b); } };
struct Or { template <class T> static T of(T old, T b, T) { return T(old | b); } };
struct Xor { template <class T> static T of(T old, T b, T) { return T(old ^ b); } };
struct Exchange { template <class T> static T of(T, T b, T) { return b; } };
struct CompareAndSwap { template <class T> static T of(T old, T b, T c) { return old == b ? c : old; } };
struct Increment { template <class T> static T of(T old, T b, T) { return old >= b ? T(0) : T(old + 1); } };
struct Decrement { template <class T> static T of(T old, T b, T) { return old == 0 || old > b ? b : T(old - 1); } };

template <class T, class Operation>
void update(Warp& warp, const Instruction& i, uint32_t lanes) {
    uint8_t* places[LANES];
    find(warp, i, lanes, Access::ATOMIC, places);
    const T *b = warp.row<T>(i.b), *c = warp.row<T>(i.c == NONE ? i.b : i.c);
    T* d = i.d == NONE ? nullptr : warp.row<T>(i.d);
    const uint32_t first = warp.block->launch->seed ? warp.block->random() % LANES : 0;
    T olds[LANES];
    for (uint32_t n = 0; n < LANES; n++) {
        const uint32_t lane = (first + n) % LANES;
        if (!(lanes >> lane & 1)) continue;
        T old;
        memcpy(&old, places[lane], sizeof(T));
        const T result = Operation::of(old, b[lane], c[lane]);
        memcpy(places[lane], &result, sizeof(T));
        olds[lane] = old;
    }
    if (d) for_lanes(lanes, [&](int lane) { d[lane] = olds[lane]; });
}

struct Variant {
    const char *operation, *types;  // the types that PTX has it for
    Instruction::Run run;
};


const Variant variants[] = {
    {"add", "u32 s32", update<uint32_t, Add>},   {"add", "u64", update<uint64_t, Add>},
    {"add", "f32", update<float, Add>},          {"add", "f64", update<double, Add>},
    {"min", "u32", update<uint32_t, Min>},       {"min", "s32", update<int32_t, Min>},
    {"min", "u64", update<uint64_t, Min>},       {"min", "s64", update<int64_t, Min>},
    {"max", "u32", update<uint32_t, Max>},       {"max", "s32", update<int32_t, Max>},
    {"max", "u64", update<uint64_t, Max>},       {"max", "s64", update<int64_t, Max>},
    {"and", "b32", update<uint32_t, And>},       {"and", "b64", update<uint64_t, And>},
    {"or", "b32", update<uint32_t, Or>},         {"or", "b64", update<uint64_t, Or>},
    {"xor", "b32", update<uint32_t, Xor>},       {"xor", "b64", update<uint64_t, Xor>},
    {"exch", "b32", update<uint32_t, Exchange>}, {"exch", "b64", update<uint64_t, Exchange>},
    {"cas", "b16", update<uint16_t, CompareAndSwap>}, {"cas", "b32", update<uint32_t, CompareAndSwap>},
    {"cas", "b64", update<uint64_t, CompareAndSwap>},
    {"inc", "u32", update<uint32_t, Increment>}, {"dec", "u32", update<uint32_t, Decrement>},
};

}  // namespace

bool decode_atomic(Decoder& d) {
    const Statement& s = d.statement;
    const bool returns = s.parts[0] == "atom";
    size_t last = s.parts.size() - 1;
    if (returns == false && s.parts.size() > 1 && s.parts[1] == "async") return false;
    const std::string type_name = s.parts[last];
    const std::string operation = s.parts.at(last - 1);
    const Type type = d.type();
    for (const Variant& variant : variants) {
        if (operation != variant.operation || std::string(variant.types).find(type_name) == std::string::npos) continue;
        d.out.e = 0;
        d.out.size = type.bytes();
        d.out.run = variant.run;
        decode_modifiers(d, last - 1);
        const int first = returns ? 1 : 0;
        const bool compares = operation == "cas";
        if (s.operands.size() != size_t(first) + 2 + compares) d.unknown("it has another number of operands");
        if (returns) d.out.d = d.target(0, type);
        decode_place(d, first, type.bytes());
        d.out.b = d.source(first + 1, type);
        if (compares) d.out.c = d.source(first + 2, type);
        return true;
    }
    d.unknown();
}

}  // namespace ptx
