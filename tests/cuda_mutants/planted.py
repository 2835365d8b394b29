"""Faults planted by hand in the kernels of the backend `cupy`, by topic: what somebody who writes or changes a kernel gets wrong.

Each replaces one text of one file by another. `nth` chooses among equal texts, from 0.
"""

from dataclasses import dataclass

from minimoe_cupy.loader import KERNELS

from .trials import Target

BF16 = "bfloat16"
GROUPED_BF16 = Target(("grouped_matmul", "grouped_matmul_dw"), BF16, ("products", "layers"), "small")
LARGE_BF16 = Target((), BF16, ("products",), "large")
WGMMA = Target((), BF16, ("products",), "wgmma")
ROUTE, SORT = Target(("route",), deep=("plans",)), Target(("embedding_backward",), deep=("sorts",))
NORM = Target(("rms_norm", "layer_norm", "rms_norm_backward", "layer_norm_backward"), deep=("norms",))
GATE, LOSS = Target(("gate",), deep=("gates",)), Target(("cross_entropy", "cross_entropy_backward"), deep=("losses",))
COMBINE, SQUARES = Target(("combine", "combine_backward"), deep=("combinations",)), Target(("sum_of_squares",), deep=("squares",))
FLOAT_PRODUCT = Target(("grouped_matmul", "grouped_matmul_dw"), deep=("products",), tiling="small")
ATTENTION, ATTENTION_BF16 = Target(("attention",), deep=("attention",)), Target(("attention",), BF16, ("attention",))


@dataclass(frozen=True)
class Planted:
    """One fault."""

    topic: str
    file: str
    right: str
    wrong: str
    target: Target
    nth: int = 0

    @property
    def name(self) -> str:
        return f"{self.file}: {' '.join(self.right.split())}  ->  {' '.join(self.wrong.split()) or 'nothing'}{f' ({self.nth + 1})' if self.nth else ''}"

    def text(self) -> str:
        """Return the file with the fault. Raises LookupError if the file has changed."""
        parts = (KERNELS / self.file).read_text(encoding="utf-8").split(self.right)
        if len(parts) < self.nth + 2:
            raise LookupError(f"{self.file} does not have {self.nth + 1} times: {self.right}")
        return self.right.join(parts[: self.nth + 1]) + self.wrong + self.right.join(parts[self.nth + 1 :])


SYNC, WARP_SYNC = "__syncthreads();", "__syncwarp();"

