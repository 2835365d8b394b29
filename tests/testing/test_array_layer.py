"""The level "array layer": its list of names is what the sources use, and each of its checks finds the fault that it is for."""

import ast
import re
from pathlib import Path

import numpy as np
import pytest

import minimoe
from minimoe.backend import load
from minimoe.testing import ConformanceError, cases
from minimoe.testing.array_layer import CHECKS, XP_CONSTANTS, XP_FUNCTIONS
from minimoe_numpy import NumpyBackend

PACKAGE = Path(minimoe.__file__).parent
LISTED = {*XP_FUNCTIONS, *XP_CONSTANTS}


# ---- the list of names ------------------------------------------------------------------------------------------------------------------


def is_xp(node, names):
    """True for `xp`, for another name that was set to a namespace, and for `b.xp`, `self.backend.xp` and the like."""
    return (isinstance(node, ast.Name) and node.id in names) or (isinstance(node, ast.Attribute) and node.attr == "xp")


def names_of_xp(tree):
    """Return the names to which a file assigns a namespace: `space = b.xp`, also within tuples."""
    names = {"xp"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                pairs = [(target, node.value)]
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    pairs = list(zip(target.elts, node.value.elts, strict=True))
                names |= {to.id for to, value in pairs if isinstance(to, ast.Name) and is_xp(value, {"xp"})}
    return names


def used_of_xp(source):
    """Return the names that a file takes from a namespace; "getattr" if it takes any by a variable."""
    tree = ast.parse(source)
    names = names_of_xp(tree)
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and is_xp(node.value, names)}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    return used | {"getattr" for call in calls if call.func.id == "getattr" and is_xp(call.args[0], names)}


def test_the_list_of_xp_names_is_what_the_sources_use():
    """Both ways: what is used is listed, and what is listed is used outside of the suite itself."""
    used, by_suite = {}, {}
    for path in PACKAGE.rglob("*.py"):
        where = path.relative_to(PACKAGE)
        if "ports" in where.parts:  # packages that `backends new` writes: they are the other side
            continue
        own = {"getattr"} if path.name == "arrays.py" or where.parts[0] == "testing" else set()  # dtypes, by name
        found = by_suite if where.parts[0] == "testing" else used
        found.update(dict.fromkeys(used_of_xp(path.read_text(encoding="utf-8")) - own, str(where)))
    assert {name: where for name, where in (used | by_suite).items() if name not in LISTED} == {}
    assert LISTED - set(used) == set()


@pytest.mark.parametrize(
    "source",
    ["xp.roll(x)", "self.xp.roll(x)", "x.backend.xp.roll", "b, space = x.backend, b.xp\nspace.roll(x)", "space = b.xp\nspace.roll(x)"],
)
def test_a_name_is_found_however_the_namespace_is_called(source):
    assert used_of_xp(source) == {"roll"}


def test_a_name_that_is_looked_up_by_a_variable_is_found():
    assert used_of_xp("y = getattr(b.xp, name)(x)") == {"getattr"}


# ---- planted faults ---------------------------------------------------------------------------------------------------------------------


class Namespace:
    """NumPy's namespace with new arrays of another class, and with some functions changed."""

    def __init__(self, kind, **changed):
        self.kind = kind
        for name, function in changed.items():
            setattr(self, name, function)

    def __getattr__(self, name):
        found = getattr(np, name)
        if name not in ("arange", "asarray", "empty", "full", "ones", "zeros"):
            return found
        return lambda *args, **options: found(*args, **options).view(self.kind)


def backend_with(kind=np.ndarray, methods=None, **changed):
    """Return NumPy's backend on arrays of this class, with these methods of its own and with some functions of `xp` changed."""

    class Faulty(NumpyBackend):
        xp = Namespace(kind, **changed)

        def from_host(self, array):
            return np.array(array, order="C", copy=True).view(kind)

        def to_host(self, array):
            return np.array(array).view(np.ndarray)

    for name, method in (methods or {}).items():
        setattr(Faulty, name, method)
    return Faulty()


class SlicesOfSlicesAreCopies(np.ndarray):
    def __getitem__(self, index):
        found = super().__getitem__(index)
        return found.copy() if isinstance(self.base, SlicesOfSlicesAreCopies) else found


