// What the kernels of attention's backward pass share beside attention.cuh: the two numbers that they need of each row.
#pragma once
#include "attention.cuh"

// x: a row's logsumexp in base 2, y: its delta. Past the last row, and for a row that saw no key, x is infinity, so that P becomes 0.
__device__ inline float2 row_statistics(const Sizes& sizes, const float* logsumexp, const float* delta, int b, int g, int row) {
    float2 result = {infinity(), 0.0f};
    if (row < sizes.n_q * sizes.heads) {
        const long long at = sizes.statistic(b, g, row);
        result.x = logsumexp[at] == -infinity() ? infinity() : logsumexp[at] * LOG2E;
        result.y = delta[at];
    }
    return result;
}
