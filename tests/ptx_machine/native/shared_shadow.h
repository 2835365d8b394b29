// The shadow of a block's shared memory: who wrote and who read each granule last, and whether that is over.
//
// An entry of a granule packs a moment of a warp (Clock::now), a thread and a flag into 32 bits. For the last write the flag says that it was
// atomic. For reads, `latest` has the last one; its flag says that several threads have read since what all know to be over, and then
// `reads`, an array per warp, has the last read of each warp. An access at entry e is sound if the moment of e is at most `seen` of its warp,
// or if e is by the same thread. Nearly always the moment is even one that every warp has seen: then e is less than `settled`, and one
// comparison of vectors decides for a whole access. The rest, granule by granule, is `judge_write` and `judge_reads`.
//
// The clocks of a block's warps go on from block to block, so that an old read needs no erasing; old writes are erased, since no entry means
// that the bytes were never written.
#pragma once
#include <algorithm>
#include <cstdlib>

#include "memory.h"

namespace ptx {

struct SharedMemory::Shadow {
    static constexpr int CLOCK = 11;                           // an entry is moment << CLOCK | thread << 1 | flag
    static constexpr uint32_t THREAD = 1023u << 1;
    static constexpr uint32_t COPY = 0xffffffffu << CLOCK;     // instead of a moment: a copy into the granule is under way
    static constexpr uint32_t LONG_AGO = 1;                    // a write that everybody has seen
    static constexpr uint32_t NOTHING_YET = 1u << CLOCK;       // above no moment but the one before all
    static constexpr uint32_t LAST_MOMENT = (COPY >> CLOCK) - 2;
    static constexpr uint32_t SEVERAL = 63;                    // an entry of `reads` is moment << 6 | lane, or this
    static constexpr int REMEMBERED_FENCES = 8;
    static constexpr int ONE_LANE = 31;                        // for `each` below: no granule is of the next lane

    struct Free {
        void operator()(void* memory) const { std::free(memory); }
    };
    using Entries = std::unique_ptr<uint32_t[], Free>;

    static Entries entries(size_t count) { return Entries(static_cast<uint32_t*>(std::calloc(count, sizeof(uint32_t)))); }

    static uint32_t thread_of(uint32_t entry) { return entry >> 1 & 1023; }

    // Who accesses, at which moment, and what is known to be over for all warps.
    struct Moment {
        Warp& warp;
        uint32_t now;      // from the shadow's zero of the warp
        uint32_t settled;  // entries below this are over for every warp
        uint32_t of(int lane) const { return now << CLOCK | uint32_t(warp.number * LANES + lane) << 1; }
    };

    int shift = 4;      // a granule has 1 << shift bytes
    size_t granules = 0;
    int warps;
    Entries writes;     // the last write of each granule; 0: none in this block
    Entries places;     // and its instruction
    Entries latest;     // the last read
    Entries reads;      // [warps, granules]
    Entries unfenced;   // for the async proxy: one more than how many fences the writing thread had behind it, or 0
    uint32_t zero[LANES] = {};     // per warp: where its moments begin
    uint32_t settled[LANES];       // per warp: what it last found for Moment::settled
    struct Fences {
        uint32_t count = 0, moments[REMEMBERED_FENCES] = {};
    };
    std::vector<Fences> fences;    // per thread

    int32_t seen(const Warp& warp, uint32_t other) const { return int32_t(warp.clock.seen[other] - zero[other]); }

    Moment moment(Warp& warp) {
        const uint32_t now = warp.clock.now - zero[warp.number];
        if (__builtin_expect(now > LAST_MOMENT, 0)) return start_clocks(warp), moment(warp);
        return {warp, now, settled[warp.number]};
    }

    // Finds out again what all warps have seen; true if that is more than before.
    bool settle(Moment& moment) {
        int32_t least = seen(moment.warp, 0);
        for (int other = 1; other < warps; other++) least = std::min(least, seen(moment.warp, uint32_t(other)));
        const uint32_t found = uint32_t(std::max(least, 0) + 1) << CLOCK;
        const bool more = found > moment.settled;
        settled[moment.warp.number] = moment.settled = found;
        return more;
    }

