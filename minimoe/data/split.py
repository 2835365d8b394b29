"""A split with what stands beside its tokens: which of them the loss counts, and where documents begin that are kept apart."""

from dataclasses import dataclass

import numpy as np

from minimoe.data.arrays import Starts
from minimoe.data.batches import IGNORE, Places, TokenRow, Tokens
from minimoe.data.encoding import Flags


@dataclass(frozen=True, eq=False)
class Split:
    """Tokens [n], which of them the loss counts [n] (None: all), and where documents begin, from 0 (None: they are not kept apart)."""

    tokens: TokenRow
    learned: Flags | None = None
    documents: Starts | None = None

    @property
    def plain(self) -> bool:
        """True if the loss counts all tokens, and nothing is kept apart."""
        return self.learned is None and self.documents is None

    def counted(self, targets: Tokens, places: Places) -> Tokens:
        """Return the targets at these places, with -100 for those that the loss does not count.   [B,T], [B,T] -> [B,T]"""
        return targets if self.learned is None else np.where(self.learned[places], targets, np.int32(IGNORE))

    def following(self, targets: Tokens, places: Places) -> Tokens:
        """Do the same for targets that the tokens before them predict: the first of a document that is kept apart is not.   -> [B,T]"""
        targets = self.counted(targets, places)
        return targets if self.documents is None else np.where(self._begin(places) == places, np.int32(IGNORE), targets)

    def starts(self, places: Places) -> tuple[Tokens, ...]:
        """Return the model's `document_starts` for tokens at these places, if documents are kept apart.   [B,T] -> ([B,T],) or ()"""
        if self.documents is None:
            return ()
        return (np.maximum(self._begin(places) - places[:, :1], 0).astype(np.int32),)  # of a document that began before the row: 0

    def _begin(self, places: Places) -> Places:
        """Return where the document of each place begins."""
        assert self.documents is not None
        return self.documents[np.searchsorted(self.documents, places, side="right") - 1]

