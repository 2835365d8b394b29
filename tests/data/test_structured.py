"""Files of rows as documents: which column is their text, what is left out, and what is refused with its file and line."""

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minimoe.config import DataConfig
from minimoe.data.corpus import Corpus, load_corpus, whole_corpus
from minimoe.data.documents import Document, Form
from minimoe.data.sources import read_source
from minimoe.errors import UserError

ROWS = [{"id": n, "text": f"row number {n}"} for n in range(4)]
TEXTS = [row["text"] for row in ROWS]
CSV = "id,text\n" + "".join(f'{row["id"]},"{row["text"]}"\n' for row in ROWS)
FORMS: dict[str, bytes] = {
    "a.jsonl": "\n".join(map(json.dumps, ROWS)).encode(), "b.json": json.dumps(ROWS).encode(), "c.csv": CSV.encode(),
    "d.tsv": CSV.replace(",", "\t").encode(), "e.jsonl.gz": gzip.compress("\n".join(map(json.dumps, ROWS)).encode() + b"\n"),
    "f.ndjson": ("\n".join(map(json.dumps, ROWS)) + "\n").encode("utf-16"), "g.csv": CSV.replace("\n", "\r\n").encode("utf-8-sig"),
    "h.json": json.dumps(TEXTS).encode(), "i.jsonl": "\n".join(map(json.dumps, TEXTS)).encode(), "j.CSV.gz": gzip.compress(CSV.encode()),
}  # fmt: skip


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def jsonl(folder: Path, *rows: Any, name: str = "x.jsonl") -> Path:
    return write(folder, name, "".join(json.dumps(row) + "\n" for row in rows))


def texts(source: str | Path, **form: Any) -> list[str]:
    return [document.text for document in read_source(str(source), form=Form(**form)).documents()]


def refusal(source: str | Path, **keys: Any) -> str:
    with pytest.raises(UserError) as caught:
        load_corpus(DataConfig(source=str(source), **keys))
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---- which column ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_rows_gives_the_same_documents(name: str, tmp_path: Path) -> None:
    documents = list(read_source(str(write(tmp_path, name, FORMS[name]))).documents())
    assert documents == [Document(text, ends=True) for text in TEXTS]


@settings(max_examples=40)
@given(rows=st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1).filter(str.strip), min_size=1))
def test_any_text_comes_back_from_json_lines_and_from_csv(tmp_path_factory: pytest.TempPathFactory, rows: list[str]) -> None:
    folder = tmp_path_factory.mktemp("rows")
    assert texts(jsonl(folder, *({"text": row} for row in rows))) == rows
    table = "n,text\n" + "".join(f'{n},"{row.replace(chr(34), chr(34) * 2)}"\n' for n, row in enumerate(rows))
    assert texts(write(folder, "x.csv", table)) == rows


def test_the_column_is_the_one_asked_for_else_text_else_the_only_one_of_text(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"text": "a", "summary": "b", "n": 1})
    assert (texts(path), texts(f"{path}:summary"), texts(path, column="summary")) == (["a"], ["b"], ["b"])
    assert texts(f"{path}:text", column="summary") == ["a"]  # what the source says comes first
    assert texts(jsonl(tmp_path, {"n": 1, "body": "c"})) == ["c"]


def test_a_file_whose_name_has_a_colon_is_found(tmp_path: Path) -> None:
    assert texts(jsonl(tmp_path, {"text": "a"}, name="x:y.jsonl")) == ["a"]


# ---- documents as tokens -----------------------------------------------------------------------------------------------------------


def test_documents_are_separated_by_an_empty_line_and_their_beginnings_are_known(tmp_path: Path) -> None:
    for tokenizer in ("byte", "char"):
        corpus = whole_corpus(DataConfig(source=str(jsonl(tmp_path, {"text": "one"}, {"text": "two"})), tokenizer=tokenizer))
        assert corpus.tokenizer.decode(corpus.val) == "one\n\ntwo\n\n"
        assert corpus.val_documents is not None and corpus.val_documents.tolist() == [0, 5]


def test_the_digest_tells_where_documents_end(tmp_path: Path) -> None:
    found = {whole_corpus(DataConfig(source=str(jsonl(tmp_path, *({"text": text} for text in parts))))).sha256
             for parts in (("ab", "c"), ("a", "bc"), ("abc",))}  # fmt: skip
    assert len(found) == 3


