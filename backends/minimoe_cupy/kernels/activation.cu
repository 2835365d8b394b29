// swiglu_rows: y = silu(gate) * up, clipped where limit > 0             [N,H] <- [N,2H];   each: y = activation(x)              [P] <- [P]
// and their gradients, swiglu_rows_backward and each_backward. The formulas for one number are in activation.cuh.
// One thread per access of V elements (16 bytes where alignment allows). Each number is read once and written once, and nothing is summed.
// Bytes, FLOPs and grid are given with each kernel.   Reference: minimoe/reference/activation.py.   Unproven: no card has run it.
#include "activation.cuh"
#include "common.cuh"

// swiglu_rows: y = silu(gate) * up, clipped where limit > 0; gate_up holds the gate half first                  [N,H] <- [N,2H]
// One thread per access of either half. Block (columns, rows), grid (pieces of H, pieces of N).   Bytes: 3 N H sizeof(T).   FLOPs: about 20 N H.
template <class T, int V>
__global__ void swiglu_rows(const T* gate_up, T* y, float limit, long long n_rows, int width) {
    const int column = (blockIdx.x * blockDim.x + threadIdx.x) * V;
    if (column >= width) return;
    for (long long n = (long long)blockIdx.y * blockDim.y + threadIdx.y; n < n_rows; n += (long long)gridDim.y * blockDim.y) {
        const T* from = gate_up + 2 * n * width + column;
        float gate[V], up[V];
        load(from, gate);
        load(from + width, up);
#pragma unroll
        for (int i = 0; i < V; i++) gate[i] = swiglu(gate[i], up[i], limit);
        store(y + n * width + column, gate);
    }
}

// swiglu_rows_backward: dgate and dup side by side, as in gate_up                                          [N,2H] <- [N,H], [N,2H]
// Launched as swiglu_rows.   Bytes: 5 N H sizeof(T).   FLOPs: about 25 N H.
template <class T, int V>
__global__ void swiglu_rows_backward(const T* dy, const T* gate_up, T* dgate_up, float limit, long long n_rows, int width) {
    const int column = (blockIdx.x * blockDim.x + threadIdx.x) * V;
    if (column >= width) return;
    for (long long n = (long long)blockIdx.y * blockDim.y + threadIdx.y; n < n_rows; n += (long long)gridDim.y * blockDim.y) {
        const long long first = 2 * n * width + column;
        float gradient[V], gate[V], up[V];
        load(dy + n * width + column, gradient);
        load(gate_up + first, gate);
        load(gate_up + first + width, up);
#pragma unroll
        for (int i = 0; i < V; i++) {
            float dgate, dup;
            swiglu_backward(gradient[i], gate[i], up[i], limit, dgate, dup);
            gate[i] = dgate, up[i] = dup;
        }
        store(dgate_up + first, gate);
        store(dgate_up + first + width, up);
    }
}

// each: y = activation(x), flat, for any KIND of activation.cuh but swiglu                                        [P] <- [P]
// One thread per access; an incomplete last access is done element by element.
// Bytes: 2 P sizeof(T).   FLOPs: relu P, tanh form 15 P, exact form about 30 P.   Grid: ceil(P / V / block).
template <class T, int KIND, int V>
__global__ void each(const T* x, T* y, long long count) {
    const long long first = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * V;
    if (count - first >= V) {
        float values[V];
        load(x + first, values);
#pragma unroll
        for (int i = 0; i < V; i++) values[i] = pointwise(KIND, values[i]);
        store(y + first, values);
    } else {
        for (long long i = first; i < count; i++) y[i] = from_float<T>(pointwise(KIND, to_float(x[i])));
    }
}

// each_backward: dx = dy * activation'(x), flat                                                                 [P] <- [P], [P]
// Launched as each.   Bytes: 3 P sizeof(T).   FLOPs: relu P, tanh form 20 P, exact form about 40 P.
template <class T, int KIND, int V>
__global__ void each_backward(const T* dy, const T* x, T* dx, long long count) {
    const long long first = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * V;
    if (count - first >= V) {
        float gradient[V], values[V];
        load(dy + first, gradient);
        load(x + first, values);
#pragma unroll
        for (int i = 0; i < V; i++) gradient[i] *= pointwise_slope(KIND, values[i]);
        store(dx + first, gradient);
    } else {
        for (long long i = first; i < count; i++) dx[i] = from_float<T>(to_float(dy[i]) * pointwise_slope(KIND, to_float(x[i])));
    }
}
