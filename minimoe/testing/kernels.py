"""The level "kernels" runs each kernel of the contract on a backend and compares it with its reference on NumPy in float64."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

from minimoe.backend import TOPICS, Backend, kernel_names, overridden
from minimoe.testing.conformance import (
    Case,
    ConformanceError,
    as_numpy,
    compare,
    dtype_name,
    is_array,
    leaves,
    require,
    rounded,
    to_device,
    to_host,
    tree_map,
)
from minimoe.testing.dense_examples import DENSE, BothHalves, Example, Examples, other_numbers, reference
from minimoe.testing.large_examples import LARGE_DENSE
from minimoe.testing.large_routed_examples import LARGE_ROUTED
from minimoe.testing.not_finite_examples import NOT_FINITE
from minimoe.testing.quick import quick_examples
from minimoe.testing.routed_examples import ROUTED
from minimoe.testing.tolerances import KERNELS, long_sum
from minimoe.testing.training_examples import TRAINING

EXAMPLES: dict[str, Examples] = {**DENSE, **TRAINING, **ROUTED}
LARGE: dict[str, Examples] = {**LARGE_DENSE, **LARGE_ROUTED}
ANY_DTYPE = {"random_bits", "uniform", "normal", "route"}  # their results do not depend on the dtype of the model
PAIRS = 8  # examples of a kernel that are called again with other numbers
GOLDEN = 0.618034  # its multiples are spread evenly and meet no period of the examples' options
BESIDE = 7.0
HALF = ("bfloat16", "float16")
MARGIN = 64  # elements on either side of an `out`, which is a part of a flat buffer, as gradients of parameters are


def kernel_cases(backend: Backend) -> Iterator[Case]:
    """Yield two cases for each kernel and dtype: one at many small sizes, one at sizes beyond tiles and counters."""
    for kernel in kernel_names():
        for dtype in backend.dtypes[: 1 if kernel in ANY_DTYPE else None]:
            check = partial(check_kernel, backend, kernel, dtype)
            quick = dtype == backend.dtypes[0]
            yield Case(f"{kernel} [{dtype}]", "kernels", kernel, check, quick, partial(check, quick=True))
            if kernel in LARGE:
                large = partial(check_large, backend, kernel, dtype)
                yield Case(f"{kernel}, large [{dtype}]", "kernels", kernel, large, quick=False)


def check_kernel(backend: Backend, kernel: str, dtype: str, quick: bool = False) -> None:
    """Run every example of a kernel, some of them again with other numbers; the first that fails raises. `quick`: a few of them."""
    examples = [*EXAMPLES[kernel](), *NOT_FINITE.get(kernel, nothing)()]
    with other_numbers():
        others = [*EXAMPLES[kernel](), *NOT_FINITE.get(kernel, nothing)()]
    pairs = list(zip(examples, others, strict=True))
    if quick:
        chosen = quick_examples(examples)
        pairs = [pair for pair in pairs if any(pair[0] is example for example in chosen)]
    for example, _ in pairs:
        Run(backend, kernel, dtype, example).check()
    for index in sorted({len(pairs) - 1, *(int(i * GOLDEN % 1.0 * len(pairs)) for i in range(PAIRS))}):
        check_two_calls(*(Run(backend, kernel, dtype, example) for example in pairs[index]))


def check_large(backend: Backend, kernel: str, dtype: str) -> None:
    """Run every large example of a kernel."""
    for example in LARGE[kernel]():
        run = Run(backend, kernel, dtype, example)
        with np.errstate(all="ignore"):
            run.check_result(run.expected())


def advice(backend: Backend, kernel: str) -> str:
    """Return advice for the author of a kernel that differs."""
    topic = next((topic for topic, (_, kernels) in TOPICS.items() if kernel.removesuffix("_backward") in kernels), "arrays")
    place = f"minimoe/reference/{topic}.py"
    if overridden(backend, kernel):
        return f"The reference is in {place}; it would run without the override"
    return f"This kernel is the reference of {place}: look at the array layer, and at kernels of your own that it calls"


class Run:
    """One example on one backend in one dtype."""

    dtypes: dict[str, str] | None = None  # of the results, by their paths

    def __init__(self, backend: Backend, kernel: str, dtype: str, example: Example) -> None:
        self.backend, self.kernel, self.example, self.dtype = backend, kernel, example, dtype
        self.where = f"{example.label} [{dtype}]"
        self.tolerance = 0.0 if example.exact else max(KERNELS[dtype], long_sum(dtype, example.additions))
        self.todo = advice(backend, kernel)
        self.parameters = list(inspect.signature(getattr(Backend, kernel)).parameters)[1:]
        self.given = (example.args, example.options)
        self.rounded = rounded(backend, self.given, dtype)

    def check(self) -> None:
        with np.errstate(all="ignore"):
            expected = self.expected()
            self.dtypes = self.expected_dtypes()
            self.check_result(expected)
            if "out" in self.parameters and (self.example.call is None or isinstance(self.example.call, BothHalves)):
                self.check_out(expected)

    def expected(self) -> Any:
        args, options = to_device(reference(), self.rounded, "float64")
        return self.trim(reference(), self.call(reference(), args, options))

    def expected_dtypes(self) -> dict[str, str]:
        """Return the dtypes that the reference gives to results, by their paths: float16 stands for any dtype of 16 bits."""
        args, options = as_numpy(self.given, self.dtype)
        results = leaves(self.call(reference(), args, options))
        names = {path: str(array.dtype) for path, array in results if is_array(array)}
        return {path: self.dtype if name == "float16" else name for path, name in names.items()}

    def call(self, backend: Backend, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """Return what is compared: the results of the kernel, or what it wrote into its `inout_` parameters."""
        with self.reported():
            result = (self.example.call or getattr(type(backend), self.kernel))(backend, *args, **options)
        written = [arg for name, arg in zip(self.parameters, args, strict=False) if name.startswith("inout_")]
        return tuple(written) if written and self.example.call is None else result

    @contextmanager
    def reported(self) -> Iterator[None]:
        """Name the kernel and the example in whatever a kernel raises."""
        try:
            yield
        except ConformanceError:
            raise
        except Exception as error:
            raise ConformanceError(f"{self.kernel} at {self.where}: it raised {type(error).__name__}: {error}. {self.todo}") from error

    def trim(self, backend: Backend, result: Any) -> Any:
        require(result is not None, self.kernel, self.where, "it returned None", "A `return` is missing")
        return self.example.trim(to_host(backend, result))

    def check_result(self, expected: Any) -> None:
        args, options = to_device(self.backend, self.given, self.dtype)
        result = self.call(self.backend, args, options)
        self.compare(result, expected)
        self.check_dtypes(result)
        self.check_inputs(args, options)

    def compare(self, result: Any, expected: Any, what: str = "", todo: str = "", tolerance: float | None = None) -> None:
        """Compare results on the device with those expected; `what` says how the kernel was called, if not once and plainly."""
        where = f"{self.where}, {what}" if what else self.where
        tolerance = self.tolerance if tolerance is None else tolerance
        compare(self.trim(self.backend, result), expected, tolerance, self.kernel, where, todo or self.todo)

    def check_dtypes(self, result: Any) -> None:
        """Check each result's dtype; without `dtypes`, which only small examples have, that indices are int32."""
        todo = "Sums may be wider inside a kernel; what it returns has the dtype that the reference returns"
        for path, array in leaves(result):
            if not is_array(array):
                continue
            name = dtype_name(self.backend, array)
            right = (name != "int64" or self.kernel == "random_bits") if self.dtypes is None else name == self.dtypes[path]
            wanted = "int32" if self.dtypes is None else self.dtypes[path]
            hint = "Indices and counts are int32" if wanted == "int32" else todo
            require(right, self.kernel, self.where, f"result{path} holds {name}, expected {wanted}", hint)

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
        """Check that `out` is filled if it holds NaN, that with `accumulate` it is added to, and that nothing beside it is written.

        The first result of a plain kernel goes there; of a composite's backward the last, the weights' gradients, which a model of 16 bits
        keeps in float32.
        """
        ways = (False, True) if "accumulate" in self.parameters else (False,)
        for accumulate in ways:
            self.check_one_out(expected, accumulate)
        if self.dtype in HALF and len(ways) > 1 and self.kernel != "linear_dx":
            for accumulate in ways:
                self.check_one_out(expected, accumulate, "float32")

    def check_one_out(self, expected: Any, accumulate: bool, wide: str = "") -> None:
        """Check one call with `out`, in the dtype of the result or in a wider one, to which sums are not rounded before."""
        place = 0 if self.example.call is None else -1
        what = f"out given{f' in {wide}' if wide else ''}{', accumulate' if accumulate else ''}"
        tolerance, todo = self.tolerance, OUT
        if wide and self.example.call is None:  # a composite rounds what is between its kernels
            tolerance, todo = max(KERNELS[wide], long_sum(wide, self.example.additions)), UNROUNDED
        args, options = to_device(self.backend, self.given, self.dtype)
        like = part_at(self.call(self.backend, args, options), place)
        fill = 0.5 if accumulate else float("nan")
        buffers: list[Any] = []
        out = tree_map(partial(self.buffer, fill, buffers, wide), like)
        extra = {"accumulate": True} if accumulate else {}
        result = self.call(self.backend, args, {**options, "out": out, **extra})
        where = f"{self.where}, {what}"
        for (path, returned), (_, buffer) in zip(leaves(part_at(result, place)), leaves(out), strict=True):
            require(returned is buffer, self.kernel, where, f"it does not return `out`{path}", "Write into `out` and return it")
        added = tree_map(lambda array: array + 0.5 if is_array(array) else array, part_at(expected, place))
        self.compare(result, replaced_at(expected, place, added) if accumulate else expected, what, todo, tolerance)
        for whole in buffers:
            host = to_host(self.backend, whole)
            beside = np.concatenate((host[:MARGIN], host[len(host) - MARGIN :]))
            untouched = bool(np.all(beside == BESIDE))
            require(
                untouched, self.kernel, where, "it wrote beside `out`", "Write nothing but `out`: it may be a part of a larger buffer"
            )

    def buffer(self, fill: float, buffers: list[Any], wide: str, like: Any) -> Any:
        """Return an array of this shape that holds `fill`, as a part of a flat buffer, which is added to `buffers`."""
        if like is None:
            return None
        xp, size = self.backend.xp, math.prod(like.shape)
        buffers.append(xp.full((size + 2 * MARGIN,), BESIDE, dtype=self.backend.dtype(wide) if wide else like.dtype))
        inside = xp.reshape(buffers[-1][MARGIN : MARGIN + size], like.shape)
        inside[...] = xp.full_like(inside, fill)
        return inside


