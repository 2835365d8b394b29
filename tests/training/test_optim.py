"""Optimizers against plain restatements of their formulas: which parameters decay, skipped steps, schedules, accumulation."""

import math

import numpy as np
import pytest
from routed_layers import BACKENDS

import minimoe as mm
from minimoe import optim
from minimoe.errors import CheckpointError, ConfigError
from minimoe.optim import learning_rate, make_optimizer
from minimoe_numpy import NumpyBackend

STEPS = 10
LR, DECAY = 0.05, 0.2
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_optimizer = pytest.mark.parametrize("name", ["adamw", "sgd", "lion", "muon"])
SHAPES = {"matrix": (6, 4), "experts": (3, 4, 5), "wide": (2, 9), "vector": (5,), "one": (1, 1)}


def model_of(backend="numpy", dtype="float64", **changes):
    moe = mm.MoEConfig(n_experts=3, top_k=2, d_hidden=6, layers=(1,), router_bias=True)
    sizes = {"d_model": 8, "n_layers": 2, "n_heads": 2, "d_hidden": 10, "max_seq_len": 9, "vocab_size": 11}
    config = mm.ModelConfig(
        **{**sizes, "bias": True, "norm": "layer", "attention_bias": True, "position": "learned", "moe": moe, **changes}
    )
    return mm.Transformer(config, seed=0, dtype=dtype, backend=BACKENDS[backend])


def batch_of(n=4, seed=0):
    ids = np.random.default_rng(seed).integers(0, 11, (n, 10))
    return ids[:, :-1], ids[:, 1:]


def leaves_of(backend="numpy"):
    """Plain tensors: what has two axes or more counts as a matrix."""
    rng = np.random.default_rng(1)
    return {name: mm.tensor(rng.standard_normal(shape), requires_grad=True, backend=BACKENDS[backend]) for name, shape in SHAPES.items()}


def gradients(step):
    rng = np.random.default_rng([2, step])
    return {name: rng.standard_normal(shape) for name, shape in SHAPES.items()}


def host(tensor):
    return np.array(tensor.backend.to_host(tensor.data))


# ---- the formulas ----------------------------------------------------------------------------------------------------------------------


def adamw(w, state, g, t, decay, b1=0.9, b2=0.99, eps=1e-8):
    m = state["m"] = b1 * state.get("m", 0) + (1 - b1) * g
    v = state["v"] = b2 * state.get("v", 0) + (1 - b2) * g**2
    return w - LR * decay * w - LR * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)


def sgd(w, state, g, t, decay):
    m = state["m"] = 0.9 * state.get("m", 0) + g
    return w - LR * decay * w - LR * m


def lion(w, state, g, t, decay):
    m = state.get("m", np.zeros_like(g))
    state["m"] = 0.99 * m + 0.01 * g
    return w - LR * decay * w - LR * np.sign(0.9 * m + 0.1 * g)


def muon(w, state, g, t, decay):
    """A matrix at a time, as Jordan's own code has it, with the update's size of Liu et al. (2025)."""
    if w.ndim < 2:
        return adamw(w, state, g, t, decay)
    m = state["m"] = 0.95 * state.get("m", 0) + g
    update = np.array([newton_schulz(x) for x in (g + 0.95 * m).reshape(-1, *w.shape[-2:])]).reshape(w.shape)
    return w - LR * decay * w - LR * 0.2 * math.sqrt(max(w.shape[-2:])) * update


def newton_schulz(g, steps=5):
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.T if g.shape[0] > g.shape[1] else g
    x = x / (np.linalg.norm(x) + 1e-7)
    for _ in range(steps):
        A = x @ x.T
        x = a * x + (b * A + c * A @ A) @ x
    return x.T if g.shape[0] > g.shape[1] else x


RULES = {"adamw": adamw, "sgd": sgd, "lion": lion, "muon": muon}


def make(name, parameters, **options):
    kinds = {"adamw": optim.AdamW, "sgd": optim.SGD, "lion": optim.Lion, "muon": optim.Muon}
    return kinds[name](parameters, lr=LR, weight_decay=DECAY, **options)


