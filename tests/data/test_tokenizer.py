"""The tokenizers: ids, text, streams, and the tokenizer.json that Hugging Face's `tokenizers` reads to the same ids."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minimoe.data.tokenizer import (
    ByteTokenizer,
    CharTokenizer,
    HuggingFaceTokenizer,
    Tokenizer,
    byte_alphabet,
    library_errors,
    load_tokenizer,
    make_tokenizer,
)
from minimoe.errors import UserError
from minimoe.hints import install

TEXTS = [
    "",
    "a",
    "First Citizen:\nBefore we proceed,  hear me.\n\n",
    " \t\r\n\0",
    "naïve — 漢字 🙂 e\u0301 \ufffd\u2028\x1f\x7f\xad",
    "##Ġa▁b</s>",
]
unicode_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


def both(text: str) -> list[Tokenizer]:
    return [ByteTokenizer(), CharTokenizer.from_text(text)]


def hugging_face_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    tokenizers = pytest.importorskip("tokenizers")
    ids: list[int] = tokenizers.Tokenizer.from_str(tokenizer.to_json()).encode(text).ids
    return ids


@settings(deadline=None)
@given(unicode_text)
def test_decoding_what_was_encoded_gives_the_text(text: str) -> None:
    for tokenizer in both(text):
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32
        assert ids.ndim == 1
        assert all(0 <= token < tokenizer.vocab_size for token in ids)
        assert tokenizer.decode(ids) == text


@settings(deadline=None)
@given(unicode_text)
def test_hugging_face_reads_tokenizer_json_to_the_same_ids_and_text(text: str) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    for tokenizer in both(text):
        other = tokenizers.Tokenizer.from_str(tokenizer.to_json())
        ids = tokenizer.encode(text).tolist()
        assert other.encode(text).ids == ids
        assert other.decode(ids) == text


@pytest.mark.parametrize("text", TEXTS)
def test_hugging_face_agrees_on_newlines_spaces_unicode_and_the_empty_text(text: str) -> None:
    for tokenizer in both("".join(TEXTS)):
        assert hugging_face_ids(tokenizer, text) == tokenizer.encode(text).tolist()


@pytest.mark.parametrize("text", TEXTS)
def test_a_stream_gives_the_same_text_as_decoding_at_once(text: str) -> None:
    for tokenizer in both("".join(TEXTS)):
        stream = tokenizer.stream()
        pieces = [stream.push(int(token)) for token in tokenizer.encode(text)]
        assert "".join(pieces) + stream.flush() == text


@settings(deadline=None)
@given(st.lists(st.integers(-1, 300), max_size=40))
def test_a_stream_of_any_ids_gives_the_same_text_as_decoding_at_once(ids: list[int]) -> None:
    for tokenizer in both("abc"):
        stream = tokenizer.stream()
        assert "".join([stream.push(token) for token in ids]) + stream.flush() == tokenizer.decode(ids)


def test_a_stream_holds_back_a_character_until_its_last_byte() -> None:
    stream = ByteTokenizer().stream()
    assert [stream.push(byte) for byte in "é🙂".encode()] == ["", "é", "", "", "", "🙂"]
    assert stream.push(0xE2) == ""
    assert stream.flush() == "\ufffd"


def test_an_id_of_the_byte_tokenizer_is_its_byte() -> None:
    assert ByteTokenizer().encode("Aé").tolist() == [0x41, 0xC3, 0xA9]
    assert ByteTokenizer().vocab_size == 256


def test_the_byte_alphabet_is_that_of_hugging_face() -> None:
    pre_tokenizers = pytest.importorskip("tokenizers").pre_tokenizers
    alphabet = byte_alphabet()
    assert sorted(alphabet) == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert [alphabet[byte] for byte in (0x20, 0x0A, 0x41, 0xFF)] == ["Ġ", "Ċ", "A", "ÿ"]


def test_characters_have_ids_in_sorted_order() -> None:
    tokenizer = CharTokenizer.from_text("banana é\n")
    assert tokenizer.chars == ("\n", " ", "a", "b", "n", "é")
    assert tokenizer.encode("nab").tolist() == [4, 2, 3]


def test_an_unknown_character_is_named() -> None:
    tokenizer = CharTokenizer.from_text("abc")
    with pytest.raises(UserError, match="prompt: the character 'é' is not in the char tokenizer's vocabulary of 3; ") as caught:
        tokenizer.encode("abé", "prompt")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"the characters '0', '1', '2', '3', '4' and 2 more are not in"):
        tokenizer.encode("a0123456")
    with pytest.raises(UserError, match="the character 'a' is not in the char tokenizer's vocabulary of 0"):
        CharTokenizer("").encode("a")


def test_half_a_character_is_refused_in_one_line() -> None:
    with pytest.raises(UserError, match=r"prompt: not valid Unicode: '\\udce9' at position 1 is half a character"):
        ByteTokenizer().encode("a\udce9", "prompt")
    with pytest.raises(UserError, match=r"the character '\\udce9' is not in"):
        CharTokenizer("a").encode("a\udce9")


def test_repeated_or_longer_symbols_make_no_char_tokenizer() -> None:
    for chars in (["a", "a"], ["ab"], [""]):
        with pytest.raises(ValueError, match="single characters, all different"):
            CharTokenizer(chars)


@pytest.mark.parametrize("target", ["tokenizer.json", "other.json", "."])
def test_built_in_tokenizers_are_saved_and_loaded_without_the_extra(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    for tokenizer in both("".join(TEXTS)):
        tokenizer.save(tmp_path / target)
        loaded = load_tokenizer(tmp_path / target)
        assert type(loaded) is type(tokenizer)
        assert loaded.to_json() == tokenizer.to_json()
        assert loaded.encode(TEXTS[2]).tolist() == tokenizer.encode(TEXTS[2]).tolist()


def test_the_empty_vocabulary_is_saved_and_loaded(tmp_path: Path) -> None:
    CharTokenizer("").save(tmp_path)
    assert load_tokenizer(tmp_path).vocab_size == 0


def test_another_tokenizer_json_without_the_extra_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = json.loads(CharTokenizer("ab").to_json())
    table["normalizer"] = {"type": "Lowercase"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(table), encoding="utf-8")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=re.escape(install("hf"))):
        load_tokenizer(tmp_path)


def train_bpe(path: Path) -> Path:
    """A byte-level BPE of 300 tokens with a special token that templates add, truncation and padding."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<s>"], show_progress=False)
    tokenizer.train_from_iterator(["the cat and the hat and the bat sat on the mat with the rat"], trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(path))
    return path