def test_what_was_left_out_is_said(tmp_path: Path) -> None:
    path = write(tmp_path, "x.jsonl", '{"text": "a"}\n\n{"text": " "}\n{"text": ""}\n{"text": "b"}\n')
    assert notes_of(path) == (f"{path}: 2 documents without text and 1 blank line left out",)
    assert notes_of(jsonl(tmp_path, {"text": "a"}, {"text": "b"})) == ()


def notes_of(source: str | Path) -> tuple[str, ...]:
    corpus: Corpus = whole_corpus(DataConfig(source=str(source)))
    return corpus.notes


# ---- several files -----------------------------------------------------------------------------------------------------------------


def test_a_pattern_is_its_files_in_order_each_a_document(tmp_path: Path) -> None:
    for name, text in {"b.txt": "second", "a.txt": "first", "c.md": "no", "sub/d.txt": "third", "e.txt": " \n"}.items():
        write(tmp_path, name, text)
    assert texts(f"{tmp_path}/*.txt") == ["first", "second"]
    assert texts(f"{tmp_path}/**/*.txt") == ["first", "second", "third"]
    assert notes_of(f"{tmp_path}/*.txt") == (f"{tmp_path}/*.txt: 1 document without text left out",)
    jsonl(tmp_path, {"text": "row"}, {"text": "another"}, name="f.jsonl")
    assert texts(f"{tmp_path}/[af].*") == ["first", "row", "another"]


def test_a_pattern_keeps_its_column(tmp_path: Path) -> None:
    for name in "ab":
        jsonl(tmp_path, {"q": f"question {name}", "a": f"answer {name}"}, name=f"{name}.jsonl")
    assert texts(f"{tmp_path}/*.jsonl:a") == ["answer a", "answer b"]


