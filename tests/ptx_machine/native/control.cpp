// Control flow: which warp goes on, with which lanes, and when barriers open.
//
// A block's warps take turns. A turn takes lanes that stand at the same instruction and runs them until they branch apart, wait, meet lanes
// that are behind, or the turn is over; so lanes that diverged meet again, as on a card. With a seed, turns have random lengths, the next
// warp is chosen at random, and now and then so are the lanes: whatever a program does not force by synchronising, happens in some schedule.
#include "control.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <numeric>
#include <thread>

#include "copies.h"
#include "decode.h"
#include "memory.h"
#include "tensor_cores.h"
#include "undefined.h"

namespace ptx {

constexpr int BARRIERS = 16;                     // of a block
constexpr int MOST_POLLS = 1 << 17;              // turns in a row that only found an mbarrier closed
constexpr uint64_t POLL_LOOP = 8;                // a turn of fewer instructions may be the rest of a loop round an mbarrier that is closed
constexpr int TURN = 2000, LONGEST_TURN = 128;   // instructions of a turn, without a seed and with one

Warp::Warp() : block(nullptr), number(0), registers(nullptr) {}
Warp::~Warp() = default;
Warp::Warp(Warp&&) = default;
Block::Block() = default;
Block::~Block() = default;
Launch::Launch() = default;
Launch::~Launch() = default;

// ---- messages ------------------------------------------------------------------------------------------------------------------------

std::string place(const Launch& launch, const Instruction& instruction) {
    std::string text = format("PTX line %d", instruction.line);
    const std::vector<Source>& sources = launch.module->sources;
    const char* between = " (";
    for (int source = instruction.source; source >= 0; source = sources[size_t(source)].inlined_at) {
        text += format("%s%s:%d", between, sources[size_t(source)].file.c_str(), sources[size_t(source)].line);
        between = ", called at ";
    }
    return text + (instruction.source >= 0 ? ")" : "");
}

// An instruction of wgmma names up to 128 registers.
static std::string shortened(const std::string& text) { return text.size() > 120 ? text.substr(0, 117) + ".." : text; }

void fail(const Warp& warp, int lane, const std::string& what) {
    const Instruction& instruction = warp.block->kernel->code[size_t(warp.at)];
    const std::string who = lane < 0 ? format("warp %d", warp.number) : format("thread %d", warp.number * LANES + lane);
    throw Failure(format("block %u, %s: %s; at %s: %s", warp.block->number, who.c_str(), what.c_str(),
                         place(*warp.block->launch, instruction).c_str(), shortened(instruction.text).c_str()));
}

// ---- a block -------------------------------------------------------------------------------------------------------------------------

namespace {

// What has come to one of a block's barriers.
struct Gathering {
    uint32_t threads = 0;          // that have arrived
    uint32_t wanted = 0;           // 0: the whole block
    std::vector<int> waiting;      // warps
    int instruction = -1;          // of the first to arrive
    int first_warp = -1;
    uint32_t seen[LANES] = {};     // what those that arrived have seen
    uint32_t votes = 0;            // of bar.red: predicates that are true
};

uint64_t special_value(const Warp& warp, int lane, const std::string& name) {
    const Launch& launch = *warp.block->launch;
    const uint32_t thread = uint32_t(warp.number * LANES + lane), number = warp.block->number;
    const uint32_t *block = launch.block, *grid = launch.grid;
    const uint32_t in_block[3] = {thread % block[0], thread / block[0] % block[1], thread / block[0] / block[1]};
    const uint32_t in_grid[3] = {number % grid[0], number / grid[0] % grid[1], number / grid[0] / grid[1]};
    const size_t dot = name.find('.');
    const std::string base = name.substr(0, dot);
    if (dot != std::string::npos && name.size() == dot + 2 && name[dot + 1] >= 'x' && name[dot + 1] <= 'z') {
        const int axis = name[dot + 1] - 'x';
        if (base == "%tid") return in_block[axis];
        if (base == "%ntid") return block[axis];
        if (base == "%ctaid") return in_grid[axis];
        if (base == "%nctaid") return grid[axis];
    }
    if (name == "%laneid") return uint64_t(lane);
    if (name == "%warpid") return uint64_t(warp.number);
    if (name == "%nwarpid") return warp.block->warps.size();
    if (name == "%dynamic_smem_size") return launch.dynamic_shared;
    if (name == "%total_smem_size") return launch.dynamic_shared + warp.block->kernel->shared_bytes;
    if (name == "%lanemask_eq") return 1u << lane;
    if (name == "%lanemask_lt") return (1u << lane) - 1;
    if (name == "%lanemask_le") return (2ull << lane) - 1;
    if (name == "%lanemask_gt") return uint32_t(~((2ull << lane) - 1));
    if (name == "%lanemask_ge") return uint32_t(~((1u << lane) - 1));
    throw Failure("the machine does not know the special register " + name);
}

// One block, from its first instruction to its last; the same object runs one block after another.
class Runner {
   public:
    Runner(Launch& launch, const std::vector<const uint8_t*>& arguments);
    ~Runner() { free(registers); }
    void run(uint32_t number);
    Block block;