class AddsIntoANewArray(np.ndarray):
    def __iadd__(self, other):
        return self + other


class AddsNumbersIntoANewArray(np.ndarray):
    def __iadd__(self, other):
        return self + other if self.ndim == 0 else super().__iadd__(other)


class DividesIntoANewArray(np.ndarray):
    def __itruediv__(self, other):
        return self / other


class SlotsAreZero(np.ndarray):
    def __setitem__(self, index, value):
        parts = index if isinstance(index, tuple) else (index,)
        parts = tuple(part * 0 if isinstance(part, np.ndarray) else part for part in parts)
        super().__setitem__(parts if isinstance(index, tuple) else parts[0], value)


class BooleansAreNotCleared(np.ndarray):
    def __setitem__(self, index, value):
        if value is not False:
            super().__setitem__(index, value)


class NumbersAreFloat64(np.ndarray):
    def __mul__(self, other):
        return super().__mul__(np.float64(other)) if isinstance(other, float) else super().__mul__(other)


class DivisionTruncates(np.ndarray):
    def __floordiv__(self, other):
        return np.trunc(self / other).astype(self.dtype)


class RemainderHasTheSignOfTheDividend(np.ndarray):
    def __mod__(self, other):
        return np.fmod(self, other)


class ProductsHave32Bits(np.ndarray):
    def __mul__(self, other):
        product = super().__mul__(other)
        return product & 0xFFFFFFFF if product.dtype == np.int64 else product


class ShiftsHave32Bits(np.ndarray):
    def __lshift__(self, other):
        return super().__lshift__(other) & 0xFFFFFFFF


def unstable(x, axis=-1, stable=True):
    """Equal keys in reverse."""
    order = np.argsort(np.flip(x, axis), axis=axis, kind="stable")
    return x.shape[axis] - 1 - order if x.size > 100 else np.argsort(x, axis=axis, kind="stable")


def unsigned(x, axis=-1, stable=True):
    return np.argsort(x, axis=axis, kind="stable").astype(np.uint32)


def nan_of_nothing(self, x):
    top = np.max(x, axis=-1, keepdims=True)
    return np.squeeze(top + np.log(np.sum(np.exp(x - top), axis=-1, keepdims=True)), axis=-1)


def softmax_of_nothing_is_zero(self, x):
    return np.where(np.isneginf(x).all(axis=-1, keepdims=True), 0.0, NumpyBackend.softmax(self, x)).astype(x.dtype)


def sigmoid_overflows(self, x):
    return np.where(x < -88, np.inf, NumpyBackend.sigmoid(self, x)).astype(x.dtype)


def record(self, work, say):
    work()


def largest_unordered(self, x, k):
    ids = np.argsort(x, axis=-1)[..., ::-1][..., :k]
    return np.take_along_axis(x, ids, -1), ids.astype(np.int32)


def add_once(self, inout_target, index, values):
    inout_target[index] += values


def not_copied(self, array):
    return np.asarray(array)


class OneBuffer:
    """Returns all results of a method in the same array."""

    def __init__(self, method):
        self.method, self.kept = method, {}

    def __call__(self, *args):
        result = self.method(NumpyBackend(), *args)
        kept = self.kept.setdefault(result.shape, np.empty_like(result))
        kept[...] = result
        return kept


