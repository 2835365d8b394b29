"""The routed layer against the per-token oracle: every router, remedy, capacity, padding, activation and bias, to 1e-10."""

import numpy as np
import oracles
import pytest
from routed_layers import BACKENDS, RNG, D, H, host, make_layer, oracle, padding, run, tokens, weights_of
from tiny_runs import tiny, write_text

import minimoe as mm
from minimoe.data.batches import batch
from minimoe.errors import ConfigError
from minimoe.layers.balance import uniform_aux_loss
from minimoe.reference.gating import Rule
from minimoe.testing import check_grads

GROUPS = {
    "router": "sigmoid_bias",
    "n_experts": 9,
    "n_groups": 3,
    "top_groups": 2,
    "top_k": 3,
}  # groups of three: neither the best nor the sum of all
CASES = {
    "softmax_topk": {},
    "softmax_topk, unnormalised": {"norm_topk_prob": False},
    "softmax_topk, one expert per token": {"top_k": 1, "norm_topk_prob": False},
    "topk_softmax": {"router": "topk_softmax", "top_k": 3},
    "switch": {"router": "switch"},
    "noisy_topk": {"router": "noisy_topk"},
    "noisy_topk, one expert per token": {"router": "noisy_topk", "top_k": 1},
    "sigmoid_bias": {"router": "sigmoid_bias"},
    "sigmoid_bias, unnormalised and scaled": {"router": "sigmoid_bias", "norm_topk_prob": False, "route_scale": 2.5},
    "sigmoid_bias, groups": {**GROUPS, "route_scale": 1.5},
    "expert_choice": {"router": "expert_choice"},
    "expert_choice, more than there are tokens": {"router": "expert_choice", "n_experts": 3, "top_k": 3},
    "router bias": {"router_bias": True},
    "expert biases": {"bias": True},
    "shared experts": {"n_shared_experts": 2, "bias": True, "activation": "gelu"},
    "gelu": {"activation": "gelu"},
    "gelu_tanh": {"activation": "gelu_tanh"},
    "relu": {"activation": "relu"},
    "jitter": {"jitter": 0.3},
    "jitter that the experts see": {"jitter": 0.3, "jitter_experts": True, "n_shared_experts": 1},
    "noise on the logits": {"noise_std": 0.5},
    "capacity 1.1": {"capacity_factor": 1.1},
    "capacity 1.25 by probability": {"capacity_factor": 1.25, "drop_priority": "probability"},
    "capacity 0.5": {"capacity_factor": 0.5, "router": "topk_softmax"},
    "capacity 0.5 by probability": {"capacity_factor": 0.5, "drop_priority": "probability", "norm_topk_prob": False},
    "capacity of switch": {"capacity_factor": 1.0, "router": "switch", "drop_priority": "probability"},
    "capacity of groups": {**GROUPS, "capacity_factor": 0.75},
    "everything": {
        "router": "noisy_topk", "n_experts": 5, "top_k": 3, "capacity_factor": 0.75, "jitter": 0.2, "jitter_experts": True,
        "n_shared_experts": 1, "router_bias": True, "bias": True, "activation": "gelu_tanh",
    },
}  # fmt: skip


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_layer_agrees_with_the_per_token_oracle(backend, case, padded, training):
    layer = make_layer(backend, **CASES[case])
    x, valid = tokens(13), padding(13) if padded else None
    with mm.no_grad():  # one of the cases has a constant weight, with which no gradient is to be had
        _, y, stats = run(layer, x, valid, training)
    expected, facts = oracle(layer, x, valid, training)
    np.testing.assert_allclose(y.numpy(), expected, rtol=1e-10, atol=1e-10)
    check_stats(layer, stats, facts, valid)


