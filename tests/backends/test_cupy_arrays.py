"""CuPy's array layer without CuPy: NumPy replaces it, without the names of the Array API standard that CuPy's releases lack."""

import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

import minimoe_cupy
from minimoe.testing.array_layer import XP_CONSTANTS, XP_FUNCTIONS

LACKED = {"14.0": ("cumulative_sum", "isdtype", "matrix_transpose"), "14.2": ()}  # of XP_FUNCTIONS, by release of CuPy


@pytest.fixture(params=LACKED)
def xp(request, monkeypatch):
    """The namespace of the array layer over a release of CuPy."""

    class Cupy(ModuleType):
        def __getattr__(self, name):
            if name in LACKED[request.param]:
                raise AttributeError(f"module 'cupy' has no attribute '{name}'")
            return getattr(np, name)

    modules = {name: ModuleType(name) for name in ("cupyx", "cupyx.scipy", "minimoe_cupy.graph")}
    modules["cupyx.scipy"].special = SimpleNamespace()
    modules["minimoe_cupy.graph"].__dict__.update(record=None, refuse_while_capturing=lambda what: None)
    for name, module in (modules | {"cupy": Cupy("cupy")}).items():
        monkeypatch.setitem(sys.modules, name, module)
    spec = importlib.util.spec_from_file_location("arrays_without_cupy", f"{minimoe_cupy.__path__[0]}/arrays.py")
    arrays = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(arrays)
    return arrays.CupyArrays.xp


@pytest.mark.parametrize("name", [*XP_FUNCTIONS, *XP_CONSTANTS])
def test_every_name_that_minimoe_uses_is_there(xp, name):
    assert hasattr(xp, name)


@pytest.mark.parametrize("n", [0, 1, 33])
def test_a_cumulative_sum_is_that_of_the_standard(xp, n):
    x = np.arange(n, dtype=np.int32)
    assert np.array_equal(xp.cumulative_sum(x), np.cumulative_sum(x)) and xp.cumulative_sum(x).dtype == np.cumulative_sum(x).dtype


@pytest.mark.parametrize("shape", [(2, 3), (4, 1, 5)])
def test_a_matrix_transpose_is_that_of_the_standard(xp, shape):
    x = np.arange(np.prod(shape)).reshape(shape)
    assert np.array_equal(xp.matrix_transpose(x), np.matrix_transpose(x))


@pytest.mark.parametrize("dtype, floating", [("float32", True), ("float64", True), ("bfloat16", True), ("int32", False), ("bool", False)])
def test_which_dtypes_are_floating(xp, dtype, floating):
    assert xp.isdtype(np.dtype(getattr(xp, dtype)), "real floating") == floating
