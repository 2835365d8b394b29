// Copies that run in the background: cp.async in groups of a thread, and cp.async.bulk from shared to global memory; fences.
//
// When a copy begins, its source is checked, and its destination becomes unreadable (SharedMemory::begin_copy). It is carried out when its
// thread waits for its group, not before: what reads without a wait, after a wait for too few groups, or before a barrier, is stopped by the
// memory's checks. A source that is written between the two shows too, as the bytes are read at the wait.
#include "copies.h"

#include <algorithm>
#include <cstring>

#include "access.h"
#include "decode.h"
#include "memory.h"

namespace ptx {

constexpr uint32_t BULK = 16;  // bulk copies are carried out in pieces of so many bytes, which is what their addresses are multiples of

// ---- addresses -----------------------------------------------------------------------------------------------------------------------

uint32_t shared_address(Warp& w, const Instruction& i, int lane) {
    uint64_t address = uint64_t(i.immediate) + (i.size & WIDE_ADDRESS ? w.row<uint64_t>(i.a)[lane] : w.row<uint32_t>(i.a)[lane]);
    if (i.size & GENERIC_ADDRESS) {
        if (!in_shared_window(address)) fail(w, lane, format("address 0x%llx is not in shared memory", (unsigned long long)address));
        address -= SHARED_WINDOW;
    }
    return uint32_t(address);
}

void decode_shared_address(Decoder& d, int operand) {
    bool named = false;
    for (const std::string& part : d.statement.parts) named |= part.rfind("shared", 0) == 0;
    const Address address = d.address(operand);
    d.out.a = address.row;
    d.out.immediate = address.offset;
    d.out.size = (address.wide ? WIDE_ADDRESS : 0) | (named ? 0 : GENERIC_ADDRESS);
}

// The global address of a copy: row `b` and an offset in rows[0].
static uint64_t global_address(Warp& w, const Instruction& i, int lane) {
    return w.row<uint64_t>(i.b)[lane] + uint64_t(int64_t(int32_t(i.rows[0])));
}

static void decode_global_address(Decoder& d, int operand) {
    const Address address = d.address(operand);
    if (!address.wide) d.unknown("global addresses have 64 bits");
    d.out.b = address.row;
    d.out.rows.push_back(uint32_t(int32_t(address.offset)));
}

// ---- cp.async ------------------------------------------------------------------------------------------------------------------------

// i.c: the row with the number of bytes to read, or NONE for all; rows[1]: the number of bytes to write.
static void begin(Warp& w, const Instruction& i, uint32_t lanes) {
    Copies& copies = *w.copies;
    const uint32_t bytes = i.rows[1];
    copies.under_way.emplace_back();
    Copy& copy = copies.under_way.back();
    copy.lanes = lanes;
    copy.bytes = bytes;
    copy.number = copies.issued++;
    copy.at = w.at;
    for_lanes(lanes, [&](int lane) {
        const uint32_t to = shared_address(w, i, lane), read = i.c == NONE ? bytes : w.row<uint32_t>(i.c)[lane];
        const uint64_t from = global_address(w, i, lane);
        if (read > bytes) fail(w, lane, format("copy of %u bytes that is told to read %u", bytes, read));
        if (to % bytes) fail(w, lane, format("misaligned copy: %u bytes to offset %u of shared memory", bytes, to - SHARED_BASE));
        if (from % bytes) fail(w, lane, format("misaligned copy: %u bytes from address 0x%llx", bytes, (unsigned long long)from));
        if (read) __builtin_prefetch(w.block->launch->global->at(w, lane, from, read, Access::READ));
        w.block->shared->begin_copy(w, lane, to, bytes);
        copy.to[lane] = to;
        copy.from[lane] = from;
        copy.read[lane] = uint8_t(read);
        copy.group[lane] = copies.committed[lane];
    });
    w.block->counters.copied_bytes += uint64_t(__builtin_popcount(lanes)) * bytes;
    if (w.block->launch->counts) {
        uint32_t reading = 0;
        for_lanes(lanes, [&](int lane) { reading |= uint32_t(copy.read[lane] != 0) << lane; });
        if (reading) count_global(w.block->counters, reading, copy.from, bytes, false);
        count_shared(w.block->counters, lanes, copy.to, bytes);
    }
}

// Carries out a copy for some of its lanes. Faults are reported at the instruction that began it.
static void carry_out(Warp& w, Copy& copy, uint32_t lanes) {
    const int here = w.at;
    w.at = copy.at;
    for_lanes(lanes, [&](int lane) {
        uint8_t* to = w.block->shared->end_copy(w, lane, copy.to[lane], copy.bytes, Access::WRITE);
        const uint32_t read = copy.read[lane];
        const uint8_t* from = read ? w.block->launch->global->at(w, lane, copy.from[lane], read, Access::READ) : nullptr;
        if (read == 16) {
            memcpy(to, from, 16);
        } else {
            if (read) memcpy(to, from, read);
            memset(to + read, 0, copy.bytes - read);
        }
    });
    copy.lanes &= ~lanes;
    w.at = here;
}

static void drop_finished(Copies& copies) {
    while (!copies.under_way.empty() && !copies.under_way.front().lanes) copies.under_way.pop_front();
}

static void commit(Warp& w, const Instruction&, uint32_t lanes) {
    uint32_t* committed = w.copies->committed;
    set_row(committed, lanes, [&](int lane) { return committed[lane] + 1; });
}

// Until at most `immediate` of the groups committed last are under way.
static void wait_group(Warp& w, const Instruction& i, uint32_t lanes) {
    Copies& copies = *w.copies;
    const uint32_t pending = uint32_t(i.immediate);
    for (Copy& copy : copies.under_way) {
        uint32_t over = 0;
        for (int lane = 0; lane < LANES; lane++) over |= uint32_t(copy.group[lane] + pending < copies.committed[lane]) << lane;
        if (over &= lanes & copy.lanes) carry_out(w, copy, over);
    }
    drop_finished(copies);
}

static void wait_all(Warp& w, const Instruction&, uint32_t lanes) {
    for (Copy& copy : w.copies->under_way) {
        if (const uint32_t over = lanes & copy.lanes) carry_out(w, copy, over);
    }
    drop_finished(*w.copies);
}

void Copies::finish(Warp& w, int lane, uint64_t before) {
    for (Copy& copy : under_way) {
        if (copy.number < before && copy.lanes >> lane & 1) carry_out(w, copy, 1u << lane);
    }
    drop_finished(*this);
}

// ---- cp.async.bulk from shared to global memory ------------------------------------------------------------------------------------------

// i.c: the row with the number of bytes.
static void begin_store(Warp& w, const Instruction& i, uint32_t lanes) {
    for_lanes(lanes, [&](int lane) {
        const uint32_t from = shared_address(w, i, lane), bytes = w.row<uint32_t>(i.c)[lane];
        const uint64_t to = global_address(w, i, lane);
        if (from % BULK || to % BULK || bytes % BULK)
            fail(w, lane, format("misaligned bulk copy: %u bytes from offset %u of shared memory to address 0x%llx; all must be multiples of 16",
                                 bytes, from - SHARED_BASE, (unsigned long long)to));
        for (uint32_t n = 0; n < bytes; n += BULK) w.block->shared->at(w, lane, from + n, BULK, Access::ASYNC_READ);
        w.copies->stores.push_back({lane, from, to, bytes, w.copies->committed_stores[lane], w.at, {}});
    });
}

static void read_source(Warp& w, BulkStore& store) {
    if (!store.held.empty()) return;
    for (uint32_t n = 0; n < store.bytes; n += BULK) {
        const uint8_t* from = w.block->shared->at(w, store.lane, store.from + n, BULK, Access::ASYNC_READ);
        store.held.insert(store.held.end(), from, from + BULK);
    }
}

static void write_target(Warp& w, BulkStore& store) {
    for (uint32_t n = 0; n < store.bytes; n += BULK)
        memcpy(w.block->launch->global->at(w, store.lane, store.to + n, BULK, Access::WRITE), &store.held[n], BULK);
}

static void commit_stores(Warp& w, const Instruction&, uint32_t lanes) {
    for_lanes(lanes, [&](int lane) { w.copies->committed_stores[lane]++; });
}

// READ: only until the sources are read.
template <bool READ>
static void wait_stores(Warp& w, const Instruction& i, uint32_t lanes) {
    auto& stores = w.copies->stores;
    const int here = w.at;
    for (auto store = stores.begin(); store != stores.end();) {
        const bool over = lanes >> store->lane & 1 && store->group + uint32_t(i.immediate) < w.copies->committed_stores[store->lane];
        w.at = store->at;
        if (over) read_source(w, *store);
        if (over && !READ) {
            write_target(w, *store);
            store = stores.erase(store);
        } else {
            ++store;
        }
    }
    w.at = here;
}

// ---- the beginning and the end -------------------------------------------------------------------------------------------------------

void Copies::start() {
    under_way.clear();
    stores.clear();
    std::fill(committed, committed + LANES, 0);
    std::fill(committed_stores, committed_stores + LANES, 0);
    issued = 0;
}

// A thread may end before the copies that arrive at an mbarrier on its behalf: others wait for those.
static uint64_t handed_over(const Warp& w, int lane) {
    uint64_t before = 0;
    for (const auto& barrier : w.block->barriers->at) {
        for (const CopiesArrive& arrival : barrier.second.arrivals) {
            if (arrival.warp == &w && arrival.lane == lane) before = std::max(before, arrival.before);
        }
    }
    return before;
}

void Copies::end(Warp& w, int lane) {
    if (!under_way.empty()) {
        const uint64_t before = handed_over(w, lane);
        for (const Copy& copy : under_way) {
            if (!(copy.lanes >> lane & 1) || copy.number < before) continue;
            const char* why = copy.group[lane] == committed[lane] ? "was not committed" : "is still under way";
            fail(w, lane, format("a copy (cp.async, PTX line %d) %s when its thread ends", w.block->kernel->code[size_t(copy.at)].line, why));
        }
    }
    for (auto store = stores.begin(); store != stores.end();) {
        if (store->lane != lane) {
            ++store;
            continue;
        }
        if (store->held.empty() && store->bytes)
            fail(w, lane, format("a bulk copy (PTX line %d) %s when its thread ends", w.block->kernel->code[size_t(store->at)].line,
                                 store->group == committed_stores[lane] ? "was not committed" : "still reads shared memory"));
        write_target(w, *store);
        store = stores.erase(store);
    }
}

// ---- fences --------------------------------------------------------------------------------------------------------------------------

// The order of a thread's own accesses is that of the program here, and others learn of them by barriers and atomics: a fence adds nothing.
static void fence(Warp&, const Instruction&, uint32_t) {}

static void fence_proxy(Warp& w, const Instruction&, uint32_t lanes) { w.block->shared->fence_proxy(w, lanes); }

static bool decode_fence(Decoder& d) {
    const auto& parts = d.statement.parts;
    d.out.run = fence;
    if (parts[0] == "membar" && parts.size() == 2 && (parts[1] == "cta" || parts[1] == "gl" || parts[1] == "sys")) return true;
    if (d.statement.opcode == "fence.mbarrier_init.release.cluster") return true;
    if (d.statement.has("proxy")) {
        if (parts.size() < 3 || parts[2] != "async") d.unknown("of the proxies, the machine knows async alone");
        if (parts.size() == 3 || parts[3] == "shared::cta" || parts[3] == "shared::cluster") d.out.run = fence_proxy;
        else if (parts[3] != "global") d.unknown();
        return true;
    }
    if (parts[0] == "membar" || parts.size() > 3) d.unknown();
    for (size_t part = 1; part < parts.size(); part++) {
        const std::string& name = parts[part];
        if (name != "sc" && name != "acq_rel" && name != "acquire" && name != "release" && name != "cta" && name != "cluster" && name != "gpu" &&
            name != "sys")
            d.unknown();
    }
    return true;
}

// ---- decoding ------------------------------------------------------------------------------------------------------------------------

static void decode_cp_async(Decoder& d) {
    const Statement& statement = d.statement;
    for (const std::string& part : statement.parts) {
        if (part == "L2::cache_hint") d.unknown("the machine does not know cache policies");
    }
    const int64_t bytes = d.literal(2);
    if (statement.has("cg") ? bytes != 16 : !statement.has("ca") || (bytes != 4 && bytes != 8 && bytes != 16))
        d.unknown("cp.async.cg copies 16 bytes, cp.async.ca 4, 8 or 16");
    if (statement.operands.size() > 4) d.unknown();
    decode_shared_address(d, 0);
    decode_global_address(d, 1);
    d.out.rows.push_back(uint32_t(bytes));
    d.kernel.smallest_shared_write = std::min(d.kernel.smallest_shared_write, uint32_t(bytes));
    if (statement.operands.size() == 4) {
        d.out.c = d.source(3, {'u', 32});
        if (d.kernel.widths.at(d.out.c) != 4) d.unknown("the machine knows a number of bytes to read here");
    }
    d.out.run = begin;
}

static void decode_wait(Decoder& d, Instruction::Run run) {
    d.out.immediate = d.literal(0);
    d.out.run = run;
}

bool decode_copies(Decoder& d) {
    const Statement& statement = d.statement;
    const std::string& opcode = statement.opcode;
    if (statement.parts[0] == "fence" || statement.parts[0] == "membar") return decode_fence(d);
    if (decode_mbarrier(d)) return true;
    if (statement.parts[0] != "cp") return false;
    if (opcode == "cp.async.commit_group") d.out.run = commit;
    else if (opcode == "cp.async.wait_all") d.out.run = wait_all;
    else if (opcode == "cp.async.wait_group") decode_wait(d, wait_group);
    else if (opcode == "cp.async.bulk.commit_group") d.out.run = commit_stores;
    else if (opcode == "cp.async.bulk.wait_group") decode_wait(d, wait_stores<false>);
    else if (opcode == "cp.async.bulk.wait_group.read") decode_wait(d, wait_stores<true>);
    else if (opcode == "cp.async.bulk.global.shared::cta.bulk_group") {
        decode_shared_address(d, 1);
        decode_global_address(d, 0);
        d.out.c = d.source(2, {'u', 32});
        d.out.run = begin_store;
        d.kernel.async_proxy = true;
    } else if (statement.parts.size() >= 5 && (opcode.rfind("cp.async.ca.shared", 0) == 0 || opcode.rfind("cp.async.cg.shared", 0) == 0)) {
        decode_cp_async(d);
    } else {
        d.unknown();
    }
    return true;
}

}  // namespace ptx