def test_any_other_tokenizer_json_is_read_and_kept_as_it_is(tmp_path: Path) -> None:
    path = train_bpe(tmp_path / "bpe.json")
    tokenizer = load_tokenizer(path)
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    text = "the cat, the hat — 🙂 and the mat " * 20
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert 100 < len(ids) < len(text.encode())  # merged; neither cut nor padded
    assert 0 not in ids  # no special token added
    assert ids.max() < tokenizer.vocab_size
    assert tokenizer.decode(ids) == text
    tokenizer.save(tmp_path)
    assert (tmp_path / "tokenizer.json").read_text(encoding="utf-8") == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("text", TEXTS)
def test_any_other_tokenizer_streams_whole_characters(text: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(train_bpe(tmp_path / "bpe.json"))
    stream = tokenizer.stream()
    pieces = [stream.push(int(token)) for token in tokenizer.encode(text)]
    assert "".join(pieces) + stream.flush() == text
    cut = tokenizer.encode("the 🙂")[:-1]
    stream = tokenizer.stream()
    assert "".join([stream.push(int(token)) for token in cut]) == "the "
    assert stream.flush() == "\ufffd"


@pytest.mark.parametrize(
    "content, message",
    [
        (b"{", "not a tokenizer.json"), (b"\xff", "not UTF-8"), (b"{}", "not a tokenizer.json"), (b'{"model": 3}', "not a tokenizer.json"),
        (b"[" * 100_000, "not a tokenizer.json: nested more than 100 deep"),
        (b'{"version": ' + b"9" * 5000 + b"}", "a number that is too long"),
        (b'{"version": "\\ud800"}', "half of a Unicode surrogate pair"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_a_tokenizer_json_is_one_clear_error(content: bytes, message: str, tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    (tmp_path / "bad.json").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_tokenizer(tmp_path / "bad.json")
    assert "bad.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_expression_that_makes_the_library_panic_is_one_clear_error(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    table = json.loads(CharTokenizer("ax").to_json())
    table["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": False}
    (tmp_path / "slow.json").write_text(json.dumps(table))
    tokenizer = load_tokenizer(tmp_path / "slow.json")
    assert tokenizer.encode("a").tolist() == [0]
    for encode in (tokenizer.encode, tokenizer.encode_prompt):
        with pytest.raises(UserError, match=r"slow\.json cannot encode it: Onig: Regex search error: retry-limit-in-match over$"):
            encode("x" * 40)


def test_only_errors_of_the_library_become_errors_of_the_user() -> None:
    for other in (KeyboardInterrupt, SystemExit):
        with pytest.raises(other), library_errors("a.json: not a tokenizer.json"):
            raise other


def test_a_tokenizer_is_made_by_name_or_path(tmp_path: Path) -> None:
    assert make_tokenizer("byte", "").vocab_size == 256
    assert make_tokenizer("char", "hello").vocab_size == 4
    CharTokenizer("ab").save(tmp_path / "mine.json")
    assert make_tokenizer("mine.json", "", tmp_path).vocab_size == 2
    assert make_tokenizer(str(tmp_path / "mine.json"), "").vocab_size == 2


def test_an_unknown_name_gets_the_nearest_one() -> None:
    with pytest.raises(UserError, match=r"data.tokenizer = 'bytes' .* \(did you mean 'byte'\?\)"):
        make_tokenizer("bytes", "")
    with pytest.raises(UserError, match=r"'gpt2\.json': no such file"):
        make_tokenizer("gpt2.json", "")
    with pytest.raises(UserError, match="cannot be read: No such file"):
        load_tokenizer(Path("nowhere/tokenizer.json"))
