// The machine: what a launch, its blocks, and their warps hold while PTX is executed, and how an instruction looks once it is decoded.
//
// A warp executes one instruction for 32 lanes at a time. A register is a row of 32 values, one per lane, so that an operation is a loop
// over a row, which the compiler turns into vector instructions; a predicate is one bit per lane. `control.cpp` chooses which warp goes on,
// and with which lanes. What an instruction does is a plain function (`Instruction::run`), chosen when the kernel is loaded (decode.h).
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

namespace ptx {

constexpr int LANES = 32;
constexpr uint32_t ALL = 0xffffffffu;
constexpr uint32_t NONE = 0xffffffffu;  // no register

struct Warp;
struct Block;
struct Launch;

// What stops a launch: a fault that was found, or PTX that the machine does not know. The text says where.
struct Failure : std::runtime_error {
    using std::runtime_error::runtime_error;
};

std::string format(const char* pattern, ...) __attribute__((format(printf, 1, 2)));

// ---- a kernel, decoded ---------------------------------------------------------------------------------------------------------------

// How the scheduler treats an instruction.
enum class Kind : uint8_t {
    PLAIN,       // each lane by itself
    BRANCH,      // to `target`
    EXIT,        // the end of a thread
    COLLECTIVE,  // with all lanes of its member mask (`mask`), or of the warp if it is aligned (`mask` is NONE): they wait for each other
    BARRIER,     // with the whole block, or as many threads as it names
    POLL,        // like PLAIN, and if it sets `Warp::waits`, another warp runs next
};

// What an instruction makes of an undefined value (undefined.h).
enum class Follows : uint8_t {
    NEVER,   // it may not have one
    ALWAYS,  // its result is undefined too
    CHOICE,  // if it chooses one
    AND, OR  // unless the other operand says all
};

struct Instruction {
    using Run = void (*)(Warp&, const Instruction&, uint32_t lanes);  // lanes: a bit for each lane that takes part, never none

    Run run = nullptr;
    Kind kind = Kind::PLAIN;
    Follows follows = Follows::NEVER;
    bool negated = false;        // of the predicate
    bool uniform = false;        // a branch that the compiler promised to be taken by all lanes or none
    uint32_t predicate = NONE;   // rows of registers: offsets in bytes from Warp::registers
    uint32_t d = NONE, a = NONE, b = NONE, c = NONE, e = NONE;
    uint32_t mask = NONE;
    int64_t immediate = 0;       // an address's offset, a count, or whatever the instruction was decoded with
    uint32_t size = 0;           // bytes of an element in memory, or what the instruction was decoded with
    int target = -1;             // of a branch: an index into Kernel::code
    std::vector<uint32_t> rows;  // more rows: the elements of a vector, the fragments of a product
    std::vector<uint32_t> reads, writes;  // all rows that it reads and writes, without the predicate
    int line = 0;                // in the PTX, from 1
    int source = -1;             // an index into Module::sources, or -1
    std::string text;            // as it stands in the PTX
};

struct Parameter {
    std::string name;
    uint32_t size;  // bytes
    uint32_t row;   // where a warp has its value; one of a single byte lies in a row of 16 bits
};

struct Constant {
    uint32_t row;
    uint32_t width;  // bytes per lane; 0: a predicate
    uint64_t bits;
};

// A special register, such as %tid.x, as a row that is filled when a block starts.
struct Special {
    std::string name;
    uint32_t row;
};

struct Kernel {
    std::string name;
    std::vector<Instruction> code;  // the last one is an EXIT
    std::vector<Parameter> parameters;
    std::vector<Constant> constants;
    std::vector<Special> specials;
    std::map<std::string, int> labels;
    std::map<uint32_t, std::string> names;  // of rows, for messages and traces
    std::map<uint32_t, uint32_t> widths;    // bytes per lane of each row; 0: a predicate
    uint32_t register_bytes = 0;    // of one warp
    uint32_t shared_bytes = 0;      // of the arrays that the kernel declares
    uint32_t dynamic_alignment = 16;
    uint32_t dynamic_row = NONE, dynamic_row_wide = NONE;  // hold the address of the shared memory whose size the launch gives
    uint32_t most_threads = 0;      // .maxntid; 0: not said
    std::vector<uint32_t> written_parameters;  // those through which it may write to global memory
    bool global_atomics = false;    // blocks run one after another, so that a seed gives the same order each time
    uint32_t smallest_shared_write = 16, smallest_global_write = 16;  // bytes: of a vector, all of it
    bool async_proxy = false;       // tensor cores or bulk copies read shared memory by themselves (wgmma, cp.async.bulk)
};

// A place in the source that PTX was made from.
struct Source {
    std::string file;
    int line;
    int inlined_at;  // the place of the call, if the code was inlined: an index into Module::sources, or -1
};

// An array of a module (.global, .const).
struct ModuleArray {
    std::string name;
    std::vector<uint8_t> bytes;
    uint64_t address;
};

struct Module {
    std::map<std::string, std::unique_ptr<Kernel>> kernels;
    std::vector<Source> sources;
    std::vector<std::unique_ptr<ModuleArray>> arrays;
};

// ---- memory --------------------------------------------------------------------------------------------------------------------------

enum class Access : uint8_t { READ, WRITE, ATOMIC, ASYNC_READ, ASYNC_WRITE };  // ASYNC: by the async proxy (wgmma, bulk copies)

// Addresses. Shared memory begins at SHARED_BASE in its own space, as on a card whose first KiB is the system's, and at SHARED_WINDOW among
// generic addresses. Each array of a launch has a region of its own, so that an access beyond its end is in no array.
constexpr uint32_t SHARED_BASE = 1024;
constexpr uint64_t SHARED_WINDOW = 0x0100000000000000ull;
constexpr int REGION_BITS = 40;  // region i, first the module's arrays, then the arguments, begins at (i + 1) << REGION_BITS, plus its
                                 // offset in its allocation

inline bool in_shared_window(uint64_t address) { return address - SHARED_WINDOW < (1u << 24); }

// ---- what runs -----------------------------------------------------------------------------------------------------------------------

struct SharedMemory;  // of a block, with its checks (memory.h)
struct GlobalMemory;  // the arrays of a launch, with their checks (memory.h)
struct Copies;        // a warp's copies under way (copies.h)
struct Barriers;      // a block's mbarriers (copies.h)
struct Products;      // a warp's products under way (tensor_cores.h)
struct Undefined;     // a warp's values that nobody may use (undefined.h)

// The order of events in a block, as far as barriers say it (vector clocks). `now` counts a warp's synchronisations; `seen[v]` is the
// last moment of warp v that this warp knows to be over. What a warp does at moment t happens before what another does if its
// `seen` of the first is at least t.
struct Clock {
    uint32_t now = 1;
    uint32_t seen[LANES] = {};
};

struct Counters {
    uint64_t warp_instructions = 0, thread_instructions = 0;
    uint64_t global_loads = 0, global_load_sectors = 0, global_load_bytes = 0;    // requests of warps; sectors of 32 bytes
    uint64_t global_stores = 0, global_store_sectors = 0, global_store_bytes = 0;
    uint64_t shared_requests = 0, shared_waves = 0, shared_ideal_waves = 0;       // waves beyond the ideal are bank conflicts
    uint64_t matrix_loads = 0, matrix_load_waves = 0;                             // ldmatrix, each matrix of 8 x 8
    uint64_t products = 0, async_product_flops = 0;                               // mma.sync; wgmma
    uint64_t copied_bytes = 0;                                                    // cp.async
};

// AT_BARRIER: with its whole warp; GATHERS: at a collective instruction or a barrier, for other lanes of its warp.
enum class State : uint8_t { RUNS, AT_BARRIER, GATHERS, ENDED };

struct Warp {
    Block* block;
    int number;               // in its block
    uint8_t* registers;
    uint32_t alive = 0;       // lanes that have not ended
    uint32_t pc[LANES];
    State state[LANES];
    int at = 0;               // the instruction under way, for messages
    bool waits = false;       // set by a POLL that has to try again
    bool watched = false;     // registers of products under way must not be touched: `watch` is called before each instruction
    Clock clock;
    std::unique_ptr<Copies> copies;
    std::unique_ptr<Products> products;
    std::unique_ptr<Undefined> undefined;  // null: none

