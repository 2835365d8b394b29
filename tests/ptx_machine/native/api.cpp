// The machine's face in C, which ctypes calls (machine.py).
#include <algorithm>
#include <cstring>

#include "control.h"
#include "decode.h"
#include "memory.h"

using namespace ptx;

extern "C" {

// A word of a kernel's arguments: a number, or the address of an array.
struct PtxArgument {
    uint64_t bits;
    int32_t array;  // an index into the launch's arrays, or -1
};

struct PtxArray {
    void* memory;
    uint64_t bytes, offset;  // `offset`: within its allocation
    uint32_t element;        // bytes
    int32_t same_as;         // the first array that shares its memory, or its own index
    int32_t unwritten;       // it holds the pattern of memory that nobody wrote
    const char* name;
};

struct PtxLaunch {
    const char* kernel;
    uint32_t grid[3], block[3], dynamic_shared;
    const PtxArgument* arguments;
    int32_t argument_count;
    const PtxArray* arrays;
    int32_t array_count;
    uint64_t seed, most_instructions;
    int32_t threads, counts;
    void (*trace)(const char*);
    int32_t trace_block, trace_warp;
};

static void say(const std::string& what, char* message, size_t size) { snprintf(message, size, "%s", what.c_str()); }

// -> a module, or null with a message
void* ptx_load(const char* text, char* message, size_t size) {
    try {
        return parse(text).release();
    } catch (const std::exception& error) {
        say(error.what(), message, size);
        return nullptr;
    }
}

void ptx_unload(void* module) { delete static_cast<Module*>(module); }

// The names of a module's kernels, a line each.
void ptx_kernels(void* module, char* names, size_t size) {
    std::string all;
    for (const auto& [name, kernel] : static_cast<Module*>(module)->kernels) all += name + "\n";
    say(all, names, size);
}

int ptx_counter_count() { return int(sizeof(Counters) / sizeof(uint64_t)); }

// Runs a kernel.  -> 0, or 1 with a message
int ptx_launch(void* loaded, const PtxLaunch* given, uint64_t* counters, char* message, size_t size) {
    try {
        Module& module = *static_cast<Module*>(loaded);
        const auto found = module.kernels.find(given->kernel);
        if (found == module.kernels.end()) throw Failure(format("the module has no kernel '%s'", given->kernel));
        const Kernel& kernel = *found->second;
        if (size_t(given->argument_count) != kernel.parameters.size()) {
            throw Failure(format("it takes %zu arguments, not %d", kernel.parameters.size(), given->argument_count));
        }
        const uint64_t threads = uint64_t(given->block[0]) * given->block[1] * given->block[2];
        if (threads == 0 || threads > 1024) throw Failure(format("%llu threads in a block: a card takes 1 to 1024", (unsigned long long)threads));
        if (kernel.most_threads && threads > kernel.most_threads) throw Failure(format("%llu threads in a block: the kernel is bounded to %u", (unsigned long long)threads, kernel.most_threads));
        for (int axis = 0; axis < 3; axis++) {
            const uint32_t most = axis ? 65535u : 2147483647u;
            if (!given->grid[axis] || given->grid[axis] > most) throw Failure(format("%u blocks along axis %d: a card takes 1 to %u", given->grid[axis], axis, most));
        }
        const uint32_t most_shared = 227 * 1024;
        if (kernel.shared_bytes + given->dynamic_shared > most_shared) throw Failure(format("%u bytes of shared memory: a card has %u", kernel.shared_bytes + given->dynamic_shared, most_shared));

        std::vector<Region> regions;
        for (const auto& array : module.arrays) {
            const int index = int(regions.size());
            regions.push_back({array->address, array->bytes.size(), array->bytes.data(), 1, true, false, array->name, index});
        }
        const int first = int(regions.size());
        for (int i = 0; i < given->array_count; i++) {
            const PtxArray& array = given->arrays[i];
            const uint64_t address = (uint64_t(regions.size() + 1) << REGION_BITS) + array.offset;
            regions.push_back({address, array.bytes, static_cast<uint8_t*>(array.memory), array.element, false, array.unwritten != 0, array.name, first + array.same_as});
        }
        std::vector<uint64_t> words;
        for (int i = 0; i < given->argument_count; i++) {
            const PtxArgument& argument = given->arguments[i];
            words.push_back(argument.array < 0 ? argument.bits : regions[size_t(first + argument.array)].address);
        }
        for (const uint32_t parameter : kernel.written_parameters) {
            const int array = given->arguments[parameter].array;
            if (array >= 0) regions[size_t(first + array)].written = true;
        }
        for (Region& region : regions) {  // memory that is written under one name is written under the others
            for (const Region& other : regions) region.written |= other.written && other.same_as == region.same_as;
        }
        std::vector<const uint8_t*> pointers;
        for (const uint64_t& word : words) pointers.push_back(reinterpret_cast<const uint8_t*>(&word));

        Launch launch;
        launch.module = &module;
        launch.kernel = &kernel;
        std::copy_n(given->grid, 3, launch.grid);
        std::copy_n(given->block, 3, launch.block);
        launch.dynamic_shared = given->dynamic_shared;
        launch.seed = given->seed;
        launch.most_instructions = given->most_instructions;
        launch.threads = given->threads;
        launch.counts = given->counts != 0;
        launch.trace = given->trace;
        launch.trace_block = given->trace_block;
        launch.trace_warp = given->trace_warp;
        launch.global.reset(new GlobalMemory(std::move(regions), kernel.smallest_global_write));
        execute(launch, pointers);
        memcpy(counters, &launch.counters, sizeof launch.counters);
        return 0;
    } catch (const std::exception& error) {
        say(error.what(), message, size);
        return 1;
    }
}
}
