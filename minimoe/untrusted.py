"""Reads JSON and TOML that others wrote, within bounds that hold before anything costs time or memory.

A value that passes is nested at most `MOST_DEPTH` deep, has no number too long to compute with, and no text that UTF-8 cannot express. All
else raises `Malformed`, whose message says what is wrong without naming the file: the caller knows it, and adds it.
"""

import codecs
import json
import re
import tomllib
from pathlib import Path
from typing import Any

from minimoe.errors import UserError

MOST_DEPTH = 100  # tables or lists inside each other; what transformers and minimoe write needs fewer than ten
MOST_TOML = 1_000_000  # bytes; the largest preset takes 2 kB
MOST_JSON = 10_000_000  # bytes; files that may be larger, such as tokenizer.json, have their own bounds
MOST_KEY_PARTS = MOST_DEPTH  # parts of a dotted key: tomllib's time grows with their square

BYTE_ORDER_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
KEY_PART = r"""(?:"(?:[^"\\\n]|\\.)*+"|'[^'\n]*+'|[^\s.=\[\]{},#"']++)[ \t]*+"""
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # an escape of one half
LONG_KEY = re.compile(rf"(?:^|[\[{{,])[ \t]*+(?:{KEY_PART}\.[ \t]*+){{{MOST_KEY_PARTS}}}", re.MULTILINE)


class Malformed(UserError, ValueError):
    """A file that others wrote is not what it should be; the message does not name it."""


class NotToml(Malformed):
    """A text breaks TOML's grammar."""


def read_bounded(path: Path, most: int) -> bytes:
    """Return the bytes of a file of at most `most`, however large its name or its system claims it to be. Raises `OSError`, `Malformed`."""
    with open(path, "rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise Malformed(f"has more than {most:,} bytes: too large to be what it should be")
    return data


def decode_text(data: bytes) -> str:
    """Return UTF-8 text, or UTF-16 that begins with a byte order mark; the mark is removed. Raises `Malformed` for anything else."""
    encoding = next((name for mark, name in BYTE_ORDER_MARKS if data.startswith(mark)), "utf-8")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise Malformed(f"not {encoding.removesuffix('-sig').upper()} text (byte 0x{data[error.start]:02x} at {error.start})") from None


def parse_json(data: bytes) -> Any:
    """Return the value of a JSON text. Python's NaN and Infinity are read, since its own library writes them. Raises `Malformed`."""
    try:
        value = json.loads(decode_text(data))
    except RecursionError:
        raise Malformed(f"nested more than {MOST_DEPTH} deep") from None
    except json.JSONDecodeError as error:
        raise Malformed(f"not JSON: {error}") from None
    except Malformed:
        raise
    except ValueError:  # of int(): Python reads at most 4,300 digits
        raise Malformed("has a number that is too long") from None
    if data.count(b"[") + data.count(b"{") > MOST_DEPTH:  # fewer cannot be nested deeper, as in the lines of a long run's metrics
        check_depth(value)
    if SURROGATE.search(data):
        _check_surrogates(value)
    return value


def parse_json_object(data: bytes) -> dict[str, Any]:
    """Return the value of a JSON text that is an object. Raises `Malformed`."""
    value = parse_json(data)
    if not isinstance(value, dict):
        raise Malformed(f"expected a JSON object, got {type(value).__name__}")
    return value


def parse_toml(text: str) -> dict[str, Any]:
    """Return the tables of a TOML text. Raises `Malformed`, of which `NotToml` is one."""
    if len(text) > MOST_TOML:
        raise Malformed(f"has more than {MOST_TOML:,} characters: too large to be a configuration")
    if LONG_KEY.search(text):
        raise Malformed(f"has a dotted key of more than {MOST_KEY_PARTS} parts")
    try:
        tables = tomllib.loads(text)
    except RecursionError:
        raise Malformed(f"nested more than {MOST_DEPTH} deep") from None
    except tomllib.TOMLDecodeError as error:
        raise NotToml(f"not valid TOML: {error}") from None
    except ValueError:  # a number of more than 4,300 digits, a date that no calendar has
        raise Malformed("not valid TOML: it has a number or a date that cannot be read") from None
    check_depth(tables)
    return tables


def check_depth(value: Any) -> None:
    """Raise `Malformed` if lists and tables are nested more than `MOST_DEPTH` deep."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MOST_DEPTH):
        inner = (item for parent in level for item in (parent.values() if isinstance(parent, dict) else parent))
        level = [item for item in inner if isinstance(item, dict | list)]
        if not level:
            return
    raise Malformed(f"nested more than {MOST_DEPTH} deep")


def _check_surrogates(value: Any) -> None:
    """Raise `Malformed` for half of a surrogate pair, which JSON can escape and UTF-8 cannot express."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise Malformed("has half of a Unicode surrogate pair in its text") from None
