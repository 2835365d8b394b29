// Products of tensor cores: mma.sync at once, wgmma as late as a wait allows.
#pragma once
#include <deque>
#include <set>

#include "machine.h"

namespace ptx {

// Of a warp: its quarter of the products of a warpgroup.
struct Products {
    struct Product {
        const Instruction* instruction;
        uint64_t a, b;  // descriptors
        bool adds;
    };
    std::deque<std::vector<Product>> groups;  // committed, oldest first
    std::vector<Product> open;
    std::set<uint32_t> under_way;   // rows of sums that a product will write
    std::set<uint32_t> unfenced;    // rows of sums that were accessed since the last wgmma.fence
    void start();      // for the next block
    void end(Warp&);   // the warp's last thread ends: stops the launch if a product is still under way
};

// Called before each instruction of a warp that has products: stops the launch if it touches registers of one under way.
void watch(Warp&, const Instruction&, uint32_t lanes);

}  // namespace ptx
