"""Turns the rows of a file into documents: a column of text, chat messages, or a prompt with its completion.

The first row decides which. Without a column that is asked for: `text`, then `messages`, then `prompt` and `completion`, then the only
column of text. Rows are never learned as the JSON or CSV that they are written in.
"""

from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from minimoe.data.chat import ChatError
from minimoe.data.documents import Document, Form, Tally
from minimoe.data.rows import Row, plain_text_hint, read_rows, type_name
from minimoe.errors import UserError, nearest

MOST_NAMED = 12  # columns that a message names


class NoColumn(UserError):
    """A file of rows in which no column is clearly its text."""


def read_documents(path: Path, form: Form, tally: Tally) -> Iterator[Document]:
    """Yield the documents of a file of rows. Raises `UserError`, naming the file and the line, for a row without text.

    The column is found, and may be refused, when the first document is asked for.
    """
    rows = read_rows(path, tally)
    first = next(rows, None)
    if first is None:
        raise UserError(f"{path}: has no rows: data.source needs text")
    document_of = _reader(path, first, form)
    for row in chain([first], rows):
        document = document_of(row)
        if not document.text.strip():
            tally.empty += 1
        elif document.learned == ():
            tally.unanswered += 1
        else:
            yield document


# ---- which column ------------------------------------------------------------------------------------------------------------------


def _reader(path: Path, first: Row, form: Form) -> Callable[[Row], Document]:
    """Return the function that makes a document of a row, chosen by the first one. Raises `UserError`, naming the columns."""
    row, column = first.value, form.column
    if isinstance(row, str) and column is None:
        return lambda row: Document(_text(row.value, row.place, "the row"), ends=True)
    if not isinstance(row, dict):
        raise UserError(f"{first.place}: expected an object with columns, got a {type_name(row)}: {plain_text_hint(path)}")
    if column is not None:
        if column not in row:
            raise NoColumn(f"{first.place}: has no column {column!r}{nearest(column, row) if row else ''}")
        return _conversation(column, form) if isinstance(row[column], list) else _column(column)
    strings = [name for name, value in row.items() if isinstance(value, str)]
    if "text" in row:
        return _column("text")
    if isinstance(row.get("messages"), list):
        return _conversation("messages", form)
    if "prompt" in row and "completion" in row:
        return lambda row: _chat(_pair(row), row, form)
    if len(strings) == 1:
        return _column(strings[0])
    raise NoColumn(
        f"{path}: which column is its text? It has {_names(row)}: name it as in --data {path.name}:COLUMN, or by data.text_key; "
        f"{plain_text_hint(path)}"
    )


def _names(row: dict[str, Any]) -> str:
    shown = [*map(repr, list(row)[:MOST_NAMED]), *([f"and {len(row) - MOST_NAMED} more"] if len(row) > MOST_NAMED else [])]
    return ", ".join(shown) or "none"


def _value(row: Row, column: str) -> Any:
    if not isinstance(row.value, dict):
        raise UserError(f"{row.place}: expected an object with the column {column!r}, got a {type_name(row.value)}")
    if column not in row.value:
        raise UserError(f"{row.place}: lacks the column {column!r}: it has {_names(row.value)}")
    return row.value[column]


def _text(value: Any, place: str, what: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{place}: {what} is {'null' if value is None else f'a {type_name(value)}'}, not a string")
    return value


# ---- a row as a document -------------------------------------------------------------------------------------------------------------


def _column(name: str) -> Callable[[Row], Document]:
    return lambda row: Document(_text(_value(row, name), row.place, repr(name)), ends=True)


def _conversation(name: str, form: Form) -> Callable[[Row], Document]:
    return lambda row: _chat(_messages(_value(row, name), row.place, name), row, form)


def _messages(value: Any, place: str, name: str) -> list[dict[str, str]]:
    if not isinstance(value, list):
        raise UserError(f"{place}: {name!r} is a {type_name(value)}, not a list of messages")
    for number, message in enumerate(value, 1):
        what = f"message {number} of {name!r}"
        if not isinstance(message, dict):
            raise UserError(f"{place}: {what} is a {type_name(message)}, not an object with role and content")
        for key in ("role", "content"):
            if key not in message:
                raise UserError(f"{place}: {what} has no {key}: it has {_names(message)}")
            _text(message[key], place, f"the {key} of {what}")
    return value


def _pair(row: Row) -> list[dict[str, str]]:
    roles = {"prompt": "user", "completion": "assistant"}
    return [{"role": role, "content": _text(_value(row, column), row.place, repr(column))} for column, role in roles.items()]


def _chat(messages: list[dict[str, str]], row: Row, form: Form) -> Document:
    if not any(message["content"].strip() for message in messages):
        return Document("")
    chat = form.chat()
    try:
        text = chat.render(messages)
        learned = chat.answers(messages, text) if form.answers else None
    except ChatError as error:
        raise UserError(f"{row.place}: {error}") from None
    if form.end is not None and text.rstrip().endswith(form.end):  # what ends a document follows it
        text = text.rstrip().removesuffix(form.end)
        learned = learned and tuple((start, min(stop, len(text))) for start, stop in learned)
    return Document(text, learned=learned, ends=True)
