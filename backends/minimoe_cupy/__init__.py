"""NVIDIA cards through CuPy: arrays and memory from CuPy, dense products from cuBLAS, everything else CUDA C kernels (kernels/*.cu).

`loader.py` compiles them, `launch.py` checks and launches, and each topic of the contract has its file. Kernels take float32, or bfloat16
with float32 sums; any other dtype goes to the reference. No card has run any of them yet: the tests execute all of them on the processor,
and compile them with NVRTC 12.8 and newer for sm_80, sm_89, sm_90a and sm_100.
"""

from collections.abc import Callable, Iterable, Iterator
from types import ModuleType

from minimoe.backend import Array, Backend
from minimoe_cupy import (
    activation,
    attention,
    dispatch,
    embedding,
    gating,
    grouped,
    linear,
    loss,
    norm,
    optimizer,
    random,
    rope,
    routing,
    selection,
    sorting,
)  # fmt: skip
from minimoe_cupy.activation import CudaActivation
from minimoe_cupy.attention import CudaAttention
from minimoe_cupy.embedding import CudaEmbedding
from minimoe_cupy.expert import CudaExpert
from minimoe_cupy.gating import CudaGating
from minimoe_cupy.launch import FLOAT32
from minimoe_cupy.linear import CudaLinear
from minimoe_cupy.loader import CupyLoader, Loader, Source, to_stderr
from minimoe_cupy.loss import CudaLoss
from minimoe_cupy.norm import CudaNorm
from minimoe_cupy.optimizer import CudaOptimizer
from minimoe_cupy.random import CudaRandom
from minimoe_cupy.rope import CudaRope
from minimoe_cupy.routing import CudaRouting

__all__ = ["CudaKernels", "backend", "backend_class", "sources"]

TOPICS: tuple[ModuleType, ...] = (
    activation, attention, dispatch, embedding, gating, grouped, linear, loss, norm, optimizer, random, rope, routing, selection, sorting,
)  # fmt: skip
PRODUCTS = frozenset({"linear", "linear_dx", "linear_dw"})


class CudaKernels(
    CudaNorm, CudaActivation, CudaRope, CudaLinear, CudaAttention, CudaGating, CudaRouting, CudaExpert, CudaLoss, CudaEmbedding,
    CudaRandom, CudaOptimizer,
):  # fmt: skip
    """The contract's kernels in CUDA C, for any array layer and loader."""

    name = "cupy"
    emulated = "executed as PTX on a CPU"  # by the tests
    library = PRODUCTS

    def __init__(self, loader: Loader) -> None:
        self.loader = loader


def sources() -> list[Source]:
    """Returns every source: a `.cu` file with the kernels that the backend compiles from it. `ladder.py` has those that are only read."""
    return list(dict.fromkeys(source for topic in TOPICS for source in _sources_in(vars(topic).values())))


def _sources_in(values: Iterable[object]) -> Iterator[Source]:
    """Yields the sources among the values, and in tables and tuples of them."""
    for value in values:
        if isinstance(value, Source):
            yield value
        elif isinstance(value, dict):
            yield from _sources_in(value.values())
        elif isinstance(value, tuple):
            yield from _sources_in(value)


def backend_class() -> type[Backend]:
    """Returns the class with all overrides, which needs no device."""
    return CudaKernels


def backend() -> Backend:
    """Returns the CuPy backend. Raises BackendUnavailable if CuPy, a driver or a card is missing."""
    from minimoe_cupy.device import check_device

    check_device("cupy")
    from minimoe_cupy.arrays import CupyArrays, cublas

    class CupyBackend(CudaKernels, CupyArrays):
        """The backend on a card."""

        def _add_product(self, inout_y: Array, a: Array, b: Array) -> None:
            """Lets cuBLAS add in float32, without another array."""
            if inout_y.dtype != FLOAT32 or not cublas.matmul(a, b, inout_y, accumulate=True):
                super()._add_product(inout_y, a, b)

        def tell(self, listener: Callable[[str], None] | None) -> None:
            loader.listener = listener or to_stderr

    loader = CupyLoader()
    return CupyBackend(loader)
