// The arrays of a launch. An address names its array (REGION_BITS), so that an access beyond an array's end is found even where another
// array's memory begins.
//
// Arrays that the kernel may write have a shadow: for each granule the last plain write, the last atomic update and the last read, packed into
// 64 bits as block (from 1), thread, moment of its warp, and a flag. Blocks run in any order and at once, so two accesses of different blocks
// race unless both are reads or both are atomic. Within a block the moments of warps decide, as in shared memory. Arrays that overlap share their shadow.
//
// Blocks of several processor threads use a shadow at once. Its words are loaded and stored whole, without an order between threads: a race
// that is seen when blocks run one after another may then be missed, but none is invented.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "memory.h"

namespace ptx {

namespace {

constexpr int BLOCK = 33, THREAD = 23, MOMENT = 1, MOMENT_BITS = 22;  // where a word's parts begin
constexpr uint64_t FLAG = 1;                      // of a read: nobody may write there (ld.global.nc)
constexpr int ONE_LANE = 31;                      // for `each` below: no granule is of the next lane
constexpr uint64_t SEVERAL = ~0ull << BLOCK;      // instead of a block: several have read, or have updated

struct Free {
    void operator()(void* memory) const { std::free(memory); }
};
template <class T>
using Zeros = std::unique_ptr<T[], Free>;

template <class T>
Zeros<T> zeros(size_t count) {
    return Zeros<T>(static_cast<T*>(std::calloc(std::max<size_t>(count, 1), sizeof(T))));
}

uint64_t load(const uint64_t& word) { return __atomic_load_n(&word, __ATOMIC_RELAXED); }
void store(uint64_t& word, uint64_t value) { __atomic_store_n(&word, value, __ATOMIC_RELAXED); }

uint64_t block_of(uint64_t word) { return word >> BLOCK; }
uint32_t thread_of(uint64_t word) { return uint32_t(word >> THREAD) & 1023; }
bool same_block(uint64_t word, uint64_t other) { return !((word ^ other) >> BLOCK); }
bool same_thread(uint64_t word, uint64_t other) { return !((word ^ other) >> THREAD); }

// Who accesses, as a word of a shadow.
uint64_t word_of(const Warp& warp, int lane) {
    const uint64_t moment = warp.clock.now & ((1u << MOMENT_BITS) - 1);
    return uint64_t(warp.block->number + 1) << BLOCK | uint64_t(warp.number * LANES + lane) << THREAD | moment << MOMENT;
}

// Is an access of the same block over? Moments are compared by their distance, since a word has only their last bits.
bool is_over(const Warp& warp, uint64_t word) {
    const uint32_t moment = uint32_t(word) >> MOMENT, seen = warp.clock.seen[thread_of(word) / LANES];
    return int32_t((moment - seen) << (32 - MOMENT_BITS)) <= 0;
}

}  // namespace

// Of memory that is written, under all names that it was given.
struct GlobalMemory::Shadow {
    const uint8_t* begin;  // where the first granule's bytes are
    int shift;             // a granule has 1 << shift bytes
    Zeros<uint64_t> written, read, updated;
    Zeros<uint64_t> earlier;  // a read before the last, by another thread of the same block, that no barrier parts from it
    std::atomic<bool> has_earlier{false}, has_updated{false};
    Zeros<uint32_t> written_at, updated_at;  // the instruction of the last write, and of the last update

    Shadow(const uint8_t* begin, const uint8_t* end, uint32_t granule) : begin(begin), shift(__builtin_ctz(granule)) {
        const size_t count = (size_t(end - begin) + granule - 1) >> shift;
        written = zeros<uint64_t>(count);
        read = zeros<uint64_t>(count);
        updated = zeros<uint64_t>(count);
        earlier = zeros<uint64_t>(count);
        written_at = zeros<uint32_t>(count);
        updated_at = zeros<uint32_t>(count);
    }

    [[noreturn]] void refuse(const Warp& warp, int lane, const Region& region, Access access, size_t granule, const std::string& what) const {
        const int64_t offset = (begin + (granule << shift)) - region.memory;
        fail(warp, lane, format("%s of %s at byte %lld %s", verb(access), region.name.c_str(), static_cast<long long>(std::max<int64_t>(offset, 0)), what.c_str()));
    }

    bool is_written(size_t granule) const { return load(written[granule]) || load(updated[granule]); }