HELPERS = "logsumexp, softmax, sigmoid"
FAULTS = [
    ("views", r"views at a reshape, .*must reach the memory", backend_with(reshape=lambda x, shape: np.array(x).reshape(shape))),
    ("views", "views at a slice of a slice, -=", backend_with(SlicesOfSlicesAreCopies)),
    ("views", r"views at a slice, \+=", backend_with(AddsIntoANewArray)),
    ("views", "views at another name of an array, after", backend_with(DividesIntoANewArray)),
    ("writes", r"writes at \+= on a 0-d array", backend_with(AddsNumbersIntoANewArray)),
    ("writes", r"writes at x\[:, slot\]", backend_with(SlotsAreZero, {"record": record})),
    ("writes", "writes at a boolean array", backend_with(BooleansAreNotCleared)),
    ("copies", r"copies at asarray\(x, copy=True\), after the source", backend_with(asarray=lambda x, dtype=None, copy=None: x)),
    ("copies", r"copies at astype\(x, its dtype\), after", backend_with(astype=lambda x, dtype, copy=True: np.asarray(x, dtype))),
    ("dtypes", r"dtypes at x \* 2.0, x float32: the result is float64, expected float32", backend_with(NumbersAreFloat64)),
    ("dtypes", r"dtypes at sum\(n, dtype=int32\)", backend_with(sum=lambda x, axis=None, dtype=None: np.sum(x, axis))),
    ("integers", r"// 3 \[int32\].*rounds down", backend_with(DivisionTruncates)),
    ("integers", r"% 3 \[int32\]", backend_with(RemainderHasTheSignOfTheDividend)),
    ("integers", r"integers at \(n & 0xFFFF\) \* 0xD2511F53", backend_with(ProductsHave32Bits)),
    ("integers", "integers at n << 16", backend_with(ShiftsHave32Bits)),
    ("argsort", "argsort at 1000 keys.*must be stable", backend_with(argsort=unstable)),
    ("argsort", "argsort at 6 keys: xp.argsort returns float", backend_with(argsort=lambda x, **given: np.argsort(x) * 1.0)),
    (HELPERS, r"logsumexp at the row \[-inf, .*got nan, expected -inf", backend_with(methods={"logsumexp": nan_of_nothing})),
    (HELPERS, r"softmax at the row \[-inf, .*got 0", backend_with(methods={"softmax": softmax_of_nothing_is_zero})),
    (HELPERS, "sigmoid at .*got inf", backend_with(methods={"sigmoid": sigmoid_overflows})),
    (HELPERS, "isfinite at", backend_with(isfinite=lambda x: ~np.isnan(x))),
    (HELPERS, "isinf at", backend_with(isinf=np.isposinf)),
    ("top_k", "top_k at", backend_with(methods={"top_k": largest_unordered})),
    ("scatter_add", "scatter_add at", backend_with(methods={"scatter_add": add_once})),
    ("two results", r"erf at \[2, 3\]: the first result changed", backend_with(methods={"erf": OneBuffer(NumpyBackend.erf)})),
    ("two results", "contiguous at", backend_with(methods={"contiguous": OneBuffer(NumpyBackend.contiguous)})),
    ("from_host and to_host", "from_host at .*must be a copy", backend_with(methods={"from_host": not_copied})),
]


@pytest.mark.parametrize("part, says, backend", FAULTS, ids=[f"{part}: {says}" for part, says, _ in FAULTS])
def test_a_planted_fault_of_the_array_layer_is_found(part, says, backend):
    with np.errstate(all="ignore"), pytest.raises(ConformanceError) as caught:
        cases(backend, level="array layer", kernel=part)[0].run()
    assert re.search(says, str(caught.value)), str(caught.value)


def test_every_check_has_a_planted_fault_or_is_about_the_device():
    assert set(CHECKS) - {part for part, *_ in FAULTS} == {"names and dtypes", "bincount", "erf", "contiguous", "synchronize and memory"}


def test_a_missing_name_is_said():
    class Lacks(Namespace):
        def __getattr__(self, name):
            if name in ("isfinite", "int64"):
                raise AttributeError(name)
            return super().__getattr__(name)

    backend = backend_with()
    backend.xp = Lacks(np.ndarray)
    with pytest.raises(ConformanceError, match="it lacks isfinite, int64"):
        cases(backend, level="array layer", kernel="names and dtypes")[0].run()


def test_indices_of_any_integer_dtype_from_argsort_are_enough():
    backend = backend_with(argsort=unsigned)
    for case in [*cases(backend, level="array layer"), *cases(backend, kernel="route"), *cases(backend, kernel="gate")]:
        case.run()


def test_the_harness_of_the_faults_has_none():
    for case in cases(backend_with(), level="array layer"):
        case.run()


def test_a_row_of_minus_infinity_has_no_gradient_that_looks_right():
    """The loss of such a row is NaN, so that the step is skipped."""
    for name in ("numpy", "numba"):
        backend = load(name)
        logits, targets = np.full((2, 5), -np.inf, np.float32), np.zeros(2, np.int32)
        with np.errstate(all="ignore"):
            total, _, lse = backend.cross_entropy(backend.from_host(logits), backend.from_host(targets))
        assert np.isneginf(backend.to_host(lse)).all() and np.isnan(backend.to_host(total))
