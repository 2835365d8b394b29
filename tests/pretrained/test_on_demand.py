"""Weights read on demand: what is in memory, what a bound evicts, and that neither changes a number."""

import numpy as np
import pytest
from tiny_runs import tiny, train, write_text

import minimoe as mm
from minimoe.config import ModelConfig, MoEConfig
from minimoe.errors import ConfigError, UserError
from minimoe.pretrained.on_demand import WeightCache
from minimoe.pretrained.opening import open_folder

SHAPE = {"d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_hidden": 1024, "max_seq_len": 32, "vocab_size": 40}
TOKENS = np.random.default_rng(0).integers(0, 40, (2, 9))


def routed(**moe):
    return ModelConfig(**SHAPE, moe=MoEConfig(**{"n_experts": 6, "top_k": 1, "norm_topk_prob": False, **moe}), qk_norm="full")


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def folder(request, tmp_path_factory):
    """An OLMoE whose experts are larger than a page."""
    path = tmp_path_factory.mktemp("folder") / "model"
    mm.Transformer(routed(), seed=3).save_pretrained(path, request.param)
    return path


def test_nothing_is_read_by_opening(folder):
    model = open_folder(folder)
    assert model.file_weights.cache.used == 0
    assert not model.resident
    assert all(layer.sources[0].memory is None for layer in model.file_weights.experts)


def test_only_experts_that_a_token_was_routed_to_are_read(folder):
    model = open_folder(folder)
    with mm.no_grad():
        model(TOKENS[:1, :2])
    for layer, rows in zip(model.file_weights.experts, model.expert_rows, strict=True):
        assert layer.resident.sum() <= 2
        assert (layer.resident == (rows > 0)).all()
        assert rows.sum() == 2
        unread = layer.sources[0].stack[~layer.resident]
        assert not unread.any()


def test_a_gradient_reaches_a_weight_that_was_read_on_demand(folder):
    model = open_folder(folder)
    whole = open_folder(folder)
    whole.file_weights.read_all()
    for m in (model, whole):
        m.loss(TOKENS, TOKENS).total.backward()
    for (name, a), (_, b) in zip(model.named_parameters(), whole.named_parameters(), strict=True):
        np.testing.assert_array_equal(a.grad, b.grad, err_msg=name)
    assert whole.resident


def test_state_dict_gives_all_experts(folder):
    model, whole = open_folder(folder), open_folder(folder)
    with mm.no_grad():
        model(TOKENS[:1, :2])
    whole.file_weights.read_all()
    for name, array in model.state_dict().items():
        np.testing.assert_array_equal(array, whole.state_dict()[name], err_msg=name)
        assert array.any()


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_a_bound_evicts_experts_and_changes_no_output(folder, backend):
    b = mm.backend.load(backend)
    free = open_folder(folder, backend=b)
    least = sum(s.size for s in free.file_weights.dense) + max(s.expert_size * s.experts for s in free.file_weights.experts)
    bound = open_folder(folder, backend=b, max_memory=least)
    rng = np.random.default_rng(1)
    evicted = 0
    with mm.no_grad():
        for _ in range(12):
            tokens = rng.integers(0, 40, (1, 3))
            np.testing.assert_array_equal(bound(tokens).numpy(), free(tokens).numpy())
            assert bound.file_weights.cache.used <= least
            pairs = zip(bound.file_weights.experts, bound.expert_rows, strict=True)
            evicted = max(evicted, sum(int(((np.asarray(rows) > 0) & ~layer.resident).sum()) for layer, rows in pairs))
    assert evicted > 0
    assert not bound.resident


def test_the_least_recently_used_is_evicted_first():
    gone = []
    cache = WeightCache(budget=10)
    for name in "abc":
        cache.insert(name, 3, lambda name=name: gone.append(name))
    cache.mark_used("a")
    with mm.no_grad():
        cache.insert("d", 4, lambda: None)
    assert gone == ["b"]
    assert cache.used == 10
    cache.insert("e", 4, lambda: None)  # where gradients are wanted nothing may go
    assert gone == ["b"]


def test_too_small_a_bound_says_what_is_needed(folder):
    with pytest.raises(ConfigError, match=r"max_memory = 0\.0 MB is too little: .* need \d+\.\d MB"):
        open_folder(folder, max_memory=1000)


def test_a_bound_is_for_model_folders(tmp_path):
    with pytest.raises(UserError, match="max_memory bounds what is read of a model folder"):
        mm.load(tmp_path, max_memory=10)


def test_a_loaded_model_trains(folder):
    model = open_folder(folder)
    optimizer = mm.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        parts = model.loss(TOKENS, TOKENS)
        parts.total.backward()
        optimizer.step()
        losses.append(parts.cross_entropy.item())
    assert losses[-1] < losses[0]


def test_outputs_equal_those_of_a_model_that_was_never_in_a_file(tmp_path):
    made = mm.Transformer(routed(top_k=2), seed=5)
    made.save_pretrained(tmp_path / "model")
    with mm.no_grad():
        np.testing.assert_array_equal(open_folder(tmp_path / "model")(TOKENS).numpy(), made(TOKENS).numpy())


def test_numbers_loaded_over_those_of_a_file_are_the_ones_that_are_saved(folder, tmp_path):
    other = mm.Transformer(routed(), seed=9)
    model = open_folder(folder)
    model.load_state_dict(other.state_dict())
    model.save_pretrained(tmp_path / "changed")
    again = open_folder(tmp_path / "changed").state_dict()
    for name, array in other.state_dict().items():
        np.testing.assert_array_equal(again[name], array, err_msg=name)


def test_the_balance_bias_of_an_opened_model_is_updated(tmp_path):
    shape = {**SHAPE, "n_kv_heads": None, "d_hidden": 16}
    moe = MoEConfig(n_experts=4, top_k=2, router="sigmoid_bias", n_shared_experts=1)
    config = ModelConfig(**shape, mla=mm.config.LatentConfig(kv_rank=8, rope_dim=4), moe=moe)
    mm.Transformer(config, seed=1).save_pretrained(tmp_path / "model")
    model = open_folder(tmp_path / "model")
    model.update_balance([np.array([4, 0, 0, 0])] * 2)
    assert model.blocks[0].moe.router.balance_bias.data[0] < 0 < model.blocks[1].moe.router.balance_bias.data[1]


def test_a_trained_model_is_saved_with_its_tokenizer(tmp_path):
    run = train(tiny(write_text(tmp_path), steps=1), tmp_path / "runs")
    run.model.save_pretrained(tmp_path / "model")
    assert mm.load(tmp_path / "model").tokenizer.name == "byte"


def test_rows_per_expert_are_counted_by_the_loaded_model_alone(folder):
    model = open_folder(folder)
    with mm.no_grad():
        model(TOKENS)
        model(TOKENS)
    assert [int(np.asarray(rows).sum()) for rows in model.expert_rows] == [36, 36]
    assert not [name for name, module in model.named_modules() if name and "expert_rows" in vars(module)]
