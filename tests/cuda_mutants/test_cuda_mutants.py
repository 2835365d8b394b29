"""Faults planted in CUDA kernels, and mutants made by operators: the operators on small texts, the trials, and the figures on the page."""

import re
from collections import Counter

import pytest
from cuda_mutants import __main__ as command
from cuda_mutants.__main__ import KERNELS_OF, SOURCES, Trial, equivalents, report
from cuda_mutants.figures import SEEDS, TOPICS, figures, outcomes, parts_of_page, result
from cuda_mutants.operators import Mutant, mutants_of_ptx, mutants_of_source
from cuda_mutants.planted import PLANTED, Target
from cuda_mutants.trials import found
from ptx_machine.nvrtc import compile_ptx

from minimoe_cupy.loader import KERNELS

# ---- operators ---------------------------------------------------------------------------------------------------------------------------

SOURCE = """
#include "common.cuh"
constexpr int WARPS = 8; // 8 < 9
template <int V = 4> __global__ void __launch_bounds__(256) f(const float* x, float* y, int n) {
    asm volatile("bar.sync 0;");
    for (int i = 0; i < n; i += 2) y[i] = 0.5f - x[i + 1];
    __syncthreads();
    y[n] += 1.0f;
    if (n == 32) return;
}
"""
OF_SOURCE = {
    ("comparison", "for (int i = 0; i <= n; i += 2) y[i] = 0.5f - x[i + 1];"), ("comparison", "if (n != 32) return;"),
    ("constant", "constexpr int WARPS = 9; // 8 < 9"), ("constant", "for (int i = 1; i < n; i += 2) y[i] = 0.5f - x[i + 1];"),
    ("constant", "for (int i = 0; i < n; i += 3) y[i] = 0.5f - x[i + 1];"),
    ("constant", "for (int i = 0; i < n; i += 2) y[i] = 0.5f - x[i + 2];"), ("constant", "if (n == 33) return;"),
    ("sign", "for (int i = 0; i < n; i -= 2) y[i] = 0.5f - x[i + 1];"), ("sign", "for (int i = 0; i < n; i += 2) y[i] = 0.5f + x[i + 1];"),
    ("sign", "for (int i = 0; i < n; i += 2) y[i] = 0.5f - x[i - 1];"), ("sign", "y[n] -= 1.0f;"), ("statement", ";"),
}  # fmt: skip

PTX = """
.entry other(.param .u64 x) {
    bar.sync 0;
}
.entry f(.param .u64 x) {
    .reg .b32 %r<9>;
    .loc 1 32 5
    bar.sync 0;
    setp.lt.s32 %p1, %r1, %r2;
    @%p1 bra $L;
    ld.shared.v2.u32 {%r1, %r2}, [%r3];
    st.global.f32 [%rd1+8], %f1;
    shl.b32 %r1, %r2, 2;
    sub.s32 %r1, %r2, %r3;
    selp.b32 %r1, %r2, 0, %p1;
$L:
    ret;
}
"""
OF_PTX = {
    ("synchronise", ""), ("comparison", "setp.le.s32 %p1, %r1, %r2;"), ("predicate", "@!%p1 bra $L;"),
    ("offset", "ld.shared.v2.u32 {%r1, %r2}, [%r3+8];"), ("fragment", "ld.shared.v2.u32 {%r2, %r1}, [%r3];"),
    ("offset", "st.global.f32 [%rd1+12], %f1;"), ("constant", "shl.b32 %r1, %r2, 3;"), ("operands", "sub.s32 %r1, %r3, %r2;"),
    ("operands", "selp.b32 %r1, 0, %r2, %p1;"),
}  # fmt: skip


def changes(mutants: list[Mutant]) -> Counter[tuple[str, str]]:
    return Counter((mutant.operator, mutant.after) for mutant in mutants)


def test_operators_on_cuda_c_make_each_listed_change_once():
    mutants = list(mutants_of_source(SOURCE))
    assert changes(mutants) == Counter([*OF_SOURCE, ("statement", ";")])
    assert {mutant.before for mutant in mutants if mutant.operator == "statement"} == {"__syncthreads();", "y[n] += 1.0f;"}


def test_operators_on_ptx_make_each_listed_change_of_the_kernel_once():
    assert changes(list(mutants_of_ptx(PTX, "f"))) == Counter(OF_PTX)
    with pytest.raises(LookupError, match="no kernel g"):
        list(mutants_of_ptx(PTX, "g"))


def test_a_mutant_is_one_change_of_one_line():
    for text, mutants in ((SOURCE, mutants_of_source(SOURCE)), (PTX, mutants_of_ptx(PTX, "f"))):
        for mutant in mutants:
            old, new = text.split("\n"), mutant.applied(text).split("\n")
            assert [n for n, (a, b) in enumerate(zip(old, new, strict=True), 1) if a != b] == [mutant.line]
            assert old[mutant.line - 1].strip() == mutant.before and new[mutant.line - 1].strip() == mutant.after


# ---- planted faults ----------------------------------------------------------------------------------------------------------------------

