"""NVIDIA cards with kernels written in Python, compiled by Numba-CUDA: the GPU version that can be read without knowing C++.

Arrays, memory and dense products are CuPy's; `launch.py` checks and launches, and each topic of the contract has its file. Where it is
instructive a kernel comes as a ladder, from the naive form to the one that is used. Kernels compute in float32; any other dtype goes to
the reference. No card has run any of them yet: the tests execute all of them as PTX on the processor, in random schedules, and
compile them for sm_80 and sm_90a.
"""

from importlib.util import find_spec

from minimoe.backend import Backend, BackendUnavailable

__all__ = ["backend", "backend_class"]

INSTALL = "pip install 'numba-cuda[cu13]' (for CUDA 13), or 'numba-cuda[cu12]'"


def backend_class() -> type[Backend]:
    """Returns the class with all overrides, which needs no device."""
    from minimoe_numba_cuda.kernels import NumbaCudaKernels

    return NumbaCudaKernels


def backend() -> Backend:
    """Returns the Numba-CUDA backend. Raises BackendUnavailable if CuPy, a driver, a card or Numba-CUDA is missing."""
    from minimoe_cupy.device import check_device

    check_device("numba-cuda")
    if find_spec("numba_cuda") is None:
        raise BackendUnavailable(f"backend numba-cuda: Numba-CUDA is not installed: {INSTALL}")
    try:
        from numba import cuda
    except ImportError as error:
        raise BackendUnavailable(f"backend numba-cuda: Numba-CUDA cannot be imported ({error}): {INSTALL}") from error
    if not cuda.is_available():
        raise BackendUnavailable(f"backend numba-cuda: Numba-CUDA does not find the driver or its compiler libNVVM: {INSTALL}")
    from minimoe_numba_cuda.device import NumbaCudaBackend

    return NumbaCudaBackend()
