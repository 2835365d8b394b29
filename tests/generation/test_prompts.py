"""Prompts: what is added to them, the text that follows them, and what a user is told of the parts that do not reach the model."""

import warnings
from pathlib import Path
from typing import Any

import made_tokenizers
import numpy as np
import pytest
from command_line import call, one_line
from made_tokenizers import KINDS, PLAIN

import minimoe as mm
from minimoe.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from minimoe.engine.tensor import Tensor
from minimoe.errors import Notice, UserError
from minimoe.generation.generation import Sampling, default_prompt, generate, generate_batch, generate_ids, generate_texts

GREEDY = Sampling(temperature=0.0)
ENCODER = {"causal": False, "head": "mlm", "position": "learned", "norm": "layer", "norm_position": "post", "bias": True,
           "attention_bias": True, "activation": "gelu", "tie_embeddings": True, "norm_eps": 1e-12, "type_vocab_size": 2,
           "pad_token_id": 0}  # fmt: skip


def small(vocab_size: int, limit: int = 64, **changes: Any) -> Any:
    shape = {"d_model": 8, "n_heads": 2, "n_layers": 1, "d_hidden": 8, "max_seq_len": limit, "vocab_size": vocab_size}
    return mm.Transformer(mm.ModelConfig(**{**shape, **changes}), backend=mm.set_backend("numpy"))


class Reciting(mm.Transformer):  # type: ignore[valid-type, misc]
    """Predicts fixed ids, one after the other, in every row, and keeps the prompts that it has read."""

    def __init__(self, ids: Any, vocab_size: int) -> None:
        super().__init__(small(vocab_size).config, backend=mm.set_backend("numpy"))
        self.left, self.read = list(ids), list[Any]()

    def hidden(self, tokens: Any, *args: Any, **options: Any) -> Any:
        self.read.append(np.asarray(tokens).tolist())
        return super().hidden(tokens, *args, **options)

    def logits(self, x: Tensor) -> Tensor:
        logits = np.zeros(super().logits(x).shape)
        logits[:, -1, self.left.pop(0)] = 1.0
        return Tensor(logits, self.backend)


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    return load_tokenizer(made_tokenizers.write(request.param, tmp_path))


def folder_of(model: Any, tokenizer: Any, path: Path) -> Path:
    """A model folder with a tokenizer of the `tokenizers` library."""
    model.save_pretrained(path)
    tokenizer.save(str(path / "tokenizer.json"))
    return path


# ---- the text that follows a prompt ----------------------------------------------------------------------------------------------


def continuation(tokenizer: Tokenizer, prompt: str, after: str) -> tuple[Reciting, int]:
    """A model that recites the ids of a text after its beginning, and how many these are."""
    begin, whole = tokenizer.encode_prompt(prompt), tokenizer.encode_prompt(prompt + after)
    assert whole[: len(begin)].tolist() == begin.tolist()
    return Reciting(whole[len(begin) :], tokenizer.vocab_size), len(whole) - len(begin)


def test_the_text_that_follows_a_prompt_begins_with_its_space(tokenizer: Tokenizer) -> None:
    model, n = continuation(tokenizer, "the router", " sends every token")
    assert "".join(generate(model, tokenizer, "the router", n, GREEDY)) == " sends every token"
    assert model.read[0] == [tokenizer.encode_prompt("the router").tolist()], "and nothing after the prompt"


def test_the_texts_of_a_batch_begin_with_their_spaces(tokenizer: Tokenizer) -> None:
    model, n = continuation(tokenizer, "the router", " sends every token")
    texts = dict(generate_texts(model, tokenizer, ["the router", "two experts"], n, GREEDY))
    assert texts == {0: " sends every token", 1: " sends every token"}


def test_a_stop_string_may_begin_with_the_space_after_the_prompt(tokenizer: Tokenizer) -> None:
    for stop, left in ((" sends", ""), (" every", " sends"), ("s every", " send")):
        model, n = continuation(tokenizer, "the router", " sends every token")
        assert "".join(generate(model, tokenizer, "the router", n, Sampling(0.0, stop=(stop,)))) == left


def test_without_a_prompt_a_text_begins_with_what_begins_every_text(tmp_path: Path) -> None:
    found = {}
    for kind in KINDS:
        (tmp_path / kind).mkdir()
        found[kind] = default_prompt(load_tokenizer(made_tokenizers.write(kind, tmp_path / kind)))
    assert found == {"wordpiece": "", "sentencepiece": "\n", "metaspace": "", "unigram": "\n", "byte-level": "\n"}


