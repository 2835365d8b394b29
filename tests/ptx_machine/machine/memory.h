// Shared and global memory with their checks. Both have one function: `at` checks an access and returns where its bytes are.
//
// Every access is checked for bounds, to the byte, and alignment; a read, for bytes that were never written; any, for races: another access
// to the same bytes, one of the two a write, that no barrier puts before or after this one (by the vector clocks of machine.h, within a
// warp by its synchronisations and by lanes, and between blocks always, unless both are atomic).
#pragma once
#include "machine.h"

namespace ptx {

// What memory holds before anything is written: as bf16 a NaN that no operation makes, as float a NaN, as int a number that nobody uses.
constexpr uint16_t UNWRITTEN = 0x7fa5;
constexpr uint32_t UNWRITTEN_WORD = 0x7fa57fa5u;

struct SharedMemory {
    explicit SharedMemory(uint32_t bytes, int warps, bool async_proxy);
    ~SharedMemory();
    // Forgets everything, for the next block.
    void start();
    // `address` is in the shared space (from SHARED_BASE). Stops the launch if the access is at fault.
    uint8_t* at(Warp&, int lane, uint32_t address, uint32_t size, Access);
    // The bytes become "not written", and nobody may read them: a copy into them has begun.
    void begin_copy(Warp&, int lane, uint32_t address, uint32_t size);
    // What this lane wrote becomes visible to the async proxy (fence.proxy.async).
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
    explicit GlobalMemory(std::vector<Region> regions);
    ~GlobalMemory();
    uint8_t* at(Warp&, int lane, uint64_t address, uint32_t size, Access, bool never_written = false);
    struct Shadow;
    std::vector<Region> regions;
    std::unique_ptr<Shadow> shadow;
};

}  // namespace ptx
