// Runs launches (control.cpp).
#pragma once
#include "machine.h"

namespace ptx {

// What a barrier's Instruction is decoded with: `a` its number, `b` how many threads (NONE: the block), `c` a predicate to reduce into `d`.
constexpr int64_t ONLY_ARRIVES = 1, NEGATED = 2;  // in `immediate`
constexpr uint32_t POPC = 1, AND = 2, OR = 3;     // in `size`

// Runs every block of a launch. `arguments`: where each parameter's bytes are. Throws Failure.
void execute(Launch&, const std::vector<const uint8_t*>& arguments);

// "PTX line 120 (norm.cuh:57, called at norm.cu:30)"
std::string place(const Launch&, const Instruction&);

}  // namespace ptx
