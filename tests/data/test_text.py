"""Text as it lies on disks or comes through pipes: compressed, in UTF-16, behind a byte order mark, among other files."""

import codecs
import gzip
import hashlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minimoe.config import DataConfig
from minimoe.data import corpus as corpus_module
from minimoe.data import pipes, text
from minimoe.data.corpus import Corpus, load_corpus, whole_corpus
from minimoe.errors import UserError

packed = partial(gzip.compress, mtime=0)  # without the time, so that the tests have the same names in each process
TEXT = "naïve tokens wait, and the expert sorts them\n" * 20
POSIX = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")


def load(path: Path) -> Corpus:
    return load_corpus(DataConfig(source=str(path), tokenizer="char"))


def text_of(corpus: Corpus) -> str:
    return corpus.tokenizer.decode(np.concatenate([corpus.train, corpus.val]))


def refusal(path: str | Path) -> str:
    with pytest.raises(UserError) as caught:
        load_corpus(DataConfig(source=str(path)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- encodings and compression ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [
    TEXT.encode("utf-8-sig"), codecs.BOM_UTF16_LE + TEXT.encode("utf-16-le"), codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"),
    packed(TEXT.encode()), packed(TEXT[:100].encode()) + packed(TEXT[100:].encode()),
    packed(TEXT.encode("utf-16")),
], ids=["utf-8-sig", "utf-16-le", "utf-16-be", "gzip", "gzip in two parts", "gzip of utf-16"])  # fmt: skip
def test_the_text_is_what_a_reader_sees(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(data)
    corpus = load(tmp_path / "text")
    assert text_of(corpus) == TEXT
    assert corpus.sha256 == hashlib.sha256(TEXT.encode()).hexdigest()


def test_a_mark_that_is_left_out_is_said(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8-sig")
    assert load(tmp_path / "text.txt").notes == (f"{tmp_path / 'text.txt'}: its byte order mark is left out",)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    assert load(tmp_path / "text.txt").notes == ()


@pytest.mark.parametrize("data, says", [
    (packed(TEXT.encode())[:-9], "damaged gzip data"),
    (packed(TEXT.encode())[:-8] + bytes(8), "damaged gzip data"),
    (b"\x1f\x8b\x08\x00nonsense beyond the header", "damaged gzip data"),
    (packed(b"ab\0c"), "a binary file (it has NUL bytes)"),
    (packed(b"ab\xff"), "not UTF-8 (byte 0xff at 2)"),
    (codecs.BOM_UTF16_LE + b"abc", "not UTF-16"),
    (codecs.BOM_UTF16_LE + "a\0b".encode("utf-16-le"), "a binary file (it has NUL bytes)"),
])  # fmt: skip
def test_what_is_no_text_is_refused_with_its_name(data: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "bad").write_bytes(data)
    assert refusal(tmp_path / "bad").startswith(f"{tmp_path / 'bad'}: {says}")


def bomb(path: Path, size: int) -> Path:
    """Write a small file that unfolds to a large one."""
    with gzip.open(path, "wb") as file:
        for start in range(0, size, 1_000_000):
            file.write(b"x" * min(1_000_000, size - start))
    assert path.stat().st_size < size // 100
    return path


@pytest.mark.parametrize("inside", [False, True])
def test_compressed_data_are_bounded_by_the_room_for_their_tokens(inside: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_module, "room", lambda: 10_000_000.0)
    path = bomb(tmp_path / "bomb.gz", 100_000_000)
    path = tmp_path if inside else path
    assert refusal(path).startswith(f"{path}: more than 10.0 MB of text: the disk of the cache has no room for its tokens")


def test_a_folder_leaves_out_binary_files_that_are_larger_than_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "good.txt").write_text(TEXT, encoding="utf-8")
    (tmp_path / "archive.tar.gz").write_bytes(packed(b"name" + bytes(3_000_000)))
    with open(tmp_path / "film", "wb") as file:
        file.truncate(10**12)
    corpus = load(tmp_path)
    assert text_of(corpus) == TEXT
    assert len(corpus.notes) == 1 and corpus.notes[0].startswith(f"{tmp_path}: 2 binary files (1000 GB) are left out")


# ---- a text that a run began with in an earlier version --------------------------------------------------------------------------


def test_a_text_whose_digest_was_recorded_with_its_mark_is_read_with_it(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8-sig")
    recorded = hashlib.sha256(path.read_bytes()).hexdigest()
    corpus = whole_corpus(DataConfig(source=str(path), tokenizer="char"), sha256=recorded)
    assert corpus.sha256 == recorded and text_of(corpus).startswith("\ufeffna")
    other = whole_corpus(DataConfig(source=str(path), tokenizer="char"), sha256="of another text")
    assert other.sha256 == hashlib.sha256(TEXT.encode()).hexdigest()


def test_a_folder_whose_digest_was_recorded_without_utf_16_is_read_without_it(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("plain " * 9, encoding="utf-8")
    (tmp_path / "b.txt").write_text("wide", encoding="utf-16")
    (tmp_path / "c.gz").write_bytes(packed(b"packed"))
    assert text_of(whole_corpus(DataConfig(source=str(tmp_path), tokenizer="char"))).endswith("plain \n\nwide\n\npacked")
    recorded = hashlib.sha256(b"plain " * 9).hexdigest()
    corpus = whole_corpus(DataConfig(source=str(tmp_path), tokenizer="char"), sha256=recorded)
    assert corpus.sha256 == recorded
    assert any("as when the run began" in note for note in corpus.notes)


# ---- folders ---------------------------------------------------------------------------------------------------------------------


def test_a_folder_says_how_much_of_its_text_is_left_out(tmp_path: Path) -> None:
    for number in range(5):
        (tmp_path / f"latin-{number}.txt").write_bytes(b"caf\xe9" * 100)
    (tmp_path / "good.txt").write_text(TEXT, encoding="utf-8")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "broken.gz").write_bytes(b"\x1f\x8b\x08\x00nonsense")
    corpus = load(tmp_path)
    assert text_of(corpus) == TEXT
    assert corpus.notes == (
        f"{tmp_path}: 5 files (2.0 kB) are left out, since they are not UTF-8: latin-0.txt, latin-1.txt, latin-2.txt, and 2 more",
        f"{tmp_path}: 2 binary files (18 B) are left out",
    )


def test_a_folder_of_clean_text_has_nothing_to_say(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text(TEXT, encoding="utf-8")
    assert load(tmp_path).notes == ()


# ---- pipes -----------------------------------------------------------------------------------------------------------------------


@contextmanager
def writing(path: Path, write: Callable[[int], None]) -> Iterator[None]:
    """Write into a named pipe from another thread."""

    def run() -> None:
        descriptor = os.open(path, os.O_WRONLY)
        try:
            write(descriptor)
        finally:
            os.close(descriptor)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield
    thread.join(timeout=20)
    assert not thread.is_alive()


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "pipe")
    return tmp_path / "pipe"


@POSIX
@pytest.mark.parametrize(
    "data",
    [TEXT.encode(), packed(TEXT.encode()), ("\ufeff" + TEXT).encode("utf-8-sig"), TEXT.encode() * 3000],
    ids=["plain", "packed", "marked", "long"],
)
def test_a_pipe_is_read_to_its_end_and_kept(fifo: Path, data: bytes, tmp_path: Path) -> None:
    def write(descriptor: int) -> None:
        for start in range(0, len(data), 50_000):
            os.write(descriptor, data[start : start + 50_000])

    with writing(fifo, write):
        corpus = load(fifo)
    assert corpus.kept is not None
    (tmp_path / "kept.txt").write_bytes(corpus.kept)
    again = load(tmp_path / "kept.txt")
    assert again.sha256 == corpus.sha256 and text_of(again) == text_of(corpus)
    assert again.kept is None


@POSIX
def test_a_pipe_that_delivers_nothing_is_said_and_then_refused(
    fifo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pipes, "SAY_AFTER", 0.05)
    monkeypatch.setattr(pipes, "GIVE_UP_AFTER", 0.3)
    began = time.monotonic()
    holder = os.open(fifo, os.O_RDWR)  # a writer that never writes
    message = refusal(fifo)
    assert 0.3 <= time.monotonic() - began < 3
    assert message.startswith(f"{fifo}: nothing came through this pipe in 0.3 seconds")
    assert f"waiting for data from the pipe {fifo}" in capsys.readouterr().err
    os.close(holder)
    assert "nothing came through" in refusal(fifo)  # nobody opened it to write either


@POSIX
def test_a_pause_after_the_first_byte_is_waited_for(
    fifo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pipes, "GIVE_UP_AFTER", 0.3)
    monkeypatch.setattr(pipes, "PROGRESS_AFTER", 0.2)

    def write(descriptor: int) -> None:
        os.write(descriptor, TEXT.encode())
        time.sleep(0.7)
        os.write(descriptor, TEXT.encode())

    with writing(fifo, write):
        assert text_of(load(fifo)) == TEXT * 2
    assert f"reading the pipe {fifo}: 920 B so far" in capsys.readouterr().err


@POSIX
def test_an_empty_pipe_is_empty(fifo: Path) -> None:
    with writing(fifo, lambda descriptor: None):
        assert refusal(fifo).startswith(f"{fifo}: empty")


@POSIX
def test_a_pipe_without_end_is_refused_at_the_bound(fifo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "most_bytes", lambda: 1_000_000)

    def write(descriptor: int) -> None:
        try:
            while True:
                os.write(descriptor, b"y\n" * 20_000)
        except BrokenPipeError:
            pass

    with writing(fifo, write):
        assert refusal(fifo).startswith(f"{fifo}: more than 1.0 MB")


@pytest.mark.skipif(os.name == "nt", reason="devices are files on POSIX systems")
@pytest.mark.parametrize("path, kind", [("/dev/zero", "a device"), ("/dev/random", "a device"), ("/dev/null", "a device")])
def test_a_device_is_refused_at_once(path: str, kind: str) -> None:
    began = time.monotonic()
    assert refusal(path).startswith(f"{path}: {kind}, not text")
    assert time.monotonic() - began < 1


@POSIX
def test_a_socket_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("s")
        assert refusal("s").startswith("s: a socket, not text")


def test_a_path_with_a_control_character_hints_at_the_backslash(tmp_path: Path) -> None:
    assert "single quotes" in refusal("C:\text.txt")


# ---- pieces ----------------------------------------------------------------------------------------------------------------------

ENCODED = [
    lambda t: t.encode(), lambda t: t.encode("utf-8-sig"), lambda t: t.encode("utf-16"),
    lambda t: codecs.BOM_UTF16_BE + t.encode("utf-16-be"), lambda t: gzip.compress(t.encode()),
    lambda t: gzip.compress(t[:5].encode("utf-16") + t[5:].encode("utf-16-le")),
]  # fmt: skip
TEXTS = st.text(st.characters(exclude_characters="\0\ufeff", exclude_categories=["Cs"]), max_size=40)
BYTES = st.binary(min_size=1, max_size=30).filter(lambda data: b"\0" not in data)


@settings(deadline=None)
@given(TEXTS, st.sampled_from(ENCODED), st.integers(3, 20))
def test_chunks_of_any_size_give_the_text_of_the_whole(content: str, encoded: Callable[[str], bytes], size: int) -> None:
    data = encoded(content)
    assert "".join(text.decode(data[start : start + size] for start in range(0, len(data), size))) == content


@settings(deadline=None)
@given(BYTES, st.integers(3, 12), st.sampled_from([b"", codecs.BOM_UTF8]))
def test_a_byte_that_is_no_text_is_named_by_its_place_whatever_the_chunks(data: bytes, size: int, mark: bytes) -> None:
    if data.startswith((text.GZIP, *text.WIDE, codecs.BOM_UTF8)) and not mark:
        return
    whole = mark + data
    chunks = [whole[start : start + size] for start in range(0, len(whole), size)]
    try:
        expected = data.decode()
    except UnicodeDecodeError as error:
        with pytest.raises(text.NotText) as caught:
            list(text.decode(chunks))
        at = error.start + len(mark)
        assert str(caught.value) == f"not UTF-8 (byte 0x{whole[at]:02x} at {at}): data.source needs UTF-8 text"
    else:
        assert "".join(text.decode(chunks)) == expected


def test_a_large_file_of_a_folder_is_left_out_whole_if_its_last_byte_is_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "CHUNK", 100)
    (tmp_path / "a.txt").write_bytes(TEXT.encode() + b"\xff")
    (tmp_path / "b.txt").write_text(TEXT * 2, encoding="utf-8")
    (tmp_path / "c.txt").write_text("short", encoding="utf-8")
    corpus = load(tmp_path)
    assert text_of(corpus) == TEXT * 2 + "\n\nshort"
    assert corpus.notes == (f"{tmp_path}: 1 file (921 B) is left out, since it is not UTF-8: a.txt",)
