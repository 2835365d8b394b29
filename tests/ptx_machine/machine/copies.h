// Copies that run in the background (cp.async, cp.async.bulk), and the barriers in shared memory that threads and copies arrive at (mbarrier).
// A copy is carried out as late as a wait allows, so that what reads too early reads "not written".
#pragma once
#include <deque>
#include <map>

#include "machine.h"

namespace ptx {

struct Copy {
    uint32_t to;      // in shared memory
    uint64_t from;    // in global memory
    uint32_t bytes;   // that are written
    uint32_t read;    // that are read: the others are written as zeros
    int at;           // the instruction that began it
};

// Of a warp: for each lane, the groups that are committed, oldest first, and the one that is open.
struct Copies {
    std::deque<std::vector<Copy>> groups[LANES];
    std::vector<Copy> open[LANES];
    void start();            // for the next block
    void end(Warp&, int lane);  // a thread ends: stops the launch if a copy is still under way
};

struct Barrier {
    uint32_t count, pending, phase;
    int64_t bytes;                     // that bulk copies still have to bring in this phase
    uint32_t seen[LANES], next[LANES];  // vector clocks of the phase that is over, and of the one under way
};

struct Barriers {
    std::map<uint32_t, Barrier> at;  // by address
    void start();
};

}  // namespace ptx
