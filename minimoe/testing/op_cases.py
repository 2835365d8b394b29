"""The level "gradients" runs each operation through autograd and compares outputs and gradients with NumPy's float64."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from minimoe.backend import Backend
from minimoe.engine.backward import backward
from minimoe.engine.tensor import Tensor
from minimoe.testing.conformance import Case, compare, rounded, to_device, to_host
from minimoe.testing.dense_examples import floats, reference
from minimoe.testing.op_examples import OpExample, op_examples
from minimoe.testing.tolerances import GRADIENTS

WHAT_TO_DO = "Both halves of the kernels that it calls are compared one by one at level 'kernels': start there"


def gradient_cases(backend: Backend) -> Iterator[Case]:
    """Yield a case for each operation and dtype."""
    examples: dict[str, list[OpExample]] = {}
    for example in op_examples():
        examples.setdefault(example.op, []).append(example)
    for op, group in examples.items():
        for dtype in backend.dtypes:
            if dtype in GRADIENTS:
                run, run_quick = (partial(check_op, backend, dtype, examples) for examples in (group, group[:1]))
                yield Case(f"{op} [{dtype}]", "gradients", op, run, quick=dtype == backend.dtypes[0], run_quick=run_quick)


def check_op(backend: Backend, dtype: str, examples: list[OpExample]) -> None:
    for example in examples:
        inputs = rounded(backend, example.inputs, dtype)
        with np.errstate(all="ignore"):
            got = run_op(backend, example, dtype, inputs)
            expected = run_op(reference(), example, "float64", inputs)
        compare(got, expected, GRADIENTS[dtype], example.op, f"{example.label} [{dtype}]", WHAT_TO_DO)


def run_op(backend: Backend, example: OpExample, dtype: str, inputs: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Return the outputs, and the gradients of the inputs, on the host."""
    tensors = [Tensor(array, backend, requires_grad=True) for array in to_device(backend, inputs, dtype)]
    result = example.function(backend, *tensors)
    outputs = result if isinstance(result, tuple) else (result,)
    weights = [to_device(backend, floats(7 + i, *output.shape), dtype) for i, output in enumerate(outputs)]
    backward(outputs, weights)
    arrays = tuple(output.data for output in outputs), tuple(tensor.grad for tensor in tensors)
    return to_host(backend, arrays)
