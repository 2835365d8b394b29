"""The level "kernels" runs each kernel of the contract on a backend and compares it with its reference on NumPy in float64."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from minimoe.backend import TOPICS, Backend, kernel_names, overridden
from minimoe.testing.conformance import Case, ConformanceError, compare, is_array, leaves, require, rounded, to_device, to_host
from minimoe.testing.dense_examples import DENSE, Example, Examples, reference
from minimoe.testing.routed_examples import ROUTED
from minimoe.testing.tolerances import KERNELS
from minimoe.testing.training_examples import TRAINING

EXAMPLES: dict[str, Examples] = {**DENSE, **TRAINING, **ROUTED}
ANY_DTYPE = {"random_bits", "uniform", "normal", "route"}  # results that do not depend on the dtype of the model


def kernel_cases(backend: Backend) -> Iterator[Case]:
    """Return a case for each kernel and dtype."""
    for kernel in kernel_names():
        for dtype in backend.dtypes[: 1 if kernel in ANY_DTYPE else None]:
            yield Case(f"{kernel} [{dtype}]", "kernels", kernel, partial(check_kernel, backend, kernel, dtype))


def check_kernel(backend: Backend, kernel: str, dtype: str) -> None:
    """Run every example of a kernel; the first that fails raises."""
    for example in EXAMPLES[kernel]():
        Run(backend, kernel, dtype, example).check()


def advice(backend: Backend, kernel: str) -> str:
    """Return advice for the author of a kernel that differs."""
    topic = next((topic for topic, (_, kernels) in TOPICS.items() if kernel.removesuffix("_backward") in kernels), "arrays")
    place = f"minimoe/reference/{topic}.py"
    if overridden(backend, kernel):
        return f"The reference is in {place}; it would run without the override"
    return f"This kernel is the reference of {place}: look at the array layer, and at kernels of your own that it calls"


class Run:
    """One example on one backend in one dtype."""

    def __init__(self, backend: Backend, kernel: str, dtype: str, example: Example) -> None:
        self.backend, self.kernel, self.example, self.dtype = backend, kernel, example, dtype
        self.where = f"{example.label} [{dtype}]"
        self.tolerance = KERNELS[dtype]
        self.todo = advice(backend, kernel)
        self.parameters = list(inspect.signature(getattr(Backend, kernel)).parameters)[1:]
        self.given = (example.args, example.options)
        self.rounded = rounded(backend, self.given, dtype)

    def check(self) -> None:
        with np.errstate(all="ignore"):
            expected = self.expected()
            self.check_result(expected)
            if self.example.call is None and "out" in self.parameters:
                self.check_out(expected)

    def expected(self) -> Any:
        args, options = to_device(reference(), self.rounded, "float64")
        return self.trim(reference(), self.call(reference(), args, options))

    def call(self, backend: Backend, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """Return what is compared: the results of the kernel, or what it wrote into its `inout_` parameters."""
        try:
            result = (self.example.call or getattr(type(backend), self.kernel))(backend, *args, **options)
        except Exception as error:
            raise ConformanceError(f"{self.kernel} at {self.where}: it raised {type(error).__name__}: {error}. {self.todo}") from error
        written = [arg for name, arg in zip(self.parameters, args, strict=False) if name.startswith("inout_")]
        return tuple(written) if written and self.example.call is None else result

    def trim(self, backend: Backend, result: Any) -> Any:
        require(result is not None, self.kernel, self.where, "it returned None", "A `return` is missing")
        return self.example.trim(to_host(backend, result))

    def check_result(self, expected: Any) -> None:
        args, options = to_device(self.backend, self.given, self.dtype)
        result = self.call(self.backend, args, options)
        self.check_dtypes(result)
        compare(self.trim(self.backend, result), expected, self.tolerance, self.kernel, self.where, self.todo)
        self.check_inputs(args, options)

    def check_dtypes(self, result: Any) -> None:
        """Check that indices are int32."""
        int64 = self.backend.xp.int64
        for path, array in leaves(result):
            right = not is_array(array) or array.dtype != int64 or self.kernel == "random_bits"
            require(right, self.kernel, self.where, f"result{path} holds int64", "Indices and counts are int32")

    def check_inputs(self, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Check that nothing but `out` and `inout_` parameters was written."""
        names = self.parameters if self.example.call is None else [f"argument {i}" for i in range(len(args))]
        before = (*self.rounded[0], *self.rounded[1].values())
        after = to_host(self.backend, (*args, *options.values()))
        for name, old, new in zip((*names[: len(args)], *options), before, after, strict=True):
            if name.startswith("inout_"):
                continue
            for (path, a), (_, b) in zip(leaves(old), leaves(new), strict=True):
                same = not is_array(a) or np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
                todo = "Write only into `out` and `inout_` parameters; copy first"
                require(same, self.kernel, self.where, f"it wrote its input {name}{path}", todo)

    def check_out(self, expected: Any) -> None:
        """Check that `out` is filled if it holds NaN, and with `accumulate` is added to."""
        args, options = to_device(self.backend, self.given, self.dtype)
        first = self.call(self.backend, args, options)
        like = first[0] if isinstance(first, tuple) else first
        for accumulate in (False, True) if "accumulate" in self.parameters else (False,):
            where = f"{self.where}, out given{', accumulate' if accumulate else ''}"
            out = self.backend.xp.full_like(like, 0.5 if accumulate else float("nan"))
            extra = {"accumulate": True} if accumulate else {}
            result = self.call(self.backend, args, {**options, "out": out, **extra})
            returned = result[0] if isinstance(result, tuple) else result
            require(returned is out, self.kernel, where, "it does not return `out`", "Write into `out` and return it")
            wanted = expected[0] if isinstance(first, tuple) else expected
            wanted = wanted + 0.5 if accumulate else wanted
            written = self.trim(self.backend, (out, *result[1:]) if isinstance(result, tuple) else out)
            written = written[0] if isinstance(result, tuple) else written
            compare(written, wanted, self.tolerance, self.kernel, where, "Write the whole of `out`: its old content is not zero")
