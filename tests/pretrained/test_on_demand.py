"""Weights read on demand: what is in memory, what a bound evicts, and that neither changes a number."""

import mmap
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from tiny_runs import tiny, train, write_text

import minimoe as mm
from minimoe.config import ModelConfig, MoEConfig
from minimoe.errors import ConfigError, UserError
from minimoe.generation.decoding import Decoder
from minimoe.pretrained.on_demand import ResidentExperts, WeightCache
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
    for layer in bound.file_weights.experts:
        gone = layer.sources[0].stack[~layer.resident, mmap.PAGESIZE // 128 : -mmap.PAGESIZE // 128]  # a page may be a neighbour's too
        assert gone.size and not gone.any()


class Layer:
    """A layer with three experts of three bytes each."""

    expert_size = 3

    def __init__(self, cache):
        self.cache, self.resident, self.evicted = cache, np.zeros(3, bool), []

    def read(self, expert):
        self.resident[expert] = True

    def evict(self, expert):
        self.resident[expert] = False
        self.evicted.append(expert)


def test_the_least_recently_used_is_evicted_first():
    cache = WeightCache(budget=10)
    one, other = Layer(cache), Layer(cache)
    with mm.no_grad():
        for expert in (0, 1, 2, 0):
            with cache.lease(one, [expert]):
                pass
        with cache.lease(other, [0]):
            assert one.evicted == [1] and cache.used == 9
    with cache.lease(other, [1]):  # where gradients are wanted nothing may go
        assert one.evicted == [1] and cache.used == 12


def test_experts_in_use_are_not_evicted_and_room_is_made_of_others():
    cache = WeightCache(budget=9)
    one, other = Layer(cache), Layer(cache)
    with mm.no_grad(), cache.lease(one, [0]):
        for expert in (1, 2):
            with cache.lease(one, [expert]):
                pass
        with cache.lease(other, [0, 1]):
            assert one.evicted == [1, 2] and cache.used == 9
    assert not cache.pins


def test_a_thread_waits_for_a_layer_that_runs_elsewhere_and_not_for_what_a_graph_holds():
    cache, seen = WeightCache(budget=9), []
    one, other = Layer(cache), Layer(cache)

    def use_other():
        with mm.no_grad(), cache.lease(other, [0], runs=True):
            seen.append(list(one.evicted))

    with mm.no_grad():
        with cache.lease(one, [0, 1, 2], runs=True):
            thread = threading.Thread(target=use_other)
            thread.start()
            thread.join(0.2)
            assert thread.is_alive() and not seen
        thread.join(10)
        assert seen == [[0]] and cache.used == 9
        array = np.zeros(1)
        with cache.lease(one, [0, 1, 2]) as lease:
            cache.hold_for(array, lease)
        use_other()  # above the bound
        assert seen[-1] == [0] and cache.used == 12
        del array
        use_other()
    assert not cache.pins and cache.used == 9 and len(one.evicted) == 2


def least_bound(model):
    weights = model.file_weights
    return sum(s.size for s in weights.dense) + max(s.expert_size * s.experts for s in weights.experts)


def in_threads(work, count=8):
    """Call work(0), work(1), ... at the same time, each in a thread of its own.   -> their results"""
    with ThreadPoolExecutor(count) as pool:
        together = threading.Barrier(count)

        def one(number):
            together.wait(60)
            return work(number)

        return [future.result(120) for future in [pool.submit(one, number) for number in range(count)]]


@pytest.mark.parametrize("backend", ["numpy", "numba"])
@pytest.mark.parametrize("room", [1.0, 1.3])
def test_threads_compute_with_one_model_within_a_bound_as_one_thread_does(folder, backend, room, monkeypatch):
    b = mm.backend.load(backend)
    free = open_folder(folder, backend=b)
    budget = int(least_bound(free) * room)
    model, seen = open_folder(folder, backend=b, max_memory=budget), []
    read = ResidentExperts.read

    def watched(layer, expert):
        read(layer, expert)
        seen.append(layer.cache.used + layer.expert_size)

    inputs = np.random.default_rng(1).integers(0, 40, (8, 15, 1, 3))
    with mm.no_grad():
        expected = [[free(tokens).numpy() for tokens in batch] for batch in inputs]
    monkeypatch.setattr(ResidentExperts, "read", watched)

    def work(number):
        with mm.no_grad():
            return [model(tokens).numpy() for tokens in inputs[number]]

    for found, right in zip(in_threads(work), expected, strict=True):
        np.testing.assert_array_equal(found, right)
    cache = model.file_weights.cache
    assert max(seen) <= budget and len(seen) > 2 * 6  # more than all experts of both layers: some were read again
    assert cache.used == sum(s.size for s in model.file_weights.dense) + sum(layer.expert_size for layer, _ in cache.entries)
    assert not cache.pins and not cache.running and not cache.queue and not cache.gone
    assert [int(rows.sum()) for rows in map(np.asarray, model.expert_rows)] == [8 * 15 * 3] * 2


@pytest.mark.parametrize("bounded", [False, True], ids=["free", "bounded"])
def test_threads_generate_with_one_model_what_one_thread_generates(folder, bounded):
    b = mm.backend.load("numba")
    free = open_folder(folder, backend=b)
    model = open_folder(folder, backend=b, max_memory=least_bound(free) if bounded else None)

    def generated(model, number):
        decoder = Decoder(model, [[number, 3, 5], [7]], 12)
        for _ in range(12):
            decoder.add(decoder.predict().argmax(axis=-1))
        return decoder.texts.copy()

    expected = [generated(free, number) for number in range(4)]
    for found, right in zip(in_threads(lambda number: generated(model, number), 4), expected, strict=True):
        np.testing.assert_array_equal(found, right)


def test_a_graph_keeps_its_experts_while_another_thread_needs_their_room(folder):
    free = open_folder(folder)
    model = open_folder(folder, max_memory=least_bound(free))
    for m in (free, model):
        loss = m.loss(TOKENS, TOKENS).total
        if m is model:
            with mm.no_grad():
                others = [m(np.full((1, 1), token)) for token in range(40)]
            assert np.isfinite([other.numpy().sum() for other in others]).all()
        loss.backward()
    for (name, a), (_, c) in zip(model.named_parameters(), free.named_parameters(), strict=True):
        np.testing.assert_array_equal(a.grad, c.grad, err_msg=name)


def test_arrays_of_all_experts_keep_their_numbers_beyond_a_bound(folder):
    free = open_folder(folder)
    model = open_folder(folder, max_memory=least_bound(free))
    with mm.no_grad():
        state = model.state_dict()
        model(TOKENS)
        for name, array in free.state_dict().items():
            np.testing.assert_array_equal(state[name], array, err_msg=name)
        del state, array
        model(TOKENS)
    assert model.file_weights.cache.used <= least_bound(free)


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
