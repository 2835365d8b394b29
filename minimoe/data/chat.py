"""Turns the messages of a chat into text, by the template of a tokenizer or in a plain form, and finds the answers in it.

A template is a Jinja program that comes with a model. It runs in Jinja's sandbox, and its size, its steps and its output are bounded.

    plain form:   user: What is a gate?
                  assistant: It weighs the experts.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from minimoe.errors import UserError
from minimoe.hints import install
from minimoe.untrusted import Malformed, decode_text, parse_json_object, read_bounded

Message = Mapping[str, str]
Spans = tuple[tuple[int, int], ...]

MOST_TEMPLATE = 1_000_000  # bytes; the longest known take 20 kB
ANSWERER = "assistant"


class ChatError(UserError):
    """Messages that a template does not turn into text; the message does not name the file."""


class Chat:
    """The plain form: a line `role: content` for each message. It is used where a tokenizer has no template."""

    name = "the plain form `role: content`"
    plain = True
    identity = ""  # differs for chats that write the same messages differently

    def render(self, messages: Sequence[Message]) -> str:
        """Return the text of a chat. Raises `ChatError` if there is none."""
        return "".join(f"{message['role']}: {message['content']}\n" for message in messages)

    def prompt(self, messages: Sequence[Message]) -> str:
        """Return the text of a chat up to where the assistant's next answer begins."""
        return f"{self.render(messages)}{ANSWERER}: "

    def answers(self, messages: Sequence[Message], text: str) -> Spans:
        """Return the characters of the text that the assistant writes, from the prompt to the end of each of its messages.

        Raises `ChatError` if the template writes earlier messages differently once others follow, so that answers cannot be found.
        """
        found = []
        for number, message in enumerate(messages):
            if message["role"] != ANSWERER:
                continue
            before = self.prompt(messages[:number]) if number else ""
            after = text if number + 1 == len(messages) else self.render(messages[: number + 1])
            if not (text.startswith(before) and text.startswith(after) and len(before) < len(after)):
                raise ChatError(
                    f"{self.name} writes the messages before an answer differently once it follows, so the answers cannot be found: "
                    "set data.loss_on = 'all'"
                )
            found.append((len(before), len(after)))
        return tuple(found)


PLAIN = Chat()


class Template(Chat):
    """A tokenizer's chat template, with the names of its special tokens. Raises `UserError` if it cannot be used at all."""

    plain = False

    def __init__(self, source: str, tokens: Mapping[str, str], path: Path) -> None:
        self.source, self.tokens, self.name = source, dict(tokens), f"the chat template of {path}"
        self.identity = json.dumps([source, self.tokens], sort_keys=True)

    def render(self, messages: Sequence[Message]) -> str:
        return self._run(messages, False)

    def prompt(self, messages: Sequence[Message]) -> str:
        return self._run(messages, True)

    @cached_property
    def _program(self) -> Any:
        try:
            from minimoe.data.jinja import compiled
        except ImportError:
            raise ChatError(f"{self.name} needs Jinja: {install('chat')}") from None
        try:
            return compiled(self.source)
        except Malformed as error:
            raise ChatError(f"{self.name}: {error}") from None

    def _run(self, messages: Sequence[Message], prompts: bool) -> str:
        given = {"messages": list(messages), "add_generation_prompt": prompts, **self.tokens}
        try:
            text: str = self._program(given)
        except Malformed as error:
            raise ChatError(f"{self.name} {error}") from None
        return text


def find_chat(folder: Path | None) -> Chat:
    """Return the chat template beside a tokenizer.json, or the plain form if there is none.

    `chat_template.jinja`, or `chat_template` in tokenizer_config.json (of several, that called "default"), as transformers keeps them.
    Raises `UserError` for a file that is not what its name says.
    """
    if folder is None:
        return PLAIN
    table = _read_table(folder / "tokenizer_config.json")
    tokens = {key: name for key, value in table.items() if key.endswith("_token") and (name := _token_name(value)) is not None}
    path = folder / "chat_template.jinja"
    if path.is_file():
        return Template(_read(path, MOST_TEMPLATE), tokens, path)
    source = table.get("chat_template")
    if isinstance(source, list):
        named = {entry["name"]: entry.get("template") for entry in source if isinstance(entry, dict) and "name" in entry}
        source = named.get("default")
    if source is None:
        return PLAIN
    path = folder / "tokenizer_config.json"
    if not isinstance(source, str) or len(source) > MOST_TEMPLATE:
        raise UserError(f"{path}: its chat_template is not a text of at most {MOST_TEMPLATE:,} characters")
    return Template(source, tokens, path)


def _token_name(value: Any) -> str | None:
    """Return the text of a special token, which is a string or a table with its content."""
    found = value.get("content") if isinstance(value, dict) else value
    return found if isinstance(found, str) else None


def _read_table(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return parse_json_object(_read(path, 10 * MOST_TEMPLATE).encode())
    except Malformed as error:
        raise UserError(f"{path}: {error}") from None


def _read(path: Path, most: int) -> str:
    try:
        return decode_text(read_bounded(path, most))
    except Malformed as error:
        raise UserError(f"{path}: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
