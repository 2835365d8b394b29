"""Blanks and what may fill them: by bytes, characters and a tokenizer with a mask, in a run and in a model folder."""

import shutil
from pathlib import Path

import made_tokenizers
import numpy as np
import pytest
from model_folders import small, write

import minimoe as mm
from minimoe.data.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer, load_tokenizer
from minimoe.errors import UserError
from minimoe.pretrained.transformer import PretrainedTransformer
from minimoe.study.fill import token_text


def reader(tokenizer: Tokenizer | None, rows: int, **shape: object) -> PretrainedTransformer:
    given = {"d_model": 16, "n_layers": 1, "n_heads": 2, "d_hidden": 32, "max_seq_len": 32, "head": "mlm", "causal": False, **shape}
    model = mm.Transformer(mm.ModelConfig(vocab_size=rows, **given), seed=0)  # type: ignore[arg-type]
    model.tokenizer = tokenizer
    return model


@pytest.mark.parametrize(("tokenizer", "rows"), [(ByteTokenizer(), 257), (CharTokenizer("aeght "), 7)])
def test_each_blank_gets_the_softmax_of_what_the_model_predicts_there(tokenizer: Tokenizer, rows: int) -> None:
    model = reader(tokenizer, rows)
    found = mm.fill(model, "the [MASK]at[MASK]", top=rows + 5)
    ids = np.array([[*tokenizer.encode("the "), rows - 1, *tokenizer.encode("at"), rows - 1]], np.int32)
    with mm.no_grad():
        z = model(ids).numpy()[0].astype(np.float64)
    for place, guesses in zip((4, 7), found.masks, strict=True):
        p = np.exp(z[place]) / np.exp(z[place]).sum()
        assert [guess.id for guess in guesses] == np.argsort(-p, kind="stable").tolist()
        assert np.allclose([guess.probability for guess in guesses], np.sort(p)[::-1], atol=1e-6)
    best = tokenizer.decode([found.masks[0][0].id]), tokenizer.decode([found.masks[1][0].id])
    assert found.text.startswith("the ") and found.text.endswith(f"at{best[1]}") and "[MASK]" not in found.text


def test_a_run_reads_no_special_tokens_and_a_folder_the_whole_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = made_tokenizers.write("wordpiece", tmp_path)
    tokenizer = load_tokenizer(path)
    folder = write(tmp_path / "bert", small("bert", vocab_size=tokenizer.vocab_size))
    shutil.copy(path, folder / "tokenizer.json")  # another one that is made may number its tokens otherwise
    seen = []
    forward = PretrainedTransformer.hidden

    def hidden(self: PretrainedTransformer, tokens: np.ndarray, *more: object, **others: object) -> object:  # type: ignore[type-arg]
        seen.append([tokenizer.token(id) for id in np.asarray(tokens)[0].tolist()])
        return forward(self, tokens, *more, **others)  # type: ignore[arg-type]

    monkeypatch.setattr(PretrainedTransformer, "hidden", hidden)
    mm.fill(mm.load(folder), "the [MASK] expert")
    mm.fill(reader(tokenizer, tokenizer.vocab_size), "the [MASK] expert")
    assert seen[0][0] == "[CLS]" and seen[0][-1] == "[SEP]" and seen[1] == seen[0][1:-1] and seen[1][1] == "[MASK]"


def test_the_bytes_of_one_character_are_joined_and_a_byte_alone_is_a_number() -> None:
    assert token_text(ByteTokenizer(), 0xC3, 256) == "<0xC3>" and token_text(ByteTokenizer(), 256, 256) == "[MASK]"
    assert token_text(ByteTokenizer(), 65, 256) == "A" and token_text(CharTokenizer("ab"), 3, 2) == "<3>"


@pytest.mark.parametrize(
    ("model", "text", "says"),
    [
        (reader(ByteTokenizer(), 256, head="lm", causal=True), "a [MASK]", "head = 'lm'; `minimoe generate`"),
        (reader(ByteTokenizer(), 256), "a [MASK]", "no mask token"),
        (reader(ByteTokenizer(), 257), "nothing hidden", r"has no \[MASK\]"),
        (reader(ByteTokenizer(), 257), "", r"has no \[MASK\]"),
        (reader(ByteTokenizer(), 257), "x" * 40 + "[MASK]", "41 tokens: the model reads at most 32"),
        (reader(CharTokenizer("ab"), 3), "z[MASK]", "'z' is not in the char"),
        (reader(None, 257), "a [MASK]", "no tokenizer"),
    ],
)
def test_what_cannot_be_filled_is_said(model: PretrainedTransformer, text: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        mm.fill(model, text)
