// Shared and global memory with their checks. Both have one function: `at` checks an access and returns where its bytes are; `at_lanes` does
// the same for a warp at once.
//
// Every access is checked for bounds, to the byte, and alignment; a read, for bytes that were never written; any, for races: another access
// to the same bytes, one of the two a write, that no barrier puts before or after this one (by the vector clocks of machine.h, within a
// warp by its synchronisations and by lanes, and between blocks always, unless both are atomic).
//
// Shadows hold who accessed memory last, for granules of a few bytes. A granule is as large as the smallest write of the kernel
// (Kernel::smallest_shared_write): then each write covers whole granules, and an access that shares a granule with it shares bytes.
#pragma once
#include "machine.h"

namespace ptx {

// What memory holds before anything is written: as bf16 a NaN that no operation makes, as float a NaN, as int a number that nobody uses.
constexpr uint16_t UNWRITTEN = 0x7fa5;
constexpr uint32_t UNWRITTEN_WORD = 0x7fa57fa5u;

inline bool writes(Access access) { return access == Access::WRITE || access == Access::ATOMIC || access == Access::ASYNC_WRITE; }

// For messages.
inline const char* verb(Access access) {
    return access == Access::ATOMIC ? "atomic update" : writes(access) ? "write" : access == Access::READ ? "read" : "read by the async proxy";
}

struct SharedMemory {
    explicit SharedMemory(uint32_t bytes, int warps, bool async_proxy, uint32_t smallest_write = 16);
    ~SharedMemory();
    // Forgets everything, for the next block of the same threads, whose clocks go on.
    void start();
    // `address` is in the shared space (from SHARED_BASE). Stops the launch if the access is at fault.
    uint8_t* at(Warp&, int lane, uint32_t address, uint32_t size, Access);
    // For each lane that takes part: its access, checked, and its place. If they are all lanes and lie one after the other, the places
    // are not filled in, and the first is returned; otherwise null.
    uint8_t* at_lanes(Warp&, uint32_t lanes, const uint32_t* addresses, uint32_t size, Access, uint8_t** places);
    // A copy into the bytes has begun: nobody may access them until it has written them, which `end_copy` says (WRITE or ASYNC_WRITE).
    void begin_copy(Warp&, int lane, uint32_t address, uint32_t size);
    uint8_t* end_copy(Warp&, int lane, uint32_t address, uint32_t size, Access);
    // What these lanes wrote becomes visible to the async proxy (fence.proxy.async).
    void fence_proxy(Warp&, uint32_t lanes);
    uint32_t size() const;
    struct Shadow;
    std::vector<uint8_t> bytes;
    std::unique_ptr<Shadow> shadow;
};

// An array that a launch was given, or one of its module.
struct Region {
    uint64_t address;    // where kernels see its first byte
    uint64_t size;       // bytes
    uint8_t* memory;
    uint32_t element;    // bytes of an element
    bool written;        // the kernel may write to it
    bool unwritten;      // it holds UNWRITTEN somewhere
    std::string name;    // "argument 3, float32[4, 5]"
    int same_as;         // the region of the same memory that was given first, or its own number
};

struct GlobalMemory {
    explicit GlobalMemory(std::vector<Region> regions, uint32_t smallest_write = 1);
    ~GlobalMemory();
    // never_written: the access is sound only if nobody writes these bytes during the launch (ld.global.nc).
    uint8_t* at(Warp&, int lane, uint64_t address, uint32_t size, Access, bool never_written = false);
    // As SharedMemory::at_lanes.
    uint8_t* at_lanes(Warp&, uint32_t lanes, const uint64_t* addresses, uint32_t size, Access, uint8_t** places, bool never_written = false);
    struct Shadow;
    std::vector<Region> regions;
    std::vector<std::unique_ptr<Shadow>> shadows;  // of each region that may be written, by the first region of the same memory
};

}  // namespace ptx
