"""The device that a part measures: backends, a clock, PyTorch's device, and the size of problems; a card or, in the tests, a processor."""

import gc
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.gpu.clocks import Clock, EventClock, TorchClock
from benchmarks.machine import machine
from minimoe.backend import Backend, load
from minimoe.errors import UserError

BACKENDS = ("cupy", "numba-cuda")
COMPUTES = {"cupy": ("bfloat16", "float32"), "numba-cuda": ("float32",)}  # the dtypes that their kernels are written for
OURS = "cupy"  # the backend that the targets are for
PACKAGES = ("cupy", "numba-cuda", "ml-dtypes", "pytest", "torch", "triton", "transformers")
MEGABYTE = 10**6


@dataclass
class Lab:
    """The device as one process sees it."""

    scale: str  # size of the problems: "full", "quick", "tiny"
    backends: dict[str, Backend]
    clock: Clock
    cache_bytes: int  # size of the last cache before the device's memory
    absent: dict[str, str] = field(default_factory=dict)  # backends that do not run here, and why
    device: dict[str, Any] = field(default_factory=dict)  # facts about the card
    peers: str = "cuda"  # PyTorch's device

    @cached_property
    def torch(self) -> str:
        """PyTorch's device, or "" if its peers cannot be measured."""
        if find_spec("torch") is None:
            return ""
        import torch

        return self.peers if self.peers == "cpu" or torch.cuda.is_available() else ""

    def backend(self, name: str) -> Backend:
        """One of minimoe's backends. Raises UserError with the reason if it does not run here."""
        if name not in self.backends:
            raise UserError(self.absent.get(name, f"backend {name} is not measured here"))
        return self.backends[name]

    def check(self) -> None:
        """Raise the error of a device that was lost."""
        for backend in self.backends.values():
            backend.synchronize()

    def release(self) -> None:
        """Release unused memory that CuPy and PyTorch keep, so that one side does not fail because of another's."""
        gc.collect()
        if self.peers == "cuda" and "cupy" in sys.modules:
            sys.modules["cupy"].get_default_memory_pool().free_all_blocks()
        if self.torch == "cuda" and "torch" in sys.modules:
            sys.modules["torch"].cuda.empty_cache()


def card(scale: str) -> Lab:
    """The current NVIDIA card. Raises UserError if there is none."""
    found: dict[str, Backend] = {}
    absent = {}
    for name in BACKENDS:
        try:
            found[name] = load(name)
        except UserError as error:
            if name == OURS:  # the others need its arrays and events
                raise
            absent[name] = str(error)
    import cupy

    return Lab(scale, found, EventClock(), cupy.cuda.Device().attributes.get("L2CacheSize", 64 * MEGABYTE), absent, card_facts())


def check_card() -> None:
    """Raise UserError unless a card is here, without making a context."""
    from minimoe_cupy.device import check_device

    check_device(OURS)


def card_for_torch(scale: str) -> Lab:
    """For a process without CuPy. Raises UserError if PyTorch is not installed or sees no card."""
    lab = Lab(scale, {}, TorchClock(), 0)
    if not lab.torch:
        raise UserError("PyTorch is not installed" if find_spec("torch") is None else "PyTorch sees no card")
    return lab


# ---- facts ---------------------------------------------------------------------------------------------------------------------------


def card_facts() -> dict[str, Any]:
    """Facts about the card, the driver and CUDA."""
    import cupy

    runtime, device = cupy.cuda.runtime, cupy.cuda.Device()
    free, total = runtime.memGetInfo()
    attributes = device.attributes
    return {
        "card": runtime.getDeviceProperties(device.id)["name"].decode(),
        "compute_capability": f"{device.compute_capability[:-1]}.{device.compute_capability[-1]}",
        "multiprocessors": attributes.get("MultiProcessorCount"),
        "memory_gb": total / 1e9,
        "free_gb": free / 1e9,
        "l2_mb": attributes.get("L2CacheSize", 0) / MEGABYTE,
        "driver": driver_version(),
        "driver_cuda": cuda_version(runtime.driverGetVersion()),
        "cuda_runtime": cuda_version(runtime.runtimeGetVersion()),
    }


def cuda_version(number: int) -> str:
    """13000 -> 13.0"""
    return f"{number // 1000}.{number % 1000 // 10}"


def driver_version() -> str:
    """The driver's version, from nvidia-smi or the kernel module."""
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        if answer.returncode == 0 and answer.stdout.strip():
            return answer.stdout.split()[0]
    module = Path("/proc/driver/nvidia/version")
    found = re.search(r"\d+\.\d+\.\d+", module.read_text()) if module.exists() else None
    return found[0] if found else "unknown"


def facts(lab: Lab) -> dict[str, Any]:
    """The machine's entry in the JSON file; what is absent is named as absent."""
    versions = {package: package_version(package) for package in PACKAGES}
    if versions["torch"] != "absent" and not lab.torch:
        versions["torch"] += ", which sees no card"
    return {**machine(), **lab.device, **versions, "commit": commit(), "absent_backends": lab.absent}


def package_version(name: str) -> str:
    """The version of CuPy, whose wheels are named by the version of CUDA."""
    names = [f"cupy-cuda{major}x" for major in (13, 12, 14)] + ["cupy"] if name == "cupy" else [name]
    for candidate in names:
        try:
            return version(candidate)
        except PackageNotFoundError:
            continue
    return "absent"


def commit() -> str:
    """The commit of this tree, with a plus if files differ from it."""
    try:
        name, changed = git("rev-parse", "--short", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    except OSError:
        return "unknown"
    return (name or "unknown") + ("+" if changed else "")


def git(*words: str) -> str:
    """The output of git for this tree; empty if it is not a repository. Raises OSError without git."""
    where = Path(__file__).parent
    return subprocess.run(["git", *words], capture_output=True, text=True, timeout=30, check=False, cwd=where).stdout.strip()