# ---- tokens that the embedding lacks ---------------------------------------------------------------------------------------------


def extended() -> tuple[Any, int]:
    """A tokenizer to which a token was added, and how many it had before."""
    made = made_tokenizers.wordpiece()
    rows = made.get_vocab_size()
    made.add_tokens(["<new>"])
    return made, rows


LACKS = r"has the token '<new>' \(id {0}\), which the model lacks: its embedding has {0} rows, the tokenizer {1} tokens"


def test_a_token_that_the_embedding_lacks_is_one_line_where_a_prompt_has_it(tmp_path: Path, capsys: Any) -> None:
    made, rows = extended()
    path = folder_of(small(rows), made, tmp_path / "model")
    model = mm.load(path)
    assert len("".join(generate(model, model.tokenizer, "the router", 3))) > 0
    for start in (lambda p: generate(model, model.tokenizer, p), lambda p: generate_texts(model, model.tokenizer, ["the", p])):
        with pytest.raises(UserError, match="prompt: " + LACKS.format(rows, rows + 1)):
            start("the <new> router")
    code, out, err = call(capsys, "generate", str(path), "--prompt", "the <new>")
    assert (code, out) == (2, "") and "'<new>'" in one_line(err)
    assert call(capsys, "generate", str(path), "--prompt", "the router", "--tokens", "2")[0] == 0


@pytest.mark.parametrize("changes", [{}, ENCODER], ids=["next token", "masked"])
def test_a_text_without_the_tokens_that_the_embedding_lacks_is_measured(changes: Any, tmp_path: Path, capsys: Any) -> None:
    made = made_tokenizers.wordpiece()
    rows = made.get_vocab_size()
    model = small(rows, **changes)
    paths = [folder_of(model, made, tmp_path / "plain")]
    made.add_tokens(["<new>"])
    paths.append(folder_of(model, made, tmp_path / "extended"))
    text = tmp_path / "text.txt"
    text.write_text(PLAIN * 30, encoding="utf-8")
    results = [call(capsys, "eval", str(path), "--data", str(text)) for path in paths]
    assert [code for code, _, _ in results] == [0, 0]
    plain, other = (out.partition(": ")[2] for _, out, _ in results)
    assert plain == other and "loss " in plain
    text.write_text(PLAIN * 3 + " a <new> router", encoding="utf-8")
    code, out, err = call(capsys, "eval", str(paths[1]), "--data", str(text))
    assert (code, out) == (2, "") and one_line(err).startswith(f"{text}: has the token '<new>' (id {rows})")


# ---- a prompt that is longer than the context ------------------------------------------------------------------------------------


