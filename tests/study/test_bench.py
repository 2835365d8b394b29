"""Timings: what is counted, that nothing stays patched, and that the tables fit. No test depends on how fast anything is."""

import io
import json

import numpy as np
import pytest
from rich.console import Console

from minimoe.backend import kernel_names, load
from minimoe.config import Config, ModelConfig, MoEConfig, TrainConfig, load_config
from minimoe.config.cost import cost
from minimoe.errors import ConfigError, UserError
from minimoe.reference.expert import ExpertWeights
from minimoe.study import bench
from minimoe.study.bench.work import bind, work
from minimoe_numpy import NumpyBackend

MODEL = ModelConfig(
    d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, d_hidden=24, max_seq_len=8, vocab_size=19, moe=MoEConfig(n_experts=4, layers=(1,))
)
TINY = Config(name="tiny", model=MODEL, train=TrainConfig(batch_size=2, seq_len=8))


class Fused(NumpyBackend):
    """Has one kernel of its own, and a composite that saves something of its own."""

    name = "fused"
    library = frozenset({"rms_norm"})

    def rms_norm(self, x, weight, eps, out=None):
        return super().rms_norm(x, weight, eps, out)

    def linear_cross_entropy(self, x, weight, targets, ignore=-100):
        result, saved = super().linear_cross_entropy(x, weight, targets, ignore)
        return result, {"mine": saved}

    def linear_cross_entropy_backward(self, dloss, saved, ignore=-100, out=None, accumulate=False):
        return super().linear_cross_entropy_backward(dloss, saved["mine"], ignore, out, accumulate)