def set_gradients(leaves, values, scale=1.0):
    for name, leaf in leaves.items():
        leaf.grad[...] = leaf.backend.from_host(values[name] * scale)


@each_backend
@each_optimizer
def test_ten_steps_follow_the_formula(name, backend):
    leaves, states = leaves_of(backend), {key: {} for key in SHAPES}
    expected = {key: host(leaf) for key, leaf in leaves.items()}
    optimizer = make(name, leaves.values())
    for step in range(STEPS):
        values = gradients(step)
        set_gradients(leaves, values, 4.0)
        optimizer.step(scale=optimizer.backend.from_host(np.array(0.25)))
        for key, shape in SHAPES.items():
            decay = DECAY if len(shape) > 1 else 0.0
            expected[key] = RULES[name](expected[key], states[key], values[key], step + 1, decay)
    for key, leaf in leaves.items():
        np.testing.assert_allclose(host(leaf), expected[key], rtol=1e-10, atol=1e-12, err_msg=key)


# ---- flat buffers ----------------------------------------------------------------------------------------------------------------------

ODD = {"three": (3,), "five": (5,), "matrix": (3, 5), "experts": (3, 5, 1), "even": (4,), "one": (1, 1)}
ALIGNED = type("Aligned", (NumpyBackend,), {"alignment": 16})()


def odd_leaves(backend, dtype):
    rng = np.random.default_rng(3)
    return {
        name: mm.tensor(rng.standard_normal(shape).astype(dtype), requires_grad=True, backend=backend, dtype=dtype)
        for name, shape in ODD.items()
    }


def trained(name, backend, dtype, steps=4, state=None):
    """-> the leaves after some steps, their optimizer, its norms"""
    leaves = odd_leaves(backend, dtype)
    optimizer, norms = make(name, leaves.values()), []
    if state is not None:
        optimizer.load_state_dict(state)
    for step in range(steps):
        rng = np.random.default_rng([4, step])
        optimizer.zero_grad()
        for leaf in leaves.values():
            leaf.grad[...] = rng.standard_normal(leaf.shape)
        norms.append(float(optimizer.grad_norm()))
        optimizer.step()
    return leaves, optimizer, norms


@each_optimizer
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_parameters_of_odd_sizes_begin_at_multiples_of_16_bytes(name, dtype):
    leaves, optimizer, _ = trained(name, ALIGNED, dtype)
    for leaf in leaves.values():
        assert leaf.data.ctypes.data % 16 == leaf.grad.ctypes.data % 16 == 0
    for group in optimizer.groups:
        between = np.ones(group.param.size, bool)
        for part in group.slices:
            assert part.start * group.param.itemsize % 16 == 0
            between[part] = False
        assert between.any() or len(group.slices) == 1
        for buffer in (group.param, group.grad, *group.states.values()):
            assert buffer.ctypes.data % 16 == 0 and not buffer[between].any()


@each_optimizer
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_what_lies_between_parameters_changes_no_result_and_is_in_no_file(name, dtype):
    (ours, aligned, norms), (theirs, packed, expected) = (trained(name, backend, dtype) for backend in (ALIGNED, BACKENDS["numpy"]))
    assert norms == pytest.approx(expected, rel=1e-6)
    for key in ODD:
        assert np.array_equal(ours[key].data, theirs[key].data)
    left, right = aligned.state_dict(), packed.state_dict()
    assert left.keys() == right.keys()
    for key, array in left.items():
        assert np.array_equal(array, right[key]) and array.dtype == right[key].dtype
    for backend in (ALIGNED, BACKENDS["numpy"]):  # what either saved is resumed by either
        (from_left, *_), (from_right, *_) = (trained(name, backend, dtype, state=state) for state in (left, right))
        assert all(np.array_equal(from_left[key].data, from_right[key].data) for key in ODD)
    with pytest.raises(CheckpointError, match="does not fit"):
        aligned.load_state_dict({key: np.zeros(array.size + 3, array.dtype) if array.ndim else array for key, array in left.items()})


