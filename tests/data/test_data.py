"""Data: sources, splits, domains, and batches that depend on nothing but their arguments."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

import minimoe.data.batches
from minimoe.config import DataConfig
from minimoe.data.batches import IGNORE, batch, batch_starts, sample_windows, take_windows, windows
from minimoe.data.corpus import Corpus, load_corpus
from minimoe.data.sources import CODE_BYTES, python_code
from minimoe.data.tokenizer import CharTokenizer
from minimoe.errors import UserError

SHAKESPEARE = os.environ.get("MINIMOE_SHAKESPEARE")


def corpus_of(tmp_path: Path, text: str, val_fraction: float = 0.1, tokenizer: str = "byte") -> Corpus:
    (tmp_path / "text.txt").write_text(text, encoding="utf-8", newline="")
    return load_corpus(DataConfig(source="text.txt", tokenizer=tokenizer, val_fraction=val_fraction), tmp_path)


def refusal(source: str, base: Path | None = None, seq_len: int | None = None, val_fraction: float = 0.1) -> str:
    with pytest.raises(UserError) as caught:
        load_corpus(DataConfig(source=source, val_fraction=val_fraction), base, seq_len=seq_len)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---- sources and splits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [20, 31, 100, 1003])
@pytest.mark.parametrize("val_fraction", [0.1, 0.25, 0.5])
def test_the_last_part_of_a_text_is_the_validation_split(n: int, val_fraction: float, tmp_path: Path) -> None:
    text = "".join(chr(97 + i * 7 % 26) for i in range(n))
    corpus = corpus_of(tmp_path, text, val_fraction)
    assert len(corpus.train) == int(n * (1 - val_fraction))
    assert corpus.tokenizer.decode(np.concatenate([corpus.train, corpus.val])) == text
    assert corpus.train.dtype == corpus.val.dtype == np.int32


def test_a_text_is_read_byte_for_byte_and_its_sha256_recorded(tmp_path: Path) -> None:
    text = "naïve\r\nlines\n" * 30
    corpus = corpus_of(tmp_path, text)
    assert corpus.sha256 == hashlib.sha256(text.encode()).hexdigest()
    assert corpus.source == "text.txt"
    assert len(corpus.train) + len(corpus.val) == len(text.encode())
    assert corpus.domains == ()
    assert corpus.train_domains is None
    assert corpus.val_domains is None


def test_the_char_tokenizer_knows_both_splits(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path, "a" * 95 + "zyxwv", tokenizer="char")
    assert corpus.tokenizer.vocab_size == 6
    assert (len(corpus.train), len(corpus.val)) == (90, 10)


def test_a_given_tokenizer_replaces_the_configured_one(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("abab" * 20, encoding="utf-8")
    tokenizer = CharTokenizer("cba")
    corpus = load_corpus(DataConfig(source="text.txt"), tmp_path, tokenizer)
    assert corpus.tokenizer is tokenizer
    assert corpus.train[:4].tolist() == [2, 1, 2, 1]
    with pytest.raises(UserError, match=r"text\.txt: the character 'b' is not in the char tokenizer's vocabulary of 1"):
        load_corpus(DataConfig(source="text.txt"), tmp_path, CharTokenizer("a"))


def test_a_folder_is_its_text_files_in_sorted_order(tmp_path: Path) -> None:
    files = {"b.txt": b"second", "a/z.md": b"first", "c.bin": b"\0\1", "d.txt": b"\xff\xfe", ".hidden": b"no", ".git/x": b"no", "e": b""}
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    corpus = load_corpus(DataConfig(source=str(tmp_path), val_fraction=0.5))
    assert corpus.tokenizer.decode(np.concatenate([corpus.train, corpus.val])) == "first\n\nsecond"


def test_the_docs_that_every_python_has_are_half_a_megabyte_of_text() -> None:
    corpus, again = (load_corpus(DataConfig(), seq_len=128) for _ in range(2))
    assert len(corpus.train) + len(corpus.val) > 300_000
    assert corpus.sha256 == again.sha256
    assert np.array_equal(corpus.train, again.train)


def test_the_code_that_every_python_has_is_whole_files_within_the_limit() -> None:
    code = python_code()
    assert CODE_BYTES // 2 < len(code.encode()) <= CODE_BYTES
    assert "import argparse" in code
    assert code == python_code()


@pytest.mark.parametrize("tokenizer", ["byte", "char"])
def test_the_mix_has_both_domains_throughout_both_splits(tokenizer: str) -> None:
    corpus = load_corpus(DataConfig(source="python-mix", tokenizer=tokenizer))
    assert corpus.domains == ("docs", "code")
    for tokens, domains in ((corpus.train, corpus.train_domains), (corpus.val, corpus.val_domains)):
        assert domains is not None
        assert domains.dtype == np.int8
        assert domains.shape == tokens.shape
        for part in np.array_split(domains, 4):
            assert 0.3 < part.mean() < 0.7
    whole = corpus.tokenizer.decode(np.concatenate([corpus.train, corpus.val]))
    assert corpus.sha256 == hashlib.sha256(whole.encode()).hexdigest()


def test_the_mix_labels_each_token_with_the_source_it_came_from() -> None:
    corpus = load_corpus(DataConfig(source="python-mix"))
    assert corpus.train_domains is not None
    code = python_code()
    edges = np.flatnonzero(np.diff(corpus.train_domains)) + 1
    for number, part in enumerate(np.split(corpus.train, edges)[:10]):
        assert (corpus.tokenizer.decode(part) in code) == bool(number % 2)


# ---- refusals ----------------------------------------------------------------------------------------------------------------


def test_an_unknown_word_gets_the_nearest_source() -> None:
    assert "did you mean 'python-docs'?" in refusal("python-doc")
    assert "known: python-code, python-docs, python-mix" in refusal("zzz")


def test_a_missing_file_or_folder_is_named(tmp_path: Path) -> None:
    assert refusal("nothing.txt", tmp_path).startswith("data.source = 'nothing.txt': no such file or folder")
    assert "no such file or folder" in refusal("no/where")


@pytest.mark.parametrize(
    "content, message",
    [(b"", "bad.txt: empty"), (b"ab\0c", "bad.txt: a binary file (it has NUL bytes)"), (b"ab\xff", "bad.txt: not UTF-8 (byte 0xff at 2)")],
)
def test_a_file_without_text_is_one_clear_error(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(content)
    assert message in refusal("bad.txt", tmp_path)


def test_a_folder_without_text_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"\0")
    assert f"{tmp_path}: no text in this folder" in refusal(str(tmp_path))


def test_a_split_shorter_than_a_window_is_refused_with_what_it_needs(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("x" * 100, encoding="utf-8")
    message = refusal("short.txt", tmp_path, seq_len=9)
    assert "short.txt: too short: the validation split has 10 tokens, windows of train.seq_len = 9 need 11" in message
    assert "the training split has 25 tokens" in refusal("short.txt", tmp_path, seq_len=24, val_fraction=0.75)
    assert len(load_corpus(DataConfig(source="short.txt"), tmp_path, seq_len=8).val) == 10
    (tmp_path / "short.txt").write_text("ab", encoding="utf-8")
    assert "the training split has 1 tokens" in refusal("short.txt", tmp_path)


# ---- batches -----------------------------------------------------------------------------------------------------------------

TOKENS = np.arange(1000, dtype=np.int32)


@pytest.mark.parametrize("batch_size, seq_len", [(1, 1), (3, 31), (4, 32), (2, 999)])
def test_targets_of_a_batch_are_one_position_after_its_inputs(batch_size: int, seq_len: int) -> None:
    inputs, targets = batch(TOKENS, seed=7, step=3, micro=1, batch_size=batch_size, seq_len=seq_len)
    assert inputs.shape == targets.shape == (batch_size, seq_len)
    assert inputs.dtype == targets.dtype == np.int32
    assert inputs.flags.c_contiguous
    assert targets.flags.c_contiguous
    assert np.array_equal(targets, inputs + 1)
    assert np.array_equal(inputs, inputs[:, :1] + np.arange(seq_len))


def test_a_batch_depends_only_on_seed_step_and_micro_batch() -> None:
    def draw(seed: int = 0, step: int = 0, micro: int = 0) -> list[int]:
        starts: list[int] = batch_starts(1_000_000, seed, step, micro, 8, 64).tolist()
        return starts

    assert draw() == draw()
    draws = [draw(), draw(seed=1), draw(step=1), draw(micro=1), draw(seed=2**64 - 1)]
    assert len({tuple(starts) for starts in draws}) == len(draws)


def test_the_domains_of_a_batch_are_those_of_its_windows() -> None:
    starts = batch_starts(len(TOKENS), 0, 5, 0, 4, 16)
    domains = take_windows((TOKENS % 3).astype(np.int8), starts, 16)
    inputs, targets = batch(TOKENS, 0, 5, 0, 4, 16)
    assert np.array_equal(domains[:, :-1], inputs % 3)
    assert np.array_equal(domains[:, 1:], targets % 3)


def test_starts_reach_both_ends_and_are_uniform() -> None:
    starts = batch_starts(20, 0, 0, 0, 16_000, 4)
    counts = np.bincount(starts, minlength=16)
    assert len(counts) == 16
    assert 800 < counts.min() <= counts.max() < 1200


@pytest.mark.parametrize("n_tokens, seq_len", [(2, 1), (1003, 7), (2**31 + 5, 1024)])
def test_a_start_is_the_high_half_of_bits_times_count(n_tokens: int, seq_len: int, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [0, 0, 2**32 - 1, 2**32 - 1, 0x80000000, 0, 0x12345678, 0x9ABCDEF0, 0x7FFFFFFF, 0xFFFFFFFF]

    def bits(count: int, seed: int, stream: str, micro: int, step: int) -> npt.NDArray[np.int64]:
        assert (count, seed, stream, micro, step) == (len(words), 11, "data.batch", 2, 3)
        return np.array(words, np.int64)

    monkeypatch.setattr(minimoe.data.batches, "host_bits", bits)
    starts = batch_starts(n_tokens, 11, 3, 2, len(words) // 2, seq_len)
    pairs = zip(words[::2], words[1::2], strict=True)
    assert starts.tolist() == [(high << 32 | low) * (n_tokens - seq_len) >> 64 for high, low in pairs]


def test_a_text_shorter_than_a_window_gives_no_batch() -> None:
    with pytest.raises(ValueError, match="5 tokens hold no window of seq_len 5"):
        batch(TOKENS[:5], 0, 0, 0, 1, 5)


# ---- evaluation --------------------------------------------------------------------------------------------------------------

Batches = list[tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]]


def checked(batches: Iterable[tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]], batch_size: int, seq_len: int) -> Batches:
    found = list(batches)
    for inputs, targets in found:
        assert inputs.shape == targets.shape == (batch_size, seq_len)
        assert inputs.dtype == targets.dtype == np.int32
        valid = targets != IGNORE
        assert np.array_equal(inputs[valid] + 1, targets[valid])
        assert not inputs[~valid].any()
    return found


@pytest.mark.parametrize("n", [2, 31, 32, 33, 64, 65, 66, 97, 1000])
@pytest.mark.parametrize("batch_size, seq_len", [(1, 32), (2, 16), (3, 7)])
def test_windows_predict_every_target_once(n: int, batch_size: int, seq_len: int) -> None:
    found = checked(windows(TOKENS[:n], seq_len, batch_size), batch_size, seq_len)
    targets = np.concatenate([targets.ravel() for _, targets in found])
    assert targets[targets != IGNORE].tolist() == list(range(1, n))
    assert len(found) == -(-(n - 1) // (batch_size * seq_len))


def test_windows_of_domains_line_up_with_those_of_tokens() -> None:
    for (_, targets), (_, domains) in zip(windows(TOKENS, 7, 3), windows(TOKENS % 2, 7, 3), strict=True):
        valid = targets != IGNORE
        assert np.array_equal(domains[valid], targets[valid] % 2)
        assert (domains[~valid] == IGNORE).all()


def test_sample_windows_are_evenly_spaced_from_end_to_end() -> None:
    found = checked(sample_windows(TOKENS, 10, 2, 3), 2, 10)
    assert len(found) == 3
    starts = np.concatenate([inputs[:, 0] for inputs, _ in found])
    assert starts[0] == 0
    assert starts[-1] == len(TOKENS) - 11
    assert np.ptp(np.diff(starts)) <= 1
    again = sample_windows(TOKENS, 10, 2, 3)
    assert all(np.array_equal(a[0], b[0]) for a, b in zip(found, again, strict=True))


def test_sample_windows_never_exceed_the_split() -> None:
    found = checked(sample_windows(TOKENS, 32, 4, 20), 4, 32)
    targets = np.concatenate([targets.ravel() for _, targets in found])
    assert targets[targets != IGNORE].tolist() == list(range(1, 1000))
    assert len(checked(sample_windows(TOKENS, 32, 1, 1), 1, 32)) == 1


@pytest.mark.skipif(SHAKESPEARE is None, reason="MINIMOE_SHAKESPEARE is not set")
def test_tinyshakespeare_splits_as_nanogpt_splits_it() -> None:
    corpus = load_corpus(DataConfig(source=str(SHAKESPEARE), tokenizer="char"), seq_len=256)
    assert corpus.tokenizer.vocab_size == 65
    assert (len(corpus.train), len(corpus.val)) == (1_003_854, 111_540)
