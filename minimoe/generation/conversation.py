"""A conversation with a model: messages become text by the chat template of its tokenizer, and the model continues that text.

The template says where an answer begins, and also where it ends: an answer ends before the text that the template writes after one, at an
end token, or when it has its number of tokens. When the messages outgrow the context, the oldest question and its answer are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain

from minimoe.data.chat import ANSWERER, PLAIN, Chat, ChatError, Message, find_chat
from minimoe.data.tokenizer import HuggingFaceTokenizer, Tokenizer
from minimoe.errors import UserError, notice
from minimoe.generation.continuation import Continuation
from minimoe.generation.decoding import context_of
from minimoe.generation.generation import generate
from minimoe.generation.sampling import Sampling
from minimoe.model.transformer import Transformer
from minimoe.pretrained.transformer import PretrainedTransformer

QUESTION, ANSWER, NEXT = "first question", "first answer", "second question"  # messages that show what a template writes between others
ANSWERS_SHARE = 4  # of the context that is kept free for an answer, if its number of tokens is not smaller


class Conversation:
    """`Conversation(model).ask("Why?")` yields the answer as it is drawn; later questions are read after those before them.

    Answer number n, from 0, is drawn with the seed `how.seed` + n, so that the first is what `minimoe generate --chat` prints.
    """

    def __init__(
        self, model: Transformer, tokenizer: Tokenizer | None = None, chat: Chat | None = None, tokens: int = 300,
        how: Sampling | None = None, system: str | None = None,
    ) -> None:  # fmt: skip
        """`tokenizer` is the model's own by default, `chat` the template beside it; `system` is the first message.

        Raises `UserError` if the model has no tokenizer, or if the template fails.
        """
        found = tokenizer or (model.tokenizer if isinstance(model, PretrainedTransformer) else None)
        if found is None:
            raise UserError("a conversation needs a tokenizer: this model has none")
        self.model, self.tokenizer, self.tokens, self.how = model, found, tokens, how or Sampling()
        self.chat = chat or (find_chat(found.path.parent) if isinstance(found, HuggingFaceTokenizer) else PLAIN)
        self.first: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self.stop, self.end = ends_of_answers(self.chat, found), _end_tokens(model, found)
        self.reset()

    def reset(self) -> None:
        """Forget all questions and answers."""
        self.messages: list[Message] = []  # after the first
        self.answers = 0  # answers begun

    def ask(self, question: str) -> Continuation:
        """Return the answer, which is drawn while it is iterated over; it can be left unfinished. A `Notice` counts messages left out.

        Question and answer become part of the conversation when the iteration ends; of an unfinished answer what was drawn, if anything.
        Raises `UserError` if the question cannot be read.
        """
        messages: list[Message] = [*self.messages, {"role": "user", "content": question}]
        prompt, left_out = self._fitted(messages)
        if left_out:
            notice(f"the conversation outgrew the model's context of {context_of(self.model.config):,} tokens: "
                   f"its oldest {left_out} messages are no longer read")  # fmt: skip
        how = replace(
            self.how, seed=(self.how.seed + self.answers) % 2**64, stop=tuple(dict.fromkeys((*self.how.stop, *self.stop))),
            end=self.how.end or self.end,
        )  # fmt: skip
        text = generate(self.model, self.tokenizer, prompt, self.tokens, how)
        return Continuation(self._kept(text, messages[left_out:]))

    def _kept(self, text: Continuation, messages: list[Message]) -> Iterator[str]:
        """Yield an answer, and keep it with the messages before it."""
        whole = False
        try:
            yield from text
            whole = True
        finally:
            answer = "".join(text.drawn)
            if whole or answer:
                self.messages = [*messages, {"role": ANSWERER, "content": answer}]
                self.answers += 1

    def _fitted(self, messages: list[Message]) -> tuple[str, int]:
        """Return the text of the messages, and how many of the oldest were left out, two at a time, to leave room for an answer."""
        limit, out = context_of(self.model.config), 0
        while True:
            prompt = self.chat.prompt([*self.first, *messages[out:]])
            if limit is None or out + 2 >= len(messages):
                return prompt, out
            room = limit - min(self.tokens, limit // ANSWERS_SHARE)
            if len(self.tokenizer.encode_prompt(prompt)) <= room:
                return prompt, out
            out += 2


class Continuations:
    """Prompts that are continued one after the other, none of which is read again; number n, from 0, is drawn with the seed plus n."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, tokens: int, how: Sampling) -> None:
        self.model, self.tokenizer, self.tokens, self.how = model, tokenizer, tokens, how
        self.reset()

    def reset(self) -> None:
        """Draw again as at the beginning."""
        self.answers = 0

    def ask(self, question: str) -> Continuation:
        """Return the prompt and what continues it. Raises `UserError` if the prompt cannot be read."""
        how = replace(self.how, seed=(self.how.seed + self.answers) % 2**64)
        text = generate(self.model, self.tokenizer, question, self.tokens, how)
        self.answers += 1
        return Continuation(chain([question], text))


def ends_of_answers(chat: Chat, tokenizer: Tokenizer) -> tuple[str, ...]:
    """Return the texts that end an answer: what the template writes between it and the next question, and after it at the end of a chat.

    The plain form writes nothing of its own at the end of a chat, where training puts an empty line if the tokenizer has no end token.
    """
    asked: list[Message] = [{"role": "user", "content": QUESTION}, {"role": ANSWERER, "content": ANSWER}]
    whole = chat.render([*asked, {"role": "user", "content": NEXT}])
    _, _, after = whole.rpartition(ANSWER)
    between, found, _ = after.partition(NEXT)
    if not found or ANSWER not in whole:
        raise ChatError(f"{chat.name} leaves out messages of a conversation")
    last = chat.render(asked).rpartition(ANSWER)[2].strip()
    empty_line = ["\n\n"] if chat.plain and tokenizer.end_id is None else []
    return tuple(text for text in dict.fromkeys([last, between, *empty_line]) if text)


def _end_tokens(model: Transformer, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the model's end tokens and the tokenizer's."""
    named = model.end_tokens if isinstance(model, PretrainedTransformer) else ()
    return tuple(dict.fromkeys([*named, *([] if tokenizer.end_id is None else [tokenizer.end_id])]))
