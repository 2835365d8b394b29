"""The part of the level "array layer" that checks how arrays behave: views, writes, copies, dtypes, integers, sorting.

The references write into slices of flat buffers, and rely on what NumPy does there. A library whose arrays are immutable, or whose slices
are copies, passes through a holder (`minimoe.functional`); what it gets wrong would show as a loss that is slightly off.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from minimoe.backend import Array, Backend
from minimoe.testing.conformance import compare, require, to_host
from minimoe.testing.tolerances import KERNELS

Host = npt.NDArray[Any]
FIX = "Fix the array layer before any kernel"
IN_PLACE = "The write must reach the memory that the array shares"


def equal(backend: Backend, got: Array, expected: Any, part: str, where: str, tolerance: float = 0.0, todo: str = FIX) -> None:
    """Compare an array of the backend with one of the host."""
    wanted = np.asarray(expected)
    compare(to_host(backend, got), wanted.astype(np.float64) if wanted.dtype.kind == "f" else wanted, tolerance, part, where, todo)


def check_dtype(backend: Backend, got: Array, name: str, part: str, where: str) -> None:
    right = got.dtype == getattr(backend.xp, name)
    require(right, part, where, f"the result is {got.dtype}, expected {name}", "A Python number takes the dtype of the array beside it")


# ---- views ---------------------------------------------------------------------------------------------------------------------------


def check_views(backend: Backend) -> None:
    """Write into slices, reshapes, and slices of those: parameters, gradients and moments are views of flat buffers."""
    xp = backend.xp

    def both(where: str, write: Callable[[Any, Any], None]) -> None:
        """Do the same with NumPy's arrays and with the backend's, and compare the whole."""
        expected = np.arange(24, dtype=np.float32)
        whole = backend.from_host(expected)
        write(np, expected)
        write(xp, whole)
        equal(backend, whole, expected, "views", where, todo=IN_PLACE)

    both("a slice", lambda n, a: assign(a, slice(3, 7), n.ones((4,), dtype=n.float32)))
    both("a slice, broadcast from a number", lambda n, a: assign(a, slice(3, 7), 2.0))
    both("a slice, += ", lambda n, a: add(a[3:7], 1.0))
    both("a slice of a slice, -=", lambda n, a: add(a[4:20][2:5], -1.0))
    both("a reshape", lambda n, a: assign(n.reshape(a, (4, 6)), ..., 3.0))
    both("a reshape of a slice, +=", lambda n, a: add(n.reshape(a[6:18], (3, 4)), 1.0))
    both("a reshape of a slice, *= with an array", lambda n, a: scale(n.reshape(a[6:18], (3, 4)), n.ones((4,), dtype=n.float32) * 2.0))
    both("a row of a reshape of a slice", lambda n, a: assign(n.reshape(a[4:20], (2, 4, 2)), (1, slice(None), slice(None)), 5.0))
    both("a slice of a reshape of a slice, +=", lambda n, a: add(n.reshape(a[4:20], (4, 4))[1:3, :], 1.0))
    both("a reshape of a slice of a reshape", lambda n, a: assign(n.reshape(n.reshape(a, (4, 6))[1:3, :], (-1,)), slice(2, 9), 0.0))
    both("every second column", lambda n, a: assign(n.reshape(a, (4, 6)), (..., slice(1, 6, 2)), n.ones((4, 3), dtype=n.float32)))
    both("columns of a reshape, +=", lambda n, a: add(n.reshape(a, (4, 6))[..., :2], 1.0))
    both("an element", lambda n, a: assign(a, 5, 9.0))
    check_seen(backend)


def assign(array: Any, index: Any, value: Any) -> None:
    array[index] = value


def add(array: Any, value: Any) -> None:
    array += value


def scale(array: Any, value: Any) -> None:
    array *= value


def check_seen(backend: Backend) -> None:
    """A write to the whole is seen in views that were made before, and a write to one view in the others."""
    xp = backend.xp
    whole = xp.zeros((12,), dtype=xp.float32)
    first, second = xp.reshape(whole[2:8], (2, 3)), whole[4:10]
    whole += 1.0
    equal(backend, first, np.ones((2, 3), np.float32), "views", "a view made before its whole was written", todo=IN_PLACE)
    second[...] = xp.full((6,), 4.0, dtype=xp.float32)
    equal(backend, first, np.array([[1, 1, 4], [4, 4, 4]], np.float32), "views", "a view after another one was written", todo=IN_PLACE)
    same = first
    first *= 2.0
    first /= 4.0
    first -= 1.0
    wanted = np.array([[-0.5, -0.5, 1], [1, 1, 1]], np.float32)
    equal(backend, same, wanted, "views", "another name of an array, after *=, /=, -=", todo=IN_PLACE)
    wanted = np.array([1, 1, 1, 1, 4, 4], np.float32)
    equal(backend, second, wanted, "views", "a view after another one's *=, /=, -=", todo=IN_PLACE)


# ---- writes --------------------------------------------------------------------------------------------------------------------------


def check_writes(backend: Backend) -> None:
    """Whole arrays, arrays without axes, broadcasting, booleans, and rows named by an array."""
    xp = backend.xp
    y = xp.zeros((3, 4), dtype=xp.float32)
    y[1:2, :] = 2.0
    y[..., :2] += 1.0
    y[0, :] = xp.ones_like(y[0, :]) * 5.0
    equal(backend, y, np.array([[5, 5, 5, 5], [3, 3, 2, 2], [1, 1, 0, 0]], np.float32), "writes", "slices")
    same, row = y, np.arange(4, dtype=np.float32)
    y[...] = backend.from_host(row)
    equal(backend, same, np.broadcast_to(row, (3, 4)), "writes", "x[...] = a row, which is broadcast", todo=IN_PLACE)
    y[1:, :] += backend.from_host(row)
    equal(backend, same, np.stack([row, 2 * row, 2 * row]), "writes", "x[1:, :] += a row, which is broadcast", todo=IN_PLACE)
    y[...] = 0.0
    equal(backend, same, np.zeros((3, 4), np.float32), "writes", "x[...] = 0.0", todo=IN_PLACE)
    source = backend.from_host(row)
    y[0, :] = source
    source += 1.0
    equal(backend, same[0, :], row, "writes", "x[0, :] = y, after y was written: it must hold a copy")
    count = backend.from_host(np.zeros((), np.int32))
    alias = count
    count += xp.astype(xp.asarray(True), xp.int32)
    equal(backend, alias, np.array(1, np.int32), "writes", "+= on a 0-d array, seen through another name", todo=IN_PLACE)
    count[...] = xp.where(count > 0, count + 6, xp.zeros_like(count))
    equal(backend, alias, np.array(7, np.int32), "writes", "x[...] = on a 0-d array, seen through another name", todo=IN_PLACE)
    check_dtype(backend, alias, "int32", "writes", "a 0-d counter")
    valid = xp.zeros((2, 4), dtype=xp.bool)
    valid[:, 1:3] = xp.ones((2, 2), dtype=xp.bool)
    valid[1, :] = False
    equal(backend, valid, np.array([[0, 1, 1, 0], [0, 0, 0, 0]], bool), "writes", "a boolean array")
    if type(backend).record is not Backend.record:
        check_places(backend)


def check_places(backend: Backend) -> None:
    """A recorded decoding step names the slot of its column by an array (layers/cache.py)."""
    xp, slot = backend.xp, np.array([2], np.int32)
    for shape in [(2, 4), (2, 4, 3, 2)]:
        values = np.arange(math.prod(shape) // 4, dtype=np.float32).reshape(2, 1, *shape[2:])
        expected, got = np.zeros(shape, np.float32), xp.zeros(shape, dtype=xp.float32)
        rest = (slice(None),) * (len(shape) - 2)
        assign(expected, (slice(None), slot, *rest), values)
        assign(got, (slice(None), backend.from_host(slot), *rest), backend.from_host(values))
        equal(backend, got, expected, "writes", f"x[:, slot] = ..., slot an array [1], x {list(shape)}")
    valid = xp.zeros((2, 4), dtype=xp.bool)
    valid[:, backend.from_host(slot)] = xp.ones((2, 1), dtype=xp.bool)
    equal(backend, valid, np.arange(4) == np.full((2, 1), 2), "writes", "x[:, slot] = True, slot an array [1]")


def check_copies(backend: Backend) -> None:
    """A copy and its source are independent, whichever is written."""
    xp, one = backend.xp, np.ones(4, np.float32)
    ways: dict[str, Callable[[Array], Array]] = {
        "asarray(x, copy=True)": lambda x: xp.asarray(x, copy=True),
        "astype(x, its dtype)": lambda x: xp.astype(x, xp.float32),
        "astype(x, its dtype, copy=True)": lambda x: xp.astype(x, xp.float32, copy=True),
        "asarray(a view, copy=True)": lambda x: xp.asarray(x[0:4], copy=True),
        "x + 0": lambda x: x + 0.0,
    }
    for what, way in ways.items():
        for written in ("source", "copy"):
            source = backend.from_host(one)
            copy = way(source)
            target, other = (source, copy) if written == "source" else (copy, source)
            target += 1.0
            target[1:2] = 9.0
            equal(backend, other, one, "copies", f"{what}, after the {written} was written", todo="Copy the numbers, not the reference")


# ---- dtypes and integers -------------------------------------------------------------------------------------------------------------


def check_dtypes(backend: Backend) -> None:
    """Python numbers, operators in place and writes leave the dtype as it is."""
    xp = backend.xp
    for name in backend.dtypes:
        x = xp.ones((3,), dtype=backend.dtype(name))
        if name in ("float32", "float64"):  # NumPy's bfloat16 becomes float32 beside a Python number
            for what, got in results_of(xp, x).items():
                check_dtype(backend, got, name, "dtypes", f"{what}, x {name}")
        x += 1
        x *= 0.5
        x[...] = 3
        x[0:1] = 2.5
        check_dtype(backend, x, name, "dtypes", f"x += 1, x *= 0.5, x[...] = 3, x {name}")
        equal(backend, x, np.array([2.5, 3, 3], np.float32), "dtypes", f"x += 1, x *= 0.5, x[...] = 3, x[0:1] = 2.5, x {name}")
        if name in ("bfloat16", "float16"):  # gradients of parameters in float32 of a model that computes in half precision
            wide = xp.zeros((3,), dtype=xp.float32)
            wide[...] = x
            check_dtype(backend, wide, "float32", "dtypes", f"x[...] = {name}, x float32")
            require(xp.result_type(x.dtype, xp.float32) == xp.float32, "dtypes", f"result_type({name}, float32)", "it is not float32", FIX)
    for name in ("int32", "int64"):
        n = xp.ones((3,), dtype=getattr(xp, name))
        for what, got in {"n + 1": n + 1, "n * 3": n * 3, "n // 2": n // 2, "-n": -n, "clip(n, min=1)": xp.clip(n, min=1)}.items():
            check_dtype(backend, got, name, "dtypes", f"{what}, n {name}")
    for what, got in {"x > 0": n > 0, "n == 1": n == 1, "a & b": (n > 0) & (n < 3), "isfinite(x)": xp.isfinite(x), "~a": ~(n > 0)}.items():
        check_dtype(backend, got, "bool", "dtypes", what)
    check_dtype(backend, xp.sum(xp.ones((3,), dtype=xp.int32), dtype=xp.int32), "int32", "dtypes", "sum(n, dtype=int32)")


def results_of(xp: Any, x: Array) -> dict[str, Array]:
    """Return what should have the dtype of x [3]."""
    ids = xp.zeros((2,), dtype=xp.int32)
    return {
        "x * 2.0": x * 2.0, "1 - x": 1 - x, "1.0 / x": 1.0 / x, "x**2": x**2, "0.5**x": 0.5**x, "-x": -x, "x + inf": x + xp.inf,
        "where(x > 0, x, x)": xp.where(x > 0, x, x), "full_like(x, 2)": xp.full_like(x, 2), "zeros_like(x)": xp.zeros_like(x),
        "clip(x, min=0.5)": xp.clip(x, min=0.5), "sqrt(x)": xp.sqrt(x), "sum(x)": xp.sum(x), "mean(x)": xp.mean(x),
        "max(x)": xp.max(x, axis=-1), "take(x, ids)": xp.take(x, ids), "matmul(x, x)": xp.matmul(x[None, :], x[:, None]),
        "asarray(2.5, dtype=)": xp.asarray(2.5, dtype=x.dtype),
    }  # fmt: skip


def check_integers(backend: Backend) -> None:
    """Division of negatives, and what random numbers need of int64: products up to 2^49, shifts, bits, Python numbers up to 2^32."""
    xp = backend.xp
    todo = "Integers follow the Array API standard: // rounds down, % has the sign of the divisor, and int64 has 64 bits"
    for kind in (np.int32, np.int64):
        host = np.array([-7, -6, -1, 0, 1, 7], kind)
        n, name = backend.from_host(host), np.dtype(kind).name
        for divisor in (3, -3):
            where = f"{host.tolist()} {{}} {divisor} [{name}]"
            equal(backend, n // divisor, host // divisor, "integers", where.format("//"), todo=todo)
            equal(backend, n % divisor, host % divisor, "integers", where.format("%"), todo=todo)
            array = backend.from_host(np.full((), divisor, kind))
            equal(backend, n // array, host // divisor, "integers", where.format("// an array"), todo=todo)
    words = np.array([0, 1, 0xFFFF, 0x10000, 0xDEADBEEF, 0xFFFFFFFF], np.int64)
    n, step = backend.from_host(words), backend.from_host(np.array(3, np.int32))
    operations: dict[str, Callable[[Any, Any], Any]] = {
        "(n & 0xFFFF) * 0xD2511F53": lambda n, step: (n & 0xFFFF) * 0xD2511F53,
        "(n >> 16) * 0xCD9E8D57 + n": lambda n, step: (n >> 16) * 0xCD9E8D57 + n,
        "n << 16": lambda n, step: n << 16,
        "n ^ 0xBB67AE85 ^ n >> 3": lambda n, step: n ^ 0xBB67AE85 ^ n >> 3,
        "(n & 0xFF) << 16 | n & 0xFF": lambda n, step: (n & 0xFF) << 16 | n & 0xFF,
        "n + 0x9E3779B9": lambda n, step: n + 0x9E3779B9,
        "n + step, step 0-d int32": lambda n, step: n + step,
    }
    for what, operation in operations.items():
        where = f"{what}, n {words.tolist()} int64"
        got = operation(n, step)
        check_dtype(backend, got, "int64", "integers", where)
        equal(backend, got, operation(words, np.array(3, np.int32)), "integers", where, todo=todo)
    float_ = xp.astype(n >> 8, xp.float32)
    equal(backend, float_, (words >> 8).astype(np.float32), "integers", "int64 below 2^24 as float32", todo=todo)
    check_dtype(backend, xp.arange(3, dtype=xp.int64), "int64", "integers", "arange(3, dtype=int64)")


# ---- sorting, and helpers that backends may override ----------------------------------------------------------------------------------


def check_sort(backend: Backend) -> None:
    """Plans are made by sorting: ties must keep their order, also among more keys than short sorts compare one by one."""
    xp, todo = backend.xp, "xp.argsort must be stable: equal keys keep their order"
    rng = np.random.default_rng(0)
    columns = rng.integers(0, 3, (40, 5)).astype(np.int32)
    examples: list[tuple[str, Host, int]] = [
        ("6 keys", np.array([2, 0, 2, 1, 0, 2], np.int32), -1),
        ("1000 keys, 5 different", rng.integers(0, 5, 1000).astype(np.int32), -1),
        ("300 floats, 7 different, one -inf", np.append(rng.integers(0, 7, 299), -np.inf).astype(np.float32), -1),
        ("[40,5] along axis 0", columns, 0),
        ("[40,5] along the last axis", columns, -1),
        ("no keys", columns[:0, 0], -1),
    ]
    for where, keys, axis in examples:
        device = backend.from_host(keys)
        raw, expected = xp.argsort(device, axis=axis, stable=True), np.argsort(keys, axis=axis, kind="stable").astype(np.int32)
        whole = xp.isdtype(raw.dtype, "integral")
        require(bool(whole), "argsort", where, f"xp.argsort returns {raw.dtype}", "It returns indices, of any integer dtype")
        equal(backend, xp.astype(raw, xp.int32), expected, "argsort", where, todo=todo)
        found = backend.argsort(device, axis=axis)
        check_dtype(backend, found, "int32", "argsort", where)
        equal(backend, found, expected, "argsort", where, todo=todo)


def check_helpers(backend: Backend) -> None:
    """logsumexp, softmax and sigmoid at ordinary numbers and at the ends; isfinite and isinf decide whether a step is taken."""
    xp, inf, nan = backend.xp, math.inf, math.nan
    rows = np.array([[0.5, -1.0, 2.0], [-inf, -inf, -inf], [-inf, 1.0, -inf], [nan, 1.0, 2.0], [1e4, -1e4, 9999.0], [-1e4, -1e4, -1e4]])
    wide = np.concatenate([rows] * 7, axis=1)  # 21 columns: more than a vector register has
    for name in ("float32", "float64"):
        if name in backend.dtypes:
            for x in (rows, wide):
                top = np.max(x, axis=-1, keepdims=True)
                shifted = np.exp(x - np.where(np.isinf(top), 0.0, top))
                total = np.sum(shifted, axis=-1, keepdims=True)
                lse = (np.where(np.isinf(top), 0.0, top) + np.log(total))[:, 0]
                device = backend.from_host(x.astype(name))
                for part, got, expected, todo in [
                    ("logsumexp", backend.logsumexp(device), lse, "A row of -inf alone gives -inf, a row with NaN gives NaN"),
                    ("softmax", backend.softmax(device), shifted / total, "A row of -inf alone, or with NaN, gives NaN"),
                ]:
                    for n, row in enumerate(x.tolist()):
                        where = f"the row {row[:3]}{', repeated,' if len(row) > 3 else ''} [{name}]"
                        equal(backend, got[n : n + 1, ...], expected[n : n + 1], part, where, KERNELS[name], todo)
            z = np.array([-200.0, -90.0, -1.0, 0.0, 1.0, 90.0, 200.0, nan])
            expected = 1.0 / (1.0 + np.exp(-z))
            equal(backend, backend.sigmoid(backend.from_host(z.astype(name))), expected, "sigmoid", f"{z.tolist()} [{name}]", KERNELS[name])
    odd = np.array([0.0, 3e38, -3e38, inf, -inf, nan], np.float32)
    equal(backend, xp.isfinite(backend.from_host(odd)), np.isfinite(odd), "isfinite", f"{odd.tolist()}")
    equal(backend, xp.isinf(backend.from_host(odd)), np.isinf(odd), "isinf", f"{odd.tolist()}")


BEHAVIOUR: dict[str, Callable[[Backend], None]] = {
    "views": check_views, "writes": check_writes, "copies": check_copies, "dtypes": check_dtypes, "integers": check_integers,
    "argsort": check_sort, "logsumexp, softmax, sigmoid": check_helpers,
}  # fmt: skip
