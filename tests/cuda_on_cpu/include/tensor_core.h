// The tensor-core instructions that CUDA C reaches through inline PTX: the lane layouts of the PTX ISA (mma.m16n8k16, ldmatrix), sums in float.
#pragma once
#include "bfloat16.h"

namespace cuda_on_cpu {

struct Mma {
    float* c;
    const unsigned *a, *b;
};

// The i-th of the 16-bit numbers in a lane's registers.
inline float element(const unsigned* registers, int i) {
    __nv_bfloat16 value;
    memcpy(&value, reinterpret_cast<const char*>(registers) + 2 * i, 2);
    return value;
}

// c [16,8] += a [16,16] b [16,8]. Lane l holds rows l/4 and l/4+8, columns 2(l%4) and the next, of a and c; of b rows 2(l%4).., column l/4.
inline void multiply_tile(void* const* posted) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < 32; lane++) {
        const auto* mine = static_cast<const Mma*>(posted[lane]);
        const int row = lane / 4, column = lane % 4 * 2;
        for (int i = 0; i < 8; i++) a[row + 8 * (i / 2 % 2)][column + i % 2 + 8 * (i / 4)] = element(mine->a, i);
        for (int i = 0; i < 4; i++) b[column + i % 2 + 8 * (i / 2)][row] = element(mine->b, i);
    }
    for (int lane = 0; lane < 32; lane++) {
        auto* mine = static_cast<Mma*>(posted[lane]);
        for (int i = 0; i < 4; i++) {
            const int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
            float sum = 0.0f;
            for (int k = 0; k < 16; k++) sum += a[row][k] * b[k][column];
            mine->c[i] += sum;
        }
    }
}

inline void mma(float* c, const unsigned* a, const unsigned* b, int line) {
    Mma mine = {c, a, b};
    with_warp(0xffffffffu, mine, multiply_tile, line);
}

struct Matrices {
    unsigned* registers;
    const char* row;  // where this lane's row of 16 bytes begins
    int count;
    bool transposed;
};

// `count` matrices of 8 x 8 16-bit numbers; lanes 8i .. 8i+7 give the rows of the i-th. Lane l gets row l/4, columns 2(l%4) and the next.
inline void load_matrices(void* const* posted) {
    for (int lane = 0; lane < 32; lane++) {
        auto* mine = static_cast<Matrices*>(posted[lane]);
        for (int i = 0; i < mine->count; i++) {
            uint16_t pair[2];
            for (int j = 0; j < 2; j++) {
                const int outer = lane / 4, inner = lane % 4 * 2 + j;
                const int row = mine->transposed ? inner : outer, column = mine->transposed ? outer : inner;
                memcpy(&pair[j], static_cast<Matrices*>(posted[8 * i + row])->row + 2 * column, 2);
            }
            memcpy(&mine->registers[i], pair, 4);
        }
    }
}

template <int N>
void ldmatrix(unsigned (&registers)[N], const void* row, bool transposed, int line) {
    if (reinterpret_cast<uintptr_t>(row) % 16) fail("ldmatrix: a row does not begin at a multiple of 16 bytes");
    Matrices mine = {registers, static_cast<const char*>(row), N, transposed};
    with_warp(0xffffffffu, mine, load_matrices, line);
}

// cp.async: a copy of 16 bytes (zeros unless `wanted`), done as late as possible, when its thread waits for its group: without the wait
// shared memory stays NaN.
inline void copy_16(void* shared, const void* global, bool wanted) {
    if (reinterpret_cast<uintptr_t>(shared) % 16 || reinterpret_cast<uintptr_t>(global) % 16) fail("cp.async: not at a multiple of 16 bytes");
    threads[current].copies.push_back({shared, wanted ? global : nullptr, threads[current].groups});
}

inline void commit_copies() { threads[current].groups++; }

// Waits until at most `pending` of the groups committed last are under way.
inline void wait_for_copies(int pending) {
    auto& mine = threads[current];
    while (!mine.copies.empty() && mine.copies.front().group + pending < mine.groups) {
        const Copy copy = mine.copies.front();
        mine.copies.pop_front();
        if (copy.from) memcpy(copy.to, copy.from, 16);
        else memset(copy.to, 0, 16);
        mine.unfenced.push_back(copy.to);
    }
}

}  // namespace cuda_on_cpu
