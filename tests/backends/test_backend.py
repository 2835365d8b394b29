"""Finding and loading backends, and what is refused of one before it runs."""

import importlib.metadata
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import EntryPoint, EntryPoints

import absent_backend
import pytest
from strict_backend import StrictBackend

from minimoe import backend as backends
from minimoe.backend import (
    BackendUnavailable,
    available,
    check_overrides,
    describe,
    helper_kinds,
    helper_names,
    kernel_kinds,
    kernel_names,
    load,
)
from minimoe.errors import UserError
from minimoe_numpy import NumpyBackend


def refused(kind):
    with pytest.raises(UserError) as caught:
        check_overrides(kind())
    return str(caught.value)


def test_a_complete_backend_is_accepted():
    check_overrides(NumpyBackend())
    check_overrides(StrictBackend())


def test_a_backend_without_its_array_layer_cannot_be_made():
    class Half(backends.Backend):
        name = "half"

    with pytest.raises(TypeError, match="bincount"):
        Half()


def test_an_override_with_another_signature_is_named_with_both():
    class Renamed(NumpyBackend):
        def gelu(self, x, approximate=False, out=None):
            return x

    class WithoutOut(NumpyBackend):
        def relu(self, x):
            return x

    class WithoutDefault(NumpyBackend):
        def swiglu(self, gate_up, limit, out=None):
            return gate_up

    assert "gelu takes (self, x, approximate=False, out=None), the reference takes (self, x, tanh=False, out=None)" in refused(Renamed)
    assert "relu takes (self, x), the reference takes (self, x, out=None)" in refused(WithoutOut)
    swiglu = "swiglu takes (self, gate_up, limit, out=None), the reference takes (self, gate_up, limit=0.0, out=None)"
    assert swiglu in refused(WithoutDefault)


def test_an_inherited_override_is_checked_too():
    class Middle(NumpyBackend):
        def relu(self, x):
            return x

    class Below(Middle):
        pass

    assert "relu takes (self, x)" in refused(Below)


def test_a_method_that_is_no_kernel_is_named_with_the_nearest():
    class Misspelt(NumpyBackend):
        def rmsnorm(self, x, weight, eps, out=None):
            return x

    assert "rmsnorm is not a kernel of the contract (did you mean 'rms_norm'?)" in refused(Misspelt)

    class Private(NumpyBackend):
        def _helper(self):
            return None

    check_overrides(Private())


@pytest.mark.parametrize("kernel", ["expert_ffn", "moe_ffn", "add_rms_norm", "add_layer_norm", "linear_cross_entropy"])
@pytest.mark.parametrize("half", ["", "_backward"])
def test_half_of_a_composite_is_refused(kernel, half):
    reference = getattr(backends.Backend, kernel + half)

    def copy():
        return types.FunctionType(reference.__code__, reference.__globals__, kernel + half, reference.__defaults__)

    assert "override both or neither" in refused(type("Half", (NumpyBackend,), {kernel + half: copy()}))


def test_another_contract_is_refused():
    class Old(NumpyBackend):
        contract = 0

    assert "made for contract 0, this minimoe has contract 1" in refused(Old)


def test_kinds_say_whose_each_kernel_is():
    class Mixed(NumpyBackend):
        library = frozenset({"linear"})

        def linear(self, x, weight, bias=None, out=None):
            return super().linear(x, weight, bias, out)

        def relu(self, x, out=None):
            return super().relu(x, out)

    kinds = kernel_kinds(Mixed())
    assert list(kinds) == kernel_names()
    assert (kinds["linear"], kinds["relu"], kinds["relu_backward"]) == ("library", "hand-written", "reference")
    assert kernel_kinds(Mixed) == kinds
    assert set(kernel_kinds(load("numpy")).values()) == {"reference"}


def test_overridden_helpers_are_told_apart_from_kernels():
    class Masks(NumpyBackend):
        library = frozenset({"softmax"})

        def softmax(self, x):
            return super().softmax(x)

        def _mask(self, causal, window, q_pos, k_pos, k_valid):
            return super()._mask(causal, window, q_pos, k_pos, k_valid)

        def _of_its_own(self):
            """Not a helper of the references."""

    assert helper_kinds(Masks()) == helper_kinds(Masks) == {"_mask": "hand-written", "sigmoid": "hand-written", "softmax": "library"}
    assert {"logsumexp", "wide", "offsets_on_host", "dropout_mask"} <= set(helper_names())
    assert not {"erf", "to_host", "record", "gate", "relu_backward"} & set(helper_names())


