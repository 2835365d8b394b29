"""The level "array layer" checks what every backend must have before a reference can run on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from minimoe.backend import Backend
from minimoe.testing.array_behaviour import BEHAVIOUR, FIX, equal
from minimoe.testing.conformance import Case, dtype_name, leaves, require, rounded, to_device, to_host
from minimoe.testing.tolerances import KERNELS

XP_FUNCTIONS = (
    "abs", "any", "arange", "argsort", "asarray", "astype", "broadcast_to", "clip", "concat", "cos", "cumulative_sum", "empty",
    "empty_like", "exp", "full", "full_like", "isdtype", "isfinite", "isinf", "log", "logaddexp", "matmul", "matrix_transpose", "max",
    "mean", "minimum", "ones", "ones_like", "permute_dims", "reshape", "result_type", "sign", "sin", "sqrt", "squeeze", "stack", "sum",
    "take", "take_along_axis", "tanh", "where", "zeros", "zeros_like",
)  # fmt: skip
"""All functions of `xp` that minimoe uses, as the Array API standard 2024.12 defines them."""

XP_CONSTANTS = ("bool", "float32", "int32", "int64", "inf")


def array_layer_cases(backend: Backend) -> Iterator[Case]:
    """Yield a case for each part of the array layer, and a second one, at large sizes, for parts that counters and tiles may limit."""
    for part, check in CHECKS.items():
        yield Case(part, "array layer", part, partial(run_quietly, check, backend))
        if part in LARGE_CHECKS:
            yield Case(f"{part}, large", "array layer", part, partial(run_quietly, LARGE_CHECKS[part], backend), quick=False)


def run_quietly(check: Callable[[Backend], None], backend: Backend) -> None:
    with np.errstate(all="ignore"):
        check(backend)


def check_names(backend: Backend) -> None:
    missing = [name for name in (*XP_FUNCTIONS, *XP_CONSTANTS) if not hasattr(backend.xp, name)]
    require(not missing, "xp", "names", f"it lacks {', '.join(missing)}", "They are defined by the Array API standard")
    require("float32" in backend.dtypes, "dtypes", str(backend.dtypes), "float32 is missing", "Every backend must have it")
    for name in backend.dtypes:
        require(backend.xp.isdtype(backend.dtype(name), "real floating") or "16" in name, "dtype", name, "it is not a float dtype", FIX)


def check_transfer(backend: Backend) -> None:
    shapes: list[npt.NDArray[Any]] = [np.arange(6.0).reshape(2, 3).T, np.zeros((0, 3)), np.array(2.5)]
    for real in shapes:
        array = real.astype(np.float32)
        equal(backend, backend.from_host(array), array, "from_host, to_host", f"float32 {list(array.shape)}")
    others: list[npt.NDArray[Any]] = [np.array([3, -1], np.int32), np.array([True, False]), np.array([2**40], np.int64)]
    for other in others:
        equal(backend, backend.from_host(other), other, "from_host, to_host", f"{other.dtype}")
    source = np.ones(3, dtype=np.float32)
    device = backend.from_host(source)
    source[:] = 7.0
    equal(backend, device, np.ones(3), "from_host", "after the host array was written: it must be a copy")


def check_scatter_add(backend: Backend) -> None:
    for dtype in backend.dtypes:
        for n, shape in [(0, (4, 3)), (1, (1,)), (31, (4, 3)), (33, (5,)), (64, (3, 2, 2))]:
            rng = np.random.default_rng(n)
            inputs = rng.standard_normal(shape), rng.integers(0, shape[0], n).astype(np.int32), rng.standard_normal((n, *shape[1:]))
            added(backend, inputs, dtype, f"target {list(shape)}, {n} rows [{dtype}]")
            some = inputs[0], np.where(inputs[1] % 2 == 0, inputs[1] - shape[0], inputs[1]).astype(np.int32), inputs[2]
            added(backend, some, dtype, f"target {list(shape)}, {n} rows, some counted from the end [{dtype}]")


def added(backend: Backend, inputs: tuple[Any, ...], dtype: str, where: str) -> None:
    """Check a sum of rows.   inputs: target, index, values"""
    target, index, values = rounded(backend, inputs, dtype)
    np.add.at(target, index, values)
    device = to_device(backend, inputs, dtype)
    backend.scatter_add(*device)
    equal(backend, device[0], target, "scatter_add", where, KERNELS[dtype])


def check_scatter_add_large(backend: Backend) -> None:
    rng = np.random.default_rng(1)
    for n, shape in [(50, (70_001, 2)), (70_001, (40_001, 2)), (3, (4, 5_003))]:
        inputs = rng.standard_normal(shape), rng.integers(0, shape[0], n).astype(np.int32), rng.standard_normal((n, *shape[1:]))
        added(backend, inputs, "float32", f"target {list(shape)}, {n} rows [float32]")


def check_top_k(backend: Backend) -> None:
    nan, inf = math.nan, math.inf
    rows = [[1.0, 3.0, 2.0, 3.0, 0.0], [0.0] * 5, [nan, 1.0, inf, -inf, 1.0], [nan] * 5, [-0.0, 0.0, -1.0, nan, 5.0]]
    order = [[1, 3, 2, 0, 4], [0, 1, 2, 3, 4], [2, 1, 4, 3, 0], [0, 1, 2, 3, 4], [4, 0, 1, 2, 3]]
    array, ids = np.array(rows), np.array(order, dtype=np.int32)
    for dtype in backend.dtypes:
        for k in (1, 2, 5):
            for what, x, expected in [("[5,5]", array, ids), ("[5]", array[0], ids[0]), ("[0,5]", array[:0], ids[:0])]:
                chosen(backend, x, expected[..., :k], dtype, f"{what}, k {k}, ties and NaN [{dtype}]")
        for k in (1, 8, 1000):
            rows_of_ties = np.stack([np.zeros(1000), np.arange(1000) % 7 / 4.0])
            chosen(backend, rows_of_ties, sorted_ids(rows_of_ties)[:, :k], dtype, f"[2,1000], k {k}, ties among 1,000 [{dtype}]")


def sorted_ids(x: npt.NDArray[Any]) -> npt.NDArray[np.int32]:
    """Return the ids of a row's elements from the largest down, equal ones from the first on."""
    return np.argsort(-x, axis=-1, kind="stable").astype(np.int32)


