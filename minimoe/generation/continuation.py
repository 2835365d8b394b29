"""A text that is generated while it is read."""

from collections.abc import Iterator


class Continuation(Iterator[str]):
    """The pieces of a text, drawn one by one as they are iterated over; `str()` draws the rest and is the whole text."""

    def __init__(self, pieces: Iterator[str]) -> None:
        self.pieces = pieces
        self.drawn: list[str] = []

    def __next__(self) -> str:
        piece = next(self.pieces)
        self.drawn.append(piece)
        return piece

    def stop(self) -> None:
        """Draw nothing more, though the text has not ended."""
        close = getattr(self.pieces, "close", None)  # an iterator that is no generator has nothing to end
        if close is not None:
            close()

    def __str__(self) -> str:
        for _ in self:
            pass
        return "".join(self.drawn)

    def __repr__(self) -> str:
        return str(self)