    std::string who(const Warp& warp, uint64_t word) const {
        if (same_block(word, word_of(warp, 0))) return format("thread %u", thread_of(word));
        if (word >= SEVERAL) return "several blocks";
        return format("thread %u of block %u", thread_of(word), uint32_t(block_of(word) - 1));
    }

    // An access to a granule that another thread wrote or, if it is not atomic itself, updated.
    void judge_write(const Warp& warp, int lane, const Region& region, Access access, size_t granule, uint64_t word, bool atomic, bool never_written) const {
        const std::string place = format(" (PTX line %d)", warp.block->kernel->code[(atomic ? updated_at : written_at)[granule]].line);
        if (never_written) {
            refuse(warp, lane, region, access, granule, "that " + who(warp, word) + place + " writes: ld.global.nc is for memory that is only read");
        }
        const uint64_t me = word_of(warp, lane);
        if (same_thread(word, me) || (same_block(word, me) && is_over(warp, word))) return;
        const char* earlier = atomic ? "that races with an atomic update by " : "that races with a write by ";
        refuse(warp, lane, region, access, granule, earlier + who(warp, word) + place);
    }

    // A write to a granule that another thread read.
    void judge_read(const Warp& warp, int lane, const Region& region, Access access, size_t granule, uint64_t word) const {
        if (word & FLAG) {
            refuse(warp, lane, region, access, granule, "that " + who(warp, word) + " reads with ld.global.nc, for memory that is only read");
        }
        const uint64_t me = word_of(warp, lane);
        if (same_thread(word, me) || (same_block(word, me) && is_over(warp, word))) return;
        refuse(warp, lane, region, access, granule, "that races with a read by " + who(warp, word));
    }

    // Granules from `first` on; granule i is accessed by lane `lane + (i >> each)`.
    void access(const Warp& warp, int lane, const Region& region, size_t first, size_t count, int each, Access access, bool never_written) {
        const bool atomic = access == Access::ATOMIC;
        const uint64_t me = word_of(warp, lane) | uint64_t(never_written);
        for (size_t i = 0; i < count; i++) {
            const size_t granule = first + i;
            const uint64_t word = me + (uint64_t(i) >> each << THREAD), old = load(written[granule]), reader = load(read[granule]);
            const int who = lane + int(i >> each);
            if (old && (!same_thread(old, word) || never_written)) judge_write(warp, who, region, access, granule, old, false, never_written);
            const uint64_t update = load(updated[granule]);
            if (update && !atomic && (!same_thread(update, word) || never_written)) {
                judge_write(warp, who, region, access, granule, update, true, never_written);
            }
            if (writes(access)) {
                if (reader && (!same_thread(reader, word) || reader & FLAG)) judge_read(warp, who, region, access, granule, reader);
                if (const uint64_t other = load(earlier[granule])) judge_read(warp, who, region, access, granule, other);
                if (atomic && !has_updated) has_updated = true;
                store((atomic ? updated : written)[granule], atomic ? by_several(word, update) : word);
                __atomic_store_n(&(atomic ? updated_at : written_at)[granule], uint32_t(warp.at), __ATOMIC_RELAXED);
            } else if (reader != word) {
                if (reader && same_block(reader, word) && !same_thread(reader, word) && !is_over(warp, reader)) {
                    store(earlier[granule], reader);
                    if (!has_earlier) has_earlier = true;
                }
                store(read[granule], by_several(word, reader));
            }
        }
    }

    // What is known of reads, or of updates, after one more.
    static uint64_t by_several(uint64_t word, uint64_t earlier) {
        return word | (earlier && !same_block(earlier, word) ? SEVERAL : 0) | (earlier & FLAG);
    }