def chosen(backend: Backend, x: npt.NDArray[Any], ids: npt.NDArray[np.int32], dtype: str, where: str) -> None:
    """Check which elements top_k chooses."""
    values, found = backend.top_k(to_device(backend, x, dtype), ids.shape[-1])
    equal(backend, found, ids, "top_k", where)
    require(found.dtype == backend.xp.int32, "top_k", where, f"ids are {found.dtype}", "Indices are int32")
    equal(backend, values, np.take_along_axis(rounded(backend, x, dtype), ids.astype(np.int64), -1), "top_k", where)
    right = dtype_name(backend, values) == dtype
    require(right, "top_k", where, f"values are {values.dtype}", "They keep the input's dtype")


def check_top_k_large(backend: Backend) -> None:
    rng = np.random.default_rng(1)
    for n, width, k in [(70_001, 3, 2), (3, 5_003, 8), (2, 5_003, 5_003)]:
        x = rng.permutation(n * width).reshape(n, width) / 8.0
        chosen(backend, x, sorted_ids(x)[:, :k], "float32", f"[{n},{width}], k {k} [float32]")


def check_bincount(backend: Backend) -> None:
    for ids, length in [([], 3), ([0], 1), ([2, 0, 2, 2], 5), ([4] * 33, 5)]:
        found = backend.bincount(backend.from_host(np.array(ids, dtype=np.int32)), length)
        expected = np.bincount(np.array(ids, dtype=np.int64), minlength=length).astype(np.int32)
        equal(backend, found, expected, "bincount", f"{len(ids)} ids, minlength {length}")
        require(found.dtype == backend.xp.int32, "bincount", f"minlength {length}", f"it returns {found.dtype}", "Counts are int32")


def check_bincount_large(backend: Backend) -> None:
    rng = np.random.default_rng(1)
    for ids, length in [(rng.integers(0, 5_003, 70_001), 5_003), (np.ones(2**24 + 2**18, dtype=np.int64), 2)]:
        found = backend.bincount(backend.from_host(ids.astype(np.int32)), length)
        expected = np.bincount(ids, minlength=length).astype(np.int32)
        equal(backend, found, expected, "bincount", f"{len(ids)} ids, minlength {length}")