    // The packed moments are used up: from here on they count anew, and what was accessed is taken to be over.
    void start_clocks(const Warp& warp) {
        for (size_t i = 0; i < granules; i++) {
            if (writes[i] && writes[i] < COPY) writes[i] = LONG_AGO;
        }
        std::fill_n(latest.get(), granules, 0u);
        std::fill_n(reads.get(), granules * size_t(warps), 0u);
        for (const Warp& other : warp.block->warps) zero[other.number] = other.clock.now - 1;
        std::fill_n(settled, LANES, NOTHING_YET);
    }

    // Makes granules of `bytes`, for a write that is smaller than those that were foreseen.
    void refine(uint32_t bytes) {
        const int by = shift - __builtin_ctz(bytes);
        auto split = [&](Entries& old, size_t rows) {
            Entries fine = entries(rows * granules << by);
            for (size_t i = 0; i < rows * granules << by; i++) fine[i] = old[i >> by];
            old = std::move(fine);
        };
        for (Entries* each : {&writes, &places, &latest}) split(*each, 1);
        split(reads, size_t(warps));
        if (unfenced) split(unfenced, 1);
        granules <<= by;
        shift -= by;
    }

    // ---- reads -------------------------------------------------------------------------------------------------------------------

    // Was each of `count` granules written, and is that over for all, or by the thread that reads? Granule i is accessed by lane
    // `lane + (i >> each)`, here and below.
    template <class Count>
    bool readable(const Moment& moment, int lane, size_t first, Count count, int each) const {
        const uint32_t *entry = &writes[first], me = moment.of(lane), limit = moment.settled;
        uint32_t other = 0;
        for (size_t i = 0; i < count; i++) {
            const uint32_t own = me + (uint32_t(i) >> each << 1);
            other |= uint32_t(entry[i] - 1 >= limit - 1) & uint32_t(bool((entry[i] ^ own) & THREAD) | (entry[i] - 1 >= COPY - 1));
        }
        return !other;
    }

    template <class Count>
    void note_reads(const Moment& moment, int lane, size_t first, Count count, int each) {
        uint32_t* last = &latest[first];
        uint32_t* own = &reads[size_t(moment.warp.number) * granules + first];
        const uint32_t me = moment.of(lane), limit = moment.settled, now = moment.now << 6, at = now | uint32_t(lane);
        for (size_t i = 0; i < count; i++) {
            const uint32_t entry = me + (uint32_t(i) >> each << 1), old = last[i];
            const bool alone = old < limit || !((old ^ entry) & ((1u << CLOCK) - 1));
            last[i] = alone ? entry : std::max(old, entry) | 1;
            const uint32_t own_entry = at + (uint32_t(i) >> each), own_old = own[i];
            own[i] = (own_old & ~63u) == now && own_old != own_entry ? now | SEVERAL : own_entry;
        }
    }

    // ---- writes ------------------------------------------------------------------------------------------------------------------

    // Is each last write, if there is one, and each last read over for all, or by the thread that writes?
    template <class Count>
    bool writable(const Moment& moment, int lane, size_t first, Count count, int each) const {
        const uint32_t *entry = &writes[first], *last = &latest[first], me = moment.of(lane), limit = moment.settled;
        uint32_t other = 0;
        for (size_t i = 0; i < count; i++) {
            const uint32_t own = me + (uint32_t(i) >> each << 1);
            other |= uint32_t(entry[i] >= limit) & uint32_t(bool((entry[i] ^ own) & THREAD) | (entry[i] >= COPY));
            other |= uint32_t(last[i] >= limit) & uint32_t(bool((last[i] ^ own) & (THREAD | 1)));
        }
        return !other;
    }

    template <class Count>
    void note_writes(const Moment& moment, int lane, size_t first, Count count, int each, Access access) {
        const uint32_t me = moment.of(lane) | uint32_t(access == Access::ATOMIC), at = uint32_t(moment.warp.at);
        for (size_t i = 0; i < count; i++) {
            const uint32_t entry = me + (uint32_t(i) >> each << 1), old = writes[first + i];
            // A plain write by the same thread that is not over for all stays: others race with it, whether their accesses are atomic or not.
            if (access == Access::ATOMIC && old >= moment.settled && ((old ^ entry) & (THREAD | 1)) == 1) continue;
            writes[first + i] = entry;
            places[first + i] = at;
        }
        if (!unfenced) return;
        for (size_t i = 0; i < count; i++) {
            const uint32_t thread = thread_of(me) + (uint32_t(i) >> each);
            unfenced[first + i] = access == Access::ASYNC_WRITE ? 0 : fences[thread].count + 1;
        }
    }

