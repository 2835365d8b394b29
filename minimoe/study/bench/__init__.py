"""Timings on this machine: where the time of a training step goes, and each kernel against its reference.

Tokens are random (Philox), so no text is needed. The model has its initial weights, with which routing is about even.
"""

from minimoe.study.bench.kernels import KernelTiming as KernelTiming
from minimoe.study.bench.kernels import bench_kernels as bench_kernels
from minimoe.study.bench.kernels import kernels_table as kernels_table
from minimoe.study.bench.profile import KernelUse as KernelUse
from minimoe.study.bench.profile import StepProfile as StepProfile
from minimoe.study.bench.profile import profile_step as profile_step
from minimoe.study.bench.step import TrainingStep as TrainingStep
from minimoe.study.bench.step import step_seconds as step_seconds
