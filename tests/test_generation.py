"""Generation: the cache changes nothing, chance repeats itself, cuts cut, and characters come whole."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import minimoe as mm
from minimoe.autograd import Tensor
from minimoe.errors import ConfigError, UserError
from minimoe.generation import Sampling, default_prompt, draw, generate, generate_ids
from minimoe.model import Transformer
from minimoe.tokenizer import ByteTokenizer, CharTokenizer

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


def logits_at_end(model: Transformer, context: list[int]) -> Any:
    """The prediction after a context, all of it read at once."""
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


@pytest.mark.parametrize("position", ["rope", "learned"])
@pytest.mark.parametrize("limit", [1, 2, 5])
@pytest.mark.parametrize("length", [1, 4, 5, 13])
def test_a_full_context_forgets_its_older_half(position: str, limit: int, length: int) -> None:
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


def test_no_token_is_asked_for_none_is_given() -> None:
    assert list(generate_ids(make(), [1], 0)) == []


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
    """How often each token is drawn."""
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
    ],
)
def test_impossible_settings_are_refused_by_name(wrong: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        Sampling(**wrong)


# ---- text ----------------------------------------------------------------------------------------------------------------------


class Reciting:
    """Stands in for a model: predicts the bytes of a text, whatever it is shown."""

    def __init__(self, text: bytes) -> None:
        self.ids: Iterator[int] = iter(text)
        self.config = mm.ModelConfig(d_model=4, n_heads=1, n_layers=1, max_seq_len=8, vocab_size=256)
        self.real = Transformer(self.config, backend=mm.set_backend("numpy"))
        self.backend, self.embed, self.dtype = self.real.backend, self.real.embed, self.real.dtype

    def __call__(self, tokens: Any, cache: Any = None) -> Tensor:
        logits = np.array(self.real(tokens, cache=cache).numpy())
        logits[0, -1] = 0.0
        logits[0, -1, next(self.ids)] = 1.0
        return Tensor(logits, self.backend)


TEXT = "aé€𝄞 ü日本!"


def test_characters_come_whole_and_in_order() -> None:
    data = TEXT.encode()
    model: Any = Reciting(data)
    pieces = list(generate(model, ByteTokenizer(), "x", len(data), GREEDY))
    assert pieces == list(TEXT)


@pytest.mark.parametrize("length", range(1, 9))
def test_a_character_cut_off_at_the_end_is_replaced_there_alone(length: int) -> None:
    data = TEXT.encode()[:length]
    model: Any = Reciting(data)
    pieces = list(generate(model, ByteTokenizer(), "x", length, GREEDY))
    assert "".join(pieces) == data.decode(errors="replace")
    assert all("\ufffd" not in piece for piece in pieces[:-1])


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


def test_a_model_that_predicts_no_numbers_says_so() -> None:
    model = make()
    model.head.weight.data[...] = np.nan  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="not finite"):
        list(generate_ids(model, [1], 3))


@pytest.mark.parametrize("changes", [{"head": "none"}, {"head": "mlm", "causal": False}, {"causal": False}])
def test_a_model_that_predicts_no_next_token_is_refused(changes: dict[str, Any]) -> None:
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
