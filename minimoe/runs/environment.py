"""The machine of a run: its libraries, its memory, and whether a process is still alive."""

import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

from minimoe.config import Config
from minimoe.config.trained import training_cost
from minimoe.errors import ConfigError
from minimoe.machine import cpu_quota, machine_memory


def environment() -> dict[str, Any]:
    """Return the machine and the libraries that a run's numbers depend on, for env.json."""
    from importlib.metadata import PackageNotFoundError, version

    from threadpoolctl import threadpool_info

    def version_of(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    blas = [library for library in threadpool_info() if library["user_api"] == "blas"]
    return {
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "minimoe": version_of("minimoe") or getattr(sys.modules["minimoe"], "__version__", None),
        "python": platform.python_version(),
        "numpy": version_of("numpy"),
        "numba": version_of("numba"),
        "blas": [{"name": library["internal_api"], "version": library["version"], "threads": library["num_threads"]} for library in blas],
        "platform": platform.platform(),
        "libc": " ".join(platform.libc_ver()).strip() or None,
        "processor": processor(),
        "cpu_count": os.cpu_count(),
        "cpu_quota": cpu_quota(),
    }


def processor() -> str | None:
    """Return the model of the processor in the system's words."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # Linux alone has it
        lines = []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return model or platform.processor() or platform.machine() or None


def process_identity(pid: int) -> str | None:
    """Return boot and start time of a process, which distinguish it from a later one of the same number.

    "" if the system does not say; None if the process is gone.
    """
    if sys.platform == "win32":
        return _windows_process(pid)
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return None if fields[0] == "Z" else f"{boot}:{fields[19]}"
    except OSError:
        pass
    try:
        os.kill(pid, 0)
    except PermissionError:
        return ""
    except OSError:
        return None
    return ""


def _windows_process(pid: int) -> str | None:
    """Return the same on Windows, where signal 0 would be Ctrl-C, so the system is asked whether the process is still active."""
    import ctypes

    kernel = ctypes.windll.kernel32  # type: ignore[attr-defined, unused-ignore]
    query_limited_information, still_active = 0x1000, 259
    handle = kernel.OpenProcess(query_limited_information, False, pid)
    if not handle:
        return None
    code = ctypes.c_ulong()
    kernel.GetExitCodeProcess(handle, ctypes.byref(code))
    kernel.CloseHandle(handle)
    return "" if code.value == still_active else None


def is_alive(pid: object, identity: object) -> bool:
    """Return True if a process of this number is alive and has this `process_identity`."""
    return isinstance(pid, int) and pid > 0 and process_identity(pid) == identity is not None


def check_memory(config: Config) -> None:
    """Refuse to train what this machine cannot hold: weights, gradients and optimizer, or a step's tokens. Raises `ConfigError`."""
    model, train, needed = config.model, config.train, training_cost(config).bytes
    needs, has = needed.weights + needed.gradients + needed.optimizer, machine_memory()
    if has is not None and needs > has:
        raise ConfigError(
            f"training this model needs {needs / 2**30:,.1f} GiB for weights, gradients and optimizer, "
            f"this machine has {has / 2**30:,.1f} GiB: use a smaller model (minimoe inspect counts its parts)"
        )
    rows = train.batch_size * train.seq_len
    step = 8 * train.accumulate * rows + 4 * rows * model.d_model  # inputs and targets of all micro-batches; one vector per token of one
    if has is not None and step > has:
        raise ConfigError(
            f"a step needs more than {step / 2**30:,.1f} GiB for its tokens, this machine has {has / 2**30:,.1f} GiB: "
            f"use a smaller train.batch_size ({train.batch_size}), train.accumulate ({train.accumulate}) or train.seq_len ({train.seq_len})"
        )
