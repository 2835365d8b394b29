"""A document, and how the rows of a file become documents."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from minimoe.data.chat import PLAIN, Chat


class Document(NamedTuple):
    """A stretch of text that is turned into tokens as a whole."""

    text: str
    domain: int = 0  # its number among the source's domains
    learned: tuple[tuple[int, int], ...] | None = None  # the stretches of characters that the loss counts; None: all of them
    ends: bool = False  # the tokenizer's end of text follows or, if it has none, an empty line
    continues: bool = False  # it goes on with the text of the document before: both are turned into tokens as one


def plain_form() -> Chat:
    return PLAIN


@dataclass(frozen=True)
class Form:
    """How the rows of a file become documents."""

    column: str | None = None  # the column of text or of messages; None: found in the first row
    answers: bool = True  # of a chat, the loss counts what the assistant says; False: all of it
    chat: Callable[[], Chat] = plain_form  # how messages become text; called where there are any
    end: str | None = None  # the tokenizer's token that ends a text: a chat that ends with it is not ended twice
    apart: bool = False  # each file of a folder is a document, also if all are plain text


    def state(self) -> list[str | bool | None]:
        """Return what else than the files decides on their documents, in values that JSON has. Raises `UserError` as `chat` does."""
        return [self.column, self.answers, self.end, self.apart, self.chat().identity]


PLAINLY = Form()


class Tally:
    """Counts what was left out of a source."""

    def __init__(self) -> None:
        self.blank = self.empty = self.unanswered = 0  # lines; rows without text; chats in which the assistant says nothing

    def words(self) -> str:
        """Return what was left out and why; empty if nothing was."""
        kinds = (
            (self.empty, "document without text", "documents without text"),
            (self.unanswered, "chat without an answer", "chats without an answer"),
            (self.blank, "blank line", "blank lines"),
        )
        return " and ".join(f"{count:,} {one if count == 1 else many}" for count, one, many in kinds if count)
