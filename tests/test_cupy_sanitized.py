"""Every CUDA C kernel of the backend `cupy` under g++'s address and undefined-behaviour sanitizers, at conformance's sizes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from minimoe.backend import TOPICS, kernel_names, overridden
from minimoe_cupy import backend_class

HERE = Path(__file__).parent
SCRIPT = """
import sys
from cuda_on_cpu import cpu_cuda
from cuda_on_cpu.cpu_cuda import CudaOnCpu
from cuda_on_cpu.cupy_on_cpu import CupyOnCpu
from minimoe.testing import cases

cpu_cuda.MARGIN = 16  # the sanitizer has margins of its own
options = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1"]
backend = CupyOnCpu()
backend.loader = lambda path, names, architecture=None: lambda name: CudaOnCpu(path, [name], options=options).kernel(name)
chosen = [case for kernel in sys.argv[1:] for case in cases(backend, level="kernels", kernel=kernel) if "float64" not in case.name]
for case in chosen:
    case.run()
print(len(chosen))
"""


def own_kernels(topic: str) -> list[str]:
    """The kernels of a topic that have a kernel by hand."""
    names = {name for kernel in TOPICS[topic][1] for name in (kernel, f"{kernel}_backward")} & set(kernel_names())
    return sorted(name for name in names if overridden(backend_class(), name))


@pytest.mark.parametrize("topic", TOPICS)
def test_kernels_pass_the_sanitizers(topic):
    asan = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True).stdout.strip()
    path = os.pathsep.join(str(place) for place in (HERE.parent, HERE.parent / "backends", HERE))
    env = {**os.environ, "LD_PRELOAD": asan, "ASAN_OPTIONS": "detect_leaks=0", "PYTHONPATH": path}
    command = [sys.executable, "-c", SCRIPT, *own_kernels(topic)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) > 0
