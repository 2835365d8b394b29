"""examples/ladder.py: every rung is the same layer, which is minimoe's own; docs/ladder.md quotes it to the letter."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import minimoe as mm

ROOT = Path(__file__).parents[2]
PATH = ROOT / "examples" / "ladder.py"
SHAPES = [(37, 8, 12, 5, 2), (3, 5, 7, 16, 2), (33, 16, 8, 4, 3)]  # N, D, H, E, K: odd, most experts idle, few experts


@pytest.fixture(scope="module")
def ladder():
    spec = importlib.util.spec_from_file_location("ladder", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["ladder"] = module  # Numba's cache looks it up
    spec.loader.exec_module(module)
    return module


def own_layer(weights, k, dtype):
    """minimoe's layer with these weights."""
    (e, d), h = weights.router.shape, weights.down.shape[2]
    layer = mm.MoE(d, h, "swiglu", mm.MoEConfig(n_experts=e, top_k=k), dtype=dtype)
    layer.load_state_dict(dict(zip(("router.weight", "experts.gate_up_proj", "experts.down_proj"), weights, strict=True)))
    return layer


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_rung_gives_what_the_one_before_gives(ladder, shape):
    *sizes, k = shape
    ladder.check(ladder.make_case(*sizes, dtype=np.float64), k, lambda line: None)


@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-10), ("float32", 2e-5)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_last_rung_is_minimoes_own_layer(ladder, shape, dtype, tolerance):
    *sizes, k = shape
    x, dy, weights = ladder.make_case(*sizes, dtype=dtype)
    layer, given = own_layer(weights, k, dtype), mm.tensor(x, requires_grad=True, dtype=dtype)
    y, _ = layer(given)
    y.backward(dy)
    gradients = dict(layer.named_parameters())
    named = (gradients[name].grad for name in ("router.weight", "experts.gate_up_proj", "experts.down_proj"))
    own = y.data, ladder.Grads(given.grad, *named)
    last = ladder.RUNGS[-1].layer()(x, dy, weights, k)
    assert {array.dtype for array in (last[0], *last[1])} == {np.dtype(dtype)}
    assert ladder.difference(last, own) < tolerance


def test_a_rung_that_uses_its_memory_again_gives_the_same_bits_again(ladder):
    x, dy, weights = ladder.make_case(37, 8, 12, 5)
    for rung in ladder.RUNGS[3:]:
        layer = rung.layer()
        y, grads = layer(x, dy, weights, 2)
        first = [array.copy() for array in (y, *grads)]
        layer(x[::-1].copy(), dy, weights, 2)
        y, grads = layer(x, dy, weights, 2)
        assert all(np.array_equal(one, other) for one, other in zip(first, (y, *grads), strict=True))


@pytest.mark.parametrize("cores", [1, 3])
def test_the_number_of_cores_changes_no_bit(ladder, cores, monkeypatch):
    x, dy, weights = ladder.make_case(37, 8, 12, 5)
    fused, threaded = ladder.RUNGS[-2].layer(), ladder.RUNGS[-1].layer()
    with ladder.BLAS.limit(limits=1, user_api="blas"):
        y, grads = fused(x, dy, weights, 2)
    monkeypatch.setattr(ladder, "CORES", cores)
    ladder.pool.cache_clear()
    with ladder.BLAS.limit(limits=1, user_api="blas"):
        again, grads_again = threaded(x, dy, weights, 2)
    ladder.pool.cache_clear()
    assert np.array_equal(y, again) and all(np.array_equal(one, other) for one, other in zip(grads, grads_again, strict=True))


@pytest.mark.parametrize("dtype, tolerance", [(np.float64, 1e-11), (np.float32, 1e-6)])
def test_the_polynomial_sigmoid_is_exact_to_the_dtype_far_out_too(ladder, dtype, tolerance):
    g = np.concatenate([np.linspace(-80, 80, 4001), [-1e4, 1e4]]).astype(dtype)
    g_u, one = np.stack([np.concatenate([g, np.ones_like(g)])]), np.ones(1, dtype)
    hidden = np.empty((1, len(g)), dtype)
    ladder.swiglu(g_u, np.zeros(1, np.int64), one, hidden, 0, 1)
    wide = g[:-2].astype(np.float64)
    np.testing.assert_allclose(hidden[0, :-2], wide / (1 + np.exp(-wide)), rtol=tolerance)
    assert abs(hidden[0, -2]) < 1e-30 and hidden[0, -1] == dtype(1e4)


def test_the_command_checks_times_and_prints_every_rung(ladder, tmp_path):
    sizes = ["--tokens", "300", "--d-model", "8", "--d-hidden", "8", "--experts", "4", "--rounds", "1"]
    done = subprocess.run([sys.executable, str(PATH), *sizes], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for rung in ladder.RUNGS:
        assert re.search(rf"^ *{rung.name}( +[\d.]+){{5}} +{re.escape(rung.why)}", done.stdout, flags=re.MULTILINE)
    assert "ran 256 of the 300 tokens" in done.stdout
    refused = subprocess.run([sys.executable, str(PATH), "--top-k", "9"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert refused.returncode == 2 and "--top-k at most --experts" in refused.stderr


def test_the_page_quotes_the_file_to_the_letter():
    """Blocks marked no-run are excerpts: their lines stand in the file, in this order; a line of dots leaves some out."""
    page, file = (ROOT / "docs" / "ladder.md").read_text(encoding="utf-8"), PATH.read_text(encoding="utf-8").splitlines()
    excerpts = re.findall(r"^```python no-run\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    assert len(excerpts) >= 6
    for excerpt in excerpts:
        at = 0
        for part in re.split(r"^ *\.\.\.\n", excerpt, flags=re.MULTILINE):
            lines = part.splitlines()
            places = [i for i in range(at, len(file)) if file[i : i + len(lines)] == lines]
            assert places, f"not in {PATH.name}:\n{part}"
            at = places[0] + len(lines)
