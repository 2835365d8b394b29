"""Small mechanical changes of a whole backend: the operators that make them, and a sample that the conformance suite must see."""

from collections import Counter

import pytest
from mutants.__main__ import all_mutants, equivalents, sampled
from mutants.operators import Mutant, mutants_of
from mutants.trials import FOLDER, Trials
from toy_backend import ToyBackend

from minimoe.backend import check_overrides, kernel_kinds
from minimoe.testing import cases

SEED = 20261130
QUICK = ("array layer", "kernels")


def test_the_toy_backend_has_every_kernel():
    backend = ToyBackend()
    check_overrides(backend)
    assert set(kernel_kinds(backend).values()) == {"hand-written"}


SOURCE = '''"""A docstring is no statement."""
def f(self, x: int, n=3, out=None):
    y = np.zeros(x.shape[0], dtype=np.float32)
    if not n < 2:
        y[: n] += -x.sum(axis=-1)
    y = np.minimum(y, 1.5)
    self.g(y.T, True)
    return y.copy()
'''
EXPECTED = {
    ("axis", "y[: n] += -x.sum(axis=0)"), ("axis", "self.g(y, True)"),
    ("buffer reuse", "y = made_once(1, np.zeros(x.shape[0], dtype=np.float32))"),
    ("buffer reuse", "return (y.copy()) if out is not None else returned_in(2, (y.copy()))"), ("buffer reuse", "return y"),
    ("comparison", "if (n < 2):"), ("comparison", "if not n <= 2:"), ("comparison", "if not n >= 2:"),
    ("comparison", "y = np.maximum(y, 1.5)"),
    ("constant", "y = np.zeros(x.shape[1], dtype=np.float32)"), ("constant", "if not n < 3:"), ("constant", "y = np.minimum(y, 1.515)"),
    ("constant", "self.g(y.T, False)"), ("dropped statement", "pass"), ("dtype", "y = np.zeros(x.shape[0], dtype=np.float64)"),
    ("sign", "y[: n] -= -x.sum(axis=-1)"), ("sign", "y[: n] += (x.sum(axis=-1))"),
    ("slice bound", "y[: (n + 1)] += -x.sum(axis=-1)"), ("slice bound", "y[: (n - 1)] += -x.sum(axis=-1)"),
}  # fmt: skip


def test_the_operators_make_each_listed_change_once(tmp_path):
    path = tmp_path / "source.py"
    path.write_text(SOURCE)
    found = mutants_of(path)
    assert Counter((mutant.operator, mutant.after) for mutant in found) == Counter([*EXPECTED, *[("dropped statement", "pass")] * 2])
    assert {mutant.before for mutant in found if mutant.after == "pass"} == {
        "y[: n] += -x.sum(axis=-1)", "y = np.minimum(y, 1.5)", "self.g(y.T, True)",
    }  # fmt: skip
    assert {mutant.function for mutant in found} == {"f"}


def test_every_mutant_of_the_toy_backend_is_python_and_differs():
    for mutant in all_mutants():
        source = (FOLDER / mutant.file).read_text(encoding="utf-8")
        compile(mutant.applied(source), mutant.file, "exec")
        assert mutant.applied(source).count(mutant.text) >= 1
        assert mutant.before != mutant.after, mutant


def test_known_equivalent_mutants_exist():
    assert set(equivalents()) <= {mutant.key() for mutant in all_mutants()}


# ---- trials --------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trials():
    """The cases of kernels and arrays, of small sizes. Fails with the name of the case if the unmutated backend does not conform."""
    return Trials(large=False, levels=QUICK)


def test_the_toy_backend_conforms(trials):
    assert set(trials.times) == {str(case) for level in QUICK for case in cases(ToyBackend(), level=level) if ", large" not in case.name}


def planted(old: str, new: str, file: str = "linears.py", function: str = "linear") -> Mutant:
    source = (FOLDER / file).read_text(encoding="utf-8")
    start = source.index(old)
    return Mutant(file, 0, function, "planted", start, start + len(old), new, old, new)


PRODUCT = "np.matmul(x, weight.T, out=y)"


@pytest.mark.parametrize(
    "mutant, caught_by",
    [
        (planted(PRODUCT, "os = __import__('os'); os.kill(os.getpid(), 9)"), "crash"),
        (planted(PRODUCT, "\n        while True: pass"), "hang"),
        (planted("dy: Array, weight", "dyy: Array, weight"), "load"),
        (planted(PRODUCT, "np.matmul(x, 1.01 * weight.T, out=y)"), " [float32]"),
        (planted(PRODUCT, f"{PRODUCT}  # the same"), "SURVIVED"),
    ],
    ids=["crash", "hang", "load", "wrong", "equivalent"],
)
def test_a_trial_says_who_caught_a_mutant(trials, monkeypatch, mutant, caught_by):
    monkeypatch.setattr(trials, "limit", 5.0 if caught_by == "hang" else trials.limit)
    assert caught_by in trials.run(mutant).caught_by


ONCE_MISSED = [
    (planted("np.ascontiguousarray(x)", "returned_in(7, np.ascontiguousarray(x))", "array_layer.py", "contiguous"), "two results"),
    (planted("axis=2)[:, :, -2:]", "axis=2)[:, :, -3:]", "gates.py", "keep_best_groups"), "gate"),
    (planted("if rule.router not in self.routers", "if rule.router in self.routers", "gates.py", "gate_backward"), "gate_backward"),
]


@pytest.mark.parametrize("mutant, kernel", ONCE_MISSED, ids=["contiguous", "keep_best_groups", "gate_backward"])
def test_a_mutant_that_the_suite_once_missed_is_caught(trials, mutant, kernel):
    assert kernel in trials.run(mutant).caught_by


@pytest.mark.parametrize("count", [6, 40])
def test_the_suite_sees_every_mutant_of_a_sample_that_is_not_equivalent(trials, count):
    print(f"seed {SEED + count}, {count} mutants")
    known = equivalents()
    suite = trials if count == 6 else Trials(large=False)
    outcomes = [suite.run(mutant) for mutant in sampled(SEED + count, count) if mutant.key() not in known]
    missed = [outcome.mutant for outcome in outcomes if outcome.survived]
    assert not missed, "\n".join(f"{m.file}:{m.line} {m.operator}: {m.before}  ->  {m.after}" for m in missed)