OUT = "Write the whole of `out`, or with `accumulate` add to it: its old content is not zero"
UNROUNDED = "A float32 `out` under operands of 16 bits takes the sums as they are, so that they are not rounded before they are added up"
KEPT = "Results of an earlier call must stay as they are: return new arrays, not a buffer that the next call fills"
STALE = "Nothing that is kept between calls may depend on a shape or an address alone"


def nothing() -> Iterator[Example]:
    yield from ()


def part_at(result: Any, place: int) -> Any:
    return result[place] if isinstance(result, tuple) else result


def replaced_at(result: Any, place: int, part: Any) -> Any:
    """Return the results with another part at this place."""
    if not isinstance(result, tuple):
        return part
    items = list(result)
    items[place] = part
    return tuple(items)


# ---- two calls -----------------------------------------------------------------------------------------------------------------------


def check_two_calls(first: Run, second: Run) -> None:
    """Call a kernel with two inputs of the same shapes, then after its inputs were written in place: each result must be right and stay."""
    with np.errstate(all="ignore"):
        expected = first.expected(), second.expected()
        one, two = (to_device(run.backend, run.given, run.dtype) for run in (first, second))
        if isinstance(first.example.call, BothHalves):
            check_interleaved(first, second, first.example.call, expected)
        else:
            held = Held(first, first.call(first.backend, *one))
            second.compare(second.call(second.backend, *two), expected[1], "called with other numbers of the same shapes", STALE)
            held.check("the first result changed when it was called again")
        first.call(first.backend, *written_anew(first.backend, to_device(first.backend, first.given, first.dtype), one))
        again = written_anew(first.backend, to_device(second.backend, second.given, second.dtype), one)
        second.compare(second.call(second.backend, *again), expected[1], "called again after its inputs were written in place", STALE)


