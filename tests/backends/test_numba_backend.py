"""The Numba backend beyond the contract: threads, the kernel decorator, BLAS by address, code kept on disk, and running without these."""

import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from fresh_process import first_words
from tiny_runs import tiny, weights_of, write_text

import minimoe as mm
from minimoe.backend import kernel_kinds, load
from minimoe.reference.expert import ExpertWeights
from minimoe.reference.gating import Rule
from minimoe.testing.conformance import relative_errors
from minimoe_numba import NumbaBackend, maths
from minimoe_numba import blas as blas_module
from minimoe_numba.kernel import F1, F2, kernel
from minimoe_numba.machine import machine
from minimoe_numba.pool import Pool
from minimoe_numpy import NumpyBackend

NUMBA, NUMPY = load("numba"), NumpyBackend()
ROOT = Path(__file__).parents[2]


@kernel
def count_visits(start: int, stop: int, visits: F1, amount: float) -> None:
    for n in range(start, stop):
        visits[n] += amount


@kernel
def exps(start: int, stop: int, x: F1, y: F1) -> None:
    for n in range(start, stop):
        y[n] = maths.exp(x[n])


@kernel
def row_sums(start: int, stop: int, x: F2, y: F1) -> None:
    for n in range(start, stop):
        y[n] = x[n].sum()


@pytest.fixture
def three_threads():
    """More threads than most machines of a test have cores."""
    NUMBA.use_threads(3)
    yield
    NUMBA.use_threads(0)


# ---- threads -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grain", [1, 7, 1000, 5000])
def test_every_row_is_visited_once(three_threads, grain):
    visits = np.zeros(3001, np.float32)
    for _ in range(20):
        count_visits(3001, grain, visits, 0.5)
    assert np.array_equal(visits, np.full(3001, 10.0, np.float32))


def test_results_do_not_depend_on_how_many_threads_share_the_pieces(monkeypatch):
    monkeypatch.setattr(machine(), "blas", blas_module.own_product())
    draw = np.random.default_rng(2)
    x, dy, gate_weights, plan, weights = routed(draw, n=700)
    q, k, v = (draw.standard_normal((2, 90, heads, 16)).astype(np.float32) for heads in (4, 2, 2))
    positions, targets = np.arange(90, dtype=np.int32)[None], draw.integers(0, 40, 700).astype(np.int32)
    options = {"scale": 0.25, "causal": True, "q_pos": positions, "k_pos": positions}
    results = []
    for threads in (1, 2, 3):
        NUMBA.use_threads(threads)
        gate = NUMBA.gate(x[:, :8].copy(), None, None, rule=Rule("softmax_topk", 2))
        norm = NUMBA.rms_norm_backward(dy, x, np.ones(12, np.float32), np.ones((700, 1), np.float32))
        y, saved = NUMBA.moe_ffn(x, gate_weights, plan, weights, "swiglu")
        dx, dgate, dweights = NUMBA.moe_ffn_backward(dy, saved, "swiglu")
        z, logsumexp = NUMBA.attention(q, k, v, **options)
        dq, dk, dv, _ = NUMBA.attention_backward(z, q, k, v, z, logsumexp, **options)
        big = np.tile(x, (1, 20))  # large enough to be shared out
        products = NUMBA.linear(big, big[:500]), NUMBA.linear_dx(big[:, :200], big[:200]), NUMBA.linear_dw(big, big)
        (total, _), saved = NUMBA.linear_cross_entropy(big, big[:40], targets)
        head = NUMBA.linear_cross_entropy_backward(np.ones((), np.float32), saved)
        results.append([*gate, *norm, y, dx, dgate, *dweights, z, logsumexp, dq, dk, dv, *products, total, *head])
    NUMBA.use_threads(0)
    for others in results[1:]:
        assert [i for i, (a, b) in enumerate(zip(results[0], others, strict=True)) if not np.array_equal(a, b)] == []


def test_kernels_may_be_called_from_several_python_threads(three_threads):
    visits = np.zeros((4, 999), np.float32)

    def call(row):
        for _ in range(200):
            count_visits(999, 10, row, 1.0)

    callers = [threading.Thread(target=call, args=(row,)) for row in visits]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert (visits == 200.0).all()


def test_workers_that_fell_asleep_wake_up_and_the_pool_closes(three_threads):
    pool = machine().pool
    deadline = 6000  # a minute: a busy machine lets spinning threads run rarely
    while not all(worker.asleep for worker in pool.workers) and deadline:
        threading.Event().wait(0.01)
        deadline -= 1
    assert all(worker.asleep for worker in pool.workers)
    visits = np.zeros(64, np.float32)
    count_visits(64, 1, visits, 1.0)
    assert (visits == 1.0).all()
    workers = Pool(2).workers
    assert all(worker.is_alive() for worker in workers)
    closing = Pool(3)
    closing.close()
    assert not any(worker.is_alive() for worker in closing.workers)


