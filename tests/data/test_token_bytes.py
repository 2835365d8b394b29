"""The bytes of tokens add up to those of the text, for every tokenizer that keeps the text; the others say why they have no count."""

from pathlib import Path

import made_tokenizers
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minimoe.data.token_bytes import token_bytes
from minimoe.data.tokenizer import ByteTokenizer, CharTokenizer, load_tokenizer

TEXTS = ["the router sends  every token\nto two experts.", "Große Ähren, 雪 und 🙂!\n\n\tend ", "a"]


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_bytes_and_characters_add_up_to_the_text(text: str) -> None:
    for tokenizer in (ByteTokenizer(), CharTokenizer.from_text(text)):
        counts = token_bytes(tokenizer).counts
        assert counts is not None and len(counts) == tokenizer.vocab_size
        assert counts[tokenizer.encode(text)].sum() == len(text.encode())


@pytest.mark.parametrize(("kind", "added"), [("byte-level", 0), ("sentencepiece", 1)])  # 1: the space that it puts before a text
@pytest.mark.parametrize("text", TEXTS)
def test_byte_pairs_add_up_to_the_text(kind: str, added: int, text: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(made_tokenizers.write(kind, tmp_path))
    counts = token_bytes(tokenizer).counts
    assert counts is not None and len(counts) == tokenizer.vocab_size
    assert counts[tokenizer.encode(text)].sum() == len(text.encode()) + added


def test_special_tokens_stand_for_no_byte_and_other_added_ones_for_their_own(tmp_path: Path) -> None:
    library = pytest.importorskip("tokenizers")
    inner = library.Tokenizer.from_file(str(made_tokenizers.write("byte-level", tmp_path)))
    inner.no_truncation()
    inner.add_special_tokens(["<|end|>"])
    inner.add_tokens(["    "])
    inner.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    counts = token_bytes(tokenizer).counts
    assert counts is not None
    assert counts[inner.token_to_id("<|end|>")] == 0 and counts[inner.token_to_id("    ")] == 4
    text = "the router    waits"
    assert counts[tokenizer.encode(f"{text}<|end|>")].sum() == len(text)


@pytest.mark.parametrize(("kind", "why"), [("wordpiece", "changes the text (BertNormalizer)")])
def test_a_tokenizer_that_changes_the_text_says_why_it_has_no_count(kind: str, why: str, tmp_path: Path) -> None:
    found = token_bytes(load_tokenizer(made_tokenizers.write(kind, tmp_path)))
    assert found.counts is None and why in found.why_not


@pytest.mark.parametrize("kind", ["metaspace", "unigram"])
def test_other_kinds_are_counted_right_or_not_at_all(kind: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(made_tokenizers.write(kind, tmp_path))
    found, text = token_bytes(tokenizer), "the router sends every token"
    assert (found.counts is None) == bool(found.why_not)
    if found.counts is not None:
        assert abs(int(found.counts[tokenizer.encode(text)].sum()) - len(text)) <= 1
        assert np.all(found.counts >= 0)