    // The same for a warp whose lanes access one piece after the other, if no granule was accessed by another thread; false: it was. Loops
    // of plain loads and stores, which the compiler makes vector instructions of; processors load and store their words whole.
    template <class Count>
    bool access_run(const Warp& warp, size_t first, Count count, int each, Access access, bool never_written) {
        const uint64_t me = word_of(warp, 0) | uint64_t(never_written);
        uint64_t *write = &written[first], *reader = &read[first];
        const bool check_earlier = has_earlier.load(std::memory_order_relaxed), check_updated = has_updated.load(std::memory_order_relaxed);
        uint64_t other = 0;
        for (size_t i = 0; check_updated && i < count; i++) other |= updated[first + i];
        if (writes(access)) {
            for (size_t i = 0; i < count; i++) {
                const uint64_t word = me + (uint64_t(i) >> each << THREAD);
                other |= write[i] ? (write[i] ^ word) >> THREAD : 0;
                other |= reader[i] ? ((reader[i] ^ word) >> THREAD) | (reader[i] & FLAG) : 0;
            }
            for (size_t i = 0; check_earlier && i < count; i++) other |= earlier[first + i];
            if (other) return false;
            for (size_t i = 0; i < count; i++) write[i] = me + (uint64_t(i) >> each << THREAD);
            std::fill_n(&written_at[first], size_t(count), uint32_t(warp.at));
        } else {
            for (size_t i = 0; i < count; i++) {
                const uint64_t word = me + (uint64_t(i) >> each << THREAD);
                other |= write[i] ? (write[i] ^ word) >> THREAD | uint64_t(never_written) : 0;
                other |= reader[i] && same_block(reader[i], word) ? (reader[i] ^ word) >> THREAD : 0;
            }
            if (other) return false;
            for (size_t i = 0; i < count; i++) reader[i] = by_several(me + (uint64_t(i) >> each << THREAD), reader[i]);
        }
        return true;
    }
};

GlobalMemory::GlobalMemory(std::vector<Region> given, uint32_t smallest_write) : regions(std::move(given)), shadows(regions.size()) {
    for (size_t i = 0; i < regions.size(); i++) {
        const Region& first = regions[i];
        if (first.same_as != int(i)) continue;
        bool written = false;
        const uint8_t *begin = first.memory, *end = first.memory;
        uint32_t granule = std::min(smallest_write, 16u);
        for (const Region& region : regions) {
            if (region.same_as != int(i)) continue;
            written |= region.written;
            begin = std::min<const uint8_t*>(begin, region.memory - region.address % 16);
            end = std::max<const uint8_t*>(end, region.memory + region.size);
        }
        for (const Region& region : regions) {  // granules begin where kernels see addresses that are multiples of them
            if (region.same_as == int(i)) while ((uint64_t(region.memory - begin) - region.address) % granule) granule /= 2;
        }
        if (written) shadows[i].reset(new Shadow(begin, end, granule));
    }
}

GlobalMemory::~GlobalMemory() = default;

static const Region& region_at(const GlobalMemory& memory, const Warp& warp, int lane, uint64_t address, uint32_t size, Access access) {
    const std::vector<Region>& regions = memory.regions;
    const uint64_t number = (address >> REGION_BITS) - 1, unit = std::min(size & -size, 16u);
    if (__builtin_expect(number < regions.size(), 1)) {
        const Region& region = regions[number];
        const uint64_t offset = address - region.address;
        if (__builtin_expect(offset <= region.size && size <= region.size - offset && !(address & (unit - 1)), 1)) return region;
    }
    const std::string what = format("%s of %u bytes of global memory", verb(access), size);
    const std::string misaligned = format("misaligned %s of %u bytes", verb(access), size);
    for (const Region& region : regions) {  // nearly always the one that the address was computed from
        const int64_t offset = int64_t(address - region.address), beyond = offset + size - int64_t(region.size);
        if (std::abs(offset) >= 1ll << (REGION_BITS - 1)) continue;
        const char* name = region.name.c_str();
        if (offset < 0) fail(warp, lane, what + format(" outside %s: it begins %lld bytes before the array", name, static_cast<long long>(-offset)));
        if (beyond > 0) fail(warp, lane, what + format(" outside %s: it ends %lld bytes after the array's %lld", name, static_cast<long long>(beyond), static_cast<long long>(region.size)));
        fail(warp, lane, misaligned + format(" at byte %lld of %s: its address is not a multiple of %d", static_cast<long long>(offset), name, int(unit)));
    }
    fail(warp, lane, what + format(" at address 0x%llx, which is in no array%s", static_cast<unsigned long long>(address),
                                   in_shared_window(address) || address < (1u << 24) ? " (it may be one of shared memory)" : ""));
}

// Where the first unit is that holds the pattern of memory that nobody wrote, as seen from `place`; -1: nowhere. A unit is an element of the
// array, or less if less is read; a single byte counts as unwritten with its neighbour, since bytes of the pattern are common numbers.
static int unwritten_at(const Region& region, const uint8_t* place, uint32_t size) {
    uint32_t pattern = 0;
    for (uint32_t at = 0; at + 2 <= size; at += 2) {
        uint16_t half;
        memcpy(&half, place + at, 2);
        pattern |= uint32_t(half == UNWRITTEN);
    }
    if (!pattern && size > 1) return -1;
    const bool odd = size == 1 && (place - region.memory) & 1;
    if (size == 1) size = 2, place -= odd;
    if (uint64_t(place - region.memory) + size > region.size) return -1;
    const uint32_t unit = std::min(std::max(region.element, 2u), size);
    for (uint32_t at = 0; at < size; at += unit) {
        bool all = true;
        for (uint32_t half = 0; half < unit; half += 2) {
            uint16_t value;
            memcpy(&value, place + at + half, 2);
            all &= value == UNWRITTEN;
        }
        if (all) return int(at);
    }
    return -1;
}

uint8_t* GlobalMemory::at(Warp& warp, int lane, uint64_t address, uint32_t size, Access access, bool never_written) {
    const Region& region = region_at(*this, warp, lane, address, size, access);
    uint8_t* place = region.memory + (address - region.address);
    Shadow* shadow = shadows[size_t(region.same_as)].get();
    if (region.unwritten && (!writes(access) || access == Access::ATOMIC)) {
        const int at = unwritten_at(region, place, size);
        if (at >= 0 && !(shadow && shadow->is_written(size_t(place + at - shadow->begin) >> shadow->shift))) {
            fail(warp, lane, format("%s of %s at byte %lld, which nobody wrote", verb(access), region.name.c_str(), static_cast<long long>(place + at - region.memory)));
        }
    }
    if (!shadow) {
        if (__builtin_expect(writes(access), 0)) {
            fail(warp, lane, format("%s of %s through the address of another array", verb(access), region.name.c_str()));
        }
        return place;
    }
    const size_t begin = size_t(place - shadow->begin), first = begin >> shadow->shift, end = ((begin + size - 1) >> shadow->shift) + 1;
    shadow->access(warp, lane, region, first, end - first, ONE_LANE, access, never_written);
    return place;
}

uint8_t* GlobalMemory::at_lanes(Warp& warp, uint32_t lanes, const uint64_t* addresses, uint32_t size, Access access, uint8_t** places, bool never_written) {
    const uint64_t one = addresses[__builtin_ctz(lanes)], number = (one >> REGION_BITS) - 1;
    const auto one_by_one = [&] {
        for_lanes(lanes, [&](int lane) { places[lane] = at(warp, lane, addresses[lane], size, access, never_written); });
        return nullptr;
    };
    if (__builtin_expect(number >= regions.size() || access == Access::ATOMIC || regions[number].size < size, 0)) return one_by_one();
    const Region& region = regions[number];
    Shadow* shadow = shadows[size_t(region.same_as)].get();
    const uint64_t last = region.size - size;
    uint64_t outside = 0, low = 0, scattered = 0;
    for (uint64_t lane = 0; lane < LANES; lane++) {
        const uint64_t address = lanes >> lane & 1 ? addresses[lane] : one, offset = address - region.address;
        outside |= uint64_t(offset > last);
        low |= address;
        scattered |= address - one - lane * size;
        places[lane] = region.memory + offset;
    }
    if (__builtin_expect(outside || low & (size - 1) || (!shadow && writes(access)), 0)) return one_by_one();
    const bool run = lanes == ALL && !scattered;
    if (region.unwritten && !writes(access)) {
        bool found = false;
        if (run) found = unwritten_at(region, places[0], size * LANES) >= 0;
        else for_lanes(lanes, [&](int lane) { found |= unwritten_at(region, places[lane], size) >= 0; });
        if (found) return one_by_one();
    }
    if (!shadow) return run ? places[0] : nullptr;
    const int shift = shadow->shift;
    const size_t first = size_t(places[0] - shadow->begin) >> shift, count = std::max(size >> shift, 1u);
    if (run && size >= 1u << shift) {
        const int each = __builtin_ctz(size) - shift;
        const bool alone = count == 1 ? shadow->access_run(warp, first, std::integral_constant<size_t, LANES>(), each, access, never_written)
                                      : shadow->access_run(warp, first, count * LANES, each, access, never_written);
        if (!alone) shadow->access(warp, 0, region, first, count * LANES, each, access, never_written);
        return places[0];
    }
    for_lanes(lanes, [&](int lane) {
        const size_t own = size_t(places[lane] - shadow->begin) >> shift;
        shadow->access(warp, lane, region, own, count, ONE_LANE, access, never_written);
    });
    return run ? places[0] : nullptr;
}

}  // namespace ptx
