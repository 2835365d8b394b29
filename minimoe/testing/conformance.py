"""Defines a conformance case, how two results are compared, and the message of a failure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from minimoe.backend import Backend

Host = npt.NDArray[Any]
FLOOR = 0.1
"""Inputs are of order one: results smaller than this are differences of larger numbers, and have the rounding of those."""


class ConformanceError(AssertionError):
    """The backend breaks the contract; the text names the kernel, the shape, the error and what to do."""


@dataclass(frozen=True)
class Case:
    """One thing that a backend must do. `run()` raises `ConformanceError` if it does not."""

    name: str
    level: str
    kernel: str
    run: Callable[[], None]
    quick: bool = True  # False: too long, or of too many shapes, for `backends check --quick`
    run_quick: Callable[[], None] | None = None  # what `--quick` runs instead: fewer of the examples; None: `run`

    def __str__(self) -> str:
        return f"{self.level}: {self.name}"


@dataclass(frozen=True)
class Wide:
    """An input that is at least float32, whatever the dtype under test: logits, logsumexp, learning rates."""

    array: Host


# ---- trees: what kernels take and return, arrays within (named) tuples ---------------------------------------------------------------


def tree_map(function: Callable[[Any], Any], tree: Any) -> Any:
    """Return the same (named) tuples and dicts with `function` applied to every leaf."""
    if isinstance(tree, tuple):
        items = [tree_map(function, item) for item in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else tuple(items)
    if isinstance(tree, dict):
        return {key: tree_map(function, item) for key, item in tree.items()}
    return function(tree)


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Return the leaves with their paths: `[0]`, `.ids`."""
    if isinstance(tree, tuple):
        fields = getattr(tree, "_fields", None)
        names = [f".{name}" for name in fields] if fields else [f"[{i}]" for i in range(len(tree))]
        for name, item in zip(names, tree, strict=True):
            yield from leaves(item, path + name)
    elif isinstance(tree, dict):
        for name, item in tree.items():
            yield from leaves(item, f"{path}.{name}")
    else:
        yield path, tree


def is_array(value: Any) -> bool:
    return hasattr(value, "dtype") and hasattr(value, "shape")


# ---- between the host and a dtype of a backend ---------------------------------------------------------------------------------------


def to_device(backend: Backend, tree: Any, dtype: str) -> Any:
    """Move NumPy arrays to the backend, floats in `dtype`, those in `Wide` in at least float32."""
    wide = dtype if dtype in ("float64", "float32") else "float32"

    def move(value: Any) -> Any:
        if isinstance(value, Wide):
            return backend.from_host(np.asarray(value.array, dtype=wide))
        if not isinstance(value, np.ndarray):
            return value
        if value.dtype.kind != "f":
            return backend.from_host(value)
        device = backend.from_host(value.astype(wide))
        return device if dtype == wide else backend.xp.astype(device, backend.dtype(dtype))

    return tree_map(move, tree)


def to_host(backend: Backend, tree: Any) -> Any:
    """Copy the backend's arrays to NumPy, floats as float64."""

    def move(value: Any) -> Any:
        if not is_array(value):
            return value
        for half in ("bfloat16", "float16"):
            if half in backend.dtypes and value.dtype == backend.dtype(half):
                value = backend.xp.astype(value, backend.xp.float32)
        host = np.array(backend.to_host(value))
        return host.astype(np.float64) if host.dtype.kind == "f" else host

    return tree_map(move, tree)


def as_numpy(tree: Any, dtype: str) -> Any:
    """Return NumPy arrays as a backend has them in this dtype, with float16 in place of any dtype of 16 bits."""
    wide = np.dtype(dtype if dtype in ("float64", "float32") else "float32")
    narrow = wide if dtype == wide.name else np.dtype("float16")

    def cast(value: Any) -> Any:
        if isinstance(value, Wide):
            return np.array(value.array, dtype=wide)
        return np.array(value, dtype=narrow if value.dtype.kind == "f" else None) if isinstance(value, np.ndarray) else value

    return tree_map(cast, tree)


def dtype_name(backend: Backend, array: Any) -> str:
    """Return the name of an array's dtype."""
    for name in (*backend.dtypes, "float32", "float64", "int32", "int64", "bool"):
        if hasattr(backend.xp, name) and array.dtype == getattr(backend.xp, name):
            return name
    return str(array.dtype)


def rounded(backend: Backend, tree: Any, dtype: str) -> Any:
    """Return the inputs for the reference: rounded to this dtype, then float64 on the host."""
    return to_host(backend, to_device(backend, tree, dtype))


# ---- comparing -----------------------------------------------------------------------------------------------------------------------


def require(condition: bool, kernel: str, where: str, what: str, todo: str) -> None:
    """Raise `ConformanceError` unless the condition holds."""
    if not condition:
        raise ConformanceError(f"{kernel} at {where}: {what}. {todo}")


def compare(got: Any, expected: Any, tolerance: float, kernel: str, where: str, todo: str) -> None:
    """Compare two trees on the host: integers and booleans equal, floats within the tolerance, NaN and infinity where expected."""
    got_leaves, expected_leaves = list(leaves(got)), list(leaves(expected))
    same = len(got_leaves) == len(expected_leaves)
    require(same, kernel, where, f"it returns {len(got_leaves)} arrays, expected {len(expected_leaves)}", todo)
    for (_, given), (path, wanted) in zip(got_leaves, expected_leaves, strict=True):
        what = f"result{path}"
        if not is_array(wanted):
            require(given == wanted, kernel, where, f"{what} is {given!r}, expected {wanted!r}", todo)
            continue
        require(is_array(given), kernel, where, f"{what} is {given!r}, expected an array {wanted.shape}", todo)
        require(given.shape == wanted.shape, kernel, where, f"{what} has shape {given.shape}, expected {wanted.shape}", todo)
        same_kind = given.dtype.kind == wanted.dtype.kind
        require(same_kind, kernel, where, f"{what} holds {given.dtype}, expected {wanted.dtype}", todo)
        compare_array(given, wanted, tolerance if wanted.dtype.kind == "f" else 0.0, kernel, f"{where}, {what}", todo)


def compare_array(given: Host, wanted: Host, tolerance: float, kernel: str, where: str, todo: str) -> None:
    if not wanted.size:
        return
    error = relative_errors(given.astype(np.float64), wanted.astype(np.float64))
    worst = np.unravel_index(int(np.argmax(error)), error.shape)
    index = [int(i) for i in worst]
    found = f"worst error {error[worst]:.3g} at {index} (got {given[worst]:.8g}, expected {wanted[worst]:.8g}), tolerance {tolerance:.3g}"
    require(bool(error[worst] <= tolerance), kernel, where, found, todo)


def relative_errors(given: Host, wanted: Host) -> Host:
    """Return |given - wanted| over the largest finite |wanted|, or over FLOOR; infinity where only one is NaN, or infinities differ."""
    finite = np.isfinite(wanted) & np.isfinite(given)
    largest = float(np.max(np.abs(wanted), where=np.isfinite(wanted), initial=FLOOR))
    with np.errstate(invalid="ignore"):
        error = np.where(finite, np.abs(given - wanted) / largest, np.inf)
    return np.where((given == wanted) | (np.isnan(given) & np.isnan(wanted)), 0.0, error)
