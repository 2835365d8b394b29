"""Messages of errors: what others wrote cannot command the reader's terminal, or fill it."""

import pytest

from minimoe.errors import CheckpointError, ConfigError, UserError, nearest


@pytest.mark.parametrize("kind", [UserError, ConfigError, CheckpointError])
def test_a_message_shows_what_a_terminal_would_obey_as_escapes(kind: type[UserError]) -> None:
    assert str(kind("model.\x1b[31m: unknown key")) == r"model.\x1b[31m: unknown key"
    assert str(kind("\u202e\ud800\0 \xe9 \U0001f600")) == "\\u202e\\ud800\\x00 \xe9 \U0001f600"
    assert str(kind("two\nlines")) == "two\nlines"


def test_the_middle_of_a_long_message_is_left_out() -> None:
    message = str(UserError("begin" + "x" * 10_000 + "end"))
    assert message.startswith("beginxxx") and message.endswith("xxxend") and " ... " in message and len(message) < 2000
    assert str(UserError("x" * 2000)) == "x" * 2000


def test_a_name_of_a_megabyte_is_near_to_none() -> None:
    assert nearest("adam" + "x" * 10**6, ["adamw", "sgd"]) == " (known: adamw, sgd)"
