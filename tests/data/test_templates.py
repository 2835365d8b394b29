"""What a tokenizer puts around a text, streams that follow a prompt, and characters that a tokenizer drops."""

import json
import time
from pathlib import Path
from typing import Any

import made_tokenizers
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_tokenizers import AFTER, BEFORE, KINDS, PLAIN

from minimoe.data.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer, check_rows, load_tokenizer, note_of_dropped
from minimoe.errors import UserError


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def tokenizer(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(made_tokenizers.write(kind, tmp_path_factory.mktemp("tokenizer")))


def ids_of(tokenizer: Any, tokens: list[str]) -> list[int]:
    return [tokenizer._tokenizer.token_to_id(token) for token in tokens]


# ---- templates -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [PLAIN, "router", " router", ""])
def test_a_prompt_has_what_precedes_a_text_and_nothing_after_it(kind: str, tokenizer: Tokenizer, text: str) -> None:
    before, inner = ids_of(tokenizer, BEFORE[kind]), tokenizer.encode(text).tolist()
    assert tokenizer.encode_prompt(text).tolist() == before + inner
    assert tokenizer.encode_prompt(text).dtype == np.int32


@pytest.mark.parametrize("text", [PLAIN, "router", ""])
def test_the_template_of_a_text_is_the_librarys(kind: str, tokenizer: Tokenizer, text: str) -> None:
    before, after = ids_of(tokenizer, BEFORE[kind]), ids_of(tokenizer, AFTER[kind])
    assert tokenizer.encode_template(text).tolist() == before + tokenizer.encode(text).tolist() + after
    library: Any = tokenizer
    assert tokenizer.encode_template(text).tolist() == library._tokenizer.encode(text).ids


def test_a_typed_token_that_begins_a_text_is_not_doubled(kind: str, tokenizer: Tokenizer) -> None:
    for token in BEFORE[kind]:
        inner = tokenizer.encode(token + "the router").tolist()
        assert inner[0] == ids_of(tokenizer, [token])[0]
        assert tokenizer.encode_prompt(token + "the router").tolist() == inner
        assert tokenizer.encode_prompt(token).tolist() == inner[:1]


@pytest.mark.parametrize("typed, expected", [("a", "AB a"), ("<A>a", "AB a"), ("<B>a", "AB a"), ("<A><B>a", "AB a"), ("<A><A>a", "ABA a")])
def test_of_several_tokens_before_a_text_those_that_are_typed_are_not_doubled(typed: str, expected: str, tmp_path: Path) -> None:
    library = pytest.importorskip("tokenizers")
    made = library.Tokenizer(library.models.BPE({"<A>": 0, "<B>": 1, "a": 2}, []))
    made.add_special_tokens(["<A>", "<B>"])
    made.post_processor = library.processors.TemplateProcessing(single="<A> <B> $A", special_tokens=[("<A>", 0), ("<B>", 1)])
    made.save(str(tmp_path / "tokenizer.json"))
    ids = [{"A": 0, "B": 1, "a": 2}[letter] for letter in expected.replace(" ", "")]
    assert load_tokenizer(tmp_path).encode_prompt(typed).tolist() == ids


def test_a_template_after_other_processors_is_found(tmp_path: Path) -> None:
    """Llama 3's: bytes, then <|begin|> before a text; and RoBERTa's, a processor of its own."""
    p = pytest.importorskip("tokenizers").processors
    for name, processor in (
        ("llama", p.Sequence([p.ByteLevel(trim_offsets=False), p.TemplateProcessing("<|end|> $A", special_tokens=[("<|end|>", 0)])])),
        ("roberta", p.RobertaProcessing(("<|end|>", 0), ("<|end|>", 0))),
    ):
        made = made_tokenizers.byte_level()
        assert made.token_to_id("<|end|>") == 0
        made.post_processor = processor
        (tmp_path / name).mkdir()
        made.save(str(tmp_path / name / "tokenizer.json"))
        tokenizer = load_tokenizer(tmp_path / name)
        assert tokenizer.encode_prompt("the router").tolist() == [0, *tokenizer.encode("the router").tolist()]
        assert tokenizer.encode_template("the router").tolist()[-1] == (0 if name == "roberta" else tokenizer.encode("router")[-1])


@pytest.mark.parametrize("template", [True, False])
def test_ids_beyond_those_of_any_model_are_one_line_and_take_no_time(template: bool, tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    token = {"id": "<s>", "ids": [2**32 - 8], "tokens": ["<s>"]}
    parts = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    processor = {"type": "TemplateProcessing", "single": parts, "pair": parts, "special_tokens": {"<s>": token}} if template else None
    table = {"model": {"type": "BPE", "vocab": {"a": 2**32 - 9, "<s>": 2**32 - 8}, "merges": []}, "post_processor": processor}
    (tmp_path / "tokenizer.json").write_text(json.dumps(table))
    tokenizer = load_tokenizer(tmp_path)
    for call in (tokenizer.encode, tokenizer.encode_prompt, tokenizer.encode_template):
        with pytest.raises(UserError, match="cannot encode it"):
            call("a")
    if template:
        with pytest.raises(UserError, match="cannot encode it"):
            tokenizer.encode_prompt("")


@pytest.mark.parametrize("made", [ByteTokenizer(), CharTokenizer.from_text(PLAIN)])
def test_bytes_and_characters_have_nothing_around_a_text(made: Tokenizer) -> None:
    assert made.encode_prompt(PLAIN).tolist() == made.encode_template(PLAIN).tolist() == made.encode(PLAIN).tolist()


# ---- streams -------------------------------------------------------------------------------------------------------------------


def pieces(tokenizer: Tokenizer, prompt: Any, ids: Any) -> list[str]:
    stream = tokenizer.stream(prompt)
    return [*(stream.push(int(token)) for token in ids), stream.flush()]


def test_a_prompt_and_the_pieces_after_it_are_the_text_of_all_ids(kind: str, tokenizer: Tokenizer) -> None:
    """Cut anywhere between two tokens."""
    ids = tokenizer.encode_prompt(PLAIN)
    for cut in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:cut]) + "".join(pieces(tokenizer, ids[:cut], ids[cut:]))
        assert text == tokenizer.decode(ids), f"cut at {cut}"