QUICK = {  # of each topic the beginning of one fault, found within the first cases of small kernels
    "barriers": "optimizer.cu: __syncthreads();", "warps": "loss.cu: __shfl_xor_sync", "bounds": "dispatch.cu: >=",
    "unwritten": "optimizer.cu: if (threadIdx.x == 0)", "copies": "mma_tile.cuh: commit_copies();  ->  nothing",
    "fragments": "mma_tile.cuh: m + lane % 16", "wgmma": "wgmma_tile.cuh: wgmma_wait<0>(sum);",
    "blocks": "optimizer.cu: partial[blockIdx.x] = sum;", "arithmetic": "norm.cuh: += __shfl_xor_sync(",
}  # fmt: skip
EVERY_TARGET = dict.fromkeys([fault.target for fault in PLANTED] + list(SOURCES.values()) + list(KERNELS_OF.values()))


def test_at_least_sixty_faults_are_planted_over_all_topics():
    assert len(PLANTED) >= 60 and {fault.topic for fault in PLANTED} == set(TOPICS)
    assert len({fault.name for fault in PLANTED}) == len(PLANTED)
    for fault in PLANTED:
        assert fault.text() != (KERNELS / fault.file).read_text(encoding="utf-8"), fault.name


@pytest.mark.parametrize("topic", TOPICS)
def test_a_planted_fault_of_each_topic_is_found(topic):
    (fault,) = (fault for fault in PLANTED if fault.topic == topic and fault.name.startswith(QUICK[topic]))
    assert found(fault.target, fault.file, fault.text())


@pytest.mark.parametrize("fault", [pytest.param(fault, id=f"{n}, {fault.topic}") for n, fault in enumerate(PLANTED)])
def test_every_planted_fault_is_found(fault):
    assert found(fault.target, fault.file, fault.text(), seeds=(1, 2)), fault.name


@pytest.mark.parametrize("target", [pytest.param(target, id=f"{n}") for n, target in enumerate(EVERY_TARGET)])
def test_without_a_fault_every_case_passes(target):
    assert not found(target)


# ---- trials ------------------------------------------------------------------------------------------------------------------------------

SQUARES = Target(("sum_of_squares",))


def test_without_a_fault_a_small_case_passes_and_a_source_that_does_not_compile_is_found():
    source = (KERNELS / "optimizer.cu").read_text(encoding="utf-8")
    assert not found(SQUARES, "optimizer.cu", source)
    assert "error" in found(SQUARES, "optimizer.cu", source.replace("if (warp) return", "if (warp return"))


def test_a_machine_that_cannot_be_built_is_no_fault_found(monkeypatch):
    def fails():
        raise RuntimeError("no g++")

    monkeypatch.setattr("cuda_mutants.trials.library", fails)
    with pytest.raises(RuntimeError, match="no g\\+\\+"):
        found(SQUARES, "optimizer.cu", "nonsense")


def of_ptx(kernel: str, operator: str, target: Target) -> Trial:
    ptx, lowered = compile_ptx(KERNELS / "optimizer.cu", [kernel], command.HOPPER)
    mutant = next(mutant for mutant in mutants_of_ptx(ptx, lowered[kernel]) if mutant.operator == operator)
    return Trial("optimizer.cu", kernel, mutant, target)


def test_a_change_of_ptx_is_found_and_a_kernel_that_no_case_launches_is_an_error():
    assert "shared memory that nobody wrote" in of_ptx("sum_of_squares<4, float>", "synchronise", SQUARES).run()
    with pytest.raises(LookupError, match="launches sum_of_squares<1, float>"):
        of_ptx("sum_of_squares<1, float>", "synchronise", SQUARES).run()


def test_the_report_counts_outcomes_and_fails_for_a_survivor(tmp_path, capsys):
    path = tmp_path / "results.json"
    mutants = [{"mutant": name} for name in ("a", "b", "c")]
    assert report(mutants, ["", "never read", ""], ["Fault: race", "", ""], path, seed=3) == 1
    assert capsys.readouterr().out.endswith("3 mutants: 1 found, 1 equivalent, 1 survived\n")
    assert re.search(r'"seed": 3,\n "compiler": "NVRTC [\d.]+"', path.read_text())
    assert report(mutants[:2], ["", "never read"], ["Fault: race", ""], None) == 0


# ---- results -----------------------------------------------------------------------------------------------------------------------------


def test_the_page_says_what_the_results_say():
    assert parts_of_page()[1] == figures(), "run python -m cuda_mutants.figures"


def test_the_results_are_of_these_faults_and_at_least_95_percent_are_found():
    mutants = result("planted")["mutants"]
    assert [(mutant["topic"], mutant["mutant"]) for mutant in mutants] == [(fault.topic, fault.name) for fault in PLANTED]
    assert outcomes("planted")["found"] >= 0.95 * len(PLANTED)


@pytest.mark.parametrize("seed", SEEDS)
def test_both_runs_of_a_sample_are_of_the_same_mutants(seed):
    last, first = result(f"seed-{seed}"), result(f"seed-{seed}-first")
    assert last["seed"] == first["seed"] == seed and len(last["mutants"]) == 60
    assert [mutant["mutant"] for mutant in last["mutants"]] == [mutant["mutant"] for mutant in first["mutants"]]


def test_mutants_are_equivalent_for_the_reasons_that_are_listed():
    rows = [mutant for seed in SEEDS for mutant in result(f"seed-{seed}")["mutants"] if mutant["outcome"] == "equivalent"]
    seen = set()
    for row in rows:
        where, operator, change = re.fullmatch(r"(?:PTX of )?(.+):\d+ (\w+): (.+)", row["mutant"]).groups()
        key = where, operator, *change.split("  ->  ")
        assert equivalents()[key] == row["by"]
        seen.add(key)
    assert seen == set(equivalents())
