"""Cross-entropy fused with log-softmax: one block reads a row of logits twice. Formulas: minimoe/reference/loss.py."""

import math

from minimoe.backend import Array
from minimoe.reference.loss import IGNORE
from minimoe_numba_cuda.compiler import cuda
from minimoe_numba_cuda.launch import I32, THREADS, CudaKernels, blocks_of, singles
from minimoe_numba_cuda.warp import INFINITY, LANES, NAN, ONE, WARPS, ZERO, max_over_block, sum_over_block

BLOCK = LANES * WARPS


@cuda.jit
def row_losses(logits, targets, ignore, losses, logsumexp):  # type: ignore[no-untyped-def]
    """logsumexp(z) - z[target]; 0 for a target of `ignore`, NaN for one out of range.   [N,V], [N] -> [N], [N]

    One block per row: the maximum, then the sum of exponentials. Bytes: N*V read, the second time mostly from L2.
    """
    n, width, thread = cuda.blockIdx.x, logits.shape[1], cuda.threadIdx.x
    top = -INFINITY
    for v in range(thread, width, BLOCK):
        top = max(top, logits[n, v])
    top = max_over_block(top)
    top = ZERO if top == -INFINITY else top  # the sum of a row of -inf alone is 0, its logarithm -inf
    total = ZERO
    for v in range(thread, width, BLOCK):
        total += math.exp(logits[n, v] - top)
    total = sum_over_block(total)
    if thread == 0:
        value, target = top + math.log(total), targets[n]
        logsumexp[n] = value
        if target == ignore:
            losses[n] = ZERO
        else:
            losses[n] = value - logits[n, target] if 0 <= target < width else NAN


@cuda.jit
def sum_losses(losses, targets, ignore, total, count):  # type: ignore[no-untyped-def]
    """The sum of the losses, and the number of valid targets; in a fixed order.   [N], [N] -> [1], [1]   One block."""
    part, valid = ZERO, ZERO
    for n in range(cuda.threadIdx.x, losses.size, BLOCK):
        part += losses[n]
        if targets[n] != ignore:
            valid += ONE
    part, valid = sum_over_block(part), sum_over_block(valid)
    if cuda.threadIdx.x == 0:
        total[0] = part
        count[0] = valid


@cuda.jit
def row_losses_backward(dloss, logits, targets, logsumexp, ignore, dlogits):  # type: ignore[no-untyped-def]
    """dz = (softmax(z) - onehot) * dloss, 0 where ignored.   dloss [1] -> [N,V]   Grid: (N, ceil(V / 128)). Bytes: N*V read and written."""
    n, v = cuda.blockIdx.x, cuda.blockIdx.y * cuda.blockDim.x + cuda.threadIdx.x
    if v >= logits.shape[1]:
        return
    target = targets[n]
    slope = math.exp(logits[n, v] - logsumexp[n]) - (ONE if v == target else ZERO)
    dlogits[n, v] = slope * dloss[0] if target != ignore else ZERO


class CudaLoss(CudaKernels):
    def cross_entropy(self, logits: Array, targets: Array, ignore: int = IGNORE) -> tuple[Array, Array, Array]:
        if not singles(logits):
            return super().cross_entropy(logits, targets, ignore)
        n = logits.shape[0]
        logits = self._read("cross_entropy", "logits", logits, (n, None))
        targets = self._read("cross_entropy", "targets", targets, (n,), I32)
        losses, logsumexp, total, count = self._empty(n), self._empty(n), self._empty(1), self._empty(1)
        self._launch(row_losses, (n,), (BLOCK,), logits, targets, ignore, losses, logsumexp)
        self._launch(sum_losses, (1,), (BLOCK,), losses, targets, ignore, total, count)
        return self.xp.reshape(total, ()), self.xp.reshape(count, ()), logsumexp

    def cross_entropy_backward(self, dloss: Array, logits: Array, targets: Array, logsumexp: Array, ignore: int = IGNORE) -> Array:
        if not singles(logits, logsumexp):
            return super().cross_entropy_backward(dloss, logits, targets, logsumexp, ignore)
        where, n = "cross_entropy_backward", logits.shape[0]
        logits, targets = self._read(where, "logits", logits, (n, None)), self._read(where, "targets", targets, (n,), I32)
        logsumexp, dlogits = self._read(where, "logsumexp", logsumexp, (n,)), self._empty(*logits.shape)
        grid = n, blocks_of(logits.shape[1])
        self._launch(row_losses_backward, grid, (THREADS,), self._one(dloss), logits, targets, logsumexp, ignore, dlogits)
        return dlogits
