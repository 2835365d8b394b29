"""Generation: the cache changes no output and does not grow, rows of a batch are independent, equal seeds repeat, texts end in time."""

import tracemalloc
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import call, one_line
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import tiny, train, write_text

import minimoe as mm
from minimoe.backend import load
from minimoe.data.tokenizer import ByteTokenizer, CharTokenizer
from minimoe.engine.tensor import Tensor
from minimoe.errors import ConfigError, UserError
from minimoe.generation import decoding
from minimoe.generation.decoding import Decoder
from minimoe.generation.generation import Sampling, Writer, default_prompt, draw, generate, generate_batch, generate_ids, generate_texts
from minimoe.generation.sampling import likeliest, penalised
from minimoe.model.transformer import Transformer

GREEDY = Sampling(temperature=0.0)
LIMIT = 24
MODELS: dict[str, dict[str, Any]] = {
    "rope": {},
    "learned": {"position": "learned"},
    "no_positions": {"position": "none"},
    "window": {"sliding_window": 3},
    "mixed_windows": {"sliding_window": 3, "layer_types": ("full", "sliding")},
    "grouped_heads": {"n_kv_heads": 1, "qk_norm": "head"},
    "post_norm": {"norm_position": "post", "norm": "layer", "bias": True, "attention_bias": True, "activation": "gelu"},
    "tied": {"tie_embeddings": True, "qk_norm": "full"},
    "routed": {"moe": mm.MoEConfig(n_experts=4, n_shared_experts=1)},
    "capacity": {"moe": mm.MoEConfig(n_experts=4, capacity_factor=0.5, noise_std=1.0, jitter=0.2), "dropout": 0.5},
    "sigmoid_bias": {"moe": mm.MoEConfig(n_experts=4, router="sigmoid_bias"), "sliding_window": 2},
}


def make(seed: int = 0, **changes: Any) -> Transformer:
    """An untrained model with weights large enough that its predictions differ from token to token."""
    shape = {"d_model": 16, "n_layers": 2, "n_heads": 2, "d_hidden": 16, "max_seq_len": LIMIT, "vocab_size": 64, "init_std": 0.4}
    return Transformer(mm.ModelConfig(**{**shape, **changes}), seed=seed, dtype="float64", backend=mm.set_backend("numpy"))


def on(backend: str, **changes: Any) -> Transformer:
    """The same model in float32 on another backend."""
    return Transformer(make(**changes).config, dtype="float32", backend=load(backend))


def logits_at_end(model: Transformer, context: list[int]) -> Any:
    """The prediction after a context that is read at once."""
    return model(np.asarray([context], dtype=np.int32)).numpy()[0, -1]


# ---- the cache -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("prompt", [[5], [1, 2, 3, 4, 5, 6, 7]])
def test_greedy_is_the_argmax_of_the_full_forward(changes: dict[str, Any], prompt: list[int]) -> None:
    model = make(**changes)
    context = list(prompt)
    for token in generate_ids(model, prompt, LIMIT - len(prompt) + 1, GREEDY):
        assert token == int(np.argmax(logits_at_end(model, context)))
        context.append(token)


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("cut", [1, 5, LIMIT - 1])
def test_logits_with_a_cache_are_those_without(changes: dict[str, Any], cut: int) -> None:
    model = make(**changes)
    tokens = np.arange(LIMIT, dtype=np.int32)[None] * 7 % 64
    whole = model(tokens).numpy()
    cache = mm.Cache(model)
    parts = [model(tokens[:, :cut], cache=cache).numpy()]
    parts += [model(tokens[:, i : i + 1], cache=cache).numpy() for i in range(cut, LIMIT)]
    assert cache.length == LIMIT
    assert np.allclose(np.concatenate(parts, axis=1), whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("pieces", [(1, 1, 4, 7, 1, 2, 8), (9, 2, 2, 11), (2,) * 12, (24,)])
def test_a_text_read_in_pieces_of_any_size_has_the_logits_of_the_whole(changes: dict[str, Any], pieces: tuple[int, ...]) -> None:
    model, tokens = make(**changes), np.arange(2 * LIMIT, dtype=np.int32).reshape(2, LIMIT) * 5 % 64
    whole, cache, stop, parts = model(tokens).numpy(), mm.Cache(model, batch=2), 0, []
    for size in pieces:
        parts.append(model(tokens[:, stop : stop + size], cache=cache).numpy())
        stop += size
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, rtol=1e-9, atol=1e-9)