    // ---- what is not settled -----------------------------------------------------------------------------------------------------

    [[noreturn]] void refuse(const Moment& moment, int lane, Access access, size_t granule, const std::string& what) const {
        fail(moment.warp, lane, format("%s of shared memory %s (offset %zu)", verb(access), what.c_str(), granule << shift));
    }

    std::string writer(const Moment& moment, size_t granule) const {
        return format("thread %u (PTX line %d)", thread_of(writes[granule]), moment.warp.block->kernel->code[places[granule]].line);
    }

    // An access to a granule whose last write is not known to be over for all.
    void judge_write(const Moment& moment, int lane, size_t granule, Access access) const {
        const uint32_t entry = writes[granule], thread = thread_of(entry);
        const bool own = thread == thread_of(moment.of(lane));
        if (!entry) {
            if (access == Access::WRITE || access == Access::ASYNC_WRITE) return;
            refuse(moment, lane, access, granule, "that nobody wrote");
        }
        if (entry >= COPY) {
            refuse(moment, lane, access, granule, "into which a copy is under way, begun by " + writer(moment, granule));
        }
        if (own || int32_t(entry >> CLOCK) <= seen(moment.warp, thread / LANES) || (entry & 1 && access == Access::ATOMIC)) return;
        const char* earlier = entry & 1 ? "that races with an atomic update by " : "that races with a write by ";
        refuse(moment, lane, access, granule, earlier + writer(moment, granule));
    }

    // A write to a granule whose reads are not known to be over for all.
    void judge_reads(const Moment& moment, int lane, size_t granule, Access access) const {
        const uint32_t last = latest[granule], thread = thread_of(last);
        auto race = [&](uint32_t reader) {
            refuse(moment, lane, access, granule, format("that races with a read by thread %u", reader));
        };
        if (!(last & 1)) {
            const bool own = thread == thread_of(moment.of(lane));
            if (!own && int32_t(last >> CLOCK) > seen(moment.warp, thread / LANES)) race(thread);
            return;
        }
        for (int other = 0; other < warps; other++) {
            const uint32_t entry = reads[size_t(other) * granules + granule], reader = entry & 63;
            if (int32_t(entry >> 6) <= seen(moment.warp, uint32_t(other))) continue;
            if (other == moment.warp.number && reader == uint32_t(lane)) continue;
            if (reader == SEVERAL) {
                refuse(moment, lane, access, granule, format("that races with reads by several threads of warp %d", other));
            }
            race(uint32_t(other * LANES) + reader);
        }
    }

    // The async proxy sees what a thread wrote if the thread has executed a fence since, and what follows knows of that.
    void judge_fences(const Moment& moment, int lane, size_t first, size_t count) const {
        uint32_t last_thread = 0, last_needed = 0;  // neighbours nearly always have the same writer
        for (size_t granule = first; granule < first + count; granule++) {
            const uint32_t thread = thread_of(writes[granule]), needed = unfenced[granule];
            if (!needed || (thread == last_thread && needed == last_needed)) continue;
            last_thread = thread;
            last_needed = needed;
            const Fences& done = fences[thread];
            const bool forgotten = done.count >= needed + REMEMBERED_FENCES;
            const bool known = done.count >= needed &&
                               (forgotten || int(thread / LANES) == moment.warp.number ||
                                int32_t(done.moments[needed % REMEMBERED_FENCES] - zero[thread / LANES]) <= seen(moment.warp, thread / LANES));
            if (known) continue;
            fail(moment.warp, lane,
                 format("the async proxy (tensor cores, bulk copies) reads shared memory that %s wrote, and no fence.proxy.async by that thread"
                        "%s has made visible (offset %zu)",
                        writer(moment, granule).c_str(), done.count >= needed ? " and barrier after it" : "", granule << shift));
        }
    }