PLANTED = [
    # ---- barriers of a block ----
    Planted("barriers", "norm.cuh", SYNC, "", NORM),
    Planted("barriers", "norm.cuh", SYNC, "", NORM, 1),
    Planted("barriers", "norm.cuh", SYNC, "", NORM, 2),
    Planted("barriers", "scan.cuh", SYNC, "", ROUTE),
    Planted("barriers", "scan.cuh", "__syncthreads();  // `sums` may be used again", "", ROUTE),
    Planted("barriers", "route.cu", SYNC, "", ROUTE),
    Planted("barriers", "route.cu", SYNC, "", ROUTE, 1),
    Planted("barriers", "route.cu", SYNC, "", ROUTE, 3),
    Planted("barriers", "route.cu", SYNC, "", ROUTE, 4),
    Planted("barriers", "sort.cu", SYNC, "", SORT),
    Planted("barriers", "sort.cu", SYNC, "", SORT, 1),
    Planted("barriers", "sort.cu", SYNC, "if (threadIdx.x < 128) __syncthreads();", SORT, 2),
    Planted("barriers", "loss.cu", SYNC, "", LOSS),
    Planted("barriers", "loss.cu", "if (blockDim.x > WARP) __syncthreads();", "", LOSS),
    Planted("barriers", "expert_choice.cu", SYNC, "", GATE),
    Planted("barriers", "expert_choice.cu", SYNC, "", GATE, 1),
    Planted("barriers", "columns.cu", SYNC, "", Target(("linear_db",))),
    Planted("barriers", "grouped_bias.cu", SYNC, "", Target(("grouped_bias_backward",))),
    Planted("barriers", "optimizer.cu", SYNC, "", SQUARES),
    Planted("barriers", "float_tile.cuh", SYNC, "", FLOAT_PRODUCT),
    Planted("barriers", "attention.cuh", SYNC, "", ATTENTION, 1),
    Planted("barriers", "attention_dq_bf16.cu", "__syncthreads();  // all are done with the one stage", "", ATTENTION_BF16),
    Planted("barriers", "add_rows.cu", SYNC, "", SORT),
    Planted("barriers", "partials.cu", SYNC, "", GATE),
    # ---- warps ----
    Planted("warps", "route.cu", WARP_SYNC, "", ROUTE),
    Planted("warps", "route.cu", WARP_SYNC, "", ROUTE, 1),
    Planted("warps", "sort.cu", WARP_SYNC, "", SORT),
    Planted("warps", "sort.cu", WARP_SYNC, "", SORT, 1),
    Planted("warps", "gate.cu", WARP_SYNC, "", GATE, 1),
    Planted("warps", "gate.cu", WARP_SYNC, "", GATE, 2),
    Planted("warps", "expert_choice.cu", WARP_SYNC, "", GATE),
    Planted("warps", "attention_fma.cuh", WARP_SYNC, "", ATTENTION, 1),
    Planted("warps", "attention_mma.cuh", WARP_SYNC, "", ATTENTION_BF16),
    Planted("warps", "grouped_bf16.cu", WARP_SYNC, "", GROUPED_BF16),
    Planted("warps", "grouped_bf16.cu", WARP_SYNC, "", GROUPED_BF16, 1),
    Planted("warps", "wgmma_tile.cuh", WARP_SYNC, "", WGMMA, 1),
    Planted("warps", "route.cu", "__match_any_sync(ALL_LANES, expert)", "__match_any_sync(0x7fffffffu, expert)", ROUTE),
    Planted("warps", "scan.cuh", "__shfl_up_sync(ALL_LANES, value, offset)", "__shfl_down_sync(ALL_LANES, value, offset)", ROUTE),
    Planted("warps", "loss.cu", "__shfl_xor_sync(ALL_LANES, seen.top, offset)", "__shfl_xor_sync(0xffffu, seen.top, offset)", LOSS),
    Planted("warps", "tiles.cuh", "__ballot_sync(ALL_LANES, index < sum)", "__ballot_sync(ALL_LANES, index <= sum)", FLOAT_PRODUCT),
    # ---- bounds and indices ----
    Planted("bounds", "dispatch.cu", " >= ", " > ", Target(("dispatch",))),
    Planted("bounds", "route.cu", "row < n_rows; row += step", "row <= n_rows; row += step", ROUTE),
    Planted("bounds", "route.cu", "e <= n_experts", "e < n_experts", ROUTE),
    Planted("bounds", "route.cu", "if (pair >= n_pairs) break;", "if (pair > n_pairs) break;", ROUTE),
    Planted("bounds", "expert_choice.cu", "if (expert < n_experts) {", "if (expert <= n_experts) {", GATE),
    Planted("bounds", "float_tile.cuh", "i < count ? from[i] : 0.0f", "i <= count ? from[i] : 0.0f", Target(("grouped_matmul",))),
    Planted("bounds", "norm.cuh", "for (int y = 1;", "for (int y = 2;", NORM),
    Planted("bounds", "attention_mma.cuh", "key > seen.most", "key >= seen.most", ATTENTION_BF16),
    Planted("bounds", "attention_mma.cuh", "first + row < rows.count", "first + row <= rows.count", ATTENTION_BF16),
    Planted("bounds", "sort.cu", "mine.first + i * WARP < count", "mine.first + i * WARP <= count", SORT),
    Planted("bounds", "loss.cu", "if (edge < width) {", "if (edge <= width) {", LOSS),
    Planted("bounds", "mma_tile.cuh", "k < length ? width - chunk * CHUNK : 0", "k <= length ? width - chunk * CHUNK : 0", GROUPED_BF16),
    # ---- memory that nobody wrote ----
    Planted("unwritten", "route.cu", "seen[i] = 0;", "if (i) seen[i] = 0;", ROUTE),
    Planted("unwritten", "expert_choice.cu", "bins[bin][lane] = 0;", "if (bin) bins[bin][lane] = 0;", GATE),
    Planted("unwritten", "route.cu", "inverse[pair] = row;", "if (row >= 0) inverse[pair] = row;", ROUTE),
    Planted("unwritten", "route.cu", "if (threadIdx.x == 0) first[n_experts] = before;", "", ROUTE),
    Planted("unwritten", "sort.cu", "counts[w][threadIdx.x] = 0;", "if (w) counts[w][threadIdx.x] = 0;", SORT),
    Planted("unwritten", "norm.cuh", "shared[thread * V + j] = sum[j];", "if (sum[j] != 0.0f) shared[thread * V + j] = sum[j];", NORM),
    Planted("unwritten", "attention.cuh", "least[mine] = range.least;", "if (mine) least[mine] = range.least;", ATTENTION),
    Planted("unwritten", "optimizer.cu", "if (threadIdx.x == 0) partial[blockIdx.x] = sum;", "if (threadIdx.x == 0 && sum > 0.0f) partial[blockIdx.x] = sum;", SQUARES),
    Planted("unwritten", "combine.cu", "if (lane == 0 && j + s < width)", "if (lane == 0 && j + s < width && slots.row[s] >= 0)", COMBINE),
    # ---- copies in the background ----
    Planted("copies", "mma_tile.cuh", "wait_for_copies<STAGES - 2>();", "", GROUPED_BF16),
    Planted("copies", "mma_tile.cuh", "wait_for_copies<STAGES - 2>();", "", GROUPED_BF16, 1),
    Planted("copies", "mma_tile.cuh", "wait_for_copies<STAGES - 2>();", "wait_for_copies<STAGES - 1>();", GROUPED_BF16, 1),
    Planted("copies", "mma_tile.cuh", "commit_copies();", "", GROUPED_BF16),
    Planted("copies", "mma_tile.cuh", "commit_copies();", "if (step + STAGES - 1 < steps) commit_copies();", GROUPED_BF16, 1),
    Planted("copies", "mma_tile.cuh", SYNC, "", GROUPED_BF16),
    Planted("copies", "mma_tile.cuh", SYNC, "", GROUPED_BF16, 1),
    Planted("copies", "mma_tile.cuh", "copy_async(shared, from, count > 0);", "copy_async(shared, from, true);", GROUPED_BF16),
    Planted("copies", "mma_tile.cuh", "int here = 0, free = STAGES - 1;", "int here = 0, free = STAGES - 2;", GROUPED_BF16),
    Planted("copies", "mma_tile.cuh", "for (int step = 0; step < STAGES - 1; step++) {", "for (int step = 0; step < STAGES - 2; step++) {", GROUPED_BF16),
    Planted("copies", "attention_bf16.cu", "wait_for_copies<0>();", "", ATTENTION_BF16),
    Planted("copies", "attention_float.cu", "wait_for_copies<1>();", "", ATTENTION),
    Planted("copies", "attention_float.cu", "wait_for_copies<1>();", "wait_for_copies<2>();", ATTENTION, 1),
    Planted("copies", "attention_bf16.cu", "fetch(chunk + next, stage ^ 2 * TILE);", "fetch(chunk + next, stage);", ATTENTION_BF16),
    # ---- fragments of tensor cores ----
    Planted("fragments", "mma_tile.cuh", "m + lane % 16, k / CHUNK + lane / 16", "m + lane % 16, k / CHUNK + lane / 8 % 2", GROUPED_BF16),
    Planted("fragments", "mma_tile.cuh", "{four[j % 2 * 2], four[j % 2 * 2 + 1]}", "{four[j % 2 * 2 + 1], four[j % 2 * 2]}", GROUPED_BF16),
    Planted("fragments", "mma_tile.cuh", "ldmatrix_x4_transposed(a,", "ldmatrix_x4(a,", GROUPED_BF16),
    Planted("fragments", "mma_tile.cuh", "((chunk ^ row / 2) & 3)", "((chunk ^ row / 2) & 1)", GROUPED_BF16),
    Planted("fragments", "mma_tile.cuh", "mma_bf16(sum[i][j], a[which][i], two);", "mma_bf16(sum[i][j], a[which ^ 1][i], two);", GROUPED_BF16),
    Planted("fragments", "ptx.cuh", '"r"(b[0]), "r"(b[1])', '"r"(b[1]), "r"(b[0])', GROUPED_BF16),
    Planted("fragments", "attention_mma.cuh", "ldmatrix_x4_transposed(b, other + 16 * n", "ldmatrix_x4(b, other + 16 * n", ATTENTION_BF16),
    Planted("fragments", "attention_mma.cuh", "x[m][2 * n + i / 2][i % 2 * 2]", "x[m][2 * n + i % 2][i / 2 * 2]", ATTENTION_BF16),
    Planted("fragments", "attention_mma.cuh", "own_positions[16 * m + lane / 4 + 8 * half]", "own_positions[16 * m + lane % 8 + 8 * half]", ATTENTION_BF16),
    # ---- Hopper's products: descriptors, mbarriers, fences ----
    Planted("wgmma", "wgmma_tile.cuh", "wait_for_copies<DEPTH>();", "", WGMMA),
    Planted("wgmma", "wgmma_tile.cuh", "fence_proxy_async();", "", WGMMA),
    Planted("wgmma", "wgmma_tile.cuh", "mbarrier_wait(&barriers.full[stage], step / STAGES % 2);", "", WGMMA),
    Planted("wgmma", "wgmma_tile.cuh", "mbarrier_wait(&barriers.empty[stage], step / STAGES % 2 ^ 1);", "", WGMMA),
    Planted("wgmma", "wgmma_tile.cuh", "mbarrier_wait(&barriers.full[stage], step / STAGES % 2);", "mbarrier_wait(&barriers.full[stage], step / STAGES % 2 ^ 1);", WGMMA),
    Planted("wgmma", "wgmma_tile.cuh", "wgmma_wait<1>(sum);", "wgmma_wait<2>(sum);", WGMMA),
    Planted("wgmma", "wgmma_tile.cuh", "wgmma_wait<0>(sum);", "", WGMMA),
    Planted("wgmma", "wgmma_tile.cuh", "wgmma_fence(sum);", "", WGMMA),
    Planted("wgmma", "wgmma_tile.cuh", "wgmma_commit();", "", WGMMA),
    Planted("wgmma", "wgmma_tile.cuh", "mbarrier_wait(&barriers.end, 0);", "", WGMMA),
    Planted("wgmma", "wgmma_tile.cuh", "(chunk ^ row % 8) * CHUNK", "chunk * CHUNK", WGMMA),
    Planted("wgmma", "wgmma_tile.cuh", "warp_arrives(&barriers.full[(step - DEPTH) % STAGES]);", "warp_arrives(&barriers.full[0]);", WGMMA),
    Planted("wgmma", "wgmma_tile.cuh", "mbarrier_init(&barriers.empty[stage], MULTIPLIERS / WARP);", "mbarrier_init(&barriers.empty[stage], GROUP / WARP);", WGMMA),
    Planted("wgmma", "wgmma_tile.cuh", "__syncthreads();", "", WGMMA),
    Planted("wgmma", "wgmma_tile.cuh", "SIXTEEN = 16 * sizeof(bf16);", "SIXTEEN = 32 * sizeof(bf16);", WGMMA),
    Planted("wgmma", "wgmma_tile.cuh", "EIGHT_ROWS = 8 * ROW_BYTES", "EIGHT_ROWS = 16 * ROW_BYTES", WGMMA),
    Planted("wgmma", "ptx_hopper.cuh", "SWIZZLE_128 = 1ull << 62", "SWIZZLE_128 = 2ull << 62", WGMMA),
    Planted("wgmma", "wgmma_tile.cuh", "step || k);", "k != 0);", WGMMA),
    # ---- blocks ----
    Planted("blocks", "route.cu", "if (blockIdx.x == 0)\n", "", ROUTE),
    Planted("blocks", "expert_choice.cu", "atomicAdd(&histogram[bin * n_experts + expert], bins[bin][lane]);", "histogram[bin * n_experts + expert] += bins[bin][lane];", GATE),
    Planted("blocks", "expert_choice.cu", "atomicAdd(&bins[key >> shift & (BINS - 1)][lane], 1);", "bins[key >> shift & (BINS - 1)][lane]++;", GATE),
    Planted("blocks", "expert_choice.cu", "if (count) atomicAdd(&counts[expert], count);", "counts[expert] += count;", GATE),
    Planted("blocks", "optimizer.cu", "partial[blockIdx.x] = sum;", "partial[0] = sum;", SQUARES),
    Planted("blocks", "norm.cu", "((long long)blockIdx.x * COUNT + c) * d_model", "c * d_model", NORM),
    Planted("blocks", "gate.cu", "prob_parts[(long long)blockIdx.x * n_experts + e]", "prob_parts[e]", GATE),
    Planted("blocks", "sort.cu", "gridDim.x + blockIdx.x] = total;", "gridDim.x] = total;", SORT),
    Planted("blocks", "add_rows.cu", "partial + (2ll * number + 1) * width", "partial + (2ll * number + 2) * width", SORT),
    # ---- arithmetic ----
    Planted("arithmetic", "norm.cuh", " += __shfl_xor_sync(", " = __shfl_xor_sync(", NORM),
    Planted("arithmetic", "loss.cu", "merge(seen, {__shfl_xor_sync", "merge(merge(seen, seen), {__shfl_xor_sync", LOSS),
    Planted("arithmetic", "route.cu", "rank < first[expert + 1] - first[expert]", "rank <= first[expert + 1] - first[expert]", ROUTE),
    Planted("arithmetic", "route.cu", "same & ((1u << lane) - 1)", "same & ((2u << lane) - 1)", ROUTE),
    Planted("arithmetic", "attention_float.cu", "value = fmaxf(value, __shfl_xor_sync", "value = fminf(value, __shfl_xor_sync", ATTENTION),
    Planted("arithmetic", "combine.cu", "sum[i] += slots.weight[s] * part[i];", "sum[i] = slots.weight[s] * part[i];", COMBINE),
    Planted("arithmetic", "gate.cu", "if (ahead < top_groups) continue;", "if (ahead <= top_groups) continue;", GATE),
    Planted("arithmetic", "grouped_bf16.cu", "chunk + SIDE / CHUNK / 2", "chunk", Target((), BF16, ("layers",), "small")),
]  # fmt: skip
