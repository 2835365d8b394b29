"""JSON and TOML that others wrote: what is read, and what is refused at once with a reason."""

import json
import time
from pathlib import Path

import pytest

from minimoe.untrusted import MOST_DEPTH, Malformed, decode_text, parse_json, parse_json_object, parse_toml, read_bounded


def test_what_a_careful_writer_wrote_is_read() -> None:
    table = {"a": [1, 2.5, None, True], "b": {"c": "\u00e9\U0001f600"}, "big": 10**30}
    assert parse_json(json.dumps(table).encode()) == table
    assert parse_json(json.dumps(table, ensure_ascii=False).encode()) == table
    assert parse_json(b"[NaN, Infinity]")[1] == float("inf")
    assert parse_toml("a.b = 1\n[c]\nd = [[1]]\n") == {"a": {"b": 1}, "c": {"d": [[1]]}}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_byte_order_mark_says_how_a_text_is_encoded_and_is_no_part_of_it(encoding: str) -> None:
    assert decode_text("caf\u00e9 = 1\n".encode(encoding)) == "caf\u00e9 = 1\n"
    assert parse_json('{"a": "\u00e9"}'.encode(encoding)) == {"a": "\u00e9"}


def test_values_are_read_up_to_the_deepest_nesting_and_not_beyond() -> None:
    deep = b"[" * MOST_DEPTH + b"]" * MOST_DEPTH
    assert parse_json(deep)
    assert parse_toml("a = " + deep[1:-1].decode())
    for data in (b"[" + deep + b"]", b'{"a":' * (MOST_DEPTH + 1) + b"1" + b"}" * (MOST_DEPTH + 1)):
        with pytest.raises(Malformed, match="nested more than 100 deep"):
            parse_json(data)
    with pytest.raises(Malformed, match="nested more than 100 deep"):
        parse_toml("a = " + deep.decode())


@pytest.mark.parametrize(
    "data, message",
    [
        (b"[" * 100_000, "nested"), (b"9" * 5000, "number that is too long"), (b'"\\ud800"', "surrogate"), (b"\xff{}", "not UTF-8"),
        (b"{", "not JSON"), (b"", "not JSON"), (b'{"\\udfff": 1}', "surrogate"),
    ],
)  # fmt: skip
def test_json_that_cannot_be_used_is_refused_with_a_reason(data: bytes, message: str) -> None:
    with pytest.raises(Malformed, match=message):
        parse_json(data)


def test_json_that_is_not_an_object_is_refused() -> None:
    with pytest.raises(Malformed, match="expected a JSON object, got list"):
        parse_json_object(b"[1]")


@pytest.mark.parametrize("text", ["# sizes, {}\nx = 1", 'x = """\n{} = 1\n"""', 'x = "a, {}"', "x = ['b', '[{}']"])
def test_a_comment_or_a_string_may_have_many_dots(text: str) -> None:
    assert list(parse_toml(text.replace("{}", ".".join(["a"] * 50)))) == ["x"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("a = " + "[" * 100_000, "nested"), ("a = " + "9" * 5000, "number"), (".".join(["a"] * 20_000) + " = 1", "more than 100 parts"),
        ("[" + " . ".join(["a"] * 20_000) + "]", "more than 100 parts"), ("a =", "not valid TOML"), ("#" * 2_000_000, "too large"),
        ("a = 2026-02-31", "not valid TOML"), ("".join(f"k{i} = 1\n" for i in range(200_000)), "too large"),
        (".".join(['"a"'] * 20_000) + " = 1", "more than 100 parts"), ("{" * 50_000, "nested|not valid"),
        ('"\\"".' + ".".join(["a"] * 20_000) + " = 1", "more than 100 parts"), ('"\\' * 499_999, "not valid"),
        (".".join(['"a b"'] * 20_000) + " = 1", "more than 100 parts"),
        ("a = {" + ".".join(["a"] * 20_000) + " = 1}", "more than 100 parts"),
    ],
)  # fmt: skip
def test_toml_that_cannot_be_used_is_refused_within_a_second(text: str, message: str) -> None:
    began = time.process_time()
    with pytest.raises(Malformed, match=message):
        parse_toml(text)
    assert time.process_time() - began < 1


def test_a_file_that_never_ends_is_read_up_to_its_bound(tmp_path: Path) -> None:
    (tmp_path / "small").write_bytes(b"12345")
    assert read_bounded(tmp_path / "small", 5) == b"12345"
    with pytest.raises(Malformed, match="more than 4 bytes"):
        read_bounded(tmp_path / "small", 4)
    with pytest.raises(Malformed, match="more than 1,000,000 bytes"):
        read_bounded(Path("/dev/zero"), 1_000_000)