def test_the_space_before_the_first_word_after_a_prompt_is_kept(kind: str, tokenizer: Tokenizer) -> None:
    whole, prompt = tokenizer.encode_prompt("the router sends"), tokenizer.encode_prompt("the router")
    assert whole[: len(prompt)].tolist() == prompt.tolist()
    assert "".join(pieces(tokenizer, prompt, whole[len(prompt) :])) == " sends"


@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_pieces_after_any_ids_join_to_the_text_of_all(data: st.DataObject, tokenizer: Tokenizer, kind: str) -> None:
    """Single bytes that are no text are replaced one by one in a stream, all together at once: they are left out here."""
    usable = [i for i in range(tokenizer.vocab_size) if "\ufffd" not in tokenizer.decode([i])]
    ids = data.draw(st.lists(st.sampled_from(usable), min_size=1, max_size=12))
    cut = data.draw(st.integers(1, len(ids)))
    assert tokenizer.decode(ids[:cut]) + "".join(pieces(tokenizer, ids[:cut], ids[cut:])) == tokenizer.decode(ids)


def test_characters_of_several_tokens_come_whole_after_a_prompt(tmp_path: Path) -> None:
    for kind in ("sentencepiece", "byte-level"):
        tokenizer = load_tokenizer(made_tokenizers.write(kind, tmp_path))
        whole, prompt = tokenizer.encode_prompt("the router 漢é!"), tokenizer.encode_prompt("the router")
        found = [piece for piece in pieces(tokenizer, prompt, whole[len(prompt) :]) if piece]
        assert "".join(found) == " 漢é!" and not any("\ufffd" in piece for piece in found)


# ---- characters that are dropped -----------------------------------------------------------------------------------------------