def check_stats(layer, stats, facts, valid):
    counts, load = host(layer, stats.counts), host(layer, stats.load)
    assert counts.tolist() == facts["counts"].tolist()
    np.testing.assert_allclose(load, facts["load"], rtol=1e-12)
    np.testing.assert_allclose(host(layer, stats.entropy), -sum(f * np.log(f) for f in facts["load"] if f > 0), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(host(layer, stats.dropped), facts["dropped"], rtol=1e-12, atol=1e-15)
    rows = [set(row[row >= 0].tolist()) for row in host(layer, stats.ids)]
    keep = np.ones(len(rows), dtype=bool) if valid is None else valid
    assert [row for row, ok in zip(rows, keep, strict=True) if ok] == [set(ids) for ids, ok in zip(facts["ids"], keep, strict=True) if ok]
    moe = layer.moe
    if moe.router != "expert_choice":
        np.testing.assert_allclose(stats.aux_loss.item(), facts["aux_loss"] * (moe.k if moe.aux_convention == "mixtral" else 1), rtol=1e-10)
    if not moe.noise_std:
        np.testing.assert_allclose(stats.z_loss.item(), facts["z_loss"], rtol=1e-10)
    weighted = moe.aux_loss_coef * stats.aux_loss.item() + moe.z_loss_coef * stats.z_loss.item()
    np.testing.assert_allclose(stats.loss.item(), weighted, rtol=1e-12)


@pytest.mark.parametrize("n, e, k", [(1, 1, 1), (1, 5, 3), (2, 3, 3), (7, 9, 1), (31, 8, 2), (33, 3, 2), (64, 7, 7)])
@pytest.mark.parametrize("router", ["softmax_topk", "sigmoid_bias", "noisy_topk", "expert_choice"])
def test_sizes_need_not_be_a_multiple_of_anything(router, n, e, k):
    capacity = 0.0 if router == "expert_choice" else 1.1
    layer = make_layer(router=router, n_experts=e, top_k=k, capacity_factor=capacity, d_model=3, d_hidden=1)
    x = tokens(n, 3)
    with mm.no_grad():
        _, y, stats = run(layer, x, training=True)
    expected, facts = oracle(layer, x, training=True)
    np.testing.assert_allclose(y.numpy(), expected, rtol=1e-10, atol=1e-10)
    check_stats(layer, stats, facts, None)


@pytest.mark.parametrize("shape", [(D,), (3, D), (2, 3, D), (2, 2, 2, D)])
def test_tokens_may_stand_in_any_number_of_axes(shape):
    layer, x = make_layer(), tokens(8)
    x = x[: int(np.prod(shape)) // D].reshape(shape)
    _, y, _ = run(layer, x)
    assert y.shape == shape
    np.testing.assert_allclose(y.numpy().reshape(-1, D), oracle(layer, x.reshape(-1, D))[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_group_is_worth_its_two_best_experts(backend):
    scores = np.array([[0.9, 0.1, 0.1, 0.7, 0.69, 0.01, 0.6, 0.59, 0.58]])  # best, two best, all three: another group each time
    b, rule = BACKENDS[backend], Rule("sigmoid_bias", 2, n_groups=3, top_groups=1)
    gate = b.gate(b.from_host(np.log(scores / (1 - scores))), None, None, rule=rule)
    assert b.to_host(gate.ids).tolist() == [[3, 4]]
    np.testing.assert_allclose(b.to_host(gate.weights), [[0.7 / 1.39, 0.69 / 1.39]], rtol=1e-12)


def test_the_z_loss_is_of_the_clean_logits():
    layer, x = make_layer(noise_std=0.5), tokens(9)
    noisy, clean = run(layer, x, training=True)[2], run(layer, x)[2]
    assert noisy.z_loss.item() == clean.z_loss.item() == pytest.approx(oracle(layer, x)[1]["z_loss"], rel=1e-12)


def test_evaluation_knows_no_noise_no_jitter_and_no_capacity():
    remedies = {"jitter": 0.3, "noise_std": 0.5, "capacity_factor": 0.5}
    plain, layer, x = make_layer(), make_layer(**remedies), tokens(17)
    assert np.array_equal(run(layer, x)[1].numpy(), run(plain, x)[1].numpy())
    assert float(run(layer, x)[2].dropped) == 0.0
    assert not np.array_equal(run(layer, x, training=True)[1].numpy(), run(plain, x)[1].numpy())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_call_twice_gives_equal_bytes(backend):
    layer, x = make_layer(backend, jitter=0.2, noise_std=0.3, capacity_factor=1.1), tokens(13)
    assert run(layer, x, training=True)[1].numpy().tobytes() == run(layer, x, training=True)[1].numpy().tobytes()


# ---- gradients ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [case for case in CASES if case != "noisy_topk, one expert per token"])
def test_every_gradient_agrees_with_differences(case):
    layer = make_layer(**CASES[case])
    valid = padding(9)

    def function(x, *_):
        y, stats = layer(x, valid, RNG)
        return y, stats.aux_loss, stats.z_loss

    x = mm.tensor(tokens(9, seed=4), requires_grad=True, backend=BACKENDS["numpy"])
    check_grads(function, x, *layer.parameters(), eps=1e-5)


@pytest.mark.parametrize("moe", [
    {"top_k": 1}, {"top_k": 1, "router": "sigmoid_bias"}, {"top_k": 1, "router": "topk_softmax"}, {"top_k": 1, "router": "noisy_topk"},
])  # fmt: skip
def test_a_constant_weight_is_refused_where_gradients_are_wanted_and_serves_inference(moe):
    layer, x = make_layer(**moe), tokens(5)
    for rng in (None, RNG):
        with pytest.raises(ConfigError, match=r"gives the router no gradient \(its only weight is always 1\): set .*under no_grad\(\)"):
            layer(mm.tensor(x, backend=BACKENDS["numpy"]), None, rng)
    with mm.no_grad():
        _, y, _ = run(layer, x)
    np.testing.assert_allclose(y.numpy(), oracle(layer, x)[0], rtol=1e-10, atol=1e-12)
    for parameter in (layer.router.weight, getattr(layer.router, "noise_weight", None)):
        if parameter is not None:
            parameter.requires_grad = False  # a frozen router is not meant to learn
    run(layer, x)[1].sum().backward()
    run(make_layer(n_experts=1, top_k=1), x)[1].sum().backward()


@pytest.mark.parametrize("case", ["softmax_topk", "topk_softmax", "switch", "noisy_topk", "sigmoid_bias, groups"])
def test_the_balance_loss_alone_moves_the_router(case):
    layer = make_layer(**CASES[case])
    moved = [layer.router.weight] + ([layer.router.noise_weight] if case == "noisy_topk" else [])
    x = mm.tensor(tokens(11, seed=5), requires_grad=True, backend=BACKENDS["numpy"])
    check_grads(lambda x, *_: layer(x, None, RNG)[1].aux_loss, x, *moved, eps=1e-5)
    _, _, stats = run(layer, tokens(11, seed=5), training=True)
    stats.aux_loss.backward()
    assert np.abs(layer.router.weight.grad).max() > 1e-4


# ---- a model's losses ------------------------------------------------------------------------------------------------------------------


class Watched:
    """A routed layer that remembers what it was given."""

    def __init__(self, layer):
        self.layer = layer

    def __call__(self, x, valid, rng):
        self.x, self.valid = x.numpy().reshape(-1, x.shape[-1]), valid
        return self.layer(x, valid, rng)


def routed_model(**moe):
    config = mm.ModelConfig(
        d_model=8, n_layers=3, n_heads=2, d_hidden=6, max_seq_len=9, vocab_size=11, moe=mm.MoEConfig(**{"n_experts": 4, "top_k": 2, **moe})
    )
    model = mm.Transformer(config, seed=0, dtype="float64", backend=BACKENDS["numpy"])
    draw = np.random.default_rng(3)
    for block in model.blocks:
        block.moe.router.weight.data[...] = draw.standard_normal(block.moe.router.weight.shape)
    return model


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("convention", ["switch", "megablocks", "mixtral"])
def test_a_model_joins_its_layers_losses_by_the_convention(convention, padded):
    model = routed_model(aux_convention=convention, aux_loss_coef=0.3, z_loss_coef=0.2)
    watched = [Watched(block.moe) for block in model.blocks]
    for block, watcher in zip(model.blocks, watched, strict=True):
        block.moe = watcher
    ids = np.random.default_rng(1).integers(0, 11, (2, 10))
    mask = np.arange(9)[None] < np.array([[9], [6]]) if padded else None
    parts = model.loss(ids[:, :-1], ids[:, 1:], attention_mask=mask)
    valid = np.ones(18, dtype=bool) if mask is None else mask.reshape(-1)
    logits = [watcher.x @ watcher.layer.router.weight.numpy().T for watcher in watched]
    layers = [oracles.softmax_topk(z, valid, 2) for z in logits]
    aux, z = oracles.aux_loss(layers, valid, 2, convention), np.mean([oracles.z_loss(z, valid) for z in logits])
    assert parts.aux_loss.item() == pytest.approx(aux, rel=1e-10)
    assert parts.z_loss.item() == pytest.approx(z, rel=1e-10)
    assert parts.router_loss.item() == pytest.approx(0.3 * aux + 0.2 * z, rel=1e-10)
    assert parts.total.item() == pytest.approx(parts.cross_entropy.item() + 0.3 * aux + 0.2 * z, rel=1e-12)


@pytest.mark.parametrize("convention, uniform", [("switch", 3.0), ("megablocks", 1.0), ("mixtral", 2.0)])
def test_even_probabilities_give_the_uniform_value(convention, uniform):
    model = routed_model(aux_convention=convention)
    for block in model.blocks:
        block.moe.router.weight.data[...] = 0.0
    ids = np.random.default_rng(1).integers(0, 11, (2, 10))
    assert model.loss(ids[:, :-1], ids[:, 1:]).aux_loss.item() == pytest.approx(uniform, rel=1e-12)
    assert uniform_aux_loss(model.config.moe, 3) == uniform


@pytest.fixture
def accumulated(tmp_path):
    """One step of two micro-batches by `minimoe.train`, and the same two micro-batches by hand."""
    moe = {"router": "sigmoid_bias", "bias_rate": 0.25, "capacity_factor": 1.0}
    config = tiny(write_text(tmp_path), moe=moe, steps=1, accumulate=2, batch_size=3, dtype="float64")
    trained = mm.train(config, root=tmp_path)
    settings = trained.config.train
    model = mm.Transformer(trained.config.model, seed=settings.seed, dtype="float64", backend=BACKENDS["numpy"])
    parts = []
    for micro in range(2):
        batch_ = batch(trained.corpus.train, settings.seed, 0, micro, settings.batch_size, settings.seq_len)
        parts.append(model.loss(*batch_, rng=mm.Rng(settings.seed, 0, micro)))
    return trained, parts


def test_accumulation_reports_the_mean_over_micro_batches(accumulated):
    trained, parts = accumulated
    row = trained.metrics[0]
    for key in ("aux_loss", "z_loss", "router_loss"):
        assert row[key] == pytest.approx(np.mean([getattr(p, key).item() for p in parts]), rel=1e-10)
    assert row["loss"] == pytest.approx(np.mean([p.cross_entropy.item() for p in parts]), rel=1e-10)
    assert row["dropped"] == pytest.approx(np.mean([float(p.stats[0].dropped) for p in parts]), rel=1e-10)


def test_the_bias_moves_once_a_step_by_the_counts_of_the_whole_step(accumulated):
    trained, parts = accumulated
    counts = sum(p.stats[0].counts for p in parts)
    expected = oracles.bias_update(np.zeros(4), counts, 0.25)
    assert np.array_equal(trained.model.state_dict()["blocks.0.moe.router.balance_bias"], expected)
    assert trained.metrics[0]["expert_load"][0] == pytest.approx((counts / counts.sum()).tolist())


def test_the_bias_is_saved_and_no_parameter():
    layer = make_layer(router="sigmoid_bias")
    assert "router.balance_bias" in weights_of(layer) and "router.balance_bias" not in dict(layer.named_parameters())
    before = layer.router.balance_bias.numpy()
    layer.update_balance(np.array([9, 1, 5, 5]))
    np.testing.assert_allclose(layer.router.balance_bias.numpy(), oracles.bias_update(before, np.array([9, 1, 5, 5]), 0.001), rtol=1e-14)
    layer.update_balance(np.array([9, 1, 5, 5]), np.array(False))
    np.testing.assert_allclose(layer.router.balance_bias.numpy(), oracles.bias_update(before, np.array([9, 1, 5, 5]), 0.001), rtol=1e-14)


def test_expert_hidden_width_may_be_the_experts_own():
    assert make_layer(d_hidden=H, n_experts=2).experts.down_proj.shape == (2, D, H)
    layer = mm.MoE(D, 99, moe=mm.MoEConfig(n_experts=2, d_hidden=3, n_shared_experts=2), dtype="float64", backend=BACKENDS["numpy"])
    assert layer.experts.gate_up_proj.shape == (2, 6, D) and layer.shared.down_proj.weight.shape == (D, 6)
