"""The tokens of a source and what stands beside them, in memory or mapped from a file; both are cut and drawn from alike."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from minimoe.data.batches import TokenRow
from minimoe.data.encoding import Flags, Stretch

Domains = npt.NDArray[np.int8]
Starts = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class TokenArrays:
    """One row of tokens [n]. The rest is None where there is nothing to say."""

    tokens: TokenRow  # [n]; int32 in memory, the smallest unsigned type in a file
    domains: Domains | None  # [n]: the number of each token's domain
    learned: Flags | None  # [n]: whether the loss counts the token as a target
    documents: Starts | None  # where documents that are set apart begin, rising from 0

    def part(self, start: int, stop: int) -> "TokenArrays":
        """Return the tokens from `start` to `stop`; a document that is cut begins at 0."""
        starts = self.documents
        if starts is not None:
            first, last = np.searchsorted(starts, [start, stop])
            starts = np.unique(np.append(0, starts[first:last] - start))
        return TokenArrays(
            self.tokens[start:stop],
            None if self.domains is None else self.domains[start:stop],
            None if self.learned is None else self.learned[start:stop],
            starts,
        )


def gather(stretches: Iterable[Stretch], with_domains: bool) -> TokenArrays:
    """Return all stretches, none of which is empty, in memory."""
    found = list(stretches)
    sizes = [len(stretch.ids) for stretch in found]
    begins = np.cumsum([0, *sizes[:-1]])[[stretch.begins for stretch in found]] if found else np.zeros(0)
    ones = [np.ones(size, np.bool_) for size in sizes] if any(stretch.learned is not None for stretch in found) else []
    return TokenArrays(
        np.concatenate([stretch.ids for stretch in found]) if found else np.zeros(0, np.int32),
        np.repeat(np.array([stretch.domain for stretch in found], np.int8), sizes) if with_domains else None,
        np.concatenate([one if stretch.learned is None else stretch.learned for stretch, one in zip(found, ones, strict=True)])
        if ones else None,
        np.unique(np.append(0, begins)).astype(np.int64) if len(begins) else None,
    )  # fmt: skip