def check_interleaved(first: Run, second: Run, halves: BothHalves, expected: tuple[Any, Any]) -> None:
    """Run two forwards of a composite, then their backwards in the same order."""
    backend = first.backend
    (one, _), (two, _) = (to_device(backend, run.given, run.dtype) for run in (first, second))
    with first.reported():
        outputs, saved = halves.forward(backend, one)
        held = Held(first, outputs)
        _, saved_two = halves.forward(backend, two)
        held.check("the first outputs changed when the forward ran again")
        gradients = halves.backward(backend, one, saved)
        first.compare(gradients, expected[0], "the first backward after two forwards", "Two forwards must not share what they save")
        held = Held(first, gradients)
        second.compare(halves.backward(backend, two, saved_two), expected[1], "the second backward after two forwards", STALE)
        held.check("the first gradients changed when the backward ran again")


class Held:
    """Results, and a copy of them as they were."""

    def __init__(self, run: Run, result: Any) -> None:
        self.run, self.result, self.copy = run, result, to_host(run.backend, result)

    def check(self, what: str) -> None:
        for (path, now), (_, before) in zip(leaves(to_host(self.run.backend, self.result)), leaves(self.copy), strict=True):
            same = not is_array(now) or np.array_equal(now, before, equal_nan=now.dtype.kind == "f")
            require(same, self.run.kernel, self.run.where, f"{what} (result{path})", KEPT)


def written_anew(backend: Backend, values: Any, arrays: Any) -> Any:
    """Write numbers into arrays of the same shapes, in place, as an optimizer writes parameters; return the arguments with these arrays."""
    held = iter([array for _, array in leaves(arrays)])

    def write(value: Any) -> Any:
        array = next(held)
        return backend.store(value, array) if is_array(value) else value

    return tree_map(write, values)