def test_characters_without_a_token_are_counted_where_they_are_dropped(kind: str, tokenizer: Tokenizer) -> None:
    """Only a byte-pair encoding with neither an unknown token nor bytes drops them."""
    assert tokenizer.dropped(PLAIN) == {}
    assert tokenizer.dropped("the é router ü漢é\t") == ({"é": 2, "ü": 1, "漢": 1, "\t": 1} if kind == "metaspace" else {})
    assert ByteTokenizer().dropped("é") == CharTokenizer("a").dropped("a") == {}


def test_a_character_within_an_added_token_is_not_dropped(tmp_path: Path) -> None:
    made = made_tokenizers.metaspace()
    made.add_tokens(["<né>"])
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.dropped("the <né> router") == {}
    assert tokenizer.dropped("the <né> é") == {"é": 1}


@pytest.mark.parametrize("mark", ["continuing_subword_prefix", "end_of_word_suffix"])
def test_a_character_whose_token_has_a_mark_of_its_place_is_not_dropped(mark: str, tmp_path: Path) -> None:
    t = pytest.importorskip("tokenizers")
    vocab = {"t": 0, "h": 1, "##h": 2, "h~": 3}
    made = t.Tokenizer(t.models.BPE(vocab, [], **{mark: "##" if mark == "continuing_subword_prefix" else "~"}))
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert len(tokenizer.encode("th")) == 2 and tokenizer.dropped("th") == {} and tokenizer.dropped("the") == {"e": 1}


def test_every_character_is_dropped_that_the_counts_name(tmp_path: Path) -> None:
    """The text without them has the same ids, and each of the others changes the ids."""
    tokenizer = load_tokenizer(made_tokenizers.write("metaspace", tmp_path))
    text = "the rou\u0301té 漢 gateXY"
    lost = tokenizer.dropped(text)
    kept = "".join(char for char in text if char not in lost)
    assert set(lost) == {"\u0301", "é", "漢", "X", "Y"} and tokenizer.decode(tokenizer.encode(text)) == kept


def test_the_note_counts_the_characters_and_shows_the_commonest(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(made_tokenizers.write("metaspace", tmp_path))
    note = "tokenizer.json drops 1 character of the prompt that it has no token for: 'é'"
    assert note_of_dropped(tokenizer, "the é", "the prompt") == (note,)
    note = "tokenizer.json drops 10 characters of a.txt that it has no token for: 'é', '0', '1', '2', '3' and 4 more"
    assert note_of_dropped(tokenizer, "éé01234567", "a.txt") == (note,)
    assert note_of_dropped(tokenizer, PLAIN, "a.txt") == ()


# ---- tokens that the embedding lacks -------------------------------------------------------------------------------------------


def test_a_token_that_the_embedding_lacks_is_named_only_where_a_text_has_it(tmp_path: Path) -> None:
    made = made_tokenizers.wordpiece()
    rows = made.get_vocab_size()
    made.add_tokens(["<new>"])
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    check_rows(tokenizer, tokenizer.encode("the router"), rows, "prompt")
    check_rows(tokenizer, tokenizer.encode("the <new> router"), rows + 1, "prompt")
    with pytest.raises(UserError) as caught:
        check_rows(tokenizer, tokenizer.encode("the <new> router"), rows, "prompt")
    assert str(caught.value) == (
        f"prompt: has the token '<new>' (id {rows}), which the model lacks: its embedding has {rows} rows, "
        f"the tokenizer {rows + 1} tokens; leave the token out of the text, or resize the embedding"
    )


def test_many_different_characters_that_are_dropped_are_counted_in_one_pass(tmp_path: Path) -> None:
    """A text in another script than the tokenizer's has thousands of them: one search of the text for each would take a minute."""
    characters = "".join(chr(0x4E00 + i) for i in range(20_000))
    tokenizer, text = load_tokenizer(made_tokenizers.write("metaspace", tmp_path)), characters * 100 + PLAIN
    start = time.process_time()
    assert tokenizer.dropped(text) == dict.fromkeys(characters, 100)
    assert time.process_time() - start < 10