def test_a_folder_of_plain_text_is_read_as_it_always_was_unless_its_files_are_to_be_kept_apart(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt", "package.json"):
        write(tmp_path, name, f'{{"{name}": 1}}')
    whole = '{"a.txt": 1}\n\n{"b.txt": 1}\n\n{"package.json": 1}'
    assert "".join(texts(tmp_path)) == whole and not any(document.ends for document in read_source(str(tmp_path)).documents())
    assert texts(tmp_path, apart=True) == whole.split("\n\n")


def test_rows_in_a_folder_are_documents_and_rows_without_a_clear_column_are_left_out(tmp_path: Path) -> None:
    write(tmp_path, "a.txt", "plain")
    write(tmp_path, "n.csv", "x,y\n1,2\n")
    jsonl(tmp_path, {"text": "row"})
    assert texts(tmp_path) == ["plain", "row"]
    (note,) = notes_of(tmp_path)
    assert note == f"{tmp_path}: 1 file (n.csv) left out: rows without a column of text that is clear (data.text_key names it)"
    (tmp_path / "a.txt").unlink()
    (tmp_path / "x.jsonl").unlink()
    assert "n.csv: which column is its text? It has 'x', 'y'" in refusal(tmp_path)


def test_files_of_a_pattern_that_are_not_text_are_left_out_and_named(tmp_path: Path) -> None:
    for name, content in {"a.txt": b"text", "b.txt": b"\xff\xfe\0", "c.txt": b"\x80", "d.txt": b"\0"}.items():
        write(tmp_path, name, content)
    assert texts(f"{tmp_path}/*.txt") == ["text"]
    notes = " ".join(notes_of(f"{tmp_path}/*.txt"))
    assert "(b.txt, c.txt) left out: not UTF-8" in notes and "d.txt" in notes


# ---- what is refused ---------------------------------------------------------------------------------------------------------------

ONE = '{"text": "a"}\n'
BAD = {
    "no JSON": ("x.jsonl", ONE + "{'text': 'b'}\n", "x.jsonl, line 2: not JSON: Expecting property name enclosed in double"),
    "cut": ("x.jsonl", ONE + '{"text": "b', "x.jsonl, line 2: not JSON: Unterminated string starting at: column 10"),
    "a missing column": ("x.jsonl", ONE + "\n" + '{"txt": "b", "id": 1}\n', "x.jsonl, line 3: lacks the column 'text': it has 'txt', 'id'"),
    "a number": ("x.jsonl", ONE + '{"text": 3}\n', "x.jsonl, line 2: 'text' is a number, not a string"),
    "null": ("x.jsonl", ONE + '{"text": null}\n', "x.jsonl, line 2: 'text' is null, not a string"),
    "a list": ("x.json", '[{"text": "a"}, {"text": ["b"]}]', "x.json, row 2: 'text' is a list, not a string"),
    "no object": ("x.jsonl", ONE + "[1]\n", "x.jsonl, line 2: expected an object with the column 'text', got a list"),
    "several columns": ("x.jsonl", '{"a": "b", "c": "d"}\n', "which column is its text? It has 'a', 'c': name it as in --data x.jsonl:COL"),
    "no column of text": ("x.csv.gz", "", "x.csv.gz: has no rows: data.source needs text"),
    "numbers": ("x.jsonl", "1\n2\n", "x.jsonl, line 1: expected an object with columns, got a number"),
    "an object in JSON": ("x.json", '{"text": "a"}', "a JSON object, not a list of rows: to learn its raw text, copy it to x.json.txt"),
    "deep": ("x.jsonl", ONE + "[" * 9999 + "\n", "x.jsonl, line 2: nested more than 100 deep"),
    "an empty file": ("x.jsonl", "", "x.jsonl: has no rows: data.source needs text"),
    "an empty list": ("x.json", "[]", "x.json: has no rows"),
    "a header alone": ("x.csv", "a,b\n", "x.csv: has no rows"),
    "nothing but blanks": ("x.jsonl", '{"text": ""}\n\n', "x.jsonl: no text, only 1 document without text and 1 blank line"),
    "an open quote": ("x.csv", 'id,text\n1,a\n2,"b\n3,c\n', "x.csv, line 3: a quote that is not closed"),
    "a broken quote": ("x.csv", 'id,text\n1,"a"b\n', "x.csv, line 2: a broken quote: ',' expected after '\"'"),
    "a row too short": ("x.csv", "id,text\n1\n", "x.csv, line 2: has 1 cell, the columns are 2: 'id', 'text'"),
    "a row too long": ("x.tsv", "id\ttext\n1\ta\tb\n", "x.tsv, line 2: has 3 cells, the columns are 2"),
    "a column twice": ("x.csv", "text,text\na,b\n", "x.csv: two columns are called 'text'"),
    "another encoding": ("x.jsonl", ONE.encode() + b'{"text": "\xe9"}', "x.jsonl, line 2: not UTF-8 text (byte 0xe9)"),
    "binary": ("x.csv", b"a,text\n1,\0\n", "x.csv, line 2: a binary file (it has NUL bytes)"),
    "damaged gzip": ("x.jsonl.gz", gzip.compress(ONE.encode() * 999)[:30], "x.jsonl.gz: damaged gzip data"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD)
def test_a_fault_is_named_with_its_file_and_line(fault: str, tmp_path: Path) -> None:
    name, content, message = BAD[fault]
    assert message in refusal(write(tmp_path, name, content if name != "x.csv.gz" else gzip.compress(b"")))


def test_a_column_or_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"text": "a", "body": "b"})
    assert "line 1: has no column 'boby' (did you mean 'body'?)" in refusal(f"{path}:boby")
    assert "line 1: has no column 'x' (known: body, text)" in refusal(path, text_key="x")
    assert refusal(f"{tmp_path}/*.txt") == f"data.source = '{tmp_path}/*.txt' matches no file"
    assert "no such file" in refusal(tmp_path / "none.jsonl:text")
    text = write(tmp_path, "plain.txt", "some text")
    assert refusal(f"{text}:text") == f"data.source = '{text}:text': plain.txt is plain text, which has no columns: leave out ':text'"


# ---- runs that began with the raw text ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ['{"a": "b", "c": "d"}\n' * 9, '{"text": "a row"}\n' * 9, "\ufeff" + '{"text": "a row"}\n' * 9])
def test_rows_whose_raw_text_has_the_recorded_digest_are_learned_as_they_were(content: str, tmp_path: Path) -> None:
    path = write(tmp_path, "x.jsonl", content)
    for text in {content, content.removeprefix("\ufeff")}:
        recorded = hashlib.sha256(text.encode()).hexdigest()
        corpus = whole_corpus(DataConfig(source=str(path)), sha256=recorded)
        assert corpus.sha256 == recorded and corpus.tokenizer.decode(corpus.val) == text and corpus.val_documents is None
        assert "as when the run began" in corpus.notes[0]


def test_rows_with_another_digest_are_documents(tmp_path: Path) -> None:
    corpus = whole_corpus(DataConfig(source=str(jsonl(tmp_path, {"text": "ab"}))), sha256="of another text")
    assert np.array_equal(corpus.val, np.frombuffer(b"ab\n\n", np.uint8))