def test_a_forked_process_gets_threads_of_its_own():
    if not hasattr(os, "fork"):
        return
    code = (
        "import os, numpy as np\n"
        "import minimoe as mm\n"
        "from minimoe.backend import load\n"
        "b = load('numba'); b.use_threads(2)\n"
        "x = np.ones((600, 64), np.float32); w = np.ones((64, 64), np.float32)\n"
        "b.linear(x, w)\n"
        "child = os.fork()\n"
        "ok = bool((b.linear(x, w) == 64).all())\n"
        "if child == 0: os._exit(0 if ok else 1)\n"
        "assert ok and os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0\n"
    )
    first_words(code=code)


def test_a_hundred_steps_twice_give_equal_bytes(tmp_path):
    text = write_text(tmp_path)
    runs = [mm.train(tiny(text, backend="numba", steps=100), root=tmp_path / name) for name in "ab"]
    assert weights_of(runs[0].path, 100) == weights_of(runs[1].path, 100)


# ---- the decorator -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "x, says",
    [
        (np.zeros((4, 6), np.float64), "x is float64[4, 6]: wanted contiguous float32 of 2 axes"),
        (np.zeros((4, 6), np.float32)[:, ::2], "x is float32[4, 3], not contiguous: wanted"),
        (np.zeros(4, np.float32), "x is float32[4]: wanted contiguous float32 of 2 axes"),
    ],
)
def test_an_argument_that_does_not_fit_is_named(x, says):
    with pytest.raises(TypeError, match="row_sums: ") as caught:
        row_sums(4, 1, x, np.zeros(4, np.float32))
    assert says in str(caught.value)


def test_exp_is_good_to_a_few_ulp_everywhere():
    x = np.concatenate([np.linspace(-87.3, 88.7, 200_001), np.linspace(-1e-3, 1e-3, 1001)]).astype(np.float32)
    y = np.empty_like(x)
    exps(len(x), 1000, x, y)
    exact = np.exp(x.astype(np.float64))
    assert np.max(np.abs(y - exact) / exact) < 4 * np.finfo(np.float32).eps
    edges = np.array([-np.inf, -200.0, 89.0, np.inf, np.nan], np.float32)
    y = np.empty_like(edges)
    exps(5, 5, edges, y)
    assert np.array_equal(y, np.array([0.0, 0.0, np.inf, np.inf, np.nan], np.float32), equal_nan=True)


@pytest.mark.parametrize(
    "name", ["activation.activation_backward", "loss.softmax_rows", "optimizer.squares", "optimizer.adamw_elements", "norm.rms_rows"]
)
def test_hot_loops_are_vector_code(name, tmp_path):
    """Numba shows the code of what it compiles, not of what it loads: so in a process with an empty cache."""
    module, function = name.split(".")
    code = (
        f"from minimoe_numba.{module} import {function} as k\n"
        "k.compile()\n"
        "print('VECTORS', len(__import__('re').findall('<(?:4|8|16) x float>', k.held.inspect_llvm())))\n"
    )
    words = first_words(code=code, NUMBA_CACHE_DIR=str(tmp_path))
    assert int(words.split("VECTORS")[1].split()[0]) > 10


# ---- gradients into their places -------------------------------------------------------------------------------------------------------


def routed(rng, n=70, e=5, k=2, d=12, h=8):
    x, dy = (rng.standard_normal((n, d)).astype(np.float32) for _ in range(2))
    weights = ExpertWeights(*(rng.standard_normal(s).astype(np.float32) for s in ((e, 2 * h, d), (e, d, h), (e, 2 * h), (e, d))))
    ids = np.argsort(rng.random((n, e)), axis=1)[:, :k].astype(np.int32)
    ids[ids == 3] = 4  # expert 3 stays empty
    gate_weights = rng.random((n, k)).astype(np.float32)
    return x, dy, gate_weights, NUMPY.route(ids, gate_weights, None, n_experts=e, rows=n * k), weights


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("biases", [False, True])
def test_experts_write_their_gradients_where_they_are_told(accumulate, biases):
    x, dy, gate_weights, plan, weights = routed(np.random.default_rng(0))
    weights = weights if biases else ExpertWeights(*weights[:2])
    fresh = NUMPY.moe_ffn_backward(dy, NUMPY.moe_ffn(x, gate_weights, plan, weights, "swiglu")[1], "swiglu")[2]
    for backend in (NUMBA, NUMPY):
        before = 0.5 if accumulate else np.nan
        out = ExpertWeights(*(None if w is None else np.full_like(w, before) for w in weights))
        saved = backend.moe_ffn(x, gate_weights, plan, weights, "swiglu")[1]
        _, _, given = backend.moe_ffn_backward(dy, saved, "swiglu", out=out, accumulate=accumulate)
        for place, returned, wanted in zip(out, given, fresh, strict=True):
            assert returned is place
            if place is not None:
                assert relative_errors(place, wanted + (0.5 if accumulate else 0.0)).max() < 1e-5


