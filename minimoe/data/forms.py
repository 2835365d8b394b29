"""How a configuration and a tokenizer say that rows become documents."""

import os
from functools import cache
from pathlib import Path

from minimoe.config import DataConfig
from minimoe.data.chat import Chat, find_chat
from minimoe.data.documents import Form
from minimoe.data.tokenizer import HuggingFaceTokenizer, Tokenizer


def form_of(data: DataConfig, base: Path | None = None, tokenizer: Tokenizer | None = None) -> Form:
    """Return how rows become documents for this tokenizer (None: one that is made of the text)."""
    end = None if tokenizer is None or tokenizer.end_id is None else tokenizer.token(tokenizer.end_id)

    @cache
    def chat() -> Chat:
        return chat_of(data.tokenizer, base, tokenizer)

    return Form(data.text_key, data.loss_on == "answers", chat, end, data.within_documents)


def chat_of(name: str, base: Path | None = None, tokenizer: Tokenizer | None = None) -> Chat:
    """Return the chat template beside a tokenizer, or beside the one that the configuration names: a checkpoint keeps only the tokenizer.

    Bytes and characters have none, and are written in the plain form. Raises `UserError` for a file that cannot be read.
    """
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        return find_chat(None)
    given = (base or Path()) / os.path.expanduser(name)
    folders = [tokenizer.path.parent, given if given.is_dir() else given.parent]
    found = (find_chat(folder) for folder in (folders if given.exists() else folders[:1]))
    return next((chat for chat in found if not chat.plain), find_chat(None))
