// Operations of a warp as one: shuffles, votes, matches, reductions, bar.warp.sync. The scheduler has gathered the lanes of the member mask.
#include <algorithm>

#include "decode.h"

namespace ptx {
namespace {

enum class Mode : uint8_t { UP, DOWN, BUTTERFLY, INDEX };

// shfl.sync: lane l reads the value of lane j if j is in its segment, its own otherwise; `e`, if there is one, says which.
// a: values, b: distance or lane, c: the segment's mask in bits 8 to 12 and the last lane's bound in bits 0 to 4.
template <Mode MODE>
void shuffle(Warp& warp, const Instruction& i, uint32_t lanes) {
    const uint32_t *values = warp.row<uint32_t>(i.a), *by = warp.row<uint32_t>(i.b), *clamps = warp.row<uint32_t>(i.c);
    uint32_t result[LANES], inside = 0;
    for_lanes(lanes, [&](int lane) {
        const int distance = int(by[lane] & 31), clamp = int(clamps[lane] & 31), segment = int(clamps[lane] >> 8 & 31);
        const int last = (lane & segment) | (clamp & ~segment), first = lane & segment;
        const int from = MODE == Mode::UP          ? lane - distance
                         : MODE == Mode::DOWN      ? lane + distance
                         : MODE == Mode::BUTTERFLY ? lane ^ distance
                                                   : first | (distance & ~segment);
        const bool within = MODE == Mode::UP ? from >= last : from <= last;
        const int chosen = within ? from : lane;
        if (!(lanes >> chosen & 1)) fail(warp, lane, format("it reads the value of lane %d, which does not take part in the shuffle", chosen));
        result[lane] = values[chosen];
        inside |= uint32_t(within) << lane;
    });
    uint32_t* to = warp.row<uint32_t>(i.d);
    for_lanes(lanes, [&](int lane) { to[lane] = result[lane]; });
    if (i.e != NONE) warp.bits(i.e) = (warp.bits(i.e) & ~lanes) | inside;
}

uint32_t votes(Warp& warp, const Instruction& i, uint32_t lanes) { return lanes & (i.immediate ? ~warp.bits(i.a) : warp.bits(i.a)); }

void ballot(Warp& warp, const Instruction& i, uint32_t lanes) {
    const uint32_t found = votes(warp, i, lanes);
    set_row(warp.row<uint32_t>(i.d), lanes, [=](int) { return found; });
}

enum class Vote : uint8_t { ANY, ALL_OF, UNIFORM };

template <Vote VOTE>
void vote(Warp& warp, const Instruction& i, uint32_t lanes) {
    const uint32_t found = votes(warp, i, lanes);
    const bool yes = VOTE == Vote::ANY ? found != 0 : VOTE == Vote::ALL_OF ? found == lanes : found == lanes || found == 0;
    warp.bits(i.d) = (warp.bits(i.d) & ~lanes) | (yes ? lanes : 0);
}

// match.any.sync: for each lane, the lanes with its value.
template <class T>
void match_any(Warp& warp, const Instruction& i, uint32_t lanes) {
    T values[LANES];
    std::copy_n(warp.row<T>(i.a), LANES, values);
    uint32_t* to = warp.row<uint32_t>(i.d);
    for_lanes(lanes, [&](int lane) {
        uint32_t same = 0;
        for_lanes(lanes, [&](int other) { same |= uint32_t(values[other] == values[lane]) << other; });
        to[lane] = same;
    });
}

// match.all.sync: the lanes if all have one value, else 0; `e`, if there is one, says which.
template <class T>
void match_all(Warp& warp, const Instruction& i, uint32_t lanes) {
    const T* values = warp.row<T>(i.a);
    bool same = true;
    for_lanes(lanes, [&](int lane) { same &= values[lane] == values[__builtin_ctz(lanes)]; });
    set_row(warp.row<uint32_t>(i.d), lanes, [=](int) { return same ? lanes : 0u; });
    if (i.e != NONE) warp.bits(i.e) = (warp.bits(i.e) & ~lanes) | (same ? lanes : 0);
}

template <class T, class F>
void reduce(Warp& warp, const Instruction& i, uint32_t lanes, F both) {
    const T* values = warp.row<T>(i.a);
    T found = values[__builtin_ctz(lanes)];
    for_lanes(lanes & (lanes - 1), [&](int lane) { found = both(found, values[lane]); });
    set_row(warp.row<T>(i.d), lanes, [=](int) { return found; });
}

template <class T>
Instruction::Run reduction(const std::string& operation) {
    if (operation == "add") return [](Warp& w, const Instruction& i, uint32_t lanes) { reduce<T>(w, i, lanes, [](T a, T b) { return T(uint32_t(a) + uint32_t(b)); }); };
    if (operation == "min") return [](Warp& w, const Instruction& i, uint32_t lanes) { reduce<T>(w, i, lanes, [](T a, T b) { return std::min(a, b); }); };
    if (operation == "max") return [](Warp& w, const Instruction& i, uint32_t lanes) { reduce<T>(w, i, lanes, [](T a, T b) { return std::max(a, b); }); };
    if (operation == "and") return [](Warp& w, const Instruction& i, uint32_t lanes) { reduce<T>(w, i, lanes, [](T a, T b) { return T(a & b); }); };
    if (operation == "or") return [](Warp& w, const Instruction& i, uint32_t lanes) { reduce<T>(w, i, lanes, [](T a, T b) { return T(a | b); }); };
    if (operation == "xor") return [](Warp& w, const Instruction& i, uint32_t lanes) { reduce<T>(w, i, lanes, [](T a, T b) { return T(a ^ b); }); };
    return nullptr;
}

// The targets "%r1|%p1": a value, and a predicate that may be absent.
void two_targets(Decoder& d, Type type) {
    const std::string& text = d.statement.operands.at(0);
    const size_t bar = text.find('|');
    d.out.d = d.target(text.substr(0, bar), type);
    if (bar != std::string::npos) d.out.e = d.target(text.substr(bar + 1), {'p', 0});
}

}  // namespace

bool decode_collective(Decoder& d) {
    const Statement& s = d.statement;
    const std::string& name = s.parts[0];
    const Type word{'b', 32};
    Instruction& out = d.out;
    out.kind = Kind::COLLECTIVE;
    if (name == "shfl" && s.has("sync")) {
        two_targets(d, word);
        out.a = d.source(1, word);
        out.b = d.source(2, word);
        out.c = d.source(3, word);
        out.mask = d.source(4, word);
        out.run = s.has("up") ? shuffle<Mode::UP> : s.has("down") ? shuffle<Mode::DOWN> : s.has("bfly") ? shuffle<Mode::BUTTERFLY> : shuffle<Mode::INDEX>;
    } else if (name == "vote" && s.has("sync")) {
        const std::string& predicate = s.operands.at(1);
        const bool negated = predicate[0] == '!';
        out.immediate = negated;
        out.d = d.target(0, s.has("ballot") ? word : Type{'p', 0});
        out.a = d.source(predicate.substr(negated), {'p', 0});
        out.mask = d.source(2, word);
        out.run = s.has("ballot") ? ballot : s.has("any") ? vote<Vote::ANY> : s.has("all") ? vote<Vote::ALL_OF> : vote<Vote::UNIFORM>;
    } else if (name == "match" && s.has("sync")) {
        const bool wide = d.type().bits == 64, any = s.has("any");
        two_targets(d, word);
        out.a = d.source(1, d.type());
        out.mask = d.source(2, word);
        out.run = any ? (wide ? match_any<uint64_t> : match_any<uint32_t>) : (wide ? match_all<uint64_t> : match_all<uint32_t>);
    } else if (name == "redux" && s.has("sync")) {
        out.d = d.target(0, word);
        out.a = d.source(1, word);
        out.mask = d.source(2, word);
        if (d.type().kind == 'f' || d.type().bits != 32 || s.parts.size() != 4) d.unknown();
        out.run = d.type().kind == 's' ? reduction<int32_t>(s.parts.at(2)) : reduction<uint32_t>(s.parts.at(2));
        if (!out.run) d.unknown();
    } else if (name == "bar" && s.has("warp")) {
        out.mask = d.source(0, word);
        out.run = [](Warp& warp, const Instruction&, uint32_t) { warp.tick(); };
    } else if (name == "activemask") {
        out.kind = Kind::PLAIN;
        out.d = d.target(0, word);
        out.run = [](Warp& warp, const Instruction& i, uint32_t lanes) { set_row(warp.row<uint32_t>(i.d), lanes, [=](int) { return lanes; }); };
    } else {
        out.kind = Kind::PLAIN;
        return false;
    }
    return true;
}

}  // namespace ptx
