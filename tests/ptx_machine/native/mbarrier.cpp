// mbarrier: barriers in shared memory with phases, and the copies that arrive at one (cp.async.mbarrier.arrive, cp.async.bulk).
//
// A phase is over when `count` arrivals came and the copies have brought as many bytes as were announced. Then the next one begins at once.
// Copies are carried out when somebody waits for the phase and nothing but them is missing. What a thread did before it arrived is
// over for those that see the phase's end: vector clocks carry that (machine.h).
// The 8 bytes of the object hold a mark of ours, so that an ordinary write to them is seen at the next use.
#include <algorithm>
#include <cstring>

#include "copies.h"
#include "decode.h"
#include "memory.h"

namespace ptx {

constexpr char MARK[] = "mbarrier";
constexpr uint32_t OBJECT = 8, MOST = (1u << 20) - 1;  // bytes of an mbarrier; most arrivals, or bytes, of a phase
constexpr uint32_t PIECE = 16;                         // bytes: what a bulk copy's addresses are multiples of

static unsigned offset_of(uint32_t address) { return address - SHARED_BASE; }

// The barrier that a lane names, whole and in its place.
static Barrier& barrier_at(Warp& w, int lane, uint32_t address) {
    if (address % OBJECT) fail(w, lane, format("misaligned mbarrier: offset %u of shared memory is no multiple of 8", offset_of(address)));
    auto& all = w.block->barriers->at;
    const auto found = all.find(address);
    if (found == all.end())
        fail(w, lane, format("no mbarrier was initialised at offset %u of shared memory", offset_of(address)));
    const Barrier& barrier = found->second;
    const bool own = barrier.first_warp == w.number && barrier.first_lane == lane;
    if (!own && w.clock.seen[barrier.first_warp] < barrier.first_moment)
        fail(w, lane, format("thread %d initialised the mbarrier at offset %u of shared memory, and no barrier has come between",
                             barrier.first_warp * LANES + barrier.first_lane, offset_of(address)));
    if (memcmp(&w.block->shared->bytes[offset_of(address)], MARK, OBJECT))
        fail(w, lane, format("the mbarrier at offset %u of shared memory was overwritten", offset_of(address)));
    return found->second;
}

static Barrier& named(Warp& w, const Instruction& i, int lane) { return barrier_at(w, lane, shared_address(w, i, lane)); }

// ---- phases --------------------------------------------------------------------------------------------------------------------------

static void join(uint32_t* to, const uint32_t* from) {
    for (int warp = 0; warp < LANES; warp++) to[warp] = std::max(to[warp], from[warp]);
}

// What this warp did, and what it knows to be over, comes before the end of the phase. Warp::tick must follow.
static void release(const Warp& w, Barrier& barrier) {
    join(barrier.next, w.clock.seen);
    barrier.next[w.number] = std::max(barrier.next[w.number], w.clock.now);
}

static void end_if_complete(Warp& w, int lane, Barrier& barrier) {
    if (barrier.pending) return;
    if (barrier.bytes < 0)
        fail(w, lane, format("copies brought %lld bytes more to an mbarrier than its phase was told to expect", (long long)-barrier.bytes));
    if (barrier.bytes) return;
    barrier.phase++;
    barrier.pending = barrier.count;
    std::copy(barrier.next, barrier.next + LANES, barrier.seen);
}

static void arrive(Warp& w, int lane, Barrier& barrier, uint32_t arrivals) {
    if (!arrivals) fail(w, lane, "an arrival at an mbarrier that counts as none");
    const uint32_t missing = barrier.pending - uint32_t(barrier.arrivals.size());  // the others are taken by copies
    if (arrivals > missing)
        fail(w, lane, format("mbarrier overrun: %u arrive, and %u of its %u are missing in this phase", arrivals, missing, barrier.count));
    release(w, barrier);
    barrier.pending -= arrivals;
    end_if_complete(w, lane, barrier);
}

static void expect(Warp& w, int lane, Barrier& barrier, uint32_t bytes) {
    if (bytes > MOST || barrier.bytes + bytes > MOST)
        fail(w, lane, format("an mbarrier is told to expect %lld bytes; a phase has at most %u", (long long)(barrier.bytes + bytes), MOST));
    barrier.bytes += bytes;
}

static void carry_out(const BulkLoad& load) {
    Warp& w = *load.warp;
    for (uint32_t n = 0; n < load.bytes; n += PIECE) {
        const uint8_t* from = w.block->launch->global->at(w, load.lane, load.from + n, PIECE, Access::READ);
        memcpy(w.block->shared->end_copy(w, load.lane, load.to + n, PIECE, Access::ASYNC_WRITE), from, PIECE);
    }
}

// Somebody waits: if copies alone are missing, they come now, each reported where it began.
static void bring(Barrier& barrier) {
    if (barrier.pending != barrier.arrivals.size() || (barrier.arrivals.empty() && barrier.loads.empty())) return;
    const auto loads = std::move(barrier.loads);
    const auto arrivals = std::move(barrier.arrivals);
    barrier.loads.clear();
    barrier.arrivals.clear();
    for (const BulkLoad& load : loads) {
        const int here = load.warp->at;
        load.warp->at = load.at;
        carry_out(load);
        release(*load.warp, barrier);
        load.warp->tick();
        barrier.bytes -= load.bytes;
        if (&load == &loads.back()) end_if_complete(*load.warp, load.lane, barrier);
        load.warp->at = here;
    }
    for (const CopiesArrive& arrival : arrivals) {
        const int here = arrival.warp->at;
        arrival.warp->at = arrival.at;
        arrival.warp->copies->finish(*arrival.warp, arrival.lane, arrival.before);
        arrive(*arrival.warp, arrival.lane, barrier, 1);
        arrival.warp->tick();
        arrival.warp->at = here;
    }
}

// ---- instructions --------------------------------------------------------------------------------------------------------------------

static void initialise(Warp& w, const Instruction& i, uint32_t lanes) {
    for_lanes(lanes, [&](int lane) {
        const uint32_t address = shared_address(w, i, lane), count = w.row<uint32_t>(i.b)[lane];
        if (address % OBJECT) fail(w, lane, format("misaligned mbarrier: offset %u of shared memory is no multiple of 8", offset_of(address)));
        if (!count || count > MOST) fail(w, lane, format("an mbarrier for %u arrivals; it may have 1 to %u", count, MOST));
        uint8_t* bytes = w.block->shared->at(w, lane, address, OBJECT, Access::WRITE);
        auto& all = w.block->barriers->at;
        if (all.count(address))
            fail(w, lane, format("the mbarrier at offset %u of shared memory is in use; mbarrier.inval must come before it is initialised again",
                                 offset_of(address)));
        memcpy(bytes, MARK, OBJECT);
        Barrier& barrier = all[address];
        barrier.count = barrier.pending = count;
        barrier.first_warp = w.number;
        barrier.first_lane = lane;
        barrier.first_moment = w.clock.now;
    });
}

static void invalidate(Warp& w, const Instruction& i, uint32_t lanes) {
    for_lanes(lanes, [&](int lane) {
        const Barrier& barrier = named(w, i, lane);
        const uint32_t address = shared_address(w, i, lane);
        if (barrier.pending != barrier.count || barrier.bytes || !barrier.loads.empty() || !barrier.arrivals.empty())
            fail(w, lane, format("the mbarrier at offset %u of shared memory is in the middle of a phase", offset_of(address)));
        memset(w.block->shared->at(w, lane, address, OBJECT, Access::WRITE), 0, OBJECT);
        w.block->barriers->at.erase(address);
    });
}

// What an arrival returns: the number of its phase, one more so that 0 is none.
static void write_state(Warp& w, const Instruction& i, int lane, uint64_t phase) {
    if (i.d != NONE) w.row<uint64_t>(i.d)[lane] = phase + 1;
}

enum class Arrive { PLAIN, NO_COMPLETE, EXPECT };

// i.b: the row with the count, or the bytes to expect; NONE: one arrival.
template <Arrive KIND>
static void arrive_at(Warp& w, const Instruction& i, uint32_t lanes) {
    for_lanes(lanes, [&](int lane) {
        Barrier& barrier = named(w, i, lane);
        const uint32_t operand = i.b == NONE ? 1 : w.row<uint32_t>(i.b)[lane];
        write_state(w, i, lane, barrier.phase);
        if (KIND == Arrive::NO_COMPLETE && operand >= barrier.pending)
            fail(w, lane, format("mbarrier.arrive.noComplete of %u completes the phase, in which %u arrivals are missing", operand, barrier.pending));
        if (KIND == Arrive::EXPECT) expect(w, lane, barrier, operand);
        arrive(w, lane, barrier, KIND == Arrive::EXPECT ? 1 : operand);
    });
    w.tick();
}

static void expect_bytes(Warp& w, const Instruction& i, uint32_t lanes) {
    for_lanes(lanes, [&](int lane) { expect(w, lane, named(w, i, lane), w.row<uint32_t>(i.b)[lane]); });
}

// PARITY: of the phase that is waited for, in i.b; otherwise what an arrival returned.
template <bool PARITY>
static void wait(Warp& w, const Instruction& i, uint32_t lanes) {
    uint32_t done = 0;
    for_lanes(lanes, [&](int lane) {
        Barrier& barrier = named(w, i, lane);
        uint64_t wanted;  // the phase that must be over
        if (PARITY) {
            const uint32_t parity = w.row<uint32_t>(i.b)[lane];
            if (parity > 1) fail(w, lane, format("a phase of parity %u; it is 0 or 1", parity));
            wanted = (barrier.phase & 1) == parity ? barrier.phase : barrier.phase - 1;
        } else {
            wanted = w.row<uint64_t>(i.b)[lane] - 1;
            if (wanted != barrier.phase && wanted + 1 != barrier.phase)
                fail(w, lane, "an mbarrier's state that is neither of its phase nor of the one before");
        }
        if (wanted == barrier.phase) bring(barrier);
        if (wanted == barrier.phase) return;
        done |= 1u << lane;
        const uint32_t mine = w.clock.seen[w.number];
        join(w.clock.seen, barrier.seen);
        w.clock.seen[w.number] = mine;
    });
    uint32_t& result = w.bits(i.d);
    result = (result & ~lanes) | done;
    w.waits |= done != lanes;
}

// COUNTED: it is one of the barrier's arrivals (.noinc); otherwise it adds itself to those of this phase.
template <bool COUNTED>
static void arrive_with_copies(Warp& w, const Instruction& i, uint32_t lanes) {
    for_lanes(lanes, [&](int lane) {
        Barrier& barrier = named(w, i, lane);
        if (!COUNTED) barrier.pending++;
        if (barrier.arrivals.size() >= barrier.pending)
            fail(w, lane, format("mbarrier overrun: copies arrive, and all %u arrivals of this phase are taken", barrier.count));
        barrier.arrivals.push_back({&w, lane, w.copies->issued, w.at});
    });
}

// [a] in shared memory <- i.c bytes from [rows[0]] in global memory, with the mbarrier [rows[2]]; offsets in rows[1], rows[3].
static void begin_load(Warp& w, const Instruction& i, uint32_t lanes) {
    for_lanes(lanes, [&](int lane) {
        const uint32_t to = shared_address(w, i, lane), bytes = w.row<uint32_t>(i.c)[lane];
        const uint64_t from = w.row<uint64_t>(i.rows[0])[lane] + uint64_t(int64_t(int32_t(i.rows[1])));
        const uint32_t at = uint32_t(i.size & WIDE_ADDRESS ? w.row<uint64_t>(i.rows[2])[lane] : w.row<uint32_t>(i.rows[2])[lane]) + i.rows[3];
        if (to % PIECE || from % PIECE || bytes % PIECE)
            fail(w, lane, format("misaligned bulk copy: %u bytes from address 0x%llx to offset %u of shared memory; all must be multiples of 16",
                                 bytes, (unsigned long long)from, offset_of(to)));
        Barrier& barrier = barrier_at(w, lane, at);
        for (uint32_t n = 0; n < bytes; n += PIECE) {
            w.block->launch->global->at(w, lane, from + n, PIECE, Access::READ);
            w.block->shared->begin_copy(w, lane, to + n, PIECE);
        }
        barrier.loads.push_back({&w, lane, to, from, bytes, w.at});
        w.block->counters.copied_bytes += bytes;
    });
}

// ---- the beginning and the end -------------------------------------------------------------------------------------------------------

void Barriers::start() { at.clear(); }

void Barriers::end(Warp& w) {
    for (auto& place : at) {
        Barrier& barrier = place.second;
        if (!barrier.loads.empty())
            fail(w, -1, format("a bulk copy (PTX line %d) was not waited for when its block ends",
                                 w.block->kernel->code[size_t(barrier.loads[0].at)].line));
        if (barrier.bytes)
            fail(w, -1, format("the mbarrier at offset %u of shared memory expects %lld bytes more when its block ends", offset_of(place.first),
                                 (long long)barrier.bytes));
        bring(barrier);
    }
}

std::string Barriers::missing() const {
    std::string text;
    for (const auto& place : at) {
        const Barrier& barrier = place.second;
        if (barrier.pending == barrier.count && !barrier.bytes) continue;
        text += format("%sthe mbarrier at offset %u of shared memory, in phase %llu, misses %u of %u arrivals", text.empty() ? "" : "; ",
                       offset_of(place.first), (unsigned long long)barrier.phase, barrier.pending, barrier.count);
        if (barrier.bytes) text += format(" and %lld bytes that it was told to expect", (long long)barrier.bytes);
    }
    return text.empty() ? "no mbarrier is in the middle of a phase: perhaps a wait names the wrong parity" : text;
}

// ---- decoding ------------------------------------------------------------------------------------------------------------------------

static void decode_load(Decoder& d) {
    const Statement& statement = d.statement;
    const std::string start = "cp.async.bulk.", end = ".global.mbarrier::complete_tx::bytes";
    if (statement.opcode != start + "shared::cluster" + end && statement.opcode != start + "shared::cta" + end)
        d.unknown("the machine knows neither tensors, nor multicast, nor cache policies");
    if (statement.operands.size() != 4) d.unknown();
    const Address from = d.address(1), barrier = d.address(3);
    decode_shared_address(d, 0);
    d.out.c = d.source(2, {'u', 32});
    if (!from.wide) d.unknown("global addresses have 64 bits");
    if (barrier.wide != ((d.out.size & WIDE_ADDRESS) != 0)) d.unknown("the destination and the mbarrier are addressed in different widths");
    d.out.rows = {from.row, uint32_t(int32_t(from.offset)), barrier.row, uint32_t(int32_t(barrier.offset))};
    d.out.run = begin_load;
    d.kernel.async_proxy = true;
}

static void decode_arrival(Decoder& d) {
    const Statement& statement = d.statement;
    decode_shared_address(d, 1);
    if (statement.operands[0] != "_") d.out.d = d.target(0, {'b', 64});
    if (statement.operands.size() > 2) d.out.b = d.source(2, {'u', 32});
    d.out.run = statement.has("expect_tx") ? arrive_at<Arrive::EXPECT>
                : statement.has("noComplete") ? arrive_at<Arrive::NO_COMPLETE>
                                              : arrive_at<Arrive::PLAIN>;
    if (d.out.b == NONE && (statement.has("expect_tx") || statement.has("noComplete"))) d.unknown("an operand is missing");
}

// Refuses what is not among the qualifiers of an mbarrier instruction.
static void check_qualifiers(Decoder& d) {
    static const char* const KNOWN[] = {"shared", "shared::cta", "b64",    "release",   "acquire",   "relaxed",
                                        "cta",    "cluster",     "parity", "expect_tx", "noComplete"};
    for (size_t part = 2; part < d.statement.parts.size(); part++) {
        const std::string& name = d.statement.parts[part];
        if (std::none_of(std::begin(KNOWN), std::end(KNOWN), [&](const char* known) { return name == known; })) d.unknown();
    }
}

bool decode_mbarrier(Decoder& d) {
    const Statement& statement = d.statement;
    const std::string& opcode = statement.opcode;
    if (opcode.rfind("cp.async.bulk.shared::", 0) == 0) {
        decode_load(d);
        return true;
    }
    if (opcode.rfind("cp.async.mbarrier.arrive", 0) == 0) {
        decode_shared_address(d, 0);
        d.out.run = statement.has("noinc") ? arrive_with_copies<true> : arrive_with_copies<false>;
        return true;
    }
    if (statement.parts[0] != "mbarrier") return false;
    if (statement.parts.size() < 3) d.unknown();
    check_qualifiers(d);
    const std::string& what = statement.parts[1];
    if (what == "init" || what == "expect_tx") {
        decode_shared_address(d, 0);
        d.out.b = d.source(1, {'u', 32});
        d.out.run = what == "init" ? initialise : expect_bytes;
        d.kernel.smallest_shared_write = std::min(d.kernel.smallest_shared_write, OBJECT);
    } else if (what == "inval") {
        decode_shared_address(d, 0);
        d.out.run = invalidate;
    } else if (what == "arrive") {
        decode_arrival(d);
    } else if (what == "test_wait" || what == "try_wait") {
        const bool parity = statement.has("parity");
        decode_shared_address(d, 1);
        d.out.d = d.target(0, {'p', 0});
        d.out.b = d.source(2, parity ? Type{'u', 32} : Type{'b', 64});
        d.out.run = parity ? wait<true> : wait<false>;
        d.out.kind = Kind::POLL;
    } else {
        d.unknown();
    }
    return true;
}

}  // namespace ptx
