// Products of tensor cores: mma.sync at once, wgmma as late as a wait allows.
#pragma once
#include <deque>

#include "machine.h"

namespace ptx {

// A warp's quarter of a product of its warpgroup.
struct Product {
    const Instruction* instruction;
    int at;         // the index of that instruction
    uint64_t a, b;  // descriptors; a is 0 if the first operand is in registers
    bool adds;      // to what the sums hold
    bool done;
};

// Of a warp.
struct Products {
    std::deque<std::vector<Product>> groups;  // committed, oldest first
    std::vector<Product> open;                // not committed
    bool fenced = false;                      // since the warp began
    std::vector<uint8_t> rows;                // by offset / 64: the flags below
    uint64_t issued = 0;

    // Of the first warp of a warpgroup: what its warps issued, from number `log_start` on; those that all four issued are forgotten.
    std::deque<Product> log;
    uint64_t log_start = 0;

    void start();     // for the next block
    void end(Warp&);  // the warp's last thread ends: stops the launch if a product was not waited for, or not issued by the whole warpgroup
};

// What a row of registers is to the products of its warp.
constexpr uint8_t SUMS = 1, FRAGMENT = 2, UNFENCED = 4;  // written by one under way; read by one under way; accessed since the last fence

// Called before each instruction of a warp that has products: stops the launch if it touches registers of one under way.
void watch(Warp&, const Instruction&, uint32_t lanes);

bool decode_wgmma(struct Decoder&);  // wgmma.cpp

}  // namespace ptx