    Warp();
    ~Warp();
    Warp(Warp&&);
    template <class T>
    T* row(uint32_t offset) {
        return reinterpret_cast<T*>(registers + offset);
    }
    // A predicate: one bit per lane.
    uint32_t& bits(uint32_t offset) { return *reinterpret_cast<uint32_t*>(registers + offset); }
    // The warp has synchronised: what it did until now is over for those that learn of it.
    void tick() { clock.seen[number] = clock.now++; }
};

struct Block {
    Launch* launch;
    const Kernel* kernel;
    uint32_t number;          // in the grid, from 0
    uint32_t threads;
    std::vector<Warp> warps;
    std::unique_ptr<SharedMemory> shared;
    std::unique_ptr<Barriers> barriers;
    Counters counters;
    uint64_t random_state;
    uint32_t random() {  // xorshift: the schedule is a function of the seed and the block's number
        random_state ^= random_state << 13;
        random_state ^= random_state >> 7;
        random_state ^= random_state << 17;
        return uint32_t(random_state >> 11);
    }
    Block();
    ~Block();
};

struct Launch {
    const Module* module;
    const Kernel* kernel;
    uint32_t grid[3], block[3];
    uint32_t dynamic_shared;
    uint64_t seed;            // 0: everything in order
    int threads;              // of this processor
    uint64_t most_instructions;  // of a block's warps: beyond, the kernel is taken not to end
    bool counts;              // sectors and bank conflicts too, which takes time
    std::unique_ptr<GlobalMemory> global;
    void (*trace)(const char* line) = nullptr;
    int trace_block = 0, trace_warp = 0;
    std::mutex lock;
    Counters counters;
    Launch();
    ~Launch();
};

// Stops the launch: `what` with the thread (lane -1: the warp), the PTX line, the source line and the instruction.
[[noreturn]] void fail(const Warp& warp, int lane, const std::string& what);

// Calls `f` for each lane whose bit is set.
template <class F>
inline void for_lanes(uint32_t lanes, F f) {
    if (lanes == ALL) {
        for (int lane = 0; lane < LANES; lane++) f(lane);
    } else {
        for (; lanes; lanes &= lanes - 1) f(__builtin_ctz(lanes));
    }
}

// Writes a row: y(lane) for the lanes that take part. It is computed for all, from rows at `lane` alone, so that lanes are independent.
template <class T, class F>
inline void set_row(T* to, uint32_t lanes, F y) {
    if (lanes == ALL) {
#pragma GCC ivdep
        for (int lane = 0; lane < LANES; lane++) to[lane] = y(lane);
    } else {
#pragma GCC ivdep
        for (int lane = 0; lane < LANES; lane++) {
            const T value = y(lane);
            to[lane] = lanes >> lane & 1 ? value : to[lane];
        }
    }
}

}  // namespace ptx
