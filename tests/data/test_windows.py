"""A long text that is encoded in windows has the ids of the whole, for every kind of tokenizer."""

import random

import made_tokenizers
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minimoe.data import windows
from minimoe.data.tokenizer import HuggingFaceTokenizer, load_tokenizer
from minimoe.data.windows import Window, cut, encode_in_windows

ODD = ["\n", "  ", "é", "naïve", "日本語", "😀", "12345", "<s>", "[SEP]", "<|end|>", "A" * 30, "x\ty", "...", "\r\n"]
WORDS = [*made_tokenizers.PLAIN.split(), *ODD]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, HuggingFaceTokenizer]:
    found = {kind: load_tokenizer(made_tokenizers.write(kind, tmp_path_factory.mktemp(kind))) for kind in made_tokenizers.KINDS}
    return {kind: tokenizer for kind, tokenizer in found.items() if isinstance(tokenizer, HuggingFaceTokenizer)}


def text_of(seed: int, words: int) -> str:
    draw = random.Random(seed)
    return "".join(draw.choice(WORDS) * draw.choice([1, 1, 1, 2, 40]) + draw.choice(["", " ", " ", " "]) for _ in range(words))


def windowed(tokenizer: HuggingFaceTokenizer, pieces: list[str], **sizes: int) -> "np.ndarray[tuple[int], np.dtype[np.int32]]":
    def encode(texts: list[str]) -> list[Window]:
        return list(map(tokenizer._window, tokenizer._tokenizer.encode_batch(texts, add_special_tokens=False)))

    return np.concatenate(list(encode_in_windows(encode, pieces, **sizes)))


@settings(max_examples=12)
@given(st.integers(0, 10**6), st.sampled_from(sorted(made_tokenizers.KINDS)), st.integers(1, 3000))
def test_windows_joined_are_the_whole(tokenizers: dict[str, HuggingFaceTokenizer], seed: int, kind: str, piece: int) -> None:
    text = text_of(seed, 400)
    pieces = [text[start : start + piece] for start in range(0, len(text), piece)]
    assert np.array_equal(windowed(tokenizers[kind], pieces, size=700, shared=200, agree=8), tokenizers[kind].encode(text))


@pytest.mark.parametrize("kind", sorted(made_tokenizers.KINDS))
def test_a_run_that_no_window_holds_is_encoded_as_one(kind: str, tokenizers: dict[str, HuggingFaceTokenizer]) -> None:
    text = text_of(1, 100) + " " * 2000 + text_of(2, 100) + "a" * 3000 + text_of(3, 100) + " " * 999
    assert np.array_equal(windowed(tokenizers[kind], [text], size=300, shared=100, agree=8), tokenizers[kind].encode(text))


def test_the_usual_windows_agree_on_a_text_of_half_a_million_characters(tokenizers: dict[str, HuggingFaceTokenizer]) -> None:
    draw = random.Random(5)
    text = " ".join(draw.choices(made_tokenizers.PLAIN.split(), k=100_000))
    assert len(text) > 1.5 * windows.SIZE
    tokenizer = tokenizers["byte-level"]
    parts = list(tokenizer.encode_pieces(text[start : start + 100_000] for start in range(0, len(text), 100_000)))
    assert len(parts) > 2
    assert np.array_equal(np.concatenate(parts), tokenizer.encode(text))


def test_no_text_is_cut_that_a_window_holds() -> None:
    assert list(cut(["abc", "de", "", "f"], 6, 2)) == ["abcdef"]
    assert list(cut(["abcdefg"], 6, 2)) == ["abcdef", "efg"]
    assert list(cut([], 6, 2)) == [""]
