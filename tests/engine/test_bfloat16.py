"""Models that compute in bfloat16 beside float32 parameters: what has which dtype, and that they learn as float32 ones do."""

import numpy as np
import pytest
from ptx_machine.arrays import BFLOAT16, HostArrays
from tiny_models import batch

import minimoe as mm
from minimoe.errors import ConfigError

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
