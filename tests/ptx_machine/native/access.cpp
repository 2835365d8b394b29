// Loads and stores: ld, st, atom and red, in global, shared, generic, constant and parameter space.
//
// An instruction first finds the places of its lanes (`find`), which checks them; then it moves values between those places and rows of
// registers. When all lanes access one piece of memory after the other, as good kernels do, both are loops over consecutive memory.
// Weak, volatile, relaxed and ordered accesses are all plain ones here: what orders a kernel's accesses for the checks are its barriers.
#include "access.h"

#include <algorithm>
#include <cstring>
#include <set>

#include "decode.h"

namespace ptx {

// ---- places --------------------------------------------------------------------------------------------------------------------------

static uint8_t* find_shared(Warp& warp, uint32_t lanes, const uint64_t* addresses, uint32_t size, Access access, uint8_t** places) {
    uint32_t narrow[LANES];
    uint64_t high = 0;
    for (int lane = 0; lane < LANES; lane++) {
        narrow[lane] = uint32_t(addresses[lane]);
        high |= lanes >> lane & 1 ? addresses[lane] >> 32 : 0;
    }
    if (high) {
        for_lanes(lanes, [&](int lane) {
            if (addresses[lane] >> 32) fail(warp, lane, format("0x%llx is not an address of shared memory", static_cast<unsigned long long>(addresses[lane])));
        });
    }
    if (__builtin_expect(warp.block->launch->counts, 0)) count_shared(warp.block->counters, lanes, narrow, size);
    return warp.block->shared->at_lanes(warp, lanes, narrow, size, access, places);
}

static uint8_t* find_global(Warp& warp, const Instruction& i, uint32_t lanes, const uint64_t* addresses, Access access, uint8_t** places) {
    if (__builtin_expect(warp.block->launch->counts, 0)) count_global(warp.block->counters, lanes, addresses, i.size, access != Access::READ);
    return warp.block->launch->global->at_lanes(warp, lanes, addresses, i.size, access, places, i.e & NEVER_WRITTEN);
}

uint8_t* find(Warp& warp, const Instruction& i, uint32_t lanes, Access access, uint8_t** places) {
    uint64_t addresses[LANES];
    const uint64_t *wide = warp.row<uint64_t>(i.a), offset = uint64_t(i.immediate);
    const uint32_t* narrow = warp.row<uint32_t>(i.a);
    if (i.e & WIDE) {
        for (int lane = 0; lane < LANES; lane++) addresses[lane] = wide[lane] + offset;
    } else {
        for (int lane = 0; lane < LANES; lane++) addresses[lane] = narrow[lane] + uint32_t(offset);
    }
    if (i.e & IN_SHARED) return find_shared(warp, lanes, addresses, i.size, access, places);
    if (i.e & IN_GLOBAL) return find_global(warp, i, lanes, addresses, access, places);
    uint32_t shared = 0;  // generic addresses say which memory
    for (int lane = 0; lane < LANES; lane++) {
        if (!in_shared_window(addresses[lane]) || !(lanes >> lane & 1)) continue;
        shared |= 1u << lane;
        addresses[lane] -= SHARED_WINDOW;
    }
    if (!shared) return find_global(warp, i, lanes, addresses, access, places);
    const uint32_t global = lanes & ~shared;
    if (!global) return find_shared(warp, shared, addresses, i.size, access, places);
    uint8_t* others[LANES];
    find_shared(warp, shared, addresses, i.size, access, places);
    find_global(warp, i, global, addresses, access, others);
    for_lanes(global, [&](int lane) { places[lane] = others[lane]; });
    return nullptr;
}

// ---- loads and stores ----------------------------------------------------------------------------------------------------------------

template <class T>
static T get(const uint8_t* from) {
    T value;
    memcpy(&value, from, sizeof(T));
    return value;
}

template <class T>
static void put(uint8_t* to, T value) {
    memcpy(to, &value, sizeof(T));
}

// N values for each lane, one lane's after the other's. T: as in memory; R: in a register, which may be wider.
template <class T, class R, size_t N>
static void load_run(Warp& warp, const Instruction& i, const uint8_t* run) {
    R* rows[N];
    for (size_t n = 0; n < N; n++) rows[n] = warp.row<R>(i.rows[n]);
    for (size_t n = 0; n < N; n++) {
#pragma GCC ivdep
        for (size_t lane = 0; lane < LANES; lane++) rows[n][lane] = R(get<T>(run + (lane * N + n) * sizeof(T)));
    }
}

template <class T, class R, size_t N>
static void store_run(Warp& warp, const Instruction& i, uint8_t* run) {
    const R* rows[N];
    for (size_t n = 0; n < N; n++) rows[n] = warp.row<R>(i.rows[n]);
#pragma GCC ivdep
    for (size_t lane = 0; lane < LANES; lane++) {
        for (size_t n = 0; n < N; n++) put(run + (lane * N + n) * sizeof(T), T(rows[n][lane]));
    }
}

template <class T, class R>
static void load(Warp& warp, const Instruction& i, uint32_t lanes) {
    uint8_t* places[LANES];
    if (const uint8_t* run = find(warp, i, lanes, Access::READ, places)) {
        switch (i.rows.size()) {
            case 1: return load_run<T, R, 1>(warp, i, run);
            case 2: return load_run<T, R, 2>(warp, i, run);
            case 4: return load_run<T, R, 4>(warp, i, run);
        }
    }
    for (size_t n = 0; n < i.rows.size(); n++) {
        R* to = warp.row<R>(i.rows[n]);
        for_lanes(lanes, [&](int lane) { to[lane] = R(get<T>(places[lane] + n * sizeof(T))); });
    }
}

template <class T, class R>
static void store(Warp& warp, const Instruction& i, uint32_t lanes) {
    uint8_t* places[LANES];
    if (uint8_t* run = find(warp, i, lanes, Access::WRITE, places)) {
        switch (i.rows.size()) {
            case 1: return store_run<T, R, 1>(warp, i, run);
            case 2: return store_run<T, R, 2>(warp, i, run);
            case 4: return store_run<T, R, 4>(warp, i, run);
        }
    }
    for (size_t n = 0; n < i.rows.size(); n++) {
        const R* from = warp.row<R>(i.rows[n]);
        for_lanes(lanes, [&](int lane) { put(places[lane] + n * sizeof(T), T(from[lane])); });
    }
}

// Parameters lie in rows: all lanes have the same value. `size`: bytes from one lane's to the next.
template <class T, class R>
static void load_parameter(Warp& warp, const Instruction& i, uint32_t lanes) {
    const uint8_t* from = warp.row<uint8_t>(i.a) + i.immediate;
    for (size_t n = 0; n < i.rows.size(); n++, from += sizeof(T)) {
        R* to = warp.row<R>(i.rows[n]);
        for_lanes(lanes, [&](int lane) { to[lane] = R(get<T>(from + size_t(lane) * i.size)); });
    }
}

// ---- decoding ------------------------------------------------------------------------------------------------------------------------

// Calls `f` with a value of the type in memory and one of the register's: as wide, or wider, and then a load extends.
template <class F>
static bool with_types(Type memory, uint32_t width, F f) {
    const bool is_signed = memory.kind == 's';
    switch (memory.bits * 16 + int(width)) {
        case 8 * 16 + 2: return is_signed ? f(int8_t(), int16_t()) : f(uint8_t(), uint16_t());
        case 8 * 16 + 4: return is_signed ? f(int8_t(), int32_t()) : f(uint8_t(), uint32_t());
        case 8 * 16 + 8: return is_signed ? f(int8_t(), int64_t()) : f(uint8_t(), uint64_t());
        case 16 * 16 + 2: return f(uint16_t(), uint16_t());
        case 16 * 16 + 4: return is_signed ? f(int16_t(), int32_t()) : f(uint16_t(), uint32_t());
        case 16 * 16 + 8: return is_signed ? f(int16_t(), int64_t()) : f(uint16_t(), uint64_t());
        case 32 * 16 + 4: return f(uint32_t(), uint32_t());
        case 32 * 16 + 8: return is_signed ? f(int32_t(), int64_t()) : f(uint32_t(), uint64_t());
        case 64 * 16 + 8: return f(uint64_t(), uint64_t());
        default: return false;
    }
}

// The space, and what is not a modifier that changes nothing here.
void decode_modifiers(Decoder& d, size_t last) {
    static const std::set<std::string> changes_nothing = {
        "weak", "volatile", "relaxed", "acquire", "release", "acq_rel", "cta", "gpu", "sys", "cluster", "ca", "cg", "cs", "lu", "cv", "wb",
        "wt", "L1::evict_normal", "L1::evict_unchanged", "L1::evict_first", "L1::evict_last", "L1::no_allocate", "L2::64B", "L2::128B",
        "L2::256B",
    };
    for (size_t n = 1; n < last; n++) {
        const std::string& part = d.statement.parts[n];
        if (part == "local") d.unknown("the machine has no local memory: the kernel keeps an array there, or spills registers to it");
        if (part == "shared" || part == "shared::cta") d.out.e |= IN_SHARED;
        else if (part == "global" || part == "const") d.out.e |= IN_GLOBAL;
        else if (part == "nc") d.out.e |= NEVER_WRITTEN;
        else if (!changes_nothing.count(part)) d.unknown(("the machine does not know ." + part + " of it").c_str());
    }
}

// The operand that has the address; `writes`: bytes that each lane writes there.
void decode_place(Decoder& d, int operand, uint32_t writes) {
    const Address address = d.address(operand);
    d.out.a = address.row;
    d.out.immediate = address.offset;
    if (address.wide) d.out.e |= WIDE;
    if (!writes) return;
    uint32_t &shared = d.kernel.smallest_shared_write, &global = d.kernel.smallest_global_write;
    if (!(d.out.e & IN_GLOBAL)) shared = std::min(shared, writes);
    if (!(d.out.e & IN_SHARED)) global = std::min(global, writes);
}

static void decode_parameter(Decoder& d) {
    const std::string& operand = d.statement.operands.at(1);
    const size_t plus = operand.find('+');
    const std::string name = operand.substr(1, std::min(plus, operand.size() - 1) - 1);
    const uint32_t bytes = d.type().bytes() * uint32_t(d.out.rows.size());
    for (const Parameter& parameter : d.kernel.parameters) {
        if (parameter.name != name) continue;
        d.out.immediate = plus == std::string::npos ? 0 : std::stoll(operand.substr(plus + 1));
        if (d.out.immediate < 0 || uint64_t(d.out.immediate) + bytes > parameter.size) d.unknown("it reads beyond the parameter");
        d.out.a = parameter.row;
        d.out.reads.push_back(parameter.row);
        d.out.size = d.kernel.widths.at(parameter.row);
        return;
    }
    d.unknown("the kernel has no such parameter");
}

bool decode_memory(Decoder& d) {
    const std::string& name = d.statement.parts[0];
    if (name == "atom" || name == "red") return decode_atomic(d);
    const bool loads = name == "ld" || name == "ldu", stores = name == "st";
    if (!loads && !stores) return false;
    size_t last = d.statement.parts.size() - 1;  // the type; before it, the length of a vector
    const Type type = d.type();
    const std::string vector = last > 1 ? d.statement.parts[last - 1] : "";
    const size_t count = vector == "v2" ? 2 : vector == "v4" ? 4 : 1;
    if (count > 1) last--;
    if (d.statement.operands.size() != 2) d.unknown("it has two operands");
    d.out.e = 0;
    d.out.size = type.bytes() * uint32_t(count);
    if (d.out.size > 16) d.unknown("an access has at most 16 bytes");
    d.out.rows = loads ? d.targets(0, type) : d.sources(1, type);
    if (d.out.rows.size() != count) d.unknown("the vector has another length");
    const uint32_t width = d.kernel.widths.at(d.out.rows[0]);
    for (const uint32_t row : d.out.rows) {
        if (d.kernel.widths.at(row) != width) d.unknown("its registers have several widths");
    }
    const bool parameter = loads && d.statement.parts.at(1) == "param";
    if (parameter) {
        decode_parameter(d);
    } else {
        decode_modifiers(d, last);
        decode_place(d, loads ? 1 : 0, stores ? d.out.size : 0);
    }
    const bool known = with_types(type, width, [&](auto memory, auto in_register) {
        using T = decltype(memory);
        using R = decltype(in_register);
        d.out.run = parameter ? load_parameter<T, R> : loads ? load<T, R> : store<T, R>;
        return true;
    });
    if (!known) d.unknown("the register is narrower than the type");
    return true;
}

}  // namespace ptx
