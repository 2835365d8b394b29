"""Conversations: what ends an answer, what is kept of it, what is left out when the context is full; prompts from files."""

import os
import threading
from pathlib import Path
from typing import Any

import pytest

import minimoe as mm
from minimoe.data.chat import PLAIN, ChatError, Template
from minimoe.data.tokenizer import ByteTokenizer, CharTokenizer
from minimoe.errors import Notice, UserError
from minimoe.generation import prompts
from minimoe.generation.conversation import Conversation, ends_of_answers
from minimoe.generation.prompts import prompt_of_file
from minimoe.pretrained.transformer import PretrainedTransformer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] | trim + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
INST = (
    "{% for m in messages %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
)
REFUSES = "{{ raise_exception('no chat today') }}"
FORGETS = "{{ messages[-1].content }}"


def model(context: int = 256, vocabulary: int = 256) -> PretrainedTransformer:
    shape = mm.ModelConfig(d_model=16, n_layers=1, n_heads=2, d_hidden=32, vocab_size=vocabulary, max_seq_len=context)
    made = mm.Transformer(shape, seed=0)
    made.tokenizer = ByteTokenizer()
    return made


def template(source: str) -> Template:
    pytest.importorskip("jinja2")
    return Template(source, {}, Path("made"))


# ---- where an answer ends ------------------------------------------------------------------------------------------------------------


def test_an_answer_ends_before_what_the_template_writes_after_it() -> None:
    assert ends_of_answers(template(CHATML), ByteTokenizer()) == ("<|im_end|>", "<|im_end|>\n<|im_start|>user\n")
    assert ends_of_answers(template(INST), ByteTokenizer()) == ("</s>", " </s>[INST] ")
    assert ends_of_answers(PLAIN, ByteTokenizer()) == ("\nuser: ", "\n\n")


@pytest.mark.parametrize(("source", "says"), [(REFUSES, "no chat today"), (FORGETS, "leaves out messages"), ("{% if %}", "not a template")])
def test_a_template_that_fails_is_said(source: str, says: str) -> None:
    with pytest.raises(ChatError, match=says):
        Conversation(model(), chat=template(source))


# ---- what is kept --------------------------------------------------------------------------------------------------------------------


def test_questions_and_answers_are_read_again_and_the_system_message_stays_first() -> None:
    asked: list[str] = []

    class Chat(type(PLAIN)):  # type: ignore[misc]
        def prompt(self, messages: Any) -> str:
            asked.append(super().prompt(messages))
            return asked[-1]

    talk = Conversation(model(), chat=Chat(), tokens=4, system="be brief")
    first = str(talk.ask("one"))
    second = str(talk.ask("two"))
    assert asked[-1] == f"system: be brief\nuser: one\nassistant: {first}\nuser: two\nassistant: "
    assert [message["content"] for message in talk.messages] == ["one", first, "two", second]
    talk.reset()
    assert talk.messages == [] and str(talk.ask("one")) == first


def test_an_answer_that_is_stopped_stays_as_far_as_it_came() -> None:
    talk = Conversation(model(), chat=PLAIN, tokens=50)
    answer = talk.ask("one")
    piece = next(answer)
    answer.stop()
    assert talk.messages == [{"role": "user", "content": "one"}, {"role": "assistant", "content": piece}]
    talk.ask("never begun").stop()
    assert len(talk.messages) == 2


def test_messages_that_outgrow_the_context_are_left_out_by_pairs_and_said() -> None:
    talk = Conversation(model(context=80), chat=PLAIN, tokens=4, system="s")
    str(talk.ask("a" * 20))
    with pytest.warns(Notice, match="outgrew the model's context of 80 tokens: its oldest 2 messages"):
        str(talk.ask("b" * 20))
    assert [message["content"][0] for message in talk.messages[::2]] == ["b"]


def test_a_question_that_cannot_be_read_is_refused_and_not_kept() -> None:
    made = model(vocabulary=30)
    talk = Conversation(made, CharTokenizer("abcdefghijklmnopqrstuvwxyz: \n"), PLAIN, tokens=2)
    with pytest.raises(UserError, match="'Q'"):
        talk.ask("Q")
    assert talk.messages == []


def test_a_model_without_a_tokenizer_is_refused() -> None:
    made = model()
    made.tokenizer = None
    with pytest.raises(UserError, match="needs a tokenizer"):
        mm.Conversation(made)


# ---- prompts from files --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "text"),
    [(b"one\n", "one"), (b"one\r\n", "one"), (b"one\n\n", "one\n"), (b"one", "one"), (b"\xef\xbb\xbfone", "one"), (b"\n\n", "\n")],
)
def test_one_line_end_at_the_end_of_a_file_is_left_out(data: bytes, text: str, tmp_path: Path) -> None:
    (tmp_path / "prompt").write_bytes(data)
    assert prompt_of_file(tmp_path / "prompt") == text


def test_what_is_no_prompt_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, data in {"empty": b"", "line": b"\n", "latin": b"caf\xe9"}.items():
        (tmp_path / name).write_bytes(data)
    cases = {"empty": "empty: a prompt", "line": "empty: a prompt", "latin": "not UTF-8", "none": "No such file", ".": "a folder"}
    for name, says in cases.items():
        with pytest.raises(UserError, match=says):
            prompt_of_file(tmp_path / name)
    with pytest.raises(UserError, match="/dev/zero: a device"):
        prompt_of_file(Path("/dev/zero"))
    monkeypatch.setattr(prompts, "MOST_PROMPT", 3)
    with pytest.raises(UserError, match="more than 3 bytes"):
        prompt_of_file(tmp_path / "latin")


def test_a_pipe_that_never_ends_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "MOST_PROMPT", 1000)
    os.mkfifo(tmp_path / "pipe")

    def write() -> None:
        try:
            with open(tmp_path / "pipe", "wb") as pipe:
                while True:
                    pipe.write(b"yes\n" * 100)
        except BrokenPipeError:
            pass

    writer = threading.Thread(target=write)
    writer.start()
    with pytest.raises(UserError, match="more than 1,000 bytes"):
        prompt_of_file(tmp_path / "pipe")
    writer.join(10)
    assert not writer.is_alive()
