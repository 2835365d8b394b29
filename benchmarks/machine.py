"""The machine and the libraries with which a figure was measured."""

import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def machine() -> dict[str, Any]:
    """Date, processor, cores and versions; a library that is not installed is left out."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    processor = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    facts = {"date": time.strftime("%Y-%m-%d"), "processor": processor, "cores": os.cpu_count(), "python": platform.python_version()}
    for package in ("numpy", "numba", "mkl", "torch", "transformers"):
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            continue
    return facts
