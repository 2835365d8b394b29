// What the kernels that choose a token's experts share on top of select.cuh: gate.cu, gate_backward.cu and noisy_load.cu.
#pragma once
#include "select.cuh"

constexpr int WARPS = 8;  // tokens of a block at a time
constexpr int SOFTMAX_TOPK = 0, TOPK_SOFTMAX = 1, SIGMOID_BIAS = 2, ALL = 3;  // kinds of gate
constexpr float TINY = 1e-20f;