def check_erf(backend: Backend) -> None:
    x = np.concatenate([np.linspace(-7.0, 7.0, 2001), [0.0, 1e-30, 100.0, -100.0]])
    for dtype in backend.dtypes:
        held = rounded(backend, x, dtype)
        expected = np.array([math.erf(value) for value in held])
        tolerance = {"float64": 1e-15, "float32": 5e-7}.get(dtype, KERNELS[dtype])
        equal(backend, backend.erf(to_device(backend, x, dtype)), expected, "erf", f"2005 values in [-100, 100] [{dtype}]", tolerance)
    infinite = np.array([math.nan, math.inf, -math.inf])
    equal(backend, backend.erf(to_device(backend, infinite, "float32")), np.array([math.nan, 1.0, -1.0]), "erf", "NaN and infinity", 5e-7)


def check_contiguous(backend: Backend) -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    device = backend.from_host(array)
    equal(backend, backend.contiguous(backend.xp.permute_dims(device, (1, 0))), array.T, "contiguous", "[4,3], transposed")
    whole = backend.contiguous(backend.xp.permute_dims(device, (1, 0)))
    flat = backend.xp.reshape(whole, (-1,))
    flat[1] = 50.0
    written = np.where(array.T == 4.0, 50.0, array.T).astype(np.float32)
    equal(backend, whole, written, "contiguous", "[4,3], transposed, after a write to its reshape to [12], which must be a view")
    equal(backend, backend.contiguous(device[:, 1:3]), array[:, 1:3], "contiguous", "[3,2], a slice")


def check_sort_large(backend: Backend) -> None:
    keys = np.random.default_rng(1).integers(0, 1_100, 140_002).astype(np.int32)
    found = backend.xp.astype(backend.xp.argsort(backend.from_host(keys), stable=True), backend.xp.int32)
    equal(backend, found, np.argsort(keys, kind="stable").astype(np.int32), "xp.argsort", "140,002 keys, stable=True")


def check_two_results(backend: Backend) -> None:
    """What a call returned stays as it is when the next call, of the same shape, returns."""
    first, second = np.array([[1.5, -0.5, 0.25]] * 2, np.float32), np.array([[-2.0, 3.0, 0.5]] * 2, np.float32)
    calls: dict[str, Callable[[Any], Any]] = {
        "from_host": lambda x: backend.from_host(x),
        "to_host": lambda x: backend.to_host(backend.from_host(x)),
        "top_k": lambda x: backend.top_k(backend.from_host(x), 2),
        "bincount": lambda x: backend.bincount(backend.from_host((x[0] > 0).astype(np.int32)), 2),
        "erf": lambda x: backend.erf(backend.from_host(x)),
        "contiguous": lambda x: backend.contiguous(backend.xp.permute_dims(backend.from_host(x), (1, 0))),
    }
    for part, call in calls.items():
        copied = np.array if part == "to_host" else partial(to_host, backend)
        held = call(first)
        before = copied(held)
        call(second)
        for (_, now), (_, then) in zip(leaves(copied(held)), leaves(before), strict=True):
            todo = "Return a new array, not one that the next call fills"
            require(np.array_equal(now, then), part, str(list(then.shape)), "the first result changed when it was called again", todo)


def check_device(backend: Backend) -> None:
    backend.synchronize()
    memory = backend.memory()
    right = {"used", "peak"} <= set(memory) and all(isinstance(memory[key], int) for key in ("used", "peak"))
    require(right, "memory", "memory()", f"it returns {memory!r}", 'It returns bytes: {"used": int, "peak": int}')


CHECKS: dict[str, Callable[[Backend], None]] = {
    "names and dtypes": check_names, "from_host and to_host": check_transfer, **BEHAVIOUR, "scatter_add": check_scatter_add,
    "top_k": check_top_k, "bincount": check_bincount, "erf": check_erf, "contiguous": check_contiguous,
    "two results": check_two_results,
    "synchronize and memory": check_device,
}  # fmt: skip

LARGE_CHECKS: dict[str, Callable[[Backend], None]] = {
    "scatter_add": check_scatter_add_large, "top_k": check_top_k_large, "bincount": check_bincount_large, "argsort": check_sort_large,
}  # fmt: skip
