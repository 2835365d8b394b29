// Counts what requests of warps cost: sectors of global memory, and waves of shared memory's banks.
#include <algorithm>
#include <iterator>

#include "access.h"

namespace ptx {

// Sorts, and returns how many different values there are.
template <class T>
static size_t different(T* first, T* end) {
    std::sort(first, end);
    return size_t(std::unique(first, end) - first);
}

void count_global(Counters& counters, uint32_t lanes, const uint64_t* addresses, uint32_t size, bool stores) {
    uint64_t sectors[LANES], bytes = 0;  // an aligned access lies in one
    size_t count = 0;
    for_lanes(lanes, [&](int lane) {
        sectors[count++] = addresses[lane] / 32;
        bytes += size;
    });
    const uint64_t found = different(sectors, sectors + count);
    (stores ? counters.global_stores : counters.global_loads) += 1;
    (stores ? counters.global_store_sectors : counters.global_load_sectors) += found;
    (stores ? counters.global_store_bytes : counters.global_load_bytes) += bytes;
}

void count_shared(Counters& counters, uint32_t lanes, const uint32_t* addresses, uint32_t size) {
    const int at_once = size <= 4 ? 32 : size == 8 ? 16 : 8;
    counters.shared_requests++;
    for (int first = 0; first < LANES; first += at_once) {
        uint32_t words[LANES];
        size_t count = 0;
        for (int lane = first; lane < first + at_once; lane++) {
            if (!(lanes >> lane & 1)) continue;
            for (uint32_t word = addresses[lane] / 4; word <= (addresses[lane] + size - 1) / 4; word++) words[count++] = word;
        }
        if (!count) continue;
        uint32_t banks[32] = {};
        count = different(words, words + count);
        for (size_t n = 0; n < count; n++) banks[words[n] % 32]++;
        counters.shared_waves += *std::max_element(std::begin(banks), std::end(banks));
        counters.shared_ideal_waves++;
    }
}

}  // namespace ptx
