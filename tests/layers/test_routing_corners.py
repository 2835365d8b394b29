"""Corner cases of the routed layer that others got wrong: idle experts, collapse, K = E, E = 1, ties, NaN, padding, drops."""

import numpy as np
import oracles
import pytest
from routed_layers import BACKENDS, D, H, gradients_of, host, make_layer, oracle, padding, run, tokens, weights_of

import minimoe as mm

ROUTERS = ["softmax_topk", "topk_softmax", "switch", "noisy_topk", "sigmoid_bias", "expert_choice"]
TOKEN_CHOICE = [router for router in ROUTERS if router != "expert_choice"]
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_router = pytest.mark.parametrize("router", ROUTERS)
each_token_choice = pytest.mark.parametrize("router", TOKEN_CHOICE)


def prefer(layer, logit_of_expert):
    """Set the learned constant on each expert's logit; the rest of the router is silent."""
    state = weights_of(layer)
    state["router.weight"] *= 1e-3
    state["router.bias"] = np.array(logit_of_expert, dtype=np.float64)
    if "router.noise_weight" in state:
        state["router.noise_weight"] *= 1e-3
    if "router.balance_bias" in state:
        state["router.balance_bias"] *= 0.0
    layer.load_state_dict(state)
    return layer


def backward(layer, x, valid=None, training=True):
    """Gradients of sum(y * weights) + the router's loss -> y, stats, dx, gradients by name"""
    for parameter in layer.parameters():
        parameter.grad = None
    x, y, stats = run(layer, x, valid, training, requires_grad=True)
    dy = mm.tensor(tokens(int(np.prod(y.shape[:-1])), D, seed=8).reshape(y.shape), backend=y.backend)
    ((y * dy).sum() + stats.loss).backward()
    return y.numpy(), stats, host(layer, x.grad), gradients_of(layer)


def of_expert(gradients, expert):
    return {name: gradient[expert] for name, gradient in gradients.items() if name.startswith("experts.")}


# ---- idle experts, and collapse --------------------------------------------------------------------------------------------------------


@each_backend
@each_token_choice
def test_an_expert_without_tokens_has_a_gradient_of_zero(backend, router):
    top_k = 1 if router == "switch" else 2
    layer = prefer(make_layer(backend, router=router, top_k=top_k, router_bias=True, bias=True), [20, -40, 20.5, 20.2])
    _, stats, dx, gradients = backward(layer, tokens(13))
    assert host(layer, stats.counts)[1] == 0
    for name, gradient in of_expert(gradients, 1).items():
        assert np.array_equal(gradient, np.zeros_like(gradient)), name
    assert all(np.isfinite(gradient).all() for gradient in [dx, *gradients.values()])
    assert any(np.abs(gradient).max() > 1e-3 for gradient in of_expert(gradients, 2).values())


@each_backend
@pytest.mark.parametrize("capacity", [0.0, 1.1], ids=["dropless", "capacity 1.1"])
def test_all_tokens_may_go_to_one_expert(backend, capacity):
    layer = prefer(make_layer(backend, router="switch", router_bias=True, capacity_factor=capacity), [-50, 50, -50, -50])
    x = tokens(11)
    y, stats, dx, gradients = backward(layer, x)
    np.testing.assert_allclose(y, oracle(layer, x, training=True)[0], rtol=1e-10, atol=1e-12)
    assert host(layer, stats.load).tolist() == [0, 1, 0, 0] and float(stats.entropy) == 0.0
    assert stats.aux_loss.item() == pytest.approx(4.0, rel=1e-12)
    assert float(stats.dropped) == pytest.approx((11 - 4) / 11 if capacity else 0.0, abs=1e-15)  # ceil(11 * 1.1 / 4) = 4 rows
    assert all(np.isfinite(gradient).all() for gradient in [dx, *gradients.values()])


# ---- K = E and E = 1 -------------------------------------------------------------------------------------------------------------------


@each_backend
@pytest.mark.parametrize("router", ["softmax_topk", "topk_softmax", "noisy_topk", "sigmoid_bias", "expert_choice"])
def test_with_as_many_choices_as_experts_every_expert_sees_every_token(backend, router):
    layer, x = make_layer(backend, router=router, n_experts=3, top_k=3), tokens(10)
    y, stats, dx, gradients = backward(layer, x)
    assert host(layer, stats.counts).tolist() == [10, 10, 10]
    np.testing.assert_allclose(y, oracle(layer, x, training=True)[0], rtol=1e-10, atol=1e-12)
    if router in ("softmax_topk", "sigmoid_bias"):
        assert stats.aux_loss.item() == pytest.approx(1.0, rel=1e-12)
    assert all(np.isfinite(gradient).all() for gradient in [dx, *gradients.values()])


