"""Documents as tokens: what follows a document's end, what the loss counts, and pieces that are encoded as one text."""

from pathlib import Path

import made_tokenizers
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minimoe.data.arrays import TokenArrays, gather
from minimoe.data.encoding import encode_documents
from minimoe.data.sources import Document
from minimoe.data.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer, load_tokenizer

TEXTS = st.text(alphabet="ab é€😀\n", max_size=8)


def encoded(documents: list[Document], tokenizer: Tokenizer) -> TokenArrays:
    return gather(encode_documents(documents, tokenizer, "text"), with_domains=True)


def char(text: str) -> CharTokenizer:
    return CharTokenizer.from_text(f"{text}\nab é€😀")


@given(st.lists(st.tuples(TEXTS, st.booleans()), min_size=1, max_size=6))
def test_plain_documents_are_their_texts_in_a_row(parts: list[tuple[str, bool]]) -> None:
    documents = [Document(text, number % 3, continues=continues) for number, (text, continues) in enumerate(parts)]
    whole = "".join(text for text, _ in parts)
    for tokenizer in (ByteTokenizer(), char(whole)):
        arrays = encoded(documents, tokenizer)
        assert tokenizer.decode(arrays.tokens) == whole
        assert arrays.learned is None and arrays.documents is None
        assert arrays.domains is not None and len(arrays.domains) == len(arrays.tokens)


@given(st.lists(st.tuples(TEXTS, st.lists(st.integers(0, 8), min_size=2, max_size=4)), min_size=1, max_size=4), st.booleans())
def test_the_loss_counts_the_bytes_of_learned_characters(parts: list[tuple[str, list[int]]], ends: bool) -> None:
    documents, expected = [], bytearray()
    for text, cuts in parts:
        cuts = sorted(cuts)[: len(cuts) // 2 * 2]
        spans = tuple(zip(cuts[::2], cuts[1::2], strict=True))
        documents.append(Document(text, learned=spans, ends=ends))
        flags = [any(start <= place < stop for start, stop in spans) for place in range(len(text))]
        for char, flag in zip(text, flags, strict=True):
            expected += bytes([flag]) * len(char.encode())
        expected += bytes([bool(flags) and flags[-1]]) * (2 * ends)
    arrays = encoded(documents, ByteTokenizer())
    assert arrays.learned is not None or not expected
    assert arrays.learned is None or arrays.learned.tolist() == list(map(bool, expected))


def test_a_document_that_ends_is_followed_by_an_empty_line_and_the_next_is_set_apart() -> None:
    documents = [Document("a", ends=True), Document("bc", ends=True), Document("d"), Document("e")]
    arrays = encoded(documents, ByteTokenizer())
    assert bytes(arrays.tokens.astype(np.uint8)) == b"a\n\nbc\n\nde"
    assert arrays.documents is not None and arrays.documents.tolist() == [0, 3, 7]
    part = arrays.part(4, 9)
    assert part.documents is not None and part.documents.tolist() == [0, 3]


@pytest.mark.parametrize("kind", ["wordpiece", "sentencepiece", "metaspace", "byte-level"])
def test_a_tokenizers_own_end_of_text_follows_a_document(kind: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(made_tokenizers.write(kind, tmp_path))
    first, second = "the router waits", "a token"
    arrays = encoded([Document(first, ends=True, learned=((4, len(first)),)), Document(second, ends=True, learned=())], tokenizer)
    end = {"wordpiece": "[SEP]", "byte-level": None}.get(kind, "</s>")
    if end is None:
        ids = [*tokenizer.encode(first + "\n\n"), *tokenizer.encode(second + "\n\n")]
    else:
        assert tokenizer.end_id is not None and tokenizer.token(tokenizer.end_id) == end
        ids = [*tokenizer.encode(first), tokenizer.end_id, *tokenizer.encode(second), tokenizer.end_id]
    assert arrays.tokens.tolist() == ids
    assert arrays.learned is not None and arrays.documents is not None
    n = int(arrays.documents[1])
    assert not arrays.learned[0] and arrays.learned[n - 1] and not arrays.learned[n:].any()
    assert "router" not in tokenizer.decode(arrays.tokens[:n][~arrays.learned[:n]])