def warned(start: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        start()
    assert all(warning.category is Notice for warning in found)
    return [str(warning.message) for warning in found]


def test_a_prompt_that_is_longer_than_the_context_is_said() -> None:
    model, tokenizer = small(256, limit=8), ByteTokenizer()
    said = "the prompt has 11 tokens: the model's context holds its last 8, and the others are not read"
    assert warned(lambda: generate(model, tokenizer, "hello there", 3)) == [said]
    assert warned(lambda: generate_ids(model, list(range(11)), 3)) == [said]
    several = warned(lambda: generate_texts(model, tokenizer, ["hello there", "a", "123456789"], 3))
    assert several == [said.replace("the prompt", "prompt 1 of 3"),
                       "prompt 3 of 3 has 9 tokens: the model's context holds its last 8, and the others are not read"]  # fmt: skip


def test_a_prompt_that_fits_or_a_model_without_an_end_of_its_context_is_not_said() -> None:
    assert warned(lambda: generate_batch(small(256, limit=8), [range(8), range(3)], 30)) == []
    assert warned(lambda: generate_batch(small(256, limit=8, sliding_window=4), [range(30)], 3)) == []


# ---- the command line ------------------------------------------------------------------------------------------------------------


def test_the_command_says_what_of_a_prompt_is_not_read_before_it_shows_text(tmp_path: Path, capsys: Any) -> None:
    made = made_tokenizers.metaspace()
    path = folder_of(small(made.get_vocab_size(), limit=8), made, tmp_path / "model")
    how = ["generate", str(path), "--tokens", "4", "--temperature", "0"]
    code, out, err = call(capsys, *how, "--prompt", "the é router é ü sends every token")
    n = len(mm.load(path).tokenizer.encode_prompt("the é router é ü sends every token"))
    dropped = "minimoe: tokenizer.json drops 3 characters of the prompt that it has no token for: 'é', 'ü'\n"
    cut = f"minimoe: the prompt has {n} tokens: the model's context holds its last 8, and the others are not read\n"
    assert (code, err) == (0, dropped + cut) and out.startswith("the é router é ü sends every token")
    code, out, err = call(capsys, *how, "--prompt", "the", "--prompt", "the é")
    assert (code, err) == (0, dropped.replace("3 characters", "1 character").replace(", 'ü'", ""))
    assert call(capsys, *how, "--prompt", "the")[2] == ""


def test_the_command_shows_the_space_after_the_prompt(tmp_path: Path, capsys: Any) -> None:
    made = made_tokenizers.wordpiece()
    path = folder_of(small(made.get_vocab_size()), made, tmp_path / "model")
    model = mm.load(path)
    ids = [int(i) for i in model.tokenizer.encode_prompt("the router")]
    more = list(generate_ids(model, ids, 5, GREEDY))
    out = call(capsys, "generate", str(path), "--prompt", "the router", "--tokens", "5", "--temperature", "0")[1]
    assert f"[CLS] {out}" == model.tokenizer.decode([*ids, *more]) + "\n"


# ---- a model's own encode --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [ENCODER, {**ENCODER, "head": "none", "tie_embeddings": False}], ids=["masked", "bare"])
def test_an_encoder_reads_a_text_with_the_whole_template(changes: Any, tmp_path: Path) -> None:
    made = made_tokenizers.wordpiece()
    model = mm.load(folder_of(small(made.get_vocab_size(), **changes), made, tmp_path / "model"))
    ids = model.encode("the router sends")
    assert ids.tolist() == made.encode("the router sends").ids
    assert [made.id_to_token(int(ids[i])) for i in (0, -1)] == ["[CLS]", "[SEP]"]
    assert model(ids[None]).shape[:2] == (1, len(ids))


def test_a_causal_model_reads_a_text_that_may_go_on(tmp_path: Path) -> None:
    made = made_tokenizers.wordpiece()
    model = mm.load(folder_of(small(made.get_vocab_size()), made, tmp_path / "model"))
    assert model.encode("the router").tolist() == made.encode("the router").ids[:-1]


def test_encode_says_what_the_tokenizer_drops(tmp_path: Path) -> None:
    made = made_tokenizers.metaspace()
    model = mm.load(folder_of(small(made.get_vocab_size()), made, tmp_path / "model"))
    said = "tokenizer.json drops 1 character of the text that it has no token for: 'é'"
    assert warned(lambda: model.encode("the é")) == [said] and warned(lambda: model.encode("the")) == []


def test_a_text_that_a_model_cannot_read_is_refused_by_encode(tmp_path: Path) -> None:
    made, rows = extended()
    model = mm.load(folder_of(small(rows), made, tmp_path / "model"))
    with pytest.raises(UserError, match="text: " + LACKS.format(rows, rows + 1)):
        model.encode("a <new> router")
    with pytest.raises(UserError, match="this model has no tokenizer"):
        small(20).encode("a")


def test_ids_without_a_token_cost_as_much_as_others_and_add_nothing(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """An embedding may have more rows than its tokenizer has tokens. A stream that waited for their text would read all again each time."""
    decoded, decode = list[int](), type(tokenizer).decode

    def counted(self: Any, ids: Any) -> str:
        decoded.append(len(ids))
        return decode(self, ids)

    prompt, after = tokenizer.encode_prompt("the router").tolist(), tokenizer.encode(PLAIN).tolist()
    stream = tokenizer.stream(prompt)
    monkeypatch.setattr(type(tokenizer), "decode", counted)
    holes = [tokenizer.vocab_size + 7] * 500
    pieces = [stream.push(token) for token in [*holes, *after, *holes]] + [stream.flush()]
    assert sum(decoded) < 20 * (len(prompt) + len(after)), "ids that were decoded"
    assert decode(tokenizer, prompt) + "".join(pieces) == decode(tokenizer, [*prompt, *holes, *after, *holes])