    // ---- an access of one lane, or of a warp whose lanes access one piece after the other --------------------------------------------

    template <class Count>
    void read(Moment moment, int lane, size_t first, Count count, int each, Access access) {
        if (!readable(moment, lane, first, count, each) && !(settle(moment) && readable(moment, lane, first, count, each))) {
            for (size_t i = 0; i < count; i++) {
                if (writes[first + i] - 1 >= moment.settled - 1) judge_write(moment, lane + int(i >> each), first + i, access);
            }
        }
        if (access == Access::ASYNC_READ && unfenced) judge_fences(moment, lane, first, count);
        note_reads(moment, lane, first, count, each);
    }

    template <class Count>
    void write(Moment moment, int lane, size_t first, Count count, int each, Access access) {
        const bool atomic = access == Access::ATOMIC;
        if (atomic) settle(moment);
        if (atomic || (!writable(moment, lane, first, count, each) && !(settle(moment) && writable(moment, lane, first, count, each)))) {
            for (size_t i = 0; i < count; i++) {
                if (atomic || writes[first + i] >= moment.settled) judge_write(moment, lane + int(i >> each), first + i, access);
                if (latest[first + i] >= moment.settled) judge_reads(moment, lane + int(i >> each), first + i, access);
            }
        }
        note_writes(moment, lane, first, count, each, access);
    }

    template <class Count>
    void access(const Moment& moment, int lane, size_t first, Count count, int each, Access access) {
        if (ptx::writes(access)) {
            write(moment, lane, first, count, each, access);
        } else {
            read(moment, lane, first, count, each, access);
        }
    }

    // ---- accesses of a warp's lanes to scattered places ------------------------------------------------------------------------------

    template <class Count>
    void read_lanes(Moment moment, uint32_t lanes, const uint32_t* offsets, Count count, Access access) {
        const auto all_readable = [&] {
            uint32_t no = 0;
            for_lanes(lanes, [&](int lane) { no |= uint32_t(!readable(moment, lane, offsets[lane] >> shift, count, ONE_LANE)); });
            return !no;
        };
        if (access == Access::ASYNC_READ || (!all_readable() && !(settle(moment) && all_readable()))) {
            for_lanes(lanes, [&](int lane) { read(moment, lane, offsets[lane] >> shift, count, ONE_LANE, access); });
        } else {
            for_lanes(lanes, [&](int lane) { note_reads(moment, lane, offsets[lane] >> shift, count, ONE_LANE); });
        }
    }

    template <class Count>
    void write_lanes(Moment moment, uint32_t lanes, const uint32_t* offsets, Count count, Access access) {
        const auto all_writable = [&] {
            uint32_t no = 0;
            for_lanes(lanes, [&](int lane) { no |= uint32_t(!writable(moment, lane, offsets[lane] >> shift, count, ONE_LANE)); });
            return !no;
        };
        if (!all_writable() && !(settle(moment) && all_writable())) {
            for_lanes(lanes, [&](int lane) { write(moment, lane, offsets[lane] >> shift, count, ONE_LANE, access); });
            return;
        }
        for_lanes(lanes, [&](int lane) { note_writes(moment, lane, offsets[lane] >> shift, count, ONE_LANE, access); });
        uint32_t overwritten = 0;  // do two lanes write one place? then the first finds the other's entry
        for_lanes(lanes, [&](int lane) { overwritten |= writes[offsets[lane] >> shift] ^ moment.of(lane); });
        if (!overwritten) return;
        for_lanes(lanes, [&](int lane) {
            for (size_t i = 0; i < count; i++) judge_write(moment, lane, (offsets[lane] >> shift) + i, access);
        });
    }

    // All lanes read the same.
    template <class Count>
    void read_same(const Moment& moment, size_t first, Count count) {
        read(moment, 0, first, count, ONE_LANE, Access::READ);
        for (size_t i = 0; i < count; i++) {
            latest[first + i] |= 1;
            reads[size_t(moment.warp.number) * granules + first + i] = moment.now << 6 | SEVERAL;
        }
    }
};

}  // namespace ptx
