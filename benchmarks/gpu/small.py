"""Every kernel once at a tiny size, and some training steps, for compute-sanitizer. `python -m benchmarks.gpu.small`"""

from benchmarks.gpu.data import Data
from benchmarks.gpu.lab import COMPUTES, Lab, card
from benchmarks.gpu.step import CASES, minimoe_step
from benchmarks.gpu.suite import LAST_LINE
from benchmarks.gpu.workers import kernel_problems

STEPS = 4  # the third is recorded


def run(lab: Lab) -> dict[str, int]:
    """Run them.   -> how many problems each backend ran"""
    done = dict.fromkeys(lab.backends, 0)
    for name, backend in lab.backends.items():
        for problem in kernel_problems("tiny"):
            if problem.dtype in COMPUTES[name]:
                problem.make(backend, Data(backend))()
                done[name] += 1
        step = minimoe_step(CASES["tiny"][0], name, COMPUTES[name][0], lab)
        for _ in range(STEPS):
            step.call()
        lab.check()
    return done


if __name__ == "__main__":
    import cupy

    cupy.cuda.set_allocator(None)  # each array is its own allocation, so that accesses beyond it are found
    for side, count in run(card("tiny")).items():
        print(f"{side}: {count} problems and {STEPS} steps")
    print(LAST_LINE)
