"""Messages for the user: they are passed to the listener of `backend.tell`, by default to standard error."""

import sys
from collections.abc import Callable

COMPILING = "compiling kernels for this processor: once, for less than a minute"


def to_stderr(text: str) -> None:
    """The listener used while no other is set."""
    print(f"minimoe: {text}", file=sys.stderr, flush=True)


class News:
    """Passes messages to the listener, each text once per process."""

    def __init__(self) -> None:
        self.listener: Callable[[str], None] = to_stderr
        self.sent: set[str] = set()

    def tell(self, text: str) -> None:
        if text not in self.sent:
            self.sent.add(text)
            self.listener(text)


news = News()
