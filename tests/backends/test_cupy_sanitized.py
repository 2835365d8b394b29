"""Every CUDA C kernel of the backend `cupy` under g++'s address and undefined-behaviour sanitizers, at some of conformance's sizes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from minimoe.backend import TOPICS, kernel_names, overridden
from minimoe_cupy import backend_class

TESTS = Path(__file__).parents[1]
SCRIPT = """
import sys
from cuda_on_cpu import cpu_cuda
from cuda_on_cpu.cpu_cuda import CudaOnCpu
from cuda_on_cpu.cupy_on_cpu import CpuLoader, CupyOnCpu
from minimoe.testing.conformance import to_device
from minimoe.testing.kernels import EXAMPLES, Run

MOST = 6  # examples of a kernel, from the first to the last: what comes out is compared elsewhere

def run(loader):
    backend, calls = CupyOnCpu(), 0
    backend.loader = loader
    for kernel in sys.argv[1:]:
        examples = list(EXAMPLES[kernel]())
        for example in examples[:: -(-len(examples) // MOST)]:
            for dtype in ("float32", "bfloat16"):
                args, options = to_device(backend, (example.args, example.options), dtype)
                Run(backend, kernel, dtype, example).call(backend, args, options)
                calls += 1
    return calls

used = {}  # by file, so that no more is compiled for the sanitizers than runs
def watched(path, names, architecture=None):
    kernel = CpuLoader()(path, names)
    return lambda name: used.setdefault(path, []).append(name) or kernel(name)
run(watched)

cpu_cuda.MARGIN = 16  # the sanitizers have margins of their own
options = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1"]
sanitized = {path: CudaOnCpu(path, sorted(set(names)), options=options) for path, names in used.items()}
print(run(lambda path, names, architecture=None: sanitized[path].kernel))
"""


def own_kernels(topic: str) -> list[str]:
    """The kernels of a topic that have a kernel by hand."""
    names = {name for kernel in TOPICS[topic][1] for name in (kernel, f"{kernel}_backward")} & set(kernel_names())
    return sorted(name for name in names if overridden(backend_class(), name))


@pytest.mark.parametrize("topic", TOPICS)
def test_kernels_pass_the_sanitizers(topic):
    asan = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True).stdout.strip()
    path = os.pathsep.join(str(place) for place in (TESTS.parent, TESTS.parent / "backends", TESTS))
    env = {**os.environ, "LD_PRELOAD": asan, "ASAN_OPTIONS": "detect_leaks=0", "PYTHONPATH": path}
    command = [sys.executable, "-c", SCRIPT, *own_kernels(topic)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) > 0
