// A block's shared memory: checks of places, and which of the shadow's checks (shared_shadow.h) an access takes: that of one lane, of a warp
// whose lanes access one piece after the other, of lanes that read the same, or of scattered ones.
#include <algorithm>

#include "shared_shadow.h"

namespace ptx {

namespace {

// A number of granules that is known to the compiler.
template <size_t N>
struct Exactly {
    constexpr operator size_t() const { return N; }
};

template <class F>
void with_count(size_t count, F f) {
    switch (count) {
        case 1: return f(Exactly<1>());
        case 2: return f(Exactly<2>());
        case 4: return f(Exactly<4>());
        case 8: return f(Exactly<8>());
        case 32: return f(Exactly<32>());
        case 128: return f(Exactly<128>());
        default: return f(count);
    }
}

}  // namespace

SharedMemory::SharedMemory(uint32_t size, int warps, bool async_proxy, uint32_t smallest_write) : bytes(size), shadow(new Shadow) {
    shadow->warps = warps;
    shadow->shift = __builtin_ctz(std::min(smallest_write, 16u));
    const size_t whole = (size_t(size) + 15) / 16 * 16;
    shadow->granules = whole >> shadow->shift;
    for (Shadow::Entries* each : {&shadow->writes, &shadow->places, &shadow->latest}) *each = Shadow::entries(shadow->granules);
    shadow->reads = Shadow::entries(shadow->granules * size_t(warps));
    if (async_proxy) {
        shadow->unfenced = Shadow::entries(shadow->granules);
        shadow->fences.resize(size_t(warps) * LANES);
    }
}

SharedMemory::~SharedMemory() = default;

uint32_t SharedMemory::size() const { return uint32_t(bytes.size()); }

void SharedMemory::start() {
    std::fill_n(shadow->writes.get(), shadow->granules, 0u);
    std::fill_n(shadow->latest.get(), shadow->granules, 0u);
    std::fill_n(shadow->settled, LANES, Shadow::NOTHING_YET);
}

static inline void check_place(const Warp& warp, int lane, const SharedMemory& shared, uint32_t address, uint32_t size, Access access) {
    const uint32_t offset = address - SHARED_BASE, all = shared.size(), unit = std::min(size & -size, 16u);
    if (__builtin_expect(offset <= all && size <= all - offset && !(offset & (unit - 1)), 1)) return;
    const int64_t where = int64_t(address) - SHARED_BASE;
    const std::string what = format("%s of %u bytes of shared memory at offset %lld", verb(access), size, static_cast<long long>(where));
    if (where < 0 || where + size > all) {
        fail(warp, lane, what + format(", which has %u bytes: it ends %lld bytes %s", all,
                                       static_cast<long long>(where < 0 ? -where : where + size - all),
                                       where < 0 ? "before its start" : "after its end"));
    }
    fail(warp, lane, "misaligned " + what + format(": its address is not a multiple of %u", unit));
}

uint8_t* SharedMemory::at(Warp& warp, int lane, uint32_t address, uint32_t size, Access access) {
    check_place(warp, lane, *this, address, size, access);
    const uint32_t offset = address - SHARED_BASE;
    if (writes(access) && size < 1u << shadow->shift) shadow->refine(size);
    const Shadow::Moment moment = shadow->moment(warp);
    const size_t first = offset >> shadow->shift, count = ((offset + size - 1) >> shadow->shift) - first + 1;
    with_count(count, [&](auto known) { shadow->access(moment, lane, first, known, Shadow::ONE_LANE, access); });
    return &bytes[offset];
}

uint8_t* SharedMemory::at_lanes(Warp& warp, uint32_t lanes, const uint32_t* addresses, uint32_t size, Access access, uint8_t** places) {
    const uint32_t one = addresses[__builtin_ctz(lanes)] - SHARED_BASE, all = this->size(), granule = 1u << shadow->shift;
    uint32_t offsets[LANES], outside = 0, low = 0, scattered = 0, different = 0;
    for (uint32_t lane = 0; lane < LANES; lane++) {
        const uint32_t offset = lanes >> lane & 1 ? addresses[lane] - SHARED_BASE : one;
        outside |= uint32_t(offset > all - size);
        low |= offset;
        scattered |= offset - one - lane * size;
        different |= offset ^ one;
        offsets[lane] = offset;
    }
    const bool one_by_one = all < size || outside || low & (size - 1) || access == Access::ATOMIC || (writes(access) && size < granule);
    if (__builtin_expect(one_by_one, 0)) {
        for_lanes(lanes, [&](int lane) { places[lane] = at(warp, lane, addresses[lane], size, access); });
        return nullptr;
    }
    const Shadow::Moment moment = shadow->moment(warp);
    const bool run = lanes == ALL && !scattered;
    const size_t first = one >> shadow->shift, count = std::max(size >> shadow->shift, 1u);
    if (run && size >= granule) {
        const int each = __builtin_ctz(size) - shadow->shift;
        with_count(LANES * count, [&](auto known) { shadow->access(moment, 0, first, known, each, access); });
        return &bytes[one];
    }
    with_count(count, [&](auto known) {
        if (writes(access)) shadow->write_lanes(moment, lanes, offsets, known, access);
        else if (!different && lanes == ALL && access == Access::READ) shadow->read_same(moment, first, known);
        else shadow->read_lanes(moment, lanes, offsets, known, access);
    });
    for (int lane = 0; lane < LANES; lane++) places[lane] = &bytes[offsets[lane]];
    return nullptr;
}

void SharedMemory::begin_copy(Warp& warp, int lane, uint32_t address, uint32_t size) {
    check_place(warp, lane, *this, address, size, Access::WRITE);
    if (size < 1u << shadow->shift) shadow->refine(size);
    const uint32_t offset = address - SHARED_BASE;
    const size_t first = offset >> shadow->shift, end = ((offset + size - 1) >> shadow->shift) + 1;
    for (size_t granule = first; granule < end; granule++) {
        if (shadow->writes[granule] < Shadow::COPY) continue;
        const std::string other = shadow->writer(shadow->moment(warp), granule);
        fail(warp, lane, format("a copy into shared memory begins where one is still under way, begun by %s (offset %zu)", other.c_str(),
                                granule << shadow->shift));
    }
    at(warp, lane, address, size, Access::WRITE);
    for (size_t granule = first; granule < end; granule++) shadow->writes[granule] |= Shadow::COPY;
}

uint8_t* SharedMemory::end_copy(Warp& warp, int lane, uint32_t address, uint32_t size, Access access) {
    const uint32_t offset = address - SHARED_BASE;
    const size_t first = offset >> shadow->shift, end = ((offset + size - 1) >> shadow->shift) + 1;
    for (size_t granule = first; granule < end; granule++) shadow->writes[granule] = 0;  // nobody has accessed it since
    return at(warp, lane, address, size, access);
}

void SharedMemory::fence_proxy(Warp& warp, uint32_t lanes) {
    if (!shadow->unfenced) return;
    for_lanes(lanes, [&](int lane) {
        Shadow::Fences& fences = shadow->fences[size_t(warp.number * LANES + lane)];
        fences.count++;
        fences.moments[fences.count % Shadow::REMEMBERED_FENCES] = warp.clock.now;
    });
}

}  // namespace ptx
