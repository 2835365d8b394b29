"""Models that compute in bfloat16 beside float32 parameters: what has which dtype, and that they learn as float32 ones do."""

import numpy as np
import pytest
from ptx_machine.arrays import BFLOAT16, HostArrays
from ptx_machine.cupy_on_ptx import CupyOnPtx
from tiny_models import batch

import minimoe as mm
from minimoe.errors import ConfigError
from minimoe.reference.expert import ExpertWeights

REFERENCES = HostArrays()
SMALL = {"d_model": 16, "n_layers": 2, "n_heads": 4, "d_hidden": 24, "max_seq_len": 12, "vocab_size": 19}
CONFIGS = {
    "dense": mm.ModelConfig(**SMALL),
    "tied, layer norm, gelu, learned, biases": mm.ModelConfig(
        **SMALL, tie_embeddings=True, norm="layer", activation="gelu", position="learned", bias=True, attention_bias=True
    ),
    "experts": mm.ModelConfig(**SMALL, n_kv_heads=2, moe=mm.MoEConfig(n_experts=4, top_k=2, d_hidden=12, layers=(1,))),
    "sigmoid_bias, shared": mm.ModelConfig(**SMALL, moe=mm.MoEConfig(n_experts=4, top_k=2, router="sigmoid_bias", n_shared_experts=1)),
    "noisy_topk, normalised heads": mm.ModelConfig(**SMALL, qk_norm="head", moe=mm.MoEConfig(n_experts=4, top_k=2, router="noisy_topk")),
}


def losses(config, dtype, steps=20):
    """The loss before each step of AdamW, and the model."""
    model = mm.Transformer(config, seed=0, dtype=dtype, backend=REFERENCES)
    optimizer = mm.optim.AdamW(model.parameters(), lr=3e-3)
    found = []
    for step in range(steps):
        tokens = batch(step)
        parts = model.loss(tokens[:, :-1], tokens[:, 1:], rng=mm.Rng(0, step, 0))
        parts.total.backward()
        assert parts.total.dtype == np.float32
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(parts.cross_entropy.item()))
    return np.array(found), model


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_model_in_bfloat16_learns_as_in_float32(config):
    (narrow, _), (wide, _) = losses(config, "bfloat16"), losses(config, "float32")
    assert wide[-1] < wide[0] - 0.05 and np.abs(narrow - wide).max() < 0.03
    assert not np.array_equal(narrow, wide)


def test_parameters_gradients_and_moments_are_float32_and_activations_bfloat16():
    model = mm.Transformer(CONFIGS["experts"], seed=0, dtype="bfloat16", backend=REFERENCES)
    optimizer = mm.optim.AdamW(model.parameters(), lr=3e-3)
    tokens = batch(0)
    hidden, _ = model.hidden(tokens)
    assert hidden.dtype == BFLOAT16 and model(tokens[:, :12]).dtype == BFLOAT16
    model.loss(tokens[:, :-1], tokens[:, 1:]).total.backward()
    optimizer.step()
    kept = [*model.state_dict().values(), *(p.grad for p in model.parameters()), *optimizer.groups[0].states.values()]
    assert {array.dtype for array in kept} == {np.dtype(np.float32)}


def test_gradients_are_added_up_in_float32():
    model = mm.Transformer(CONFIGS["dense"], seed=0, dtype="bfloat16", backend=REFERENCES)
    mm.optim.AdamW(model.parameters())
    tokens, weight = batch(0), model.blocks[0].ffn.down_proj.weight
    model.loss(tokens[:, :-1], tokens[:, 1:]).total.backward()
    once = weight.grad.copy()
    model.loss(tokens[:, :-1], tokens[:, 1:]).total.backward()
    assert np.array_equal(weight.grad, once + once) and np.any(once)


# ---- what is added up in float32 has not been rounded before ---------------------------------------------------------------------------

BACKENDS = {"references": REFERENCES, "cupy": CupyOnPtx()}
each_backend = pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
MICRO_BATCHES = 24


