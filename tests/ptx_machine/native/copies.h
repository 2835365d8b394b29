// Copies that run in the background (cp.async, cp.async.bulk), and the barriers in shared memory that threads and copies arrive at
// (mbarrier). A copy is carried out as late as a wait allows, so that what reads too early reads bytes that nobody may read.
#pragma once
#include <deque>
#include <map>

#include "machine.h"

namespace ptx {

// What one cp.async of a warp began: up to 32 copies.
struct Copy {
    uint32_t lanes;            // whose copies are still under way
    uint32_t bytes;            // that each of them writes
    uint32_t to[LANES];        // in shared memory
    uint64_t from[LANES];      // in global memory
    uint8_t read[LANES];       // bytes that are read: the others are written as zeros
    uint32_t group[LANES];     // of the lane: how many groups it had committed before
    uint64_t number;           // of the warp's cp.async instructions, in their order
    int at;                    // the instruction that began it
};

// A copy of cp.async.bulk from shared to global memory.
struct BulkStore {
    int lane;
    uint32_t from;
    uint64_t to;
    uint32_t bytes, group;
    int at;
    std::vector<uint8_t> held;  // the bytes, once a wait said that they are read
};

// Of a warp.
struct Copies {
    std::deque<Copy> under_way;  // oldest first
    uint32_t committed[LANES] = {};
    uint64_t issued = 0;
    std::deque<BulkStore> stores;
    uint32_t committed_stores[LANES] = {};

    void start();               // for the next block
    void end(Warp&, int lane);  // a thread ends: stops the launch if work of this warp in the background was not waited for
    void finish(Warp&, int lane, uint64_t before);  // the copies of a lane that are older than that number
};

// What arrives at an mbarrier by itself: when the earlier copies of a thread are done (cp.async.mbarrier.arrive) ...
struct CopiesArrive {
    Warp* warp;
    int lane;
    uint64_t before;
    int at;
};

// ... and with the bytes of a bulk copy into shared memory.
struct BulkLoad {
    Warp* warp;
    int lane;
    uint32_t to;
    uint64_t from;
    uint32_t bytes;
    int at;
};

struct Barrier {
    int first_warp, first_lane;          // that initialised it, and when
    uint32_t first_moment;
    uint32_t count, pending;             // arrivals of a phase, and those still to come in this one
    uint64_t phase = 0;
    int64_t bytes = 0;                   // announced (expect_tx) that copies have yet to bring in this phase
    uint32_t seen[LANES] = {}, next[LANES] = {};  // clocks of what came before the end of the last phase, and of what arrived since
    std::vector<CopiesArrive> arrivals;
    std::vector<BulkLoad> loads;
};

// Of a block.
struct Barriers {
    std::map<uint32_t, Barrier> at;  // by address
    void start();                    // for the next block
    void end(Warp&);                 // the block ends, with this warp
    std::string missing() const;     // for the report of a deadlock: what the barriers wait for
};

bool decode_mbarrier(struct Decoder&);  // mbarrier.cpp: mbarrier, and the copies that arrive at one

// An address in shared memory as these instructions give it: `a` and `immediate`; the flags are in `size`.
constexpr uint32_t WIDE_ADDRESS = 1, GENERIC_ADDRESS = 2;
uint32_t shared_address(Warp&, const Instruction&, int lane);
void decode_shared_address(struct Decoder&, int operand);

}  // namespace ptx
