"""Backends over immutable arrays conform, and record a step as a pure function of its state and arguments."""

import numpy as np
import pytest
from frozen_backend import CompilingBackend, FrozenBackend
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import batch, tiny_model

from minimoe.backend import check_overrides, load, use_backend
from minimoe.config import ModelConfig
from minimoe.engine.recording import Recorded
from minimoe.functional import FunctionalBackend, Holder, on_library_arrays
from minimoe.functional import backend as functional_backend
from minimoe.generation.decoding import Decoder
from minimoe.model.transformer import Transformer
from minimoe.reference.expert import ExpertKernels
from minimoe.testing import cases
from minimoe.training import optim
from minimoe.training.step import Step

FROZEN = FrozenBackend()
COMPILING = CompilingBackend()


@pytest.mark.parametrize("case", [pytest.param(case, id=str(case)) for case in cases(COMPILING) if ", large" not in case.name])
def test_it_conforms(case):
    case.run()


# ---- grouped kernels without a host read -------------------------------------------------------------------------------------------------


class Masked(type(load("numpy"))):
    """NumPy, which can do both."""

    reads_offsets = False

    def offsets_on_host(self, offsets):
        raise AssertionError("offsets were read on the host")


@given(
    counts=st.lists(st.integers(0, 5), min_size=1, max_size=5), unused=st.integers(0, 3), o=st.integers(1, 3), i=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)  # fmt: skip
def test_masks_give_what_a_loop_over_the_offsets_gives(counts, unused, o, i, seed):
    rng = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    rows, experts = int(offsets[-1]) + unused, len(counts)
    x, dy = rng.standard_normal((rows, i)), rng.standard_normal((rows, o))
    x[offsets[-1] :], dy[offsets[-1] :] = np.nan, np.nan
    weight, bias, used = rng.standard_normal((experts, o, i)), rng.standard_normal((experts, o)), int(offsets[-1])
    for name, args, trim in [
        ("grouped_matmul", (x, weight, offsets), used), ("grouped_matmul", (dy, weight, offsets, True), used),
        ("grouped_matmul_dw", (dy, x, offsets), None), ("grouped_bias", (bias, offsets, rows), None),
        ("grouped_bias_backward", (dy, offsets), None),
    ]:  # fmt: skip
        expected, got = (getattr(ExpertKernels, name)(backend, *args) for backend in (load("numpy"), Masked()))
        assert got.dtype == expected.dtype and np.allclose(got[:trim], expected[:trim], atol=1e-12), name


# ---- kernels on library arrays -----------------------------------------------------------------------------------------------------------


class OwnKernels(FrozenBackend):
    library = frozenset({"gelu"})

    @on_library_arrays
    def linear(self, x, weight, bias=None, out=None):
        assert isinstance(x, np.ndarray) and out is None
        return x @ weight.T if bias is None else x @ weight.T + bias

    @on_library_arrays
    def linear_dw(self, dy, x, out=None, accumulate=False):
        return np.reshape(dy, (-1, dy.shape[-1])).T @ np.reshape(x, (-1, x.shape[-1]))


def test_a_kernel_on_library_arrays_writes_its_result_into_out():
    backend = OwnKernels()
    check_overrides(backend)
    x, w = (backend.from_host(np.ones(shape)) for shape in [(2, 3), (4, 3)])
    out = backend.xp.full((4, 3), 0.5)
    dy = backend.linear(x, w)
    assert dy.tolist() == [[3.0] * 4] * 2
    assert backend.linear_dw(dy, x, out=out, accumulate=True) is out and out.tolist() == [[6.5] * 3] * 4
    assert backend.linear_dw(dy, x, out).tolist() == [[6.0] * 3] * 4
    for case in cases(backend, kernel="linear_dw"):
        case.run()


class OwnNorm(FrozenBackend):
    """Kernels with several results."""

    @on_library_arrays
    def rms_norm(self, x, weight, eps, out=None):
        rstd = 1.0 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)
        return x * rstd * weight, rstd

    @on_library_arrays
    def gate(self, logits, bias, valid, *, rule):
        return load("numpy").gate(logits, bias, valid, rule=rule)


@pytest.mark.parametrize("kernel", ["rms_norm", "gate"])
def test_a_kernel_with_several_results_on_library_arrays_conforms(kernel):
    backend = OwnNorm()
    check_overrides(backend)
    for case in cases(backend, level="kernels", kernel=kernel, quick=True):
        case.run()


def test_the_plain_namespace_may_be_a_class():
    """A class can be called, but a namespace is no kernel that the contract lacks."""

    class Namespace:
        float32 = np.float32

    class OfAClass(FrozenBackend):
        plain = Namespace

    check_overrides(OfAClass())


# ---- recording ---------------------------------------------------------------------------------------------------------------------------