def test_a_layer_with_a_window_keeps_no_more_than_its_window() -> None:
    model = make(sliding_window=3, layer_types=("full", "sliding"))
    assert [layer.k.shape[1] for layer in mm.Cache(model).layers] == [LIMIT, 3]
    assert [layer.k.shape[1] for layer in mm.Cache(model, capacity=2).layers] == [2, 2]


def test_a_model_with_windows_everywhere_goes_past_its_context_and_drops_nothing() -> None:
    model = make(sliding_window=5, max_seq_len=8)
    context = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
    for token in generate_ids(model, context, 30, GREEDY):
        assert token == int(np.argmax(logits_at_end(model, context)))
        context.append(token)
    assert len(context) == 41


@pytest.mark.parametrize("window", [0, 4])
def test_a_later_mask_hides_earlier_tokens_and_may_cover_only_new_ones(window: int) -> None:
    model = make(sliding_window=window)
    tokens, mask = np.array([[7, 1, 2, 3, 4, 5, 6, 8]]), np.array([[1, 1, 1, 1, 0, 1, 1, 1]])
    positions, after = np.array([[0, 1, 2, 3, 4, 4, 5, 6]]), logits_at_end(model, [7, 1, 2, 3, 5, 6, 8])
    for masks in ((None, mask), (mask[:, :5], mask[:, 5:])):
        cache = mm.Cache(model)
        model(tokens[:, :5], masks[0], positions[:, :5], cache=cache)
        logits = model(tokens[:, 5:], masks[1], positions[:, 5:], cache=cache).numpy()[0, -1]
        np.testing.assert_allclose(logits, after, rtol=1e-9, atol=1e-9)


def test_a_cache_refuses_what_does_not_fit() -> None:
    model = make()
    cache = mm.Cache(model, batch=2, capacity=4)
    with pytest.raises(ValueError, match="1 sequences of 3 positions do not fit into 2 of 4"):
        model(np.zeros((1, 3), dtype=np.int32), cache=cache)
    with pytest.raises(ValueError, match="2 sequences of 5 positions do not fit into 2 of 4"):
        model(np.zeros((2, 5), dtype=np.int32), cache=cache)
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 3\), expected \(2, 2\)"):
        model(np.zeros((2, 2), dtype=np.int32), np.ones((2, 3), dtype=np.int32), cache=cache)


@pytest.mark.parametrize("claimed", [10**13, 2**62, 2**80])
def test_a_cache_for_a_context_that_no_memory_holds_is_refused_and_one_for_less_works(claimed: int) -> None:
    model = make(max_seq_len=claimed)
    with pytest.raises(ConfigError, match=f"cache: no memory for 1 x {claimed} positions of 2 layers: give it a capacity"):
        mm.Cache(model)
    assert model(np.zeros((1, 3), dtype=np.int32), cache=mm.Cache(model, capacity=4)).shape == (1, 3, 64)


@pytest.mark.parametrize("claimed", [2**31, 2**62, 2**80])
def test_a_context_that_no_memory_holds_changes_no_text(claimed: int) -> None:
    expected = list(generate_ids(make(max_seq_len=16), [1, 2, 3], 5, GREEDY))
    assert list(generate_ids(make(max_seq_len=claimed), [1, 2, 3], 5, GREEDY)) == expected


def test_texts_grow_as_tokens_come_however_many_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = list(generate_batch(make(), [[1, 2, 3], [4]], 12, GREEDY))
    monkeypatch.setattr(decoding, "ROOM", 2)
    assert list(islice(generate_batch(make(), [[1, 2, 3], [4]], 10**20, GREEDY), 12)) == expected