def test_muon_gives_every_expert_its_own_singular_values_near_one():
    b = BACKENDS["numpy"]
    experts = np.random.default_rng(0).standard_normal((4, 6, 9)) * np.array([1e-3, 1.0, 30.0, 1e4])[:, None, None]
    values = np.linalg.svd(b.orthogonal(experts), compute_uv=False)
    assert values.min() > 0.5 and values.max() < 1.3


# ---- what decays -----------------------------------------------------------------------------------------------------------------------


def shrunk(model, optimizer):
    """The names of what a step with gradients of zero makes smaller."""
    for parameter in model.parameters():
        parameter.data[...] = 1.0
    optimizer.zero_grad()
    optimizer.step()
    return {name for name, parameter in model.named_parameters() if not np.array_equal(host(parameter), np.ones(parameter.shape))}


@each_optimizer
def test_decay_spares_norms_biases_and_embeddings(name):
    model = model_of()
    decayed = shrunk(model, make(name, model.parameters()))
    names = {key for key, _ in model.named_parameters()}
    spared = {key for key in names if "norm" in key or key.endswith("bias") or key.startswith(("embed.", "positions."))}
    assert "blocks.1.moe.router.weight" in decayed and "head.weight" in decayed and "blocks.1.moe.experts.down_proj" in decayed
    assert decayed == names - spared


@each_optimizer
def test_embeddings_decay_if_asked(name):
    model = model_of()
    decayed = shrunk(model, make(name, model.parameters(), decay_embeddings=True))
    assert {"embed.weight", "positions.weight"} <= decayed
    assert not any("norm" in key or key.endswith("bias") for key in decayed)


def test_a_tied_embedding_is_one_parameter_and_decays_as_an_embedding():
    model = model_of(tie_embeddings=True)
    assert "head.weight" not in dict(model.named_parameters())
    assert "embed.weight" not in shrunk(model, make("adamw", model.parameters()))


def test_muon_leaves_embeddings_head_and_vectors_to_adamw():
    model = model_of()
    optimizer = make("muon", model.parameters())
    of = {id(p): "adamw" if "v" in group.states else "muon" for group in optimizer.groups for p in group.parameters}
    by_name = {key: of[id(p)] for key, p in model.named_parameters()}
    assert by_name["embed.weight"] == by_name["head.weight"] == by_name["norm.weight"] == by_name["blocks.1.moe.router.bias"] == "adamw"
    assert by_name["blocks.0.ffn.down_proj.weight"] == by_name["blocks.1.moe.experts.gate_up_proj"] == "muon"


# ---- one step more or less -------------------------------------------------------------------------------------------------------------


@each_backend
@each_optimizer
@pytest.mark.parametrize("bad", [1.0, np.nan, np.inf])
def test_a_skipped_step_changes_nothing(name, bad, backend):
    leaves = leaves_of(backend)
    optimizer = make(name, leaves.values())
    set_gradients(leaves, gradients(0))
    optimizer.step()
    b = optimizer.backend
    before = {key: host(leaf) for key, leaf in leaves.items()}, {key: np.array(b.to_host(a)) for key, a in optimizer.state_dict().items()}
    set_gradients(leaves, gradients(1), bad)
    with np.errstate(invalid="ignore"):
        optimizer.step(scale=b.from_host(np.array(bad)), ok=b.from_host(np.array(False)))
    for key, leaf in leaves.items():
        assert np.array_equal(host(leaf), before[0][key]), key
    for key, array in optimizer.state_dict().items():
        assert np.array_equal(b.to_host(array), before[1][key]), key


def test_a_skipped_step_does_not_count():
    paths = []
    for skip in (False, True):
        leaves = leaves_of()
        optimizer = make("adamw", leaves.values())
        for step in range(3):
            if skip and step == 1:
                set_gradients(leaves, gradients(9), np.nan)
                optimizer.step(ok=np.array(False))
            set_gradients(leaves, gradients(step))
            optimizer.step()
        paths.append({key: host(leaf) for key, leaf in leaves.items()})
    assert all(np.array_equal(paths[0][key], paths[1][key]) for key in SHAPES)