def test_numpy_is_here_and_made_once():
    assert "numpy" in available()
    assert load("numpy") is load("numpy")
    assert describe("numpy").available


def test_an_unknown_backend_is_refused_with_the_nearest():
    with pytest.raises(UserError, match=r"no backend 'nunpy' \(did you mean 'numpy'\?\)"):
        load("nunpy")
    assert describe("nunpy").why_not.startswith("no backend 'nunpy'")


@pytest.fixture
def entries(monkeypatch):
    """Entry points of group minimoe.backends: "strict" works, "broken" cannot run here."""
    module = types.ModuleType("minimoe_test_backends")
    module.strict = StrictBackend

    def broken():
        raise BackendUnavailable("broken: no such device")

    module.broken = broken
    monkeypatch.setitem(sys.modules, module.__name__, module)
    found = EntryPoints(EntryPoint(name, f"{module.__name__}:{name}", "minimoe.backends") for name in ("strict", "broken"))
    for place in (backends, importlib.metadata):  # names are also listed where no backend is imported
        monkeypatch.setattr(place, "entry_points", lambda **wanted: found.select(**wanted))
    backends.made_once.cache_clear()
    yield module
    backends.made_once.cache_clear()


def test_an_entry_point_is_found_by_name(entries):
    assert available()[-2:] == ["broken", "strict"]
    assert isinstance(load("strict"), StrictBackend)
    assert load("strict") is load("strict")


def test_a_backend_that_cannot_run_here_says_why(entries):
    with pytest.raises(BackendUnavailable, match="no such device"):
        load("broken")
    described = describe("broken")
    assert not described.available and described.why_not == "broken: no such device"


@pytest.fixture
def absent(monkeypatch):
    """A built-in backend "absent", whose package is here and whose device is not."""
    monkeypatch.setitem(backends.BUILT_IN, "absent", absent_backend.__name__)
    return absent_backend


def test_the_kernels_of_a_backend_without_its_device_are_known(absent):
    described = describe("absent")
    assert (described.available, described.why_not, described.dtypes) == (False, "backend absent: no such device", ())
    assert list(described.kernels) == kernel_names()
    own = {kernel: kind for kernel, kind in described.kernels.items() if kind != "reference"}
    assert own == {"linear": "library", "relu": "hand-written", "relu_backward": "hand-written"}
    assert described.proven == {"relu": "on a card, 2026-11-24"}


def test_so_are_those_of_a_foreign_one(entries):
    entries.backend_class = absent_backend.backend_class
    assert describe("broken").kernels["relu"] == "hand-written"


def test_a_package_that_does_not_tell_its_class_has_no_kernels_without_its_device(absent, entries, monkeypatch):
    assert describe("broken").kernels == {}
    monkeypatch.setattr(absent, "backend_class", lambda: 1 / 0)
    assert describe("absent").kernels == {}
    monkeypatch.delattr(absent, "backend_class")
    assert describe("absent").kernels == {}


def test_an_entry_point_with_a_bad_override_is_refused(entries):
    class Bad(StrictBackend):
        def relu(self, x):
            return x

    entries.strict = Bad
    with pytest.raises(UserError, match="relu takes"):
        load("strict")


def test_threads_that_ask_at_once_get_one_backend(entries, monkeypatch):
    made = []

    def slow():
        made.append(StrictBackend())
        time.sleep(0.05)
        return made[-1]

    monkeypatch.setattr(entries, "strict", slow, raising=False)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(load, ["strict"] * 4))
    assert len(made) == 1 and all(one is made[0] for one in found)


def test_auto_takes_the_first_that_runs_or_the_one_the_environment_names(monkeypatch):
    monkeypatch.delenv("MINIMOE_BACKEND", raising=False)
    backends.made_once.cache_clear()
    assert load("auto").name in backends.BUILT_IN
    monkeypatch.setenv("MINIMOE_BACKEND", "numpy")
    backends.made_once.cache_clear()
    assert load("auto").name == "numpy"
    backends.made_once.cache_clear()