@each_backend
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@each_router
def test_one_expert_equals_the_dense_layer(backend, router, activation):
    layer = make_layer(backend, router=router, n_experts=1, top_k=1, bias=True, activation=activation, aux_loss_coef=0.0, z_loss_coef=0.0)
    up, dense = "gate_up" if activation == "swiglu" else "up", mm.nn.FeedForward(D, H, activation, bias=True)
    dense.init(dtype="float64", backend=BACKENDS[backend])
    names = {f"experts.{up}_proj": f"{up}_proj.weight", f"experts.{up}_bias": f"{up}_proj.bias"}
    names |= {"experts.down_proj": "down_proj.weight", "experts.down_bias": "down_proj.bias"}
    dense.load_state_dict({theirs: weights_of(layer)[ours][0] for ours, theirs in names.items()})
    y, _, dx, gradients = backward(layer, tokens(9))
    x = mm.tensor(tokens(9), requires_grad=True, backend=BACKENDS[backend])
    expected = dense(x)
    (expected * mm.tensor(tokens(9, D, seed=8), backend=BACKENDS[backend])).sum().backward()
    np.testing.assert_allclose(y, expected.numpy(), rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(dx, host(layer, x.grad), rtol=1e-10, atol=1e-12)
    theirs = dict(dense.named_parameters())
    for ours, name in names.items():
        np.testing.assert_allclose(gradients[ours][0], host(layer, theirs[name].grad), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(gradients["router.weight"], 0.0, atol=1e-12)


# ---- ties and NaN ----------------------------------------------------------------------------------------------------------------------


@each_backend
@each_token_choice
def test_equal_logits_go_to_the_lowest_experts(backend, router):
    k = 1 if router == "switch" else 2
    layer, x = make_layer(backend, router=router, top_k=k), tokens(6)
    layer.load_state_dict({name: value * (not name.startswith("router.")) for name, value in weights_of(layer).items()})
    _, y, stats = run(layer, x)
    assert host(layer, stats.ids).tolist() == [list(range(k))] * 6
    assert host(layer, stats.counts).tolist() == [6] * k + [0] * (4 - k)
    np.testing.assert_allclose(y.numpy(), oracle(layer, x)[0], rtol=1e-10, atol=1e-12)
    if router != "noisy_topk":
        assert stats.aux_loss.item() == pytest.approx(1.0, rel=1e-12)


@each_backend
def test_equal_scores_of_expert_choice_go_to_the_first_tokens(backend):
    layer = make_layer(backend, router="expert_choice", top_k=1)
    layer.load_state_dict({name: value * (not name.startswith("router.")) for name, value in weights_of(layer).items()})
    _, _, stats = run(layer, tokens(8))
    assert host(layer, stats.ids).tolist() == [[0, 1, 2, 3]] * 2 + [[-1] * 4] * 6


@each_backend
@pytest.mark.parametrize("capacity", [0.0, 0.5], ids=["dropless", "capacity 0.5"])
@pytest.mark.parametrize("bad", [[2], [0, 1, 2, 3, 4, 5, 6]], ids=["one token", "every token"])
@each_router
def test_logits_of_nan_keep_ids_in_range_and_to_themselves(backend, router, bad, capacity):
    layer = make_layer(backend, router=router, capacity_factor=0.0 if router == "expert_choice" else capacity, drop_priority="probability")
    x = tokens(7)
    x[bad] = np.nan
    with np.errstate(invalid="ignore"):
        y, stats, _, _ = backward(layer, x)
    ids, counts = host(layer, stats.ids), host(layer, stats.counts)
    assert ids.min() >= (-1 if router == "expert_choice" else 0) and ids.max() < 4
    assert counts.min() >= 0 and counts.sum() == (ids >= 0).sum()
    assert all(len(set(row[row >= 0])) == (row >= 0).sum() for row in ids), "an expert is chosen twice"
    good = [n for n in range(7) if n not in bad]
    if capacity == 0.0:
        assert np.isfinite(y[good]).all()


@each_backend
def test_infinite_logits_leave_ids_in_range(backend):
    layer = prefer(make_layer(backend, router_bias=True), [0.0, -np.inf, 1.0, -np.inf])
    y, stats, dx, gradients = backward(layer, tokens(5))
    assert host(layer, stats.counts).tolist() == [5, 0, 5, 0]
    assert np.isfinite(y).all() and np.isfinite(dx).all() and np.isfinite(gradients["experts.down_proj"]).all()


# ---- padding ---------------------------------------------------------------------------------------------------------------------------


@each_backend
@each_router
def test_padding_is_neither_routed_nor_counted(backend, router):
    capacity = 0.0 if router == "expert_choice" else 1.1
    layer, valid, x = make_layer(backend, router=router, capacity_factor=capacity, bias=True), padding(14), tokens(14)
    other = np.where(valid[:, None], x, 30.0 * tokens(14, seed=9))
    y, stats, dx, gradients = backward(layer, x, valid)
    y2, stats2, dx2, gradients2 = backward(layer, other, valid)
    assert np.array_equal(y[~valid], np.zeros_like(y[~valid])) and np.array_equal(dx[~valid], np.zeros_like(dx[~valid]))
    assert np.array_equal(y, y2) and np.array_equal(dx, dx2), "what stands in padding changed another token"
    assert stats.loss.item() == stats2.loss.item() and host(layer, stats.counts).tolist() == host(layer, stats2.counts).tolist()
    for name in gradients:
        np.testing.assert_allclose(gradients[name], gradients2[name], rtol=1e-12, atol=1e-14, err_msg=name)


@each_router
def test_leaving_padding_away_changes_nothing(router):
    layer, valid, x = make_layer(router=router), padding(14), tokens(14)
    with_padding, without = run(layer, x, valid), run(layer, x[valid])
    np.testing.assert_allclose(with_padding[1].numpy()[valid], without[1].numpy(), rtol=1e-12, atol=1e-14)
    assert host(layer, with_padding[2].counts).tolist() == host(layer, without[2].counts).tolist()
    for name in ("aux_loss", "z_loss"):
        assert getattr(with_padding[2], name).item() == pytest.approx(getattr(without[2], name).item(), rel=1e-12)


@each_backend
@each_router
def test_padding_alone_gives_zeros_and_no_nan(backend, router):
    layer, valid = make_layer(backend, router=router), np.zeros(5, dtype=bool)
    y, stats, dx, gradients = backward(layer, tokens(5), valid)
    assert not y.any() and not dx.any() and not host(layer, stats.counts).any()
    assert stats.loss.item() == 0.0 and float(stats.dropped) == 0.0 and float(stats.entropy) == 0.0
    assert all(not gradient.any() for gradient in gradients.values())


# ---- drops -----------------------------------------------------------------------------------------------------------------------------


@each_backend
def test_a_token_whose_slots_are_all_dropped_adds_nothing(backend):
    layer = prefer(make_layer(backend, router_bias=True, capacity_factor=0.25, aux_loss_coef=0.0, z_loss_coef=0.0), [9, 8, -9, -9])
    y, stats, dx, gradients = backward(layer, tokens(16))
    kept = oracles.capacity(16, 2, 4, 0.25)
    assert kept == 2 and y[:kept].any(axis=1).all()
    assert not y[kept:].any() and not dx[kept:].any()
    assert float(stats.dropped) == pytest.approx(1 - 2 * kept / 32)
    assert all(np.isfinite(gradient).all() for gradient in gradients.values())


def test_the_residual_of_a_dropped_token_passes():
    moe = mm.MoEConfig(n_experts=4, router="switch", capacity_factor=0.01, router_bias=True)
    sizes = {"d_model": 8, "n_layers": 1, "n_heads": 2, "d_hidden": 6, "max_seq_len": 9, "vocab_size": 11}
    config = mm.ModelConfig(**sizes, position="none", head="none", moe=moe)
    model = mm.Transformer(config, seed=0, dtype="float64", backend=BACKENDS["numpy"])
    model.blocks[0].moe.router.bias.data[...] = [5.0, 0.0, 0.0, 0.0]
    model.blocks[0].attention.o_proj.weight.data[...] = 0.0
    ids = np.arange(9)[None]
    x = model.input.embed.weight.numpy()[ids[0]]
    y = model(ids, rng=mm.Rng(0)).numpy()[0]
    untouched = x / np.sqrt((x * x).mean(-1, keepdims=True) + config.norm_eps)  # embedding, then the final norm
    np.testing.assert_allclose(y[1:], untouched[1:], rtol=1e-12)
    assert np.abs(y[0] - untouched[0]).max() > 1e-6


def test_a_dropped_slot_leaves_the_other_weights_as_they_are():
    layer, x = make_layer(capacity_factor=0.5, n_shared_experts=1), tokens(12)
    _, facts = oracle(layer, x, training=True)
    half = [n for n in range(12) if (facts["weights"][n] > 0).sum() == 1]
    assert half, "no token lost just one of its slots"
    assert all(facts["weights"][n].sum() < 0.999 for n in half)
    np.testing.assert_allclose(run(layer, x, training=True)[1].numpy(), oracle(layer, x, training=True)[0], rtol=1e-10)


def test_shared_experts_see_every_token():
    layer, valid, x = make_layer(n_shared_experts=1), padding(8), tokens(8)
    y = run(layer, x, valid)[1].numpy()
    np.testing.assert_allclose(y[~valid], [oracles.shared_ffn(row, weights_of(layer), "swiglu") for row in x[~valid]], rtol=1e-10)


def test_no_token_at_all_gives_nothing_and_a_loss_of_zero():
    layer = mm.MoE(D, H, moe=mm.MoEConfig(n_experts=4))
    y, stats = layer(mm.tensor(np.zeros((0, D), np.float32)))
    assert y.shape == (0, D) and stats.loss.item() == 0.0


def test_sigmoids_that_all_round_to_zero_leave_loss_and_gradient_finite():
    layer = mm.MoE(D, H, moe=mm.MoEConfig(n_experts=4, router="sigmoid_bias"))
    layer.router.weight.data[...] = -200.0
    x = mm.tensor(np.ones((3, D), np.float32), requires_grad=True)
    y, stats = layer(x)
    (y.sum() + stats.loss).backward()
    assert np.isfinite(stats.loss.item()) and np.isfinite(x.grad).all()
