"""Checks that there is a card that the kernels can run on, for both GPU backends."""

import os
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

from minimoe.backend import BackendUnavailable
from minimoe.hints import install

REQUIRED = {"ml_dtypes": "bfloat16", "cupy_backends.cuda.libs.nvrtc": "NVRTC", "cupy_backends.cuda.libs.cublas": "cuBLAS"}
OLDEST = (8, 0)  # Ampere: bf16 on the tensor cores, cp.async
HOPPER = (9, 0)
OLDEST_NVRTC = (12, 8)  # the oldest release with which the tests compile every kernel


def check_device(name: str) -> None:
    """Raises BackendUnavailable, saying what is missing and how to get it, unless the current device can run the kernels."""
    try:
        import cupy
    except ImportError as error:
        raise BackendUnavailable(
            f"backend {name}: CuPy is not installed: {install(name)} (for CUDA 13), or {install('cupy-cuda12')}"
        ) from error
    for module, what in REQUIRED.items():
        try:
            import_module(module)
        except ImportError as error:
            raise BackendUnavailable(f"backend {name}: {what} is missing ({error}): {install(name)}") from error
    check_compiler(name, cupy.cuda.nvrtc)
    runtime = cupy.cuda.runtime
    try:
        count = runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        raise BackendUnavailable(f"backend {name}: no usable NVIDIA driver ({error}): install one for CUDA 12 or newer") from error
    if not count:
        raise BackendUnavailable(f"backend {name}: no NVIDIA card is visible (CUDA_VISIBLE_DEVICES hides cards)")
    found = capability()
    if found < OLDEST:
        card = runtime.getDeviceProperties(runtime.getDevice())["name"].decode()
        has, needs = (f"{major}.{minor}" for major, minor in (found, OLDEST))
        raise BackendUnavailable(f"backend {name}: {card} has compute capability {has}: the kernels need {needs} (Ampere) or newer")


def check_compiler(name: str, nvrtc: Any) -> None:
    """Raises BackendUnavailable if NVRTC's library, which `nvrtc` (`cupy.cuda.nvrtc`) loads at its first use, is missing or too old."""
    try:
        found = nvrtc.getVersion()
    except (RuntimeError, OSError) as error:
        how = f"{install(name)}, or for CUDA 12 {install('cupy-cuda12')}"
        raise BackendUnavailable(f"backend {name}: NVRTC is missing ({error}): {how}") from error
    if found < OLDEST_NVRTC:
        has, needs = (f"{major}.{minor}" for major, minor in (found, OLDEST_NVRTC))
        raise BackendUnavailable(
            f"backend {name}: NVRTC {has} is too old, the kernels need {needs} or newer: pip install 'nvidia-cuda-nvrtc-cu12>={needs}'"
        )


def current_device() -> int:
    """Returns the number of the device that calls go to now: `with cupy.cuda.Device(1):` changes it."""
    import cupy

    return int(cupy.cuda.runtime.getDevice())


def capability() -> tuple[int, int]:
    """Returns the compute capability of the current device; a process may have devices of several."""
    import cupy

    return _capability(cupy, current_device())


@cache
def _capability(cupy: ModuleType, device: int) -> tuple[int, int]:
    properties = cupy.cuda.runtime.getDeviceProperties(device)
    return properties["major"], properties["minor"]


def current_architecture() -> str:
    """Returns what the compiler calls the current device: sm_90. Raises RuntimeError if the kernels cannot run on it."""
    found = capability()
    if found < OLDEST:
        has, needs = (f"{major}.{minor}" for major, minor in (found, OLDEST))
        raise RuntimeError(f"device {current_device()} has compute capability {has}: the kernels need {needs} or newer")
    return "sm_{}{}".format(*found)


def wgmma_wanted() -> bool:
    """Returns True if grouped products in bfloat16 shall use Hopper's wgmma: if MINIMOE_WGMMA is 1, and the current device an H100 or H200.

    It is off by default because no card has run it; mma.sync gives the same products.
    """
    if os.environ.get("MINIMOE_WGMMA") != "1":
        return False
    try:
        return capability() == HOPPER
    except ImportError:
        return False