def drawn(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(BFLOAT16)


def wide(*arrays):
    return [array.astype(np.float64) for array in arrays]


def linear_dw(b, seed, out):
    dy, x = drawn([seed, 0], 9, 16), drawn([seed, 1], 9, 24)
    b.linear_dw(dy, x, out, True)
    dy, x = wide(dy, x)
    return dy.T @ x


def linear_db(b, seed, out):
    dy = drawn(seed, 9, 16)
    b.linear_db(dy, out, True)
    return wide(dy)[0].sum(0)


def grouped_matmul_dw(b, seed, out):
    dy, x = drawn([seed, 0], 11, 16), drawn([seed, 1], 11, 24)
    b.grouped_matmul_dw(dy, x, np.array([0, 4, 4, 9], np.int32), out, True)
    dy, x = wide(dy, x)
    return np.stack([dy[:4].T @ x[:4], np.zeros((16, 24)), dy[4:9].T @ x[4:9]])


def embedding_backward(b, seed, out):
    dy, ids = drawn(seed, 7, 16), np.array([1, 0, 1, 3, 1, 0, 4], np.int32)
    b.embedding_backward(dy, ids, 5, None, out, True)
    return np.stack([wide(dy)[0][ids == i].sum(0) for i in range(5)])


def linear_cross_entropy_backward(b, seed, out):
    """Compared with the same products in float64: what the backend saved has the roundings of the forward pass."""
    x, weight = drawn([seed, 0], 9, 16), drawn([seed, 1], 24, 16)
    targets = np.arange(9, dtype=np.int32)
    _, saved = b.linear_cross_entropy(x, weight, targets)
    one = np.ones((), np.float32)
    if hasattr(saved, "dlogits"):
        dlogits = saved.dlogits
    else:
        dlogits = b.cross_entropy_backward(one, saved.logits, targets, saved.logsumexp)
    dlogits, wide_x = wide(dlogits.copy(), x)
    b.linear_cross_entropy_backward(one, saved, out=out, accumulate=True)
    return dlogits.T @ wide_x


SUMS = {
    linear_dw: (16, 24), linear_db: (16,), grouped_matmul_dw: (3, 16, 24), embedding_backward: (5, 16),
    linear_cross_entropy_backward: (24, 16),
}  # fmt: skip


@each_backend
@pytest.mark.parametrize("add", SUMS, ids=lambda add: add.__name__)
def test_a_weights_gradient_over_many_micro_batches_is_exact_to_float32(backend, add):
    """Rounded to bfloat16 in each micro-batch, it would be wrong by about 2^-9 of a part: hundreds of times more than this allows."""
    total, wanted = np.zeros(SUMS[add], np.float32), np.zeros(SUMS[add])
    for seed in range(MICRO_BATCHES):
        wanted += add(backend, seed, total)
    assert np.abs(total - wanted).max() <= 3e-6 * np.abs(wanted).max()


def composites(b, seed, out, bias):
    """The gradients of an expert layer's weights, and the same products in float64 from what was saved."""
    x, dy = drawn([seed, 0], 10, 16), drawn([seed, 1], 10, 16)
    weights = ExpertWeights(drawn(7, 2, 24, 16), drawn(8, 2, 16, 12), *((drawn(9, 2, 24), drawn(10, 2, 16)) if bias else ()))
    offsets = np.array([0, 6, 10], np.int32)
    _, saved = b.expert_ffn(x, weights, offsets, "swiglu")
    b.expert_ffn_backward(dy, saved, "swiglu", out=out, accumulate=True)
    dpre = b.activate_backward(b.grouped_matmul(dy, weights.down, offsets, transpose=True), saved.pre_activation, "swiglu")
    dy, hidden, dpre, x = wide(dy, saved.hidden, dpre, x)
    parts = [slice(0, 6), slice(6, 10)]
    return [
        np.stack(sums)
        for sums in (
            [dpre[part].T @ x[part] for part in parts],
            [dy[part].T @ hidden[part] for part in parts],
            [dpre[part].sum(0) for part in parts],
            [dy[part].sum(0) for part in parts],
        )
    ]


@pytest.mark.parametrize("bias", [False, True])
def test_gradients_of_experts_over_many_micro_batches_are_exact_to_float32(bias):
    shapes = [(2, 24, 16), (2, 16, 12), (2, 24), (2, 16)][: 4 if bias else 2]
    out, wanted = ExpertWeights(*(np.zeros(shape, np.float32) for shape in shapes)), [0.0] * 4
    for seed in range(MICRO_BATCHES):
        wanted = [a + b for a, b in zip(wanted, composites(REFERENCES, seed, out, bias), strict=True)]
    for ours, theirs in zip(out[: len(shapes)], wanted, strict=False):
        assert np.abs(ours - theirs).max() <= 3e-6 * np.abs(theirs).max()


@each_backend
@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("owned", [True, False], ids=["optimizer", "no optimizer"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_no_gradient_of_a_model_is_rounded_to_bfloat16(config, owned, micro_batches, backend):
    """A number in bfloat16 ends in 16 zeros; few sums in float32 do, most of them in a bias of keys, whose true gradient is zero."""
    model = mm.Transformer(config, seed=0, dtype="bfloat16", backend=backend)
    if owned:
        optimizer = mm.optim.AdamW(model.parameters())
        optimizer.zero_grad()
    tokens = batch(0)
    for _ in range(micro_batches):
        model.loss(tokens[:, :-1], tokens[:, 1:], rng=mm.Rng(0, 0, 0)).total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == np.float32
        changed = parameter.grad[parameter.grad != 0].view(np.uint32)
        if parameter.role != "embedding":  # a token that occurs once has its row of dy, which is an activation's
            assert np.count_nonzero(changed & 0xFFFF) >= 0.5 * changed.size > 0, name


def test_a_rounded_copy_of_a_parameter_passes_its_gradient_on_in_float32():
    leaf = mm.tensor(np.ones((3, 4)), requires_grad=True, dtype="float32", backend=REFERENCES)
    x = mm.tensor(drawn(0, 5, 4), backend=REFERENCES)
    copy = leaf.astype("bfloat16")
    y = mm.ops.linear(x, copy)
    assert copy.dtype == BFLOAT16 and copy.requires_grad and copy.grad is None and leaf.grad is None
    y.sum().backward()
    assert leaf.grad.dtype == np.float32 and np.allclose(leaf.grad, wide(x.data)[0].sum(0), rtol=1e-6)
    assert copy.grad is None
    leaf.astype("bfloat16").backward(np.ones((3, 4), BFLOAT16))
    assert np.allclose(leaf.grad, wide(x.data)[0].sum(0) + 1.0, rtol=1e-6)
    with mm.no_grad():
        assert not leaf.astype("bfloat16").requires_grad


def test_generation_with_a_cache_equals_the_whole_forward_pass():
    model = mm.Transformer(CONFIGS["experts"], seed=0, dtype="bfloat16", backend=REFERENCES)
    tokens = batch(0)[:1, :6]
    cache = mm.Cache(model, batch=1)
    assert cache.layers[0].k.dtype == BFLOAT16
    parts = [model(tokens[:, i : i + 1], cache=cache).numpy() for i in range(6)]
    assert np.allclose(np.concatenate(parts, axis=1).astype(np.float32), model(tokens).numpy().astype(np.float32), atol=0.02)


@pytest.mark.parametrize(
    "dtype, words", [("float16", "models compute in float32, float64, bfloat16"), ("bfloat16", "numpy has no bfloat16")]
)
def test_what_a_backend_cannot_compute_in_is_refused(dtype, words):
    with pytest.raises(ConfigError, match=words):
        mm.Transformer(CONFIGS["dense"], dtype=dtype, backend=mm.backend.load("numpy"))
