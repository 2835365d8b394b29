// See undefined.h.
#include "undefined.h"

#include <cstring>

#include "control.h"

namespace ptx {
namespace {

uint32_t lanes_of(const Undefined& undefined, uint32_t row) { return undefined.lanes[row / 4]; }

[[noreturn]] void stop(Warp& warp, uint32_t row, uint32_t lanes) {
    const Undefined::Origin& origin = warp.undefined->origins.at(row);
    const Kernel& kernel = *warp.block->kernel;
    const auto named = kernel.names.find(row);
    const std::string name = named == kernel.names.end() ? "a value" : named->second;
    const std::string where = place(*warp.block->launch, kernel.code[size_t(origin.at)]);
    fail(warp, __builtin_ctz(lanes),
         format("use of %s, which is undefined: it comes from %s at %s", name.c_str(), origin.what.c_str(), where.c_str()));
}

// Lanes where a row is all zeros, or all ones, so that `and` or `or` with anything else gives the same.
uint32_t lanes_with(Warp& warp, uint32_t row, bool ones) {
    const uint32_t width = warp.block->kernel->widths.at(row);
    if (!width) return ones ? warp.bits(row) : ~warp.bits(row);
    const uint64_t wanted = ones ? ~0ull : 0;
    const uint8_t* bytes = warp.row<uint8_t>(row);
    uint32_t found = 0;
    for (uint32_t lane = 0; lane < LANES; lane++) found |= uint32_t(memcmp(bytes + lane * width, &wanted, width) == 0) << lane;
    return found;
}

// The lanes whose result is undefined.
uint32_t spread(Warp& warp, const Instruction& i, uint32_t sources) {
    const Undefined& undefined = *warp.undefined;
    const auto without = [&](uint32_t one, uint32_t other, bool ones) {
        return lanes_of(undefined, one) & ~(lanes_with(warp, other, ones) & ~lanes_of(undefined, other));
    };
    switch (i.follows) {
        case Follows::CHOICE: {
            const uint32_t chosen = warp.bits(i.c);
            return lanes_of(undefined, i.c) | (lanes_of(undefined, i.a) & chosen) | (lanes_of(undefined, i.b) & ~chosen);
        }
        case Follows::AND: return without(i.a, i.b, false) | without(i.b, i.a, false);
        case Follows::OR: return without(i.a, i.b, true) | without(i.b, i.a, true);
        default: return sources;
    }
}

}  // namespace

void undefine(Warp& warp, uint32_t row, uint32_t lanes, const std::string& what) {
    if (!warp.undefined) {
        warp.undefined = std::make_unique<Undefined>();
        warp.undefined->lanes.resize(warp.block->kernel->register_bytes / 4);
    }
    warp.undefined->lanes[row / 4] |= lanes;
    warp.undefined->origins[row] = {warp.at, what};
}

void follow(Warp& warp, const Instruction& i, uint32_t lanes, uint32_t asked) {
    Undefined& undefined = *warp.undefined;
    if (i.predicate != NONE && lanes_of(undefined, i.predicate) & lanes) stop(warp, i.predicate, lanes_of(undefined, i.predicate) & lanes);
    uint32_t found = 0, from = NONE;
    for (const uint32_t row : i.reads) {
        if (!(lanes_of(undefined, row) & asked)) continue;
        if (i.follows == Follows::NEVER) stop(warp, row, lanes_of(undefined, row) & asked);
        found |= lanes_of(undefined, row);
        from = row;
    }
    found = found & asked ? spread(warp, i, found) & asked : 0;
    const Undefined::Origin origin = found ? undefined.origins.at(from) : Undefined::Origin();
    for (const uint32_t row : i.writes) {
        uint32_t& held = undefined.lanes[row / 4];
        if (!held && !found) continue;
        held = (held & ~asked) | found;
        if (found) undefined.origins[row] = origin;
        else if (!held) undefined.origins.erase(row);
    }
    if (undefined.origins.empty()) warp.undefined.reset();
}

}  // namespace ptx
