// What loads, stores (access.cpp) and atomic operations (atomics.cpp) have in common: how they find places, and how traffic is counted.
#pragma once
#include "decode.h"
#include "memory.h"

namespace ptx {

// In Instruction::e. Without IN_SHARED and IN_GLOBAL an address is generic.
constexpr uint32_t WIDE = 1, IN_SHARED = 2, IN_GLOBAL = 4, NEVER_WRITTEN = 8;

// Checks the access of each lane: `a` holds addresses, `immediate` is added, `size` bytes each. -> as SharedMemory::at_lanes.
uint8_t* find(Warp&, const Instruction&, uint32_t lanes, Access, uint8_t** places);

void decode_modifiers(Decoder&, size_t last);
void decode_place(Decoder&, int operand, uint32_t writes);
bool decode_atomic(Decoder&);

// One request of a warp. Global memory moves sectors of 32 bytes. Shared memory has 32 banks of 4 bytes and serves in one wave what lies in
// different banks or in the same word; requests of 8 or 16 bytes a lane are served for half or a quarter of the warp at a time.
void count_global(Counters&, uint32_t lanes, const uint64_t* addresses, uint32_t size, bool stores);
void count_shared(Counters&, uint32_t lanes, const uint32_t* addresses, uint32_t size);

}  // namespace ptx