@each_optimizer
def test_gradients_and_parameters_keep_their_addresses(name):
    model = model_of()
    optimizer = make(name, model.parameters())
    addresses = {key: (p.data.ctypes.data, p.grad.ctypes.data) for key, p in model.named_parameters()}
    for step in range(3):
        model.loss(*batch_of(seed=step)).total.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert addresses == {key: (p.data.ctypes.data, p.grad.ctypes.data) for key, p in model.named_parameters()}
    model.load_state_dict(model_of().state_dict())
    assert addresses == {key: (p.data.ctypes.data, p.grad.ctypes.data) for key, p in model.named_parameters()}


def test_one_flat_buffer_a_group_holds_everything():
    model = model_of()
    optimizer = make("adamw", model.parameters())
    assert sum(group.param.size for group in optimizer.groups) == sum(p.size for p in model.parameters())
    for group in optimizer.groups:
        for p in group.parameters:
            assert np.shares_memory(p.data, group.param) and np.shares_memory(p.grad, group.grad)


def test_gradients_that_were_there_before_the_optimizer_are_kept():
    model = model_of()
    model.loss(*batch_of()).total.backward()
    before = {key: np.array(p.grad) for key, p in model.named_parameters()}
    make("adamw", model.parameters())
    assert all(np.array_equal(p.grad, before[key]) for key, p in model.named_parameters())


@each_backend
def test_the_gradient_norm_is_over_all_parameters_and_clips(backend):
    leaves = leaves_of(backend)
    optimizer = make("sgd", leaves.values())
    set_gradients(leaves, gradients(0))
    norm = float(optimizer.grad_norm())
    assert norm == pytest.approx(math.sqrt(sum((g**2).sum() for g in gradients(0).values())), rel=1e-12)
    assert float(optimizer.clip_scale(optimizer.grad_norm(), 1.0)) == pytest.approx(1.0 / norm, rel=1e-6)
    assert float(optimizer.clip_scale(optimizer.grad_norm(), 2 * norm)) == 1.0 == float(optimizer.clip_scale(optimizer.grad_norm(), 0.0))


@each_optimizer
def test_an_optimizer_that_takes_over_the_state_goes_on_to_the_same_bytes(name):
    leaves = leaves_of()
    optimizer = make(name, leaves.values())
    for step in range(5):
        if step == 3:
            saved = {key: np.array(a) for key, a in optimizer.state_dict().items()}, {key: host(leaf) for key, leaf in leaves.items()}
        set_gradients(leaves, gradients(step))
        optimizer.step()
    again = {key: mm.tensor(array, requires_grad=True, backend=BACKENDS["numpy"]) for key, array in saved[1].items()}
    other = make(name, again.values())
    other.load_state_dict(saved[0])
    for step in (3, 4):
        set_gradients(again, gradients(step))
        other.step()
    assert all(host(again[key]).tobytes() == host(leaf).tobytes() for key, leaf in leaves.items())


def test_a_state_of_another_optimizer_is_refused():
    leaves = leaves_of()
    state = make("adamw", leaves.values()).state_dict()
    with pytest.raises(CheckpointError, match="does not fit"):
        make("sgd", leaves_of().values()).load_state_dict(state)
    with pytest.raises(ConfigError, match="at least one parameter"):
        optim.AdamW([], lr=LR)


# ---- a table's optimizer, and schedules ------------------------------------------------------------------------------------------------


@each_optimizer
def test_the_configuration_names_the_optimizer(name):
    train = mm.TrainConfig(optimizer=name, lr=0.3, weight_decay=0.4, beta1=0.8, beta2=0.7, eps=1e-5, momentum=0.6, decay_embeddings=True)
    model = model_of()
    made = make_optimizer(model.parameters(), train)
    assert type(made) is {"adamw": optim.AdamW, "sgd": optim.SGD, "lion": optim.Lion, "muon": optim.Muon}[name]
    assert (made.lr, made.weight_decay) == (0.3, 0.4)
    assert getattr(made, "betas", (0.8, 0.7)) == (0.8, 0.7) and getattr(made, "eps", 1e-5) == 1e-5 and getattr(made, "momentum", 0.6) == 0.6
    assert "embed.weight" in shrunk(model, made)


