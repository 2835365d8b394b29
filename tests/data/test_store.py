"""Tokens in mapped files: made once, the same as in memory, checked when they are opened, and rebuilt where they are damaged."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import made_tokenizers
import numpy as np
import pytest
from command_line import TINY, call, environment
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_runs import weights_of

from minimoe.config import DataConfig, load_config
from minimoe.data import corpus, sources, store
from minimoe.data.arrays import TokenArrays, gather
from minimoe.data.batches import batch, batch_starts, sample_windows, windows
from minimoe.data.corpus import Corpus, load_corpus
from minimoe.data.encoding import encode_documents
from minimoe.data.sources import Document
from minimoe.data.token_files import Column, write_columns
from minimoe.data.tokenizer import ByteTokenizer
from minimoe.errors import Notice, UserError
from minimoe.training.tasks import load_task

TEXT = "naïve tokens wait, and the expert sorts them\n"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of one's own, in which texts of more than 1000 bytes are kept; the folder of the tokens."""
    monkeypatch.setenv("MINIMOE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(corpus, "MOST_IN_MEMORY", 1000)
    monkeypatch.setattr(corpus, "MOST_TO_ENCODE", 1000)
    return tmp_path / "cache" / "data"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A text of 4600 bytes that was written an hour ago."""
    path = tmp_path / "text.txt"
    path.write_text(TEXT * 100, encoding="utf-8", newline="")
    return age(path)


def age(path: Path) -> Path:
    """Let a file be an hour old: what was just written may change again without a new time."""
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns - 3600 * 10**9))
    return path


def load(path: Path, tokenizer: str = "byte") -> Corpus:
    return load_corpus(DataConfig(source=str(path), tokenizer=tokenizer))


def kept(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if path.name != "index")


def the_only(cache: Path) -> Path:
    (name,) = kept(cache)
    return cache / name


# ---- the same as in memory -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", ["byte", "char", *made_tokenizers.KINDS])
def test_kept_tokens_are_those_of_memory(tokenizer: str, cache: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if tokenizer in made_tokenizers.KINDS:
        tokenizer = str(made_tokenizers.write(tokenizer, tmp_path))
    found, again = load(text, tokenizer), load(text, tokenizer)
    monkeypatch.setattr(corpus, "MOST_IN_MEMORY", 10**6)
    monkeypatch.setattr(corpus, "MOST_TO_ENCODE", 10**6)
    expected = load(text, tokenizer)
    for one in (found, again):
        assert one.train.dtype.itemsize <= 2 and not one.train.flags.writeable
        assert np.array_equal(one.train, expected.train) and np.array_equal(one.val, expected.val)
        assert (one.sha256, one.notes) == (expected.sha256, expected.notes)
        assert one.tokenizer.to_json() == expected.tokenizer.to_json()
    assert expected.train.dtype == np.int32


@settings(max_examples=20)
@given(st.integers(0, 1000), st.integers(2, 300), st.integers(1, 40), st.integers(1, 5))
def test_batches_of_mapped_tokens_are_those_of_memory(seed: int, n: int, seq_len: int, size: int) -> None:
    seq_len = min(seq_len, n - 1)
    wide = np.random.default_rng(seed).integers(0, 256, n).astype(np.int32)
    narrow = wide.astype(np.uint8)
    narrow.flags.writeable = False
    pairs = [(batch(wide, seed, 3, 1, size, seq_len), batch(narrow, seed, 3, 1, size, seq_len))]
    pairs += zip(windows(wide, seq_len, size), windows(narrow, seq_len, size), strict=True)
    pairs += zip(sample_windows(wide, seq_len, size, 2), sample_windows(narrow, seq_len, size, 2), strict=True)
    for one, other in pairs:
        for a, b in zip(one, other, strict=True):
            assert a.dtype == b.dtype == np.int32 and np.array_equal(a, b) and b.flags.c_contiguous


def test_more_than_four_thousand_million_tokens_are_reached_to_the_end() -> None:
    n = 3 * 2**32
    starts = batch_starts(n, 0, 0, 0, 4000, 8)
    assert starts.min() < n // 100 and n - n // 100 < starts.max() <= n - 9


DOCUMENTS = st.lists(
    st.builds(
        Document, st.text(alphabet="abé\n", max_size=6), st.integers(0, 2),
        st.none() | st.tuples(st.tuples(st.integers(0, 3), st.integers(3, 7))), st.booleans(),
    ), min_size=1, max_size=6,
)  # fmt: skip


@settings(max_examples=30)
@given(DOCUMENTS, st.booleans())
def test_what_stands_beside_the_tokens_is_kept_too(
    tmp_path_factory: pytest.TempPathFactory, documents: list[Document], with_domains: bool
) -> None:
    def stretches() -> list[object]:
        return list(encode_documents(documents, ByteTokenizer(), "text"))

    expected = gather(stretches(), with_domains)  # type: ignore[arg-type]
    folder = tmp_path_factory.mktemp("columns")
    columns = write_columns(folder, stretches(), "u1", with_domains)  # type: ignore[arg-type]
    for name in TokenArrays.__dataclass_fields__:
        array = getattr(expected, name)
        assert (array is not None) == (name in columns)
        if array is not None:
            found = np.fromfile(folder / name, columns[name].dtype)
            assert isinstance(columns[name], Column) and columns[name].count == len(array) and np.array_equal(found, array)


# ---- once ------------------------------------------------------------------------------------------------------------------------


def test_a_text_is_read_and_encoded_once(cache: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load(text)
    monkeypatch.setattr(sources, "read_pieces", lambda *_: pytest.fail("it was read again"))
    assert np.array_equal(load(text).train, first.train)
    assert len(kept(cache)) == 1


def test_a_text_that_changed_is_another(cache: Path, text: Path) -> None:
    first = load(text)
    text.write_text(TEXT * 99 + TEXT.upper(), encoding="utf-8")
    second = load(age(text))
    assert second.sha256 != first.sha256 and len(kept(cache)) == 2
    assert first.tokenizer.decode(first.val).endswith("sorts them\n")  # its files are still mapped


def test_the_same_text_under_another_name_is_not_encoded_again(cache: Path, text: Path, tmp_path: Path) -> None:
    load(text)
    shutil.copy(text, tmp_path / "copy.txt")
    load(tmp_path / "copy.txt")
    assert len(kept(cache)) == 1


def test_a_text_that_was_just_written_is_read_again(cache: Path, text: Path) -> None:
    os.utime(text)
    load(text)
    before = text.stat()
    text.write_text(TEXT.swapcase() * 100, encoding="utf-8", newline="")
    os.utime(text, ns=(before.st_atime_ns, before.st_mtime_ns))  # as if the file system's clock had not moved on
    assert "NAÏVE" in (corpus := load(text)).tokenizer.decode(corpus.val)


def test_a_short_text_leaves_nothing_in_the_cache(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text(TEXT * 10, encoding="utf-8")
    load(age(tmp_path / "short.txt"))
    assert not cache.exists()


def test_the_folder_is_for_its_user_alone(cache: Path, text: Path) -> None:
    load(text)
    assert [path.stat().st_mode & 0o77 for path in (cache, the_only(cache))] == [0, 0]


# ---- damage ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage, says", [
    ("cut", "tokens has 100 bytes, not 4,600: it is cut or damaged"), ("no tokens", "tokens cannot be read: No such file or directory"),
    ("no header", "header.json is missing"), ("half a header", "header.json is damaged"), ("a wrong type", "no tokens of type f8"),
    ("a negative size", "no tokens of type u1"), ("another text", "its header has another sha256"),
    ("another tokenizer", "its header has another tokenizer_sha256"), ("another version", "its header has another format"),
])  # fmt: skip
def test_damaged_tokens_are_named_and_made_again(damage: str, says: str, cache: Path, text: Path) -> None:
    expected = load(text).train.copy()  # what is mapped would be cut too
    place = the_only(cache)
    header = json.loads((place / "header.json").read_text())
    column = header["columns"]["tokens"]
    match damage:
        case "cut":
            os.truncate(place / "tokens", 100)
        case "no tokens":
            (place / "tokens").unlink()
        case "no header":
            (place / "header.json").unlink()
        case "a wrong type":
            column["dtype"] = "f8"
        case "a negative size":
            column["count"] = -1
        case "another text":
            header["sha256"] = "0" * 64
        case "another tokenizer":
            header["tokenizer_sha256"] = "0" * 64
        case "another version":
            header["format"] = "minimoe tokens 0"
    if damage != "no header":
        (place / "header.json").write_text(json.dumps(header)[: 300 if damage == "half a header" else None])
    with pytest.warns(Notice) as said:
        found = load(text)
    (message,) = [str(one.message) for one in said]
    assert message.startswith(f"{place}: ") and says in message and message.endswith("its tokens are made again")
    assert np.array_equal(found.train, expected) and kept(cache) == [place.name]
    load(text)


def test_a_source_that_changes_while_it_is_read_is_refused(cache: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = store._prepare

    def changed(*arguments: object) -> object:
        text.write_text(TEXT * 101, encoding="utf-8")
        return whole(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(store, "_prepare", changed)
    with pytest.raises(UserError, match="changed while it was read"):
        load(text)
    assert kept(cache) == []


LIMITED = """
import resource, sys
from minimoe.cli import main
from minimoe.data import corpus
corpus.MOST_IN_MEMORY = 1000
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
main(sys.argv[1:])
"""


def test_a_file_that_cannot_be_written_to_its_end_is_one_line_and_leaves_nothing(cache: Path, text: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", LIMITED, "train", *TINY, "--data", str(text), "--steps", "1", "--quiet"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"minimoe: {text}: its tokens cannot be written to {cache}: File too large (")
    assert kept(cache) == []


def test_without_a_cache_the_tokens_are_kept_in_memory(cache: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = load(text)
    monkeypatch.setattr(store, "private_folder", lambda name, make=True: None)
    with pytest.warns(Notice, match="its tokens are kept in memory"):
        assert np.array_equal(load(text).train, expected.train)


# ---- processes side by side ------------------------------------------------------------------------------------------------------


PREPARE = """
import sys, time
from minimoe.config import DataConfig
from minimoe.data import corpus, store
from minimoe.data.corpus import load_corpus
corpus.MOST_IN_MEMORY = 1000
whole = store.write_columns
def slow(*arguments):
    print("writing", flush=True)
    time.sleep(float(sys.argv[2]))
    return whole(*arguments)
store.write_columns = slow
print(len(load_corpus(DataConfig(source=sys.argv[1])).train))
"""


def preparing(text: Path, seconds: float) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", PREPARE, str(text), str(seconds)]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_processes_make_the_tokens_once_and_both_have_them(cache: Path, text: Path) -> None:
    processes = [preparing(text, 0.5) for _ in range(2)]
    ended = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ended
    assert sorted(len(out.splitlines()) for out, _ in ended) == [1, 2]  # one wrote
    assert {out.splitlines()[-1] for out, _ in ended} == {str(int(len(text.read_bytes()) * 0.9))}
    assert len(kept(cache)) == 1
    assert sum("another process prepares it: waiting" in err for _, err in ended) == 1


def test_what_a_killed_process_left_is_removed_by_the_next(cache: Path, text: Path, tmp_path: Path) -> None:
    process = preparing(text, 60)
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    process.kill()
    process.communicate()
    assert [name.startswith(".") for name in kept(cache)] == [True, False]  # a hidden folder, a lock that nobody holds
    other = age(tmp_path / shutil.copy(text, tmp_path / "other.txt"))
    other.write_text(TEXT.upper() * 100, encoding="utf-8")
    load(other)  # of another name
    assert len(kept(cache)) == 1 and not the_only(cache).name.startswith(".")
    load(text)
    assert len(kept(cache)) == 2


def test_a_run_on_kept_tokens_is_resumed_and_measured_and_refused_once_its_text_changed(
    cache: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--data", str(text), *TINY, "--quiet"]
    for run, steps in (("mapped", 6), ("half", 3)):
        assert call(capsys, "train", *options, "--steps", str(steps), "--out", run)[0] == 0
    assert call(capsys, "resume", "half", "--steps", "6", "--quiet")[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(corpus, "MOST_IN_MEMORY", 10**6)
        assert call(capsys, "train", *options, "--steps", "6", "--out", "memory")[0] == 0
        loss = call(capsys, "eval", "memory", "--json", "--data", str(text))[1]
    weights = [weights_of(Path(run), 6) for run in ("mapped", "half", "memory")]
    assert weights[0] == weights[1] == weights[2] and len(kept(cache)) == 1
    assert json.loads(call(capsys, "eval", "mapped", "--json", "--data", str(text))[1])["loss"] == json.loads(loss)["loss"]
    text.write_text(TEXT.upper() * 100, encoding="utf-8")
    code, _, err = call(capsys, "resume", "mapped", "--steps", "9", "--quiet")
    assert code == 2 and "have changed since the run began" in err.splitlines()[-1]


def test_blanks_of_kept_tokens_are_those_of_memory(cache: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def found() -> list[object]:
        config = load_config("bert-tiny", [f"data.source={text}", "train.seq_len=16", "train.batch_size=3", "model.max_seq_len=16"])
        task = load_task(config)
        drawn = [task.batch(3, 1), *task.held_out(), *task.held_out(2)]
        return [task.chance, *(array.tolist() for arrays in drawn for array in arrays)]

    mapped = found()
    monkeypatch.setattr(corpus, "MOST_IN_MEMORY", 10**6)
    assert mapped == found() and len(kept(cache)) == 1


def test_a_damaged_note_is_as_none(cache: Path, text: Path) -> None:
    expected = load(text).train.copy()
    (note,) = (cache / "index").iterdir()
    whole = note.read_text()
    for damaged in (whole.replace(': 4600', ': 4700'), whole[:90], "", "[" * 100_000, "{}"):
        assert damaged != whole
        note.write_text(damaged)
        assert np.array_equal(load(text).train, expected) and note.read_text() == whole
    assert len(kept(cache)) == 1
