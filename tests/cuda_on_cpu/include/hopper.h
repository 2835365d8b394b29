// What sm_90a adds and CUDA C reaches through inline PTX: mbarriers, and products of warpgroups (wgmma) with operands in shared memory.
//
// A product is computed as late as possible, when a thread waits for it: without the wait it is missing from the sums. Products see shared
// memory as the tensor cores do: a write of cp.async shows only after its thread's fence (fence.proxy.async). It is an error if the operands
// have changed by the time that a thread waits. Descriptors are decoded as in the PTX ISA, for the 128-byte swizzle only.
#pragma once
#include "tensor_core.h"

namespace cuda_on_cpu {

alignas(1024) thread_local unsigned char tensor_view[MOST_DYNAMIC];  // dynamic shared memory as wgmma sees it; NaN at first, like all of it

inline unsigned offset_in_shared(const void* shared) {
    const size_t offset = static_cast<const unsigned char*>(shared) - dynamic_shared;
    if (offset >= MOST_DYNAMIC) fail("an address that is not in dynamic shared memory");
    return unsigned(offset);
}

inline void fence_proxy() {
    for (void* written : threads[current].unfenced) memcpy(tensor_view + offset_in_shared(written), written, 16);
    threads[current].unfenced.clear();
}

// ---- mbarriers ----------------------------------------------------------------------------------------------------------------------

struct Barrier {
    uint16_t count, missing;  // arrivals in a phase: all, and those still to come
    uint32_t phase;
};

inline void check_barrier(const Barrier* barrier) {
    if (barrier->count == 0xffff) fail("an mbarrier that was not initialised");
}

inline void arrive_at(Barrier* barrier) {
    check_barrier(barrier);
    if (--barrier->missing) return;
    barrier->missing = barrier->count;
    barrier->phase++;
}

template <int PARITY>
bool passed(const void* barrier) {
    return static_cast<const Barrier*>(barrier)->phase % 2 != PARITY;
}

// Waits until the phase of that parity is over: returns at once if the barrier is in the next one.
inline void wait_for_phase(const Barrier* barrier, int parity, int line) {
    check_barrier(barrier);
    wait_until(parity ? passed<1> : passed<0>, barrier, line);
}

// ---- products of a warpgroup --------------------------------------------------------------------------------------------------------

using Operand = std::vector<uint16_t>;  // [span][16]

struct Product {
    uint64_t descriptor[2];
    bool turned[2], add;
    Operand operand[2];  // as they were when it was issued
    std::vector<float> left, right;  // [64][16], [n][16]
};

struct Issue {
    size_t thread;
    uint64_t descriptor[2];
    bool turned[2], add;
    int n;
    float* sums;
};

// The place of 8 neighbours: along k for a K-major operand, along the span for an MN-major one.
// The 128-byte swizzle: address bits 4 to 6 are XORed with bits 7 to 9.
inline unsigned place_of_chunk(uint64_t descriptor, bool turned, int s, int k) {
    const unsigned start = descriptor << 4 & 0x3fff0, leading = descriptor >> 12 & 0x3fff0, stride = descriptor >> 28 & 0x3fff0;
    const unsigned inner = s / 8 * stride + s % 8 * 128 + k * 2, outer = s / 64 * leading + s % 64 * 2 + k / 8 * stride + k % 8 * 128;
    const unsigned plain = start + (turned ? outer : inner);
    return plain ^ (plain >> 7 & 7) << 4;
}

inline Operand gather(const unsigned char* shared, uint64_t descriptor, bool turned, int span) {
    Operand result(span * 16);
    for (int s = 0; s < span; s += turned ? 8 : 1) {
        for (int k = 0; k < 16; k += turned ? 1 : 8) {
            uint16_t chunk[8];
            memcpy(chunk, shared + place_of_chunk(descriptor, turned, s, k), 16);
            for (int i = 0; i < 8; i++) result[turned ? (s + i) * 16 + k : s * 16 + k + i] = chunk[i];
        }
    }
    return result;
}

inline std::vector<float> widened(const Operand& operand) {
    std::vector<float> result(operand.size());
    for (size_t i = 0; i < operand.size(); i++) result[i] = bits<float>(unsigned(operand[i]) << 16);
    return result;
}

inline void issue_product(void* const* posted) {
    const auto* first = static_cast<const Issue*>(posted[0]);
    auto product = std::make_shared<Product>();
    product->add = first->add;
    for (int i = 0; i < 2; i++) {
        product->descriptor[i] = first->descriptor[i];
        product->turned[i] = first->turned[i];
        product->operand[i] = gather(tensor_view, first->descriptor[i], first->turned[i], i ? first->n : 64);
    }
    product->left = widened(product->operand[0]);
    product->right = widened(product->operand[1]);
    for (int t = 0; t < 128; t++) {
        const auto* mine = static_cast<const Issue*>(posted[t]);
        if (memcmp(mine->descriptor, first->descriptor, sizeof mine->descriptor) || mine->add != first->add)
            snprintf(failure, sizeof failure, "wgmma: the threads of a warpgroup ask for different products");
        threads[mine->thread].products.push_back({product, mine->sums, threads[mine->thread].product_groups});
    }
}

inline void check_descriptor(uint64_t descriptor) {
    if (descriptor >> 62 != 1) fail("wgmma: only the 128-byte swizzle is known here");
    if (descriptor >> 3 & 7) fail("wgmma: an operand whose swizzle does not begin at a multiple of 1024 bytes");
}

template <int N>
void wgmma(float* sums, uint64_t a, uint64_t b, bool a_turned, bool b_turned, bool add, int line) {
    for (uint64_t descriptor : {a, b}) check_descriptor(descriptor);
    if (!threads[current].sums_ready) fail("wgmma: no wgmma.fence before it");
    Issue mine = {current, {a, b}, {a_turned, b_turned}, add, N, sums};
    with_group(mine, issue_product, line);
}

// Lane l of warp w holds rows 16w + l/4 and 16w + l/4 + 8, and columns 2(l%4) and 2(l%4) + 1 of every 8.
inline void add(const Product& product, float* sums, int thread) {
    const int top = thread / 32 % 4 * 16 + thread % 32 / 4, n = int(product.right.size() / 16);
    for (int i = 0; i < n / 2; i++) {
        const float* left = &product.left[(top + i / 2 % 2 * 8) * 16];
        const float* right = &product.right[(i / 4 * 8 + thread % 4 * 2 + i % 2) * 16];
        float sum = 0.0f;
        for (int k = 0; k < 16; k++) sum += left[k] * right[k];
        sums[i] = product.add ? sums[i] + sum : sum;
    }
}

// Waits until at most `pending` of the groups committed last are under way.
inline void wait_for_products(int pending) {
    auto& mine = threads[current];
    mine.sums_ready = false;
    while (!mine.products.empty() && mine.products.front().group + pending < mine.product_groups) {
        const Pending next = mine.products.front();
        const Product& product = *next.product;
        mine.products.pop_front();
        for (int i = 0; i < 2 && current % 32 == 0; i++)  // checked once per warp
            if (gather(dynamic_shared, product.descriptor[i], product.turned[i], int(product.operand[i].size() / 16)) != product.operand[i])
                fail("wgmma: an operand was not yet there, not shown by a fence, or written while the product was under way");
        add(product, next.sums, int(current));
    }
}

}  // namespace cuda_on_cpu
