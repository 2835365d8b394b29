// Values that nobody may use: of a division by zero, and of a shift by the width of its type or more.
//
// C and C++ leave both undefined, and compilers count on that. PTX does not stop there, so NVVM moves a division before the test of its
// divisor, and chooses by the test later. Hence the fault is the use of the value: as an address, as what is stored or given to other lanes,
// or for a branch. Until then it is followed from register to register, and a choice of the other value ends it.
#pragma once
#include <map>

#include "machine.h"

namespace ptx {

struct Undefined {
    std::vector<uint32_t> lanes;  // of each row, by its offset / 4: which lanes hold such a value
    struct Origin {
        int at;                   // the instruction that made it
        std::string what;
    };
    std::map<uint32_t, Origin> origins;  // by row
};

// The rows' lanes hold undefined values from now on.
void undefine(Warp&, uint32_t row, uint32_t lanes, const std::string& what);

// Called before each instruction while a warp holds undefined values. `lanes` are at it, and `asked` take part.
void follow(Warp&, const Instruction&, uint32_t lanes, uint32_t asked);

}  // namespace ptx
