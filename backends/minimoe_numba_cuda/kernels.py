"""All topics of the contract together, for any array layer and launcher."""

from minimoe_numba_cuda.attention import CudaAttention
from minimoe_numba_cuda.embedding import CudaEmbedding
from minimoe_numba_cuda.expert import CudaExpert
from minimoe_numba_cuda.gating import CudaGating
from minimoe_numba_cuda.loss import CudaLoss
from minimoe_numba_cuda.norm import CudaNorm
from minimoe_numba_cuda.optimizer import CudaOptimizer
from minimoe_numba_cuda.random import CudaRandom
from minimoe_numba_cuda.rope import CudaRope


class NumbaCudaKernels(
    CudaNorm, CudaGating, CudaExpert, CudaRope, CudaAttention, CudaLoss, CudaEmbedding, CudaRandom, CudaOptimizer
):  # fmt: skip
    """The contract's kernels in Numba-CUDA."""

    name = "numba-cuda"
    emulated = "executed as PTX on a CPU"  # by the tests