@pytest.mark.filterwarnings("ignore::minimoe.errors.Notice")
@pytest.mark.parametrize("position", ["rope", "learned"])
@pytest.mark.parametrize("limit", [1, 2, 5])
@pytest.mark.parametrize("length", [1, 4, 5, 13])
def test_a_full_context_drops_its_older_half(position: str, limit: int, length: int) -> None:
    model = make(position=position, max_seq_len=limit)
    prompt = [(3 * i) % 64 for i in range(length)]
    everything, seen = list(prompt), prompt[-limit:]
    for count, token in enumerate(generate_ids(model, prompt, 3 * limit + 4, GREEDY)):
        if count:
            seen = [*seen, everything[-1]]
            if len(seen) > limit:
                seen = everything[-max(1, limit // 2) :]
        assert token == int(np.argmax(logits_at_end(model, seen)))
        everything.append(token)
    assert len(everything) == length + 3 * limit + 4


def test_no_token_is_generated_if_none_is_asked_for() -> None:
    assert list(generate_ids(make(), [1], 0)) == []


# ---- batches -------------------------------------------------------------------------------------------------------------------

PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [9], [8, 8, 2], [1, 2, 3, 4, 5, 6, 7]]


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_each_row_of_a_batch_is_what_its_prompt_gives_alone(changes: dict[str, Any]) -> None:
    model = make(**changes)
    rows = zip(*generate_batch(model, PROMPTS, 12, GREEDY), strict=True)
    assert [list(row) for row in rows] == [list(generate_ids(model, prompt, 12, GREEDY)) for prompt in PROMPTS]


def test_rows_draw_from_streams_of_their_own_and_the_first_as_it_would_alone() -> None:
    model, how = make(), Sampling(1.0, seed=5)
    first, *_, last = (list(row) for row in zip(*generate_batch(model, PROMPTS, 15, how), strict=True))
    assert first == list(generate_ids(model, PROMPTS[0], 15, how))
    assert first != last, "the same prompt in another row"


def test_padding_is_not_routed() -> None:
    model = make(moe=mm.MoEConfig(n_experts=4, top_k=2))
    tokens, mask = np.array([[1, 2, 3, 4], [0, 0, 0, 9]]), np.array([[1, 1, 1, 1], [0, 0, 0, 1]])
    _, stats = model.hidden(tokens, mask, np.array([[0, 1, 2, 3], [0, 0, 0, 0]]), cache=mm.Cache(model, batch=2))
    assert [int(layer.counts.sum()) for layer in stats] == [10, 10]


def test_all_rows_of_a_batch_drop_their_older_half_when_the_longest_is_full() -> None:
    model, prompts = make(max_seq_len=8), [[1, 2, 3, 4, 5], [7, 7]]
    texts, seen, decoder = [list(p) for p in prompts], [list(p) for p in prompts], Decoder(model, prompts, 14)
    for count in range(14):
        if count in (4, 9):  # 5 + 3 columns are full, then 4 + 4
            seen = [text[-4:] for text in texts]
        logits = decoder.predict()
        np.testing.assert_allclose(logits, [logits_at_end(model, context) for context in seen], rtol=1e-9, atol=1e-9)
        drawn = [int(token) for token in logits.argmax(axis=-1)]
        decoder.add(drawn)
        for text, context, token in zip(texts, seen, drawn, strict=True):
            text.append(token)
            context.append(token)


def test_a_row_ends_before_its_end_token_and_the_batch_when_all_have() -> None:
    model, prompts = make(), [[1, 2], [5]]
    plain = [list(row) for row in zip(*generate_batch(model, prompts, 12, GREEDY), strict=True)]
    end, unused = plain[1][3], min(set(range(64)) - set(plain[0] + plain[1]))
    expected = [row[: row.index(end)] if end in row else row for row in plain]
    assert len(expected[1]) <= 3 and len(expected[0]) > len(expected[1]), "the test wants rows that end at different times"
    rows = [list(row) for row in zip(*generate_batch(model, prompts, 12, Sampling(0.0, end=(unused, end))), strict=True)]
    assert [[token for token in row if token is not None] for row in rows] == expected
    assert len(rows[0]) == len(expected[0])
    loaded = mm.Transformer(model.config, dtype="float64")
    loaded.end_tokens = (end,)
    assert list(generate_ids(loaded, [5], 12, GREEDY)) == expected[1]


@pytest.mark.parametrize("prompts", [[], [[]], [[1], []]])
def test_a_batch_without_a_prompt_is_refused(prompts: list[list[int]]) -> None:
    with pytest.raises(ConfigError, match="prompt is empty"):
        next(generate_batch(make(), prompts, 3))


# ---- steps: recorded, and of one size --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_a_recorded_step_has_the_bits_of_a_plain_one(changes: dict[str, Any]) -> None:
    """Also past the end of the context, when everything is read again into the same buffers."""
    model = on("numba", **changes)
    plain, played = (Decoder(model, PROMPTS[:3], LIMIT + 8) for _ in range(2))
    plain.recorded = None
    for _ in range(LIMIT + 8):
        one, other = plain.predict().copy(), played.predict().copy()
        assert np.array_equal(one, other)
        plain.add(one.argmax(axis=-1))
        played.add(one.argmax(axis=-1))
    assert played.recorded is not None and played.recorded.again is not None


def test_a_step_is_not_recorded_if_weights_are_not_in_memory_or_the_backend_cannot() -> None:
    class Absent(mm.Transformer):
        resident = False

    config = make().config
    assert Decoder(Absent(config, backend=load("numba")), [[1]], 5).recorded is None
    assert Decoder(Transformer(config, backend=load("numpy")), [[1]], 5).recorded is None


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Run pieces of work one after the other, so that their memory is that of one."""
    load("numba").use_threads(1)
    yield
    load("numba").use_threads(0)


def bytes_of_steps(decoder: Decoder, steps: tuple[int, int]) -> list[int]:
    """The peak memory of Python, NumPy and compiled kernels during two steps, beyond that before them."""
    found = []
    for step in range(1, max(steps) + 1):
        if step in steps:
            tracemalloc.start()
        logits = decoder.predict()
        if step in steps:
            found.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        decoder.add(logits.argmax(axis=-1))
    return found


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("backend", ["numpy", "numba"])
@pytest.mark.parametrize("changes", [{}, {"sliding_window": 16}, {"moe": mm.MoEConfig(n_experts=4)}], ids=["full", "window", "routed"])
def test_a_step_allocates_no_more_when_the_text_is_long(backend: str, recorded: bool, changes: dict[str, Any]) -> None:
    """Keys of 180 more positions would be 46 KB per layer, their scores 3 KB."""
    decoder = Decoder(on(backend, **{**changes, "max_seq_len": 512, "d_model": 64}), [[1, 2, 3], [4]], 505)
    if not recorded:
        decoder.recorded = None
    shapes = [array.shape for layer in decoder.cache.layers for array in (layer.k, layer.v)]
    early, late = bytes_of_steps(decoder, (20, 200))
    assert abs(late - early) < 2000, f"{early} bytes in step 20, {late} in step 200"
    assert shapes == [array.shape for layer in decoder.cache.layers for array in (layer.k, layer.v)]
    if recorded and backend == "numba":
        assert decoder.recorded is not None and decoder.recorded.again is not None, "played: the same kernels on the same shapes"


# ---- chance --------------------------------------------------------------------------------------------------------------------


def test_equal_seeds_give_equal_text_and_other_seeds_others() -> None:
    model = make()
    first, second, other = (list(generate_ids(model, [1, 2], 40, Sampling(1.0, seed=seed))) for seed in (3, 3, 4))
    assert first == second and first != other
    assert list(generate_ids(model, [1, 2], 10, Sampling(1.0, seed=3))) == first[:10]


def test_top_k_of_one_and_a_small_top_p_are_greedy() -> None:
    model = make()
    greedy = list(generate_ids(model, [9], 30, GREEDY))
    assert list(generate_ids(model, [9], 30, Sampling(5.0, top_k=1, seed=8))) == greedy
    assert list(generate_ids(model, [9], 30, Sampling(5.0, top_p=1e-9, seed=8))) == greedy
    assert list(generate_ids(model, [9], 30, Sampling(1e-320, seed=8))) == greedy


PROBABILITIES = np.array([0.05, 0.4, 0.1, 0.25, 0.2])


def shares(how: dict[str, Any], draws: int = 1000) -> Any:
    """Count how often each token is drawn."""
    z = np.log(PROBABILITIES)
    return np.bincount([draw(z, Sampling(**how), position) for position in range(draws)], minlength=5) / draws


@pytest.mark.parametrize(
    ("how", "kept", "power"),
    [
        ({"temperature": 1.0}, [0, 1, 2, 3, 4], 1.0),
        ({"temperature": 0.5}, [0, 1, 2, 3, 4], 2.0),
        ({"temperature": 1.0, "top_k": 2}, [1, 3], 1.0),
        ({"temperature": 1.0, "top_k": 50}, [0, 1, 2, 3, 4], 1.0),
        ({"temperature": 1.0, "top_p": 0.6}, [1, 3], 1.0),
        ({"temperature": 1.0, "top_p": 0.7}, [1, 3, 4], 1.0),
        ({"temperature": 1.0, "top_k": 3, "top_p": 0.5}, [1, 3], 1.0),
    ],
)
def test_tokens_are_drawn_by_their_probability_among_those_that_are_kept(how: dict[str, Any], kept: list[int], power: float) -> None:
    expected = np.zeros(5)
    expected[kept] = PROBABILITIES[kept] ** power
    expected /= expected.sum()
    found = shares(how)
    assert np.all(found[expected == 0.0] == 0.0)
    assert np.abs(found - expected).max() < 0.06


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=30), st.integers(1, 31))
def test_the_k_likeliest_are_the_first_of_all_in_order(logits: list[int], k: int) -> None:
    z = np.asarray(logits, dtype=np.float64)
    assert likeliest(z, k).tolist() == sorted(range(len(z)), key=lambda i: (-z[i], i))[:k]


def test_a_penalty_divides_what_is_above_zero_and_multiplies_what_is_below() -> None:
    z, seen = np.array([2.0, -1.0, 3.0, -4.0, 0.0]), np.array([True, True, False, False, True])
    assert penalised(z, seen, 2.0).tolist() == [1.0, -2.0, 3.0, -4.0, 0.0]


def test_a_large_penalty_repeats_nothing_while_there_is_something_else() -> None:
    model, prompts = make(), [[1, 2], [5]]
    for prompt, row in zip(
        prompts, zip(*generate_batch(model, prompts, 40, Sampling(0.0, repetition_penalty=1e9)), strict=True), strict=True
    ):
        text = [*prompt, *row]
        assert len(set(text)) > len({*prompt, *generate_ids(model, prompt, 40, GREEDY)})
        positive = 30  # logits above 0, about half of 64: they are not enough to choose from any longer
        assert len(set(text[:positive])) == positive


def test_equal_logits_go_to_the_lowest_id() -> None:
    z = np.zeros(6)
    assert draw(z, GREEDY, 0) == 0
    assert {draw(z, Sampling(1.0, top_k=2), position) for position in range(50)} == {0, 1}


def test_a_token_with_no_probability_is_never_drawn() -> None:
    z = np.array([-np.inf, 0.0, -np.inf, 0.0])
    assert {draw(z, Sampling(1.0), position) for position in range(100)} == {1, 3}


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty"),
        ({"stop": ("a", "")}, "stop"),
        ({"stop": "ab"}, "stop"),
    ],
)
def test_impossible_settings_are_refused_by_name(wrong: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        Sampling(**wrong)


# ---- text ----------------------------------------------------------------------------------------------------------------------


class Reciting(Transformer):
    """Predicts the bytes of a fixed text, whatever the prompt."""

    def __init__(self, text: bytes) -> None:
        self.text: Iterator[int] = iter(text)
        config = mm.ModelConfig(d_model=4, n_heads=1, n_layers=1, max_seq_len=8, vocab_size=256)
        super().__init__(config, backend=mm.set_backend("numpy"))

    def logits(self, x: Tensor) -> Tensor:
        logits = np.zeros(super().logits(x).shape)
        logits[0, -1, next(self.text)] = 1.0
        return Tensor(logits, self.backend)


TEXT = "aé€𝄞 ü日本!"


def test_characters_come_whole_and_in_order() -> None:
    data = TEXT.encode()
    model: Any = Reciting(data)
    pieces = list(generate(model, ByteTokenizer(), "x", len(data), GREEDY))
    assert pieces == list(TEXT)


@pytest.mark.parametrize("length", range(1, 9))
def test_a_character_cut_off_at_the_end_is_replaced_only_there(length: int) -> None:
    data = TEXT.encode()[:length]
    model: Any = Reciting(data)
    pieces = list(generate(model, ByteTokenizer(), "x", length, GREEDY))
    assert "".join(pieces) == data.decode(errors="replace")
    assert all("\ufffd" not in piece for piece in pieces[:-1])


def cut(text: str, stop: tuple[str, ...]) -> str:
    """The text before the string of `stop` that is complete first."""
    ends = [(text.find(string) + len(string), -len(string)) for string in stop if string in text]
    return text[: sum(min(ends))] if ends else text


@given(st.text("ab", max_size=20), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3).map(tuple))
def test_a_text_ends_before_the_first_stop_string_and_shows_nothing_too_early(text: str, stop: tuple[str, ...]) -> None:
    tokenizer, shown = CharTokenizer("ab"), ""
    writer = Writer(tokenizer, Sampling(stop=stop))
    for count, token in enumerate(tokenizer.encode(text), start=1):
        shown += writer.push(int(token))
        if writer.over:
            break
        waiting = text[len(shown) : count]
        assert shown == text[: len(shown)] and any(string.startswith(waiting) for string in stop)
        assert not any(string.startswith(text[i:count]) for i in range(len(shown)) for string in stop), (
            "shown, and yet the beginning of one"
        )
    assert shown + writer.finish() == cut(text, stop)


def test_stop_strings_end_text_that_is_generated() -> None:
    model: Any = Reciting(TEXT.encode())
    pieces = list(generate(model, ByteTokenizer(), "x", len(TEXT.encode()), Sampling(0.0, stop=("\u00fc\u65e5", "b"))))
    assert pieces == ["a", "\u00e9", "\u20ac", "\U0001d11e", " "]
    model = Reciting(b"abcabd")
    assert "".join(generate(model, ByteTokenizer(), "x", 5, Sampling(0.0, stop=("abd",)))) == "abcab"


def test_the_texts_of_a_batch_come_as_they_are_complete() -> None:
    model, tokenizer = make(vocab_size=65), CharTokenizer(chr(33 + i) for i in range(65))
    prompts = ["AB", "C!", "$"]
    alone = ["".join(generate(model, tokenizer, prompt, 14, GREEDY)) for prompt in prompts]
    assert dict(generate_texts(model, tokenizer, prompts, 14, GREEDY)) == dict(enumerate(alone))
    stop = alone[1][2:4]
    texts = list(generate_texts(model, tokenizer, prompts, 14, Sampling(0.0, stop=(stop,))))
    assert dict(texts) == {row: cut(text, (stop,)) for row, text in enumerate(alone)}
    assert [len(text) for _, text in texts] == sorted(len(text) for _, text in texts)


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), CharTokenizer("ab\n")])
def test_an_empty_prompt_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="prompt is empty"):
        list(generate(make(vocab_size=256), tokenizer, "", 3))


def test_characters_that_the_vocabulary_lacks_are_named() -> None:
    with pytest.raises(UserError, match=r"prompt: the characters 'c', 'd' are not in"):
        list(generate(make(vocab_size=3), CharTokenizer("ab\n"), "abcd", 3))


def test_the_default_prompt_is_a_lines_end_or_the_first_token() -> None:
    assert default_prompt(ByteTokenizer()) == default_prompt(CharTokenizer("ab\n")) == "\n"
    assert default_prompt(CharTokenizer("ba")) == "b"
    assert len("".join(generate(make(vocab_size=2), CharTokenizer("ba"), "b", 20))) == 20


def test_predictions_that_are_not_finite_are_refused() -> None:
    model = make()
    model.head.weight.data[...] = np.nan  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="not finite"):
        list(generate_ids(model, [1], 3))


@pytest.mark.parametrize("changes", [{"head": "none"}, {"head": "mlm", "causal": False}, {"causal": False}])
def test_a_model_that_does_not_predict_the_next_token_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="causal language model"):
        list(generate_ids(make(**changes), [1], 3))


def test_prompts_of_unequal_length_go_through_a_cache_as_they_would_alone() -> None:
    model = Transformer(mm.ModelConfig(vocab_size=11, d_model=16, n_heads=2, n_layers=2, d_hidden=8), dtype="float64")
    alone = model(np.array([[6, 7, 8]])).numpy()[0, -1]
    tokens, mask = np.array([[1, 2, 3, 4, 5], [0, 0, 6, 7, 8]]), np.array([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    positions, cache = np.array([[0, 1, 2, 3, 4], [0, 0, 0, 1, 2]]), mm.Cache(model, batch=2)
    model(tokens[:, :4], attention_mask=mask[:, :4], positions=positions[:, :4], cache=cache)
    last = model(tokens[:, 4:], attention_mask=mask, positions=positions[:, 4:], cache=cache)
    np.testing.assert_allclose(last.numpy()[1, -1], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("wrong", [{"targets": [[0, 1, -1]]}, {"targets": [[0, 1, 11]]}, {"positions": [[0, 1, 9]]}])
def test_targets_and_positions_that_do_not_fit_are_refused(wrong: dict[str, Any]) -> None:
    model = Transformer(mm.ModelConfig(vocab_size=11, d_model=16, n_heads=2, n_layers=1, position="learned", max_seq_len=4))
    with pytest.raises(ValueError, match="run from"):
        model.loss(np.array([[1, 2, 3]]), np.array(wrong.get("targets", [[1, 2, -100]])), positions=wrong.get("positions"))


# ---- the command line ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run."""
    root = tmp_path_factory.mktemp("user")
    train(tiny(write_text(root)), root / "runs")
    return root


def test_several_prompts_are_shown_each_under_its_heading(folder: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(folder)
    how = ["--tokens", "9", "--temperature", "0"]
    code, shown, _ = call(capsys, "generate", *how, "--prompt", "a token", "--prompt", "x")
    alone = [call(capsys, "generate", *how, "--prompt", prompt)[1] for prompt in ("a token", "x")]
    assert code == 0
    assert shown == f"== prompt 1 of 2\n{alone[0]}\n== prompt 2 of 2\n{alone[1]}\n"


def test_stop_strings_and_the_penalty_reach_the_text(folder: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(folder)
    how = ["generate", "--prompt", "a", "--tokens", "12", "--seed", "1"]
    text = call(capsys, *how)[1].removesuffix("\n")
    stop = text[5:7]
    assert call(capsys, *how, "--stop", "\u20ac", "--stop", stop)[1] == "a" + cut(text[1:], (stop,)) + "\n"
    assert call(capsys, *how, "--repetition-penalty", "1e9")[1] != text + "\n"


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (["--repetition-penalty", "0"], "repetition_penalty (0.0) must be a number above 0"),
        (["--repetition-penalty", "nan"], "repetition_penalty (nan)"),
        (["--stop", ""], "stop = ('',) must be a tuple of strings, none of them empty"),
        (["--prompt", "a", "--prompt", ""], "the prompt is empty"),
    ],
)
def test_wrong_options_are_one_line(folder: Path, monkeypatch: Any, capsys: Any, wrong: list[str], says: str) -> None:
    monkeypatch.chdir(folder)
    code, out, err = call(capsys, "generate", *wrong)
    assert (code, out) == (2, "") and says in one_line(err)


def test_a_cache_serves_the_attention_layers_of_any_module() -> None:
    class Pair(mm.nn.Module):
        def __init__(self) -> None:
            self.layers = [mm.nn.Attention(8, 2, window=window, max_seq_len=6) for window in (0, 2)]

        def __call__(self, x: Tensor, cache: mm.Cache | None = None) -> Tensor:
            first, t = 0 if cache is None else cache.length, x.shape[1]
            positions = np.arange(first, first + t, dtype=np.int32)[None]
            if cache is not None:
                cache.add_columns(positions, None, 1, t)
            for number, layer in enumerate(self.layers):
                x = layer(x, positions, cache=None if cache is None else cache.layers[number])
            return x

    with mm.use_backend("numpy"), mm.no_grad():
        pair, x = Pair().init(0, "float64"), mm.tensor(np.random.default_rng(0).standard_normal((1, 6, 8)))
        cache = mm.Cache(pair)
        assert [layer.slots for layer in cache.layers] == [6, 2]
        parts = [pair(mm.tensor(x.numpy()[:, i : i + 1]), cache).numpy() for i in range(6)]
        np.testing.assert_allclose(np.concatenate(parts, axis=1), pair(x).numpy(), rtol=1e-12, atol=1e-15)
