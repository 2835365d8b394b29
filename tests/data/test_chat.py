"""Chats as text: the template of a tokenizer, the plain form, which characters are answers, and what a template may not do."""

import json
from pathlib import Path
from typing import Any

import made_tokenizers
import numpy as np
import pytest

from minimoe.config import DataConfig
from minimoe.data.chat import PLAIN, Chat, ChatError, Template, find_chat
from minimoe.data.corpus import Corpus, whole_corpus
from minimoe.errors import UserError

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] | trim + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
FORGETS = "{% for m in messages %}{% if loop.last or m.role == 'user' %}{{ m.role }}: {{ m.content }}\n{% endif %}{% endfor %}"
MESSAGES = [
    {"role": "system", "content": "be brief"}, {"role": "user", "content": "why?"}, {"role": "assistant", "content": "because"},
    {"role": "user", "content": "and then?"}, {"role": "assistant", "content": "nothing\nelse"},
]  # fmt: skip


def template(source: str, **tokens: str) -> Template:
    pytest.importorskip("jinja2")
    return Template(source, tokens, Path("made"))


def learned_text(chat: Chat, messages: list[dict[str, str]]) -> list[str]:
    text = chat.render(messages)
    return [text[start:stop] for start, stop in chat.answers(messages, text)]


def chats(folder: Path, *rows: Any) -> str:
    path = folder / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def learned(corpus: Corpus) -> str:
    assert corpus.val_learned is not None
    return corpus.tokenizer.decode(np.asarray(corpus.val)[corpus.val_learned])


# ---- text and answers --------------------------------------------------------------------------------------------------------------


def test_the_plain_form_is_a_line_for_each_message_and_an_answer_goes_up_to_its_end() -> None:
    assert PLAIN.render(MESSAGES[:3]) == "system: be brief\nuser: why?\nassistant: because\n"
    assert PLAIN.prompt(MESSAGES[:2]) == "system: be brief\nuser: why?\nassistant: "
    assert learned_text(PLAIN, MESSAGES) == ["because\n", "nothing\nelse\n"]
    assert learned_text(PLAIN, MESSAGES[2:3]) == ["assistant: because\n"]  # nothing comes before it
    assert learned_text(PLAIN, MESSAGES[:2]) == []


def test_a_template_writes_the_text_that_transformers_would_and_its_answers_are_found() -> None:
    chat = template(CHATML)
    assert chat.render(MESSAGES[1:3]) == "<|im_start|>user\nwhy?<|im_end|>\n<|im_start|>assistant\nbecause<|im_end|>\n"
    assert learned_text(chat, MESSAGES) == ["because<|im_end|>\n", "nothing\nelse<|im_end|>\n"]
    chat = template(INST, bos_token="<s>", eos_token="</s>")
    assert chat.render(MESSAGES[1:3]) == "<s>[INST] why? [/INST] because </s>"
    assert learned_text(chat, MESSAGES[1:]) == [" because </s>", " nothing\nelse </s>"]


def test_a_template_that_forgets_earlier_answers_is_refused_where_they_are_to_be_learned() -> None:
    with pytest.raises(ChatError, match=r"the answers cannot be found: set data\.loss_on = 'all'"):
        learned_text(template(FORGETS), MESSAGES)
    assert learned_text(template(FORGETS), MESSAGES[1:3]) == ["assistant: because\n"]


@pytest.mark.parametrize("form", ["jinja", "config", "named", "none"])
def test_a_template_is_found_where_transformers_keeps_it(form: str, tmp_path: Path) -> None:
    table: dict[str, Any] = {"eos_token": {"content": "</s>"}, "pad_token": None}
    if form == "jinja":
        (tmp_path / "chat_template.jinja").write_text("{{ eos_token }}")
    elif form != "none":
        one = "{{ eos_token }}"
        table["chat_template"] = one if form == "config" else [{"name": "tools", "template": "no"}, {"name": "default", "template": one}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(table))
    chat = find_chat(tmp_path)
    assert chat.plain == (form == "none")
    if form != "none":
        pytest.importorskip("jinja2")
        assert chat.render(MESSAGES) == "</s>"


# ---- rows --------------------------------------------------------------------------------------------------------------------------


def test_chats_and_pairs_are_learned_by_their_answers_and_on_request_whole(tmp_path: Path) -> None:
    pair = {"prompt": "why?", "completion": "because"}
    for rows, column in (({"messages": MESSAGES[1:3]}, None), (pair, None), ({"talk": MESSAGES[1:3], "text": "no"}, "talk")):
        data = DataConfig(source=chats(tmp_path, rows), text_key=column)
        corpus = whole_corpus(data)
        assert corpus.tokenizer.decode(corpus.val) == "user: why?\nassistant: because\n\n\n"
        assert learned(corpus) == "because\n\n\n"  # and where the chat ends
        both = whole_corpus(DataConfig(source=data.source, text_key=column, loss_on="all"))
        assert both.val_learned is None and np.array_equal(both.val, corpus.val) and both.sha256 != corpus.sha256


def test_chats_without_an_answer_or_without_words_are_left_out_and_counted(tmp_path: Path) -> None:
    source = chats(tmp_path, {"messages": MESSAGES[:2]}, {"messages": MESSAGES}, {"messages": []}, {"messages": MESSAGES[:1]})
    corpus = whole_corpus(DataConfig(source=source))
    assert corpus.notes == (f"{source}: 1 document without text and 2 chats without an answer left out",)
    assert whole_corpus(DataConfig(source=source, loss_on="all")).notes == (f"{source}: 1 document without text left out",)