   private:
    Launch& launch;
    const Kernel& kernel;
    uint8_t* registers = nullptr;
    Gathering gatherings[BARRIERS];
    uint64_t instructions = 0;

    void start(uint32_t number);
    Warp* next(size_t& turn);
    bool take_turn(Warp&, int length);
    uint32_t choose(Warp&, uint32_t& pc, uint32_t& meets) const;
    void go(Warp&, uint32_t lanes, uint32_t pc);
    void end(Warp&, uint32_t lanes);
    bool collect(Warp&, const Instruction&, uint32_t pc, uint32_t asked, uint32_t others);
    bool at_barrier(Warp&, const Instruction&, uint32_t pc, uint32_t asked, uint32_t others);
    void arrive(Warp&, const Instruction&, int pc);
    void open(Gathering&);
    void trace(Warp&, const Instruction&, uint32_t lanes, bool before);
    [[noreturn]] void stuck();
};

Runner::Runner(Launch& launch, const std::vector<const uint8_t*>& arguments) : launch(launch), kernel(*launch.kernel) {
    const uint32_t* size = launch.block;
    block.launch = &launch;
    block.kernel = &kernel;
    block.threads = size[0] * size[1] * size[2];
    const size_t warps = (block.threads + LANES - 1) / LANES, bytes = (kernel.register_bytes + 255u) / 256u * 256u;
    registers = static_cast<uint8_t*>(aligned_alloc(256, std::max<size_t>(bytes, 256) * warps));
    std::fill(registers, registers + bytes * warps, 0xa5);
    const uint32_t aligned = (kernel.shared_bytes + kernel.dynamic_alignment - 1) / kernel.dynamic_alignment * kernel.dynamic_alignment;
    const uint32_t shared = launch.dynamic_shared ? aligned + launch.dynamic_shared : kernel.shared_bytes;
    block.shared.reset(new SharedMemory(shared, int(warps), kernel.async_proxy, kernel.smallest_shared_write));
    block.barriers.reset(new Barriers);
    block.warps.resize(warps);
    for (size_t i = 0; i < warps; i++) {
        Warp& warp = block.warps[i];
        warp.block = &block;
        warp.number = int(i);
        warp.registers = registers + bytes * i;
        warp.copies.reset(new Copies);
        warp.products.reset(new Products);
        const auto fill = [&](uint32_t row, uint32_t width, uint64_t bits) {
            if (width == 0) warp.bits(row) = bits ? ALL : 0;
            for (int lane = 0; width && lane < LANES; lane++) std::copy_n(reinterpret_cast<uint8_t*>(&bits), width, warp.registers + row + uint32_t(lane) * width);
        };
        for (const Constant& constant : kernel.constants) fill(constant.row, constant.width, constant.bits);
        for (size_t p = 0; p < arguments.size(); p++) {
            uint64_t value = 0;
            std::copy_n(arguments[p], kernel.parameters[p].size, reinterpret_cast<uint8_t*>(&value));
            fill(kernel.parameters[p].row, kernel.widths.at(kernel.parameters[p].row), value);
        }
        if (kernel.dynamic_row != NONE) fill(kernel.dynamic_row, 4, SHARED_BASE + aligned);
        if (kernel.dynamic_row_wide != NONE) fill(kernel.dynamic_row_wide, 8, SHARED_BASE + aligned);
    }
}

void Runner::start(uint32_t number) {
    block.number = number;
    block.random_state = (launch.seed * 0x9e3779b97f4a7c15ull) ^ ((number + 1) * 0xd1b54a32d192ed03ull);
    block.random_state += block.random_state == 0;
    block.shared->start();
    block.barriers->start();
    instructions = 0;
    for (Gathering& gathering : gatherings) gathering = Gathering();
    // clocks go on from block to block, so that shared memory's records of earlier blocks are all in the past
    uint32_t now = 0;
    for (const Warp& warp : block.warps) now = std::max(now, warp.clock.now);
    for (Warp& warp : block.warps) {
        std::fill(warp.clock.seen, warp.clock.seen + LANES, now);
        warp.clock.now = now + 1;
        warp.copies->start();
        warp.products->start();
        warp.waits = warp.watched = false;
        warp.undefined.reset();
        const uint32_t left = block.threads - uint32_t(warp.number) * LANES;
        warp.alive = left >= LANES ? ALL : (1u << left) - 1;
        for (int lane = 0; lane < LANES; lane++) {
            warp.pc[lane] = 0;
            warp.state[lane] = warp.alive >> lane & 1 ? State::RUNS : State::ENDED;
        }
        for (const Special& special : kernel.specials) {
            for (int lane = 0; lane < LANES; lane++) warp.row<uint32_t>(special.row)[lane] = uint32_t(special_value(warp, lane, special.name));
        }
    }
}

uint32_t lanes_in(const Warp& warp, State state) {
    uint32_t found = 0;
    for (int lane = 0; lane < LANES; lane++) found |= uint32_t(warp.state[lane] == state) << lane;
    return found;
}

// The warp whose turn it is, or null if none can go on.
Warp* Runner::next(size_t& turn) {
    const size_t count = block.warps.size(), first = launch.seed ? block.random() % count : turn++ % count;
    for (size_t i = 0; i < count; i++) {
        Warp& warp = block.warps[(first + i) % count];
        if (lanes_in(warp, State::RUNS)) {
            if (!launch.seed) turn = (first + i) % count + 1;
            return &warp;
        }
    }
    return nullptr;
}

void Runner::run(uint32_t number) {
    start(number);
    size_t turn = 0;
    int polls = 0;
    std::vector<char> waited(block.warps.size());
    for (Warp* warp = next(turn); warp; warp = next(turn)) {
        const uint64_t before = instructions;
        bool moved = take_turn(*warp, launch.seed ? 1 + int(block.random() % LONGEST_TURN) : TURN);
        if (moved && waited[size_t(warp->number)] && instructions - before < POLL_LOOP) moved = false;
        waited[size_t(warp->number)] = !moved;
        polls = moved ? 0 : polls + 1;
        if (polls > MOST_POLLS) fail(*warp, -1, "the kernel does not end: every thread that is left polls, for an mbarrier or in a loop of nanosleep: " + block.barriers->missing());
        if (instructions > launch.most_instructions) fail(*warp, -1, format("the kernel does not end: %llu instructions of the block's warps", (unsigned long long)instructions));
    }
    for (const Warp& warp : block.warps) {
        if (warp.alive) stuck();
    }
    for (int i = 0; i < BARRIERS; i++) {
        const Gathering& gathering = gatherings[i];
        if (gathering.threads == 0) continue;
        Warp& warp = block.warps[size_t(gathering.first_warp)];
        warp.at = gathering.instruction;
        fail(warp, -1, format("%u threads arrived at barrier %d, and nobody waited for them before the block ended", gathering.threads, i));
    }
    block.barriers->end(block.warps[0]);
}

// Lanes at one instruction: those furthest behind, so that others meet them there, or now and then at random. `meets`: the next instruction
// at which other lanes wait to be joined.
uint32_t Runner::choose(Warp& warp, uint32_t& pc, uint32_t& meets) const {
    const uint32_t runs = lanes_in(warp, State::RUNS);
    meets = NONE;
    uint32_t furthest = 0;
    pc = NONE;
    for_lanes(runs, [&](int lane) {
        pc = std::min(pc, warp.pc[lane]);
        furthest = std::max(furthest, warp.pc[lane]);
    });
    if (warp.waits) {  // those behind poll for what those ahead may have to do
        pc = furthest;
    } else if (launch.seed && furthest != pc && (warp.block->random() & 7) == 0) {
        uint32_t left = runs;
        for (int skip = int(warp.block->random() % uint32_t(__builtin_popcount(runs))); skip > 0; skip--) left &= left - 1;
        if (left) pc = warp.pc[__builtin_ctz(left)];
    }
    uint32_t lanes = 0;
    for_lanes(runs, [&](int lane) {
        if (warp.pc[lane] == pc) lanes |= 1u << lane;
        else if (warp.pc[lane] > pc) meets = std::min(meets, warp.pc[lane]);
    });
    return lanes;
}

void Runner::go(Warp& warp, uint32_t lanes, uint32_t pc) {
    for_lanes(lanes, [&](int lane) { warp.pc[lane] = pc; });
}

// -> whether it did anything but find an mbarrier closed
bool Runner::take_turn(Warp& warp, int length) {
    const bool traced = launch.trace && block.number == uint32_t(launch.trace_block) && warp.number == launch.trace_warp;
    const Instruction* code = kernel.code.data();
    int done = 0;
    while (length > 0 && lanes_in(warp, State::RUNS)) {
        uint32_t pc, meets;
        uint32_t lanes = choose(warp, pc, meets);
        warp.waits = false;
        while (lanes && length-- > 0 && pc < meets) {
            const Instruction& instruction = code[pc];
            warp.at = int(pc);
            uint32_t asked = lanes;  // without those whose predicate says no
            if (instruction.predicate != NONE) asked &= instruction.negated ? ~warp.bits(instruction.predicate) : warp.bits(instruction.predicate);
            block.counters.thread_instructions += uint64_t(__builtin_popcount(asked));
            done++;
            if (warp.undefined) follow(warp, instruction, lanes, asked);
            if (asked && warp.watched) watch(warp, instruction, asked);
            if (traced) trace(warp, instruction, asked, true);
            switch (instruction.kind) {
                case Kind::PLAIN:
                case Kind::POLL:
                    if (asked) instruction.run(warp, instruction, asked);
                    pc++;
                    break;
                case Kind::BRANCH:
                    if (asked == lanes) {
                        pc = uint32_t(instruction.target);
                    } else if (asked) {
                        if (instruction.uniform) fail(warp, __builtin_ctz(asked), "a branch that the compiler took to be uniform is taken by some lanes only");
                        go(warp, asked, uint32_t(instruction.target));
                        go(warp, lanes & ~asked, pc + 1);
                        lanes = 0;
                    } else {
                        pc++;
                    }
                    break;
                case Kind::EXIT:
                    end(warp, asked);
                    lanes &= ~asked;
                    pc++;
                    break;
                case Kind::COLLECTIVE:
                    if (asked && !collect(warp, instruction, pc, asked, lanes & ~asked)) lanes = 0;
                    else pc++;
                    break;
                case Kind::BARRIER:
                    if (asked && !at_barrier(warp, instruction, pc, asked, lanes & ~asked)) lanes = 0;
                    else pc++;
                    break;
            }
            if (traced) trace(warp, instruction, asked, false);
            if (warp.waits && instruction.kind == Kind::BRANCH) length = 0;
        }
        go(warp, lanes, pc);
    }
    block.counters.warp_instructions += uint64_t(done);
    instructions += uint64_t(done);
    return !warp.waits;
}

void Runner::end(Warp& warp, uint32_t lanes) {
    for_lanes(lanes, [&](int lane) {
        warp.copies->end(warp, lane);
        warp.state[lane] = State::ENDED;
    });
    warp.alive &= ~lanes;
    if (!warp.alive) warp.products->end(warp);
}

// ---- operations of a warp ------------------------------------------------------------------------------------------------------------

// Lanes have come to an operation that others must join.  -> true if all `asked` have done it; otherwise they wait, or the lanes of the group
// have different places now, which are noted.
bool Runner::collect(Warp& warp, const Instruction& instruction, uint32_t pc, uint32_t asked, uint32_t others) {
    uint32_t gathered = asked;
    for (int lane = 0; lane < LANES; lane++) {
        if (warp.state[lane] == State::GATHERS && warp.pc[lane] == pc) gathered |= 1u << lane;
    }
    const uint32_t came = gathered;
    uint32_t left = gathered, finished = 0;
    while (left) {
        uint32_t members = ALL, same = left;
        const int first = __builtin_ctz(left);
        if (instruction.mask == NONE) {
            members = warp.alive;
            if (warp.alive != ALL) fail(warp, first, "an .aligned instruction in a warp whose lanes are not all there");
        } else {
            const uint32_t* masks = warp.row<uint32_t>(instruction.mask);
            members = masks[first];
            same = 0;
            for_lanes(left, [&](int lane) { same |= uint32_t(masks[lane] == members) << lane; });
            if (same & ~members) fail(warp, __builtin_ctz(same & ~members), format("a lane that is not in its own member mask, %08x", members));
            if (members & ~warp.alive) {
                const int gone = __builtin_ctz(members & ~warp.alive), thread = warp.number * LANES + gone;
                fail(warp, first, format("the member mask %08x names thread %d, which %s", members, thread,
                                         uint32_t(thread) < block.threads ? "has ended" : "the block does not have"));
            }
        }
        if ((same & members) == members) {
            instruction.run(warp, instruction, members);
            finished |= members;
        }
        left &= ~same;
    }
    for_lanes(finished, [&](int lane) { warp.state[lane] = State::RUNS; });
    if (finished == asked && came == asked && !others) return true;
    go(warp, finished | others, pc + 1);
    for_lanes(came & ~finished, [&](int lane) {
        warp.state[lane] = State::GATHERS;
        warp.pc[lane] = pc;
    });
    return false;
}

// ---- barriers of a block -------------------------------------------------------------------------------------------------------------

// -> true if the lanes go on at once, because they only arrive
bool Runner::at_barrier(Warp& warp, const Instruction& instruction, uint32_t pc, uint32_t asked, uint32_t others) {
    uint32_t gathered = asked;
    for (int lane = 0; lane < LANES; lane++) {
        if (warp.state[lane] == State::GATHERS && warp.pc[lane] == pc) gathered |= 1u << lane;
    }
    go(warp, others, pc + 1);
    for_lanes(gathered, [&](int lane) {
        warp.state[lane] = State::GATHERS;
        warp.pc[lane] = pc;
    });
    if (gathered == warp.alive) arrive(warp, instruction, int(pc));
    return false;
}

// The whole warp has come.
void Runner::arrive(Warp& warp, const Instruction& instruction, int pc) {
    const int first = __builtin_ctz(warp.alive);
    const uint32_t number = warp.row<uint32_t>(instruction.a)[first], wanted = instruction.b == NONE ? 0 : warp.row<uint32_t>(instruction.b)[first];
    for_lanes(warp.alive, [&](int lane) {
        const bool same = warp.row<uint32_t>(instruction.a)[lane] == number && (instruction.b == NONE || warp.row<uint32_t>(instruction.b)[lane] == wanted);
        if (!same) fail(warp, lane, format("it comes to another barrier, or for another number of threads, than thread %d of its warp", warp.number * LANES + first));
    });
    if (number >= BARRIERS) fail(warp, first, format("barrier %u: a block has %d", number, BARRIERS));
    if (wanted % LANES || wanted > block.threads + LANES - 1) fail(warp, first, format("a barrier of %u threads in a block of %u", wanted, block.threads));
    Gathering& gathering = gatherings[number];
    if (gathering.instruction < 0) {
        gathering.instruction = pc;
        gathering.first_warp = warp.number;
        gathering.wanted = wanted;
    } else if (gathering.wanted != wanted) {
        fail(warp, first, format("it waits at barrier %u for %u threads, warp %d for %u", number, wanted, gathering.first_warp, gathering.wanted));
    } else if (!wanted && gathering.instruction != pc) {
        fail(warp, first, format("the block's barrier is met at two places: warp %d waits at %s", gathering.first_warp,
                                 place(launch, kernel.code[size_t(gathering.instruction)]).c_str()));
    }
    gathering.threads += wanted ? LANES : uint32_t(__builtin_popcount(warp.alive));
    if (instruction.c != NONE) gathering.votes += uint32_t(__builtin_popcount(warp.alive & (instruction.immediate & NEGATED ? ~warp.bits(instruction.c) : warp.bits(instruction.c))));
    warp.tick();
    for (int i = 0; i < LANES; i++) gathering.seen[i] = std::max(gathering.seen[i], warp.clock.seen[i]);
    const bool waits = !(instruction.immediate & ONLY_ARRIVES);
    for_lanes(warp.alive, [&](int lane) {
        warp.state[lane] = waits ? State::AT_BARRIER : State::RUNS;
        warp.pc[lane] = uint32_t(pc) + !waits;
    });
    if (waits) gathering.waiting.push_back(warp.number);
    const uint32_t needed = wanted ? wanted : block.threads;
    if (gathering.threads > needed) fail(warp, first, format("%u threads have come to barrier %u, which is for %u", gathering.threads, number, needed));
    if (gathering.threads == needed) open(gathering);
}

void Runner::open(Gathering& gathering) {
    for (const int number : gathering.waiting) {
        Warp& warp = block.warps[size_t(number)];
        std::copy_n(gathering.seen, LANES, warp.clock.seen);
        warp.clock.seen[number] = warp.clock.now - 1;
        const Instruction& instruction = kernel.code[warp.pc[__builtin_ctz(warp.alive)]];
        if (instruction.d != NONE) {
            const bool all = gathering.votes == gathering.threads, any = gathering.votes > 0;
            if (instruction.size == POPC) std::fill_n(warp.row<uint32_t>(instruction.d), LANES, gathering.votes);
            else warp.bits(instruction.d) = (instruction.size == AND ? all : any) ? ALL : 0;
        }
        for_lanes(warp.alive, [&](int lane) {
            warp.state[lane] = State::RUNS;
            warp.pc[lane]++;
        });
    }
    gathering = Gathering();
}

// Nothing can go on: says who waits for whom.
void Runner::stuck() {
    const auto who = [&](const Warp& warp, int lane) { return format("thread %d", warp.number * LANES + lane); };
    const auto where = [&](const Warp& warp, int lane) { return place(launch, kernel.code[warp.pc[lane]]); };
    for (Warp& warp : block.warps) {
        if (!warp.alive) continue;
        const int first = __builtin_ctz(warp.alive);
        warp.at = int(warp.pc[first]);
        const Kind kind = kernel.code[size_t(warp.at)].kind;
        const char* what = kind == Kind::BARRIER ? "a barrier" : "a warp operation";
        // a lane of its own warp, or else another warp, that does not come
        for (int lane = 0; lane < LANES; lane++) {
            const bool there = uint32_t(warp.number * LANES + lane) < block.threads;
            if (!there || (warp.state[lane] != State::ENDED && warp.pc[lane] == warp.pc[first])) continue;
            const std::string other = warp.state[lane] == State::ENDED ? " has ended" : " waits at " + where(warp, lane);
            fail(warp, first, format("it waits at %s, and %s of its warp%s", what, who(warp, lane).c_str(), other.c_str()));
        }
        for (const Warp& other : block.warps) {
            if (!other.alive) fail(warp, first, format("it waits at %s, and %s has ended", what, who(other, 0).c_str()));
            const int lane = __builtin_ctz(other.alive);
            if (other.pc[lane] == warp.pc[first]) continue;
            fail(warp, first, format("it waits at %s, and %s waits at %s", what, who(other, lane).c_str(), where(other, lane).c_str()));
        }
        fail(warp, first, format("it waits at %s that too few threads come to", what));
    }
    throw Failure("a deadlock");
}

// ---- traces --------------------------------------------------------------------------------------------------------------------------

// A lane's value in a row: a float if the instruction is one of floats.
std::string shown(Warp& warp, uint32_t row, uint32_t width, int lane, const std::string& text) {
    if (width == 8 && text.find(".f64") != std::string::npos) return format("%g", warp.row<double>(row)[lane]);
    if (width == 8) return format("%llx", (unsigned long long)warp.row<uint64_t>(row)[lane]);
    if (width == 2) return format("%x", warp.row<uint16_t>(row)[lane]);
    if (text.find(".f32") != std::string::npos) return format("%g", double(warp.row<float>(row)[lane]));
    return format("%d", warp.row<int32_t>(row)[lane]);
}

// One line for an instruction before it runs, and one for each row that it wrote: what the lanes that took part have there now.
void Runner::trace(Warp& warp, const Instruction& instruction, uint32_t lanes, bool before) {
    if (before) {
        launch.trace(format("%5d  %08x  %s", instruction.line, lanes, instruction.text.c_str()).c_str());
        return;
    }
    if (!lanes) return;
    for (const uint32_t row : instruction.writes) {
        const auto name = kernel.names.find(row);
        const uint32_t width = kernel.widths.at(row);
        std::string line = format("                   %-6s =", name == kernel.names.end() ? "_" : name->second.c_str());
        if (width == 0) {
            line += format(" %08x", warp.bits(row) & lanes);
        } else {
            std::vector<std::string> values(LANES, ".");
            for_lanes(lanes, [&](int lane) { values[size_t(lane)] = shown(warp, row, width, lane, instruction.text); });
            const std::string& first = values[size_t(__builtin_ctz(lanes))];
            const bool same = std::all_of(values.begin(), values.end(), [&](const std::string& value) { return value == first || value == "."; });
            if (same && (lanes & (lanes - 1))) line += " " + first + " in each";
            for (int lane = 0; !(same && (lanes & (lanes - 1))) && lane < LANES; lane++) line += " " + values[size_t(lane)];
        }
        launch.trace(line.c_str());
    }
}

void add(Counters& to, const Counters& from) {
    static_assert(sizeof(Counters) % sizeof(uint64_t) == 0, "counters are numbers");
    uint64_t* sums = reinterpret_cast<uint64_t*>(&to);
    const uint64_t* more = reinterpret_cast<const uint64_t*>(&from);
    for (size_t i = 0; i < sizeof(Counters) / sizeof(uint64_t); i++) sums[i] += more[i];
}

}  // namespace

// ---- a launch ------------------------------------------------------------------------------------------------------------------------

void execute(Launch& launch, const std::vector<const uint8_t*>& arguments) {
    const uint32_t count = launch.grid[0] * launch.grid[1] * launch.grid[2];
    std::vector<uint32_t> order(count);
    std::iota(order.begin(), order.end(), 0u);
    uint64_t state = launch.seed * 0x9e3779b97f4a7c15ull + 1;
    for (uint32_t i = count; launch.seed && i > 1; i--) {
        state = state * 6364136223846793005ull + 1442695040888963407ull;
        std::swap(order[i - 1], order[(state >> 33) % i]);
    }
    std::atomic<uint32_t> next{0};
    std::exception_ptr failure;
    const auto work = [&] {
        try {
            Runner runner(launch, arguments);
            for (uint32_t i = next++; i < count; i = next++) runner.run(order[i]);
            std::lock_guard<std::mutex> guard(launch.lock);
            add(launch.counters, runner.block.counters);
        } catch (...) {
            std::lock_guard<std::mutex> guard(launch.lock);
            if (!failure) failure = std::current_exception();
            next = count;
        }
    };
    const int workers = launch.kernel->global_atomics || launch.trace ? 1 : std::max(1, std::min(launch.threads, int(count)));
    std::vector<std::thread> others;
    for (int i = 1; i < workers; i++) others.emplace_back(work);
    work();
    for (std::thread& other : others) other.join();
    if (failure) std::rethrow_exception(failure);
}

// ---- decoding ------------------------------------------------------------------------------------------------------------------------

bool decode_control(Decoder& d) {
    const Statement& s = d.statement;
    const std::string& name = s.parts[0];
    if (name == "bra") {
        d.out.kind = Kind::BRANCH;
        d.out.uniform = s.has("uni");
    } else if (name == "ret" || name == "exit") {
        d.out.kind = Kind::EXIT;
    } else if (name == "trap") {
        d.out.run = [](Warp& warp, const Instruction&, uint32_t lanes) { fail(warp, __builtin_ctz(lanes), "the kernel stops itself (trap)"); };
    } else if (name == "nanosleep") {
        d.out.kind = Kind::POLL;
        d.out.run = [](Warp& warp, const Instruction&, uint32_t) { warp.waits = true; };
    } else if ((name == "bar" || name == "barrier") && !s.has("warp")) {
        d.out.kind = Kind::BARRIER;
        const bool red = s.has("red"), arrives = s.has("arrive");
        if (!red && !arrives && !s.has("sync")) return false;
        size_t next = 0;
        if (red) {
            d.out.size = s.has("popc") ? POPC : s.has("and") ? AND : OR;
            d.out.d = d.target(int(next++), d.out.size == POPC ? Type{'u', 32} : Type{'p', 0});
        }
        d.out.a = d.source(int(next++), {'u', 32});
        if (next + red < s.operands.size()) d.out.b = d.source(int(next++), {'u', 32});
        if (red) {
            const std::string predicate = s.operands.at(next);
            const bool negated = predicate[0] == '!';
            d.out.c = d.source(predicate.substr(negated), {'p', 0});
            d.out.immediate = negated ? NEGATED : 0;
        }
        if (arrives) d.out.immediate |= ONLY_ARRIVES;
    } else {
        return false;
    }
    return true;
}

}  // namespace ptx