# ---- doing without ----------------------------------------------------------------------------------------------------------------------


def test_without_a_blas_to_call_numpy_multiplies(monkeypatch):
    x, dy, gate_weights, plan, weights = routed(np.random.default_rng(1))
    expected = NUMBA.moe_ffn(x, gate_weights, plan, weights, "swiglu")[0]
    monkeypatch.setattr(machine(), "blas", None)
    y, saved = NUMBA.moe_ffn(x, gate_weights, plan, weights, "swiglu")
    assert relative_errors(y, expected).max() < 1e-5
    NUMBA.moe_ffn_backward(dy, saved, "swiglu")
    assert np.allclose(NUMBA.linear(x, weights.up[0]), x @ weights.up[0].T, atol=1e-5)


def test_the_blas_library_can_be_chosen(monkeypatch):
    monkeypatch.setenv("MINIMOE_BLAS", "openblas")
    found = blas_module.find_blas()
    assert found is None or found.name.startswith("OpenBLAS")
    monkeypatch.setenv("MINIMOE_BLAS", "best")
    with pytest.raises(mm.errors.UserError, match="MINIMOE_BLAS='best': minimoe, openblas or mkl"):
        blas_module.find_blas()


STEP = """
import numpy as np
from minimoe.backend import kernel_kinds, load
b = load("numba")
x = np.linspace(-3, 3, 64, dtype=np.float32).reshape(4, 16)
assert np.abs(b.swiglu(x) - load("numpy").swiglu(x)).max() < 1e-6
"""


def test_a_first_compilation_says_so_and_a_second_process_loads(tmp_path):
    assert "compiling kernels for this processor" in first_words(code=STEP, NUMBA_CACHE_DIR=str(tmp_path))
    assert first_words(code=STEP, NUMBA_CACHE_DIR=str(tmp_path)) == ""


ROUNDED = """
import hashlib
import numpy as np
from minimoe.backend import kernel_kinds, load
b = load("numba")
draw = np.random.default_rng(0)
q, k, v = (draw.standard_normal((2, 64, 2, 16)).astype(np.float32) for _ in range(3))
positions = np.arange(64, dtype=np.int32)[None]
y, logsumexp = b.attention(q, k, v, scale=0.25, causal=True, q_pos=positions, k_pos=positions)
print("SUM", hashlib.sha256(y.tobytes() + logsumexp.tobytes()).hexdigest())
"""


def test_what_was_just_compiled_rounds_as_what_is_loaded(tmp_path):
    sums = [first_words(code=ROUNDED, NUMBA_CACHE_DIR=str(tmp_path)).split("SUM")[1].split()[0] for _ in range(2)]
    assert sums[0] == sums[1]


def test_any_processor_will_do(tmp_path):
    first_words(code=STEP, NUMBA_CACHE_DIR=str(tmp_path), NUMBA_CPU_NAME="generic", NUMBA_CPU_FEATURES="", OMP_NUM_THREADS="1")


def test_where_nothing_can_be_kept_kernels_are_compiled_in_each_run():
    code = "import numba.core.caching as c\nc.CacheImpl._locator_classes = []\n" + STEP
    assert "no folder for compiled kernels can be written" in first_words(code=code)


def test_without_numba_the_numpy_backend_is_taken_with_a_word():
    code = "import sys\nsys.modules['numba'] = None\nfrom minimoe.backend import load\nprint(load('auto').name)\n"
    words = first_words(code=code, MINIMOE_BACKEND="")
    assert "numpy" in words and "backend numba does not run here" in words


WHY_NOT = "backend numba: NUMBA_DISABLE_JIT is set, and its kernels run only when they are compiled: unset it"


def test_where_numba_is_told_not_to_compile_numpy_is_taken_with_that_reason():
    code = "from minimoe.backend import load\nprint(load('auto').name)\n"
    words = first_words(code=code, MINIMOE_BACKEND="", NUMBA_DISABLE_JIT="1")
    assert words == f"numpy\nminimoe: {WHY_NOT}; using numpy, which is slower\n"


def test_and_its_kernels_are_listed_all_the_same():
    code = "from minimoe.cli import main\nmain(['backends', '--json'])\n"
    found = json.loads(first_words(code=code, MINIMOE_BACKEND="", NUMBA_DISABLE_JIT="1"))["numba"]
    assert (found["available"], found["why_not"]) == (False, WHY_NOT)
    assert found["kernels"] == kernel_kinds(NumbaBackend) and set(found["proven"]) == set(load("numba").proven) != set()