def losses(backend, steps=4, recorded=True, accumulate=2):
    """Train a tiny model; return the packed figures of each step and what was said."""
    model, said = tiny_model(backend, "float32"), []
    step = Step(model, optim.AdamW(model.parameters(), lr=1e-2))
    call = Recorded(step, backend, said.append, step.state) if recorded else step
    packed = []
    for i in range(steps):
        tokens = np.stack([batch(accumulate * i + micro) for micro in range(accumulate)])
        arrays = (np.ascontiguousarray(part) for part in (tokens[..., :-1], tokens[..., 1:]))
        packed.append(call(*step.arrays(i, 1e-2 / (i + 1), *arrays)))
    return [backend.to_host(figures).tolist() for figures in packed], said


def test_a_recorded_step_gives_what_plain_ones_give_and_reads_no_donated_buffer():
    backend = CompilingBackend()
    recorded, said = losses(backend)
    assert said == [] and backend.compiled == 1
    assert recorded == losses(backend, recorded=False)[0]


def test_a_library_that_does_not_compile_is_not_recorded_and_trains_all_the_same():
    assert losses(FROZEN) == losses(FROZEN, recorded=False)


def refused(function, *arrays, state=list):
    backend, said = CompilingBackend(), []
    call = Recorded(lambda *given: function(backend, *given), backend, said.append, state)
    results = [call(*(backend.from_host(array) for array in arrays)) for _ in range(2)]
    assert len(said) == 1
    return [result.tolist() for result in results], said[0]


def test_a_step_that_writes_an_undeclared_array_is_refused_and_runs_plainly():
    total = FROZEN.from_host(np.zeros(2))

    def work(backend, x):
        nonlocal total
        total += x
        return total * 1.0

    results, why = refused(work, np.ones(2))
    assert results == [[1, 1], [2, 2]]
    assert why == "the step is not repeated from a recording: it writes an array [2] that is not declared as its state"


@pytest.mark.parametrize(
    ("read", "why"),
    [
        (lambda b, x: x * float(b.xp.sum(x)), "an array is read on the host"),
        (lambda b, x: x * b.from_host(np.ones(2)), "an array of the host is copied to the device"),
        (lambda b, x: x * b.xp.asarray(np.ones(2)), "an array of the host is copied to the device"),
        (lambda b, x: x / 0 if 1 // 0 else x, "ZeroDivisionError: integer division or modulo by zero"),
    ],
)
def test_what_a_compiled_step_would_repeat_wrongly_is_refused(read, why):
    if why.startswith("Zero"):
        with pytest.raises(ZeroDivisionError):  # the plain run, which follows, raises it
            refused(read, np.ones(2))
    else:
        assert refused(read, np.ones(2))[1].endswith(why)


def test_an_error_without_a_message_is_named():
    class Refusing(FrozenBackend):
        def compile(self, function):
            def step(state, arguments):
                raise NotImplementedError

            return step

    backend, said = Refusing(), []
    call = Recorded(lambda x: x * 2.0, backend, said.append)
    assert call(backend.from_host(np.ones(2))).tolist() == [2, 2] and said[0].endswith(": NotImplementedError: it says nothing more")


def test_an_interrupt_while_a_step_is_traced_leaves_the_state_as_it_was():
    backend = CompilingBackend()
    total = backend.from_host(np.ones(2))

    def work(x):
        nonlocal total
        total += x
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Recorded(work, backend, pytest.fail, lambda: [total])(backend.from_host(np.ones(2)))
    assert total.tolist() == [1, 1]


def test_state_of_one_buffer_is_not_donated_twice():
    backend = CompilingBackend()
    x = backend.from_host(np.ones(2))
    y = backend.xp.zeros(2)
    y[...] = x  # values cannot be written, so they could share one
    total = Recorded(lambda one: y + one, backend, pytest.fail, lambda: [x, y])
    one = backend.from_host(np.ones(()))
    assert [total(one).tolist() for _ in range(3)] == [[2, 2]] * 3 and x.tolist() == [1, 1]


@pytest.mark.parametrize(("seconds", "announced"), [(0.0, ["compiling the step"]), (60.0, [])])
def test_a_compilation_is_announced_if_it_takes_long(seconds, announced, monkeypatch):
    monkeypatch.setattr(functional_backend, "ANNOUNCED_AFTER", seconds)
    backend, messages = CompilingBackend(), []
    backend.tell(messages.append)
    losses(backend, steps=1)
    assert messages == announced


def test_decoding_is_recorded_with_its_cache(monkeypatch):
    config = ModelConfig(d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, d_hidden=24, max_seq_len=12, vocab_size=19)
    texts = []
    for backend in (CompilingBackend(), load("numpy")):
        with use_backend(backend):
            decoder = Decoder(Transformer(config, seed=0, backend=backend), [[1, 2], [3]], tokens=8)
            for _ in range(8):
                decoder.add(np.argmax(decoder.predict(), axis=-1).tolist())
            texts.append(decoder.texts.tolist())
        if isinstance(backend, FunctionalBackend):
            assert backend.compiled == 1 and decoder.recorded.possible
            assert isinstance(decoder.cache.layers[0].k, Holder)
    assert texts[0] == texts[1]