@pytest.mark.parametrize("schedule, middle, end", [("cosine", 0.55, 0.1), ("linear", 0.55, 0.1), ("constant", 1.0, 1.0)])
def test_a_schedule_warms_up_and_comes_down(schedule, middle, end):
    train = mm.TrainConfig(steps=110, warmup_steps=10, lr=1.0, min_lr=0.1, schedule=schedule)
    assert [learning_rate(step, train) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert learning_rate(10, train) == pytest.approx(1.0)
    assert learning_rate(60, train) == pytest.approx(middle)
    assert learning_rate(110, train) == pytest.approx(end) == learning_rate(500, train)
    rates = [learning_rate(step, train) for step in range(10, 111)]
    assert all(a >= b for a, b in zip(rates, rates[1:], strict=False))


def test_a_quarter_of_the_cosine_lies_above_the_line():
    rate = {
        name: learning_rate(25, mm.TrainConfig(steps=100, warmup_steps=0, lr=1.0, min_lr=0.0, schedule=name))
        for name in ("cosine", "linear")
    }
    assert rate == pytest.approx({"cosine": 0.5 * (1 + math.cos(math.pi / 4)), "linear": 0.75})


@pytest.mark.parametrize("steps, warmup", [(1, 0), (1, 1), (1, 5), (5, 5)])
def test_short_runs_have_a_rate_above_zero(steps, warmup):
    train = mm.TrainConfig(steps=steps, warmup_steps=warmup, lr=1.0, min_lr=0.1)
    assert all(0.0 < learning_rate(step, train) <= 1.0 for step in range(steps))


# ---- whole models ----------------------------------------------------------------------------------------------------------------------


def gradients_of(model):
    return {name: np.array(p.backend.to_host(p.grad)) for name, p in model.named_parameters()}


@each_backend
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_recomputation_gives_equal_gradients(backend, training):
    moe = mm.MoEConfig(n_experts=3, top_k=2, d_hidden=6, jitter=0.2, noise_std=0.3, capacity_factor=1.0)
    rng = mm.Rng(5, 2, 1) if training else None
    results = []
    for recompute in (False, True):
        model = model_of(backend, moe=moe, dropout=0.2, attention_dropout=0.1)
        parts = model.loss(*batch_of(), rng=rng, recompute_blocks=recompute)
        parts.total.backward()
        results.append((parts.total.item(), gradients_of(model)))
    (plain, expected), (again, got) = results
    assert plain == again
    for name in expected:
        assert np.array_equal(got[name], expected[name]), name


@each_backend
def test_gradients_of_micro_batches_add_up_to_those_of_the_batch(backend):
    dense = {"moe": None}
    whole, parts = model_of(backend, **dense), model_of(backend, **dense)
    optimizer = make("adamw", parts.parameters())  # its gradients start at zero and are added to in place
    tokens, targets = batch_of(4)
    whole.loss(tokens, targets).total.backward()
    for half in (slice(0, 2), slice(2, 4)):
        loss = parts.loss(tokens[half], targets[half]).total
        loss.backward(loss.backend.from_host(np.array(0.5)))
    for name, gradient in gradients_of(whole).items():
        np.testing.assert_allclose(gradients_of(parts)[name], gradient, rtol=1e-9, atol=1e-13, err_msg=name)
    optimizer.zero_grad()
    assert not any(gradient.any() for gradient in gradients_of(parts).values())


@each_optimizer
def test_every_optimizer_learns(name):
    model = model_of(dtype="float32")
    lr = {"adamw": 1e-2, "sgd": 0.1, "lion": 2e-3, "muon": 1e-2}[name]
    optimizer = make_optimizer(model.parameters(), mm.TrainConfig(optimizer=name, lr=lr))
    losses = []
    for _ in range(40):
        parts = model.loss(*batch_of())
        parts.total.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(parts.cross_entropy.item())
    assert losses[-1] < losses[0] - 0.3