def printed(table, width=100):
    console = Console(width=width, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


@pytest.fixture(scope="module")
def profile():
    return bench.profile_step(TINY, "numpy", steps=2, warmup=0)


# ---- a step, kernel by kernel ----------------------------------------------------------------------------------------------------------


def test_kernels_stand_below_the_kernel_that_calls_them(profile):
    paths = [use.path for use in profile.kernels]
    assert ("moe_ffn", "expert_ffn", "grouped_matmul") in paths
    assert all(path[:-1] in paths[:i] for i, path in enumerate(paths) if len(path) > 1)
    assert {name for path in paths for name in path} <= set(kernel_names())


def test_outermost_kernels_and_the_rest_make_up_the_step(profile):
    outermost = sum(use.ms for use in profile.kernels if len(use.path) == 1)
    assert outermost + profile.outside_ms == pytest.approx(profile.watched_ms)
    assert 0 < profile.outside_ms < profile.watched_ms


def test_calls_are_those_of_one_step(profile):
    calls = {use.path: use.calls for use in profile.kernels}
    assert calls[("moe_ffn",)] == calls[("gate",)] == 1 and calls[("attention",)] == 2
    assert calls[("linear_cross_entropy",)] == 1 and calls[("adamw",)] == 2


def test_products_are_rated_in_flops_and_all_else_in_bytes(profile):
    for use in profile.kernels:
        rate = use.gflops if use.kernel in ("linear", "moe_ffn", "grouped_matmul", "attention_backward") else None
        assert (use.gflops is None) != (use.gb_per_s is None)
        assert rate is None or rate > 0
    assert {use.kernel for use in profile.kernels if use.gb_per_s} >= {"rms_norm", "swiglu", "adamw", "route"}


def test_the_flops_of_a_steps_kernels_are_those_that_cost_counts(profile):
    counted = sum(use.gflops * use.ms * 1e6 for use in profile.kernels if len(use.path) == 1 and use.gflops)
    scores_again = 2 * 2 * 8 * 8 * 4 * 4 * MODEL.n_layers  # attention's backward recomputes them: B 2, T 8, Q 4, C 4
    assert counted == pytest.approx(profile.flops + scores_again)
    assert profile.flops == 16 * cost(MODEL, 8).training_flops_per_token


def test_every_kernel_of_numpy_is_called_a_reference(profile):
    assert {use.kind for use in profile.kernels} == {"reference"}
    assert "outside kernels" in printed(profile.table()) and "  grouped_matmul_dw" in printed(profile.table())


def test_the_profile_is_plain_json(profile):
    found = json.loads(json.dumps(profile.to_dict()))
    assert found["tokens"] == 16 and found["kernels"][0]["path"][-1] == found["kernels"][0]["kernel"]
    assert found["outside_kernels"]["ms"] == profile.outside_ms and found["ceilings"]["gflops"] > 0


def test_the_backend_stays_as_it_was(profile):
    assert not set(vars(load("numpy"))) & set(kernel_names())


def test_accumulation_and_recomputation_are_part_of_the_step():
    config = Config(model=MODEL, train=TrainConfig(batch_size=2, seq_len=8, accumulate=2, recompute=True, optimizer="muon"))
    calls = {use.path: use.calls for use in bench.profile_step(config, "numpy", steps=1, warmup=0).kernels}
    assert calls[("moe_ffn",)] == 4 and calls[("moe_ffn_backward",)] == 2 and calls[("muon",)] > 0


def test_a_vocabulary_that_a_tokenizer_would_give_is_that_of_bytes():
    assert load_config("tiny-moe").model.vocab_size is None
    step = bench.TrainingStep(load_config("tiny-moe", ["train.batch_size=1", "model.n_layers=1"]), load("numpy"))
    assert step.model.vocab_size == 256 and step.batch[0].shape == (1, 1, 128) and step.batch[1].max() < 256


def test_what_cannot_be_trained_is_refused():
    with pytest.raises(ConfigError, match="there is no task"):
        bench.profile_step(load_config("vit-tiny", ["model.head=none"]), "numpy")
    with pytest.raises(UserError, match="no backend 'nump'"):
        bench.bench_kernels(TINY, "nump")


# ---- each kernel against its reference ---------------------------------------------------------------------------------------------------


def test_numpys_kernels_are_the_reference_and_the_table_says_so():
    timings = bench.bench_kernels(TINY, "numpy", steps=1)
    assert all(t.speedup is None and t.ms > 0 for t in timings)
    assert [t.ms for t in timings] == sorted((t.ms for t in timings), reverse=True)
    text = printed(bench.kernels_table(timings))
    assert text.count("is the reference") == len(timings) and all(t.kernel in text for t in timings)
    json.dumps([t.to_dict() for t in timings])


def test_an_override_is_timed_beside_its_reference_also_where_it_saves_in_its_own_way():
    timings = {t.kernel: t for t in bench.bench_kernels(TINY, Fused(), steps=1)}
    assert timings["rms_norm"].kind == "library" and timings["rms_norm"].speedup > 0
    assert timings["linear_cross_entropy_backward"].kind == "hand-written"
    assert timings["linear_cross_entropy_backward"].reference_ms > 0
    assert timings["linear_dx"].reference_ms is None
    assert "library" in printed(bench.kernels_table(list(timings.values())))


def test_calls_of_unlike_shapes_are_all_counted():
    timings = {t.kernel: t for t in bench.bench_kernels(TINY, "numpy", steps=1)}
    assert timings["linear"].calls == 2 * 2 + 2 + 1 + 1  # qkv and output twice, the dense FFN, the router, the head
    assert timings["embedding"].shapes == [[2, 8], [19, 16]]


# ---- the work of a call ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "width", "out"), [(1, 1, 1), (31, 5, 7)])
def test_a_product_has_two_flops_a_multiply_add_and_moves_each_array_once(rows, width, out):
    x, w = np.zeros((rows, width), np.float32), np.zeros((out, width), np.float32)
    done = work("linear", bind("linear", (x, w), {}).arguments, np.zeros((rows, out), np.float32))
    assert done == (2 * rows * width * out, 4 * (x.size + w.size + rows * out))


def test_what_is_written_in_place_moves_twice_and_a_table_by_the_row():
    x, one = np.zeros(10, np.float64), np.zeros((), np.float64)
    options = {"lr": one, "scale": one, "ok": one, "momentum": 0.9, "weight_decay": 0.0}
    assert work("sgd", bind("sgd", (x, x.copy(), x.copy()), options).arguments, None).bytes == 8 * (2 * 10 + 2 * 10 + 10 + 1)
    ids = np.zeros((2, 3), np.int32)
    done = work("embedding", bind("embedding", (ids, np.zeros((1000, 4), np.float32)), {}).arguments, np.zeros((2, 3, 4), np.float32))
    assert done.bytes == 4 * 6 + 2 * 4 * 24


def test_the_backward_of_the_routed_layer_costs_two_forwards():
    weights = ExpertWeights(np.zeros((4, 48, 16)), np.zeros((4, 16, 24)))
    dy = np.zeros((10, 16))
    arguments = bind("moe_ffn_backward", (dy, None, "swiglu"), {}).arguments
    assert work("moe_ffn_backward", arguments, (dy, np.zeros((10, 2)), weights), top_k=2).flops == 2 * 2 * 20 * (48 * 16 + 16 * 24)