@pytest.mark.parametrize("kind, ends", [("sentencepiece", "</s>"), ("byte-level", "\n\n")])
def test_a_tokenizers_template_is_used_and_a_chat_that_ends_itself_is_not_ended_twice(kind: str, ends: str, tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    path = made_tokenizers.write(kind, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": INST, "bos_token": "<s>", "eos_token": "</s>"}))
    messages = [{"role": "user", "content": "the gate"}, {"role": "assistant", "content": "a token"}]
    corpus = whole_corpus(DataConfig(source=chats(tmp_path, {"messages": messages}), tokenizer=str(path)))
    names = [corpus.tokenizer.token(int(id)) for id in corpus.val]
    if kind == "sentencepiece":
        assert names.count("</s>") == 1 and names[-1] == "</s>" and names[0] == "<s>"
    assert learned(corpus).strip(" ").startswith("a token") and "gate" not in learned(corpus) and learned(corpus).endswith(ends)


def test_a_tokenizer_without_a_template_writes_the_plain_form(tmp_path: Path) -> None:
    path = made_tokenizers.write("byte-level", tmp_path)
    corpus = whole_corpus(DataConfig(source=chats(tmp_path, {"messages": MESSAGES[1:3]}), tokenizer=str(path)))
    assert corpus.tokenizer.decode(corpus.val).startswith("user: why?\nassistant: because\n")


GOOD = {"messages": MESSAGES}
BAD: dict[str, tuple[Any, str]] = {
    "no role": ([{"content": "a"}], "message 1 of 'messages' has no role: it has 'content'"),
    "no content": ([MESSAGES[0], {"role": "user"}], "message 2 of 'messages' has no content: it has 'role'"),
    "a text": (["a"], "message 1 of 'messages' is a string, not an object with role and content"),
    "content of parts": ([{"role": "user", "content": ["a"]}], "the content of message 1 of 'messages' is a list, not a string"),
    "a number as role": ([{"role": 1, "content": "a"}], "the role of message 1 of 'messages' is a number, not a string"),
    "no list": ("a", "'messages' is a string, not a list of messages"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD)
def test_a_message_that_is_none_is_named_with_its_line(fault: str, tmp_path: Path) -> None:
    value, message = BAD[fault]
    source = chats(tmp_path, GOOD, {"messages": value})
    with pytest.raises(UserError) as caught:
        whole_corpus(DataConfig(source=source))
    assert str(caught.value) == f"{source}, line 2: {message}"


# ---- templates that do what they should not ----------------------------------------------------------------------------------------

LOOP = "{% set n = namespace(x='aaaa') %}{% for i in range(100) %}{% set n.x = STEP %}{% endfor %}"
FAULTS = {
    "{{ raise_exception('roles must alternate') }}": "fails: roles must alternate",
    "{% if": "not a template: ",
    "{% unknown %}": "not a template: ",
    "{{ messages.none.more }}": "fails: ",
    "{{ messages.__class__.__mro__ }}": "unsafe",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}": "more than 50,000 steps",
    "{% for i in range(999999999) %}{% endfor %}": "Range too big",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "fails: ",
    "{{ 'a' * 1000000000 }}": "more than 20,000,000 characters",
    "{{ 2 ** 1000000000 }}": "the operator **",
    "{{ '%1000000000d' % 1 }}": "the operator %",
    "{{ ''.center(1000000000) }}": "unsafe",
    "{{ 'a' | center(1000000000) }}": "No filter named 'center'",
    "{{ ('a' * 10000000) | replace('a', 'b' * 10000000) }}": "more than 20,000,000 characters",
    "{{ ('a' * 10000000).replace('a', 'b' * 10000000) }}": "more than 20,000,000 characters",
    "{% for i in range(99) %}{{ 'a' * 1000000 }}{% endfor %}": "more than 20,000,000 characters",
    LOOP.replace("STEP", "n.x ~ n.x"): "more than 20,000,000 characters",
    LOOP.replace("STEP", "n.x + n.x"): "more than 20,000,000 characters",
    LOOP.replace("STEP", "[n.x, n.x] | join"): "more than 20,000,000 characters",
}  # fmt: skip


@pytest.mark.parametrize("source", FAULTS)
def test_a_template_that_fails_or_does_too_much_ends_in_one_line(source: str) -> None:
    with pytest.raises(ChatError) as caught:
        template(source).render(MESSAGES)
    message = str(caught.value)
    assert message.startswith("the chat template of made") and FAULTS[source] in message and "\n" not in message and len(message) < 400


def test_a_template_may_mark_answers_skip_rounds_and_write_json() -> None:
    source = "{% generation %}{{ messages[0].role }}{% endgeneration %}{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}"
    assert template(source + "{{ m | tojson }}{% endfor %}").render([{"role": "é", "content": "'"}]) == 'é{"role": "é", "content": "\'"}'


def test_a_template_has_no_date_with_which_the_text_would_change_from_day_to_day() -> None:
    assert template("{% if strftime_now is defined %}{{ strftime_now('%d') }}{% else %}none{% endif %}").render(MESSAGES) == "none"
