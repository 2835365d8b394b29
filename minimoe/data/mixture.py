"""The data of a run: one source, or several, whose windows are drawn by their weights.

Each source has its own training and validation split. They lie one after the other in those of the corpus, and each is a domain of its own.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np
import numpy.typing as npt

from minimoe.config import DataConfig
from minimoe.data.arrays import Starts
from minimoe.data.batches import Part, TokenRow
from minimoe.data.corpus import Corpus, load_corpus, read_with_tokenizer, whole_corpus
from minimoe.data.tokenizer import CharTokenizer, Tokenizer
from minimoe.errors import UserError

MOST_SOURCES = 127  # the number of a token's source is an int8
NAMED = 3  # files that a summary names
Array = npt.NDArray[Any]


def load_data(
    data: DataConfig, base: Path | None = None, tokenizer: Tokenizer | None = None, *, seq_len: int | None = None,
    sha256: str | None = None, whole: bool = False,
) -> Corpus:  # fmt: skip
    """Load one source or several, as `load_corpus` does; `whole`: all of them as both splits, as `whole_corpus` does.

    Raises `UserError`, naming the source, for one that cannot be read or is too short, for a pipe among several, and for one given twice.
    """
    if not data.sources:
        only = whole_corpus(data, base, tokenizer, sha256) if whole else load_corpus(data, base, tokenizer, seq_len=seq_len, sha256=sha256)
        return replace(only, summary=(summary(only, whole),)) if only.files else only
    twice = [source for source, times in Counter(part.source for part in data.sources).items() if times > 1]
    if twice:
        raise UserError(f"data.sources: {twice[0]!r} is given twice: give it once, with the sum of the weights")
    if len(data.sources) > MOST_SOURCES:
        raise UserError(f"data.sources: {len(data.sources)} sources, of at most {MOST_SOURCES}: name many files by a pattern or a folder")
    singles = [msgspec.structs.replace(data, source=part.source, sources=()) for part in data.sources]
    if tokenizer is None and data.tokenizer == "char":
        tokenizer = _characters(singles, base)
    found: list[Corpus] = []
    for single in singles:
        found.append(whole_corpus(single, base, tokenizer) if whole else load_corpus(single, base, tokenizer, seq_len=seq_len))
        tokenizer = found[-1].tokenizer
        if found[-1].kept is not None:
            raise UserError(f"{single.source}: a pipe among several sources: save what it delivers, and give that file")
    return _joined(data, found, whole)


def summary(corpus: Corpus, whole: bool = False, share: float | None = None) -> str:
    """Return a line about what was read of a source: documents, files, tokens and how many of them the loss counts."""
    train = corpus.train_documents, corpus.train_learned, corpus.train
    splits = ((corpus.val_documents, corpus.val_learned, corpus.val), *(() if whole else (train,)))
    tokens = sum(len(part) for _, _, part in splits)
    words = [] if share is None else [f"{share:.1%} of the windows"]
    if corpus.files:
        documents = sum(1 if starts is None else len(starts) for starts, _, _ in splits) - (len(splits) - 1)
        named = ", ".join(Path(name).name for name in corpus.files[:NAMED])
        more = f" and {len(corpus.files) - NAMED:,} more" if len(corpus.files) > NAMED else ""
        of = f" of {len(corpus.files):,} files ({named}{more})" if len(corpus.files) > 1 else ""
        words.append(f"{documents:,} document{'s' * (documents != 1)}{of}")
    words.append(f"{tokens:,} tokens")
    flags = [learned for _, learned, _ in splits if learned is not None]
    if flags:
        share_learned = sum(int(np.count_nonzero(part)) for part in flags) / tokens
        words.append(f"the loss counts {share_learned:.0%} of them: the answers (data.loss_on)")
    return f"{corpus.source}: {', '.join(words)}"


# ---- several sources -----------------------------------------------------------------------------------------------------------------


def shares(weights: Sequence[float | None], sizes: Sequence[int]) -> list[float]:
    """Return each source's share of the windows. Weights are divided by their sum; sources without one share what is left, by size."""
    given = sum(weight for weight in weights if weight is not None)
    without = sum(size for weight, size in zip(weights, sizes, strict=True) if weight is None)
    if not without:
        return [cast("float", weight) / given for weight in weights]
    return [(1.0 - given) * size / without if weight is None else weight for weight, size in zip(weights, sizes, strict=True)]


class Joined:
    """Arrays one after the other, which are cut and drawn from like one, without a copy of them all: they may be mapped from files."""

    def __init__(self, parts: Sequence[Array]) -> None:
        self.parts, self.dtype = parts, np.result_type(*parts)
        self.ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, key: slice | Array) -> Array:
        """Return a stretch, or the values at indices of any shape."""
        if isinstance(key, slice):
            start, stop, _ = key.indices(len(self))
            begins = self.ends - [len(part) for part in self.parts]
            cut = [part[max(0, start - first) : max(0, stop - first)] for part, first in zip(self.parts, begins, strict=True)]
            return np.concatenate(cut)
        chosen, found = np.searchsorted(self.ends, key, side="right"), np.empty(key.shape, self.dtype)
        for number, (part, end) in enumerate(zip(self.parts, self.ends, strict=True)):
            here = chosen == number
            found[here] = part[key[here] - (end - len(part))]
        return found

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return np.concatenate([np.asarray(part) for part in self.parts]).astype(dtype or self.dtype, copy=False)


def _joined(data: DataConfig, found: Sequence[Corpus], whole: bool) -> Corpus:
    """Return the corpus of several sources."""
    train, val = ([getattr(corpus, split) for corpus in found] for split in ("train", "val"))
    stops = np.cumsum([len(part) for part in train]).tolist()
    by_weight = shares([part.weight for part in data.sources], [len(part) for part in train])
    parts = tuple(Part(stop - len(part), stop, share) for part, stop, share in zip(train, stops, by_weight, strict=True))
    combined = hashlib.sha256("".join(corpus.sha256 for corpus in found).encode()).hexdigest()
    lines = [summary(corpus, whole, None if whole else part.share) for corpus, part in zip(found, parts, strict=True)]
    return Corpus(
        train=cast("TokenRow", Joined(train)), val=cast("TokenRow", Joined(val)), train_domains=_domains(train), val_domains=_domains(val),
        domains=short_names([corpus.source for corpus in found]), tokenizer=found[0].tokenizer, sha256=combined, source=data.name,
        notes=tuple(note for corpus in found for note in corpus.notes),
        train_learned=_learned([corpus.train_learned for corpus in found], train),
        val_learned=_learned([corpus.val_learned for corpus in found], val),
        train_documents=_starts([corpus.train_documents for corpus in found], train),
        val_documents=_starts([corpus.val_documents for corpus in found], val), parts=parts, summary=tuple(lines),
    )  # fmt: skip


def short_names(sources: Sequence[str]) -> tuple[str, ...]:
    """Return the sources without their folders; whole, if two would then be called the same."""
    names = tuple(source.rstrip("/").rpartition("/")[2] for source in sources)
    return names if len(set(names)) == len(names) else tuple(sources)


def _domains(parts: Sequence[Array]) -> Any:
    return Joined([np.broadcast_to(np.int8(number), len(part)) for number, part in enumerate(parts)])


def _learned(flags: Sequence[Array | None], parts: Sequence[Array]) -> Any:
    if all(part is None for part in flags):
        return None
    return Joined([np.broadcast_to(np.bool_(True), len(part)) if one is None else one for one, part in zip(flags, parts, strict=True)])


def _starts(starts: Sequence[Starts | None], parts: Sequence[Array]) -> Starts:
    first = np.cumsum([0, *(len(part) for part in parts)])
    return np.concatenate([[begin] if one is None else one + begin for one, begin in zip(starts, first[:-1], strict=True)]).astype(np.int64)


def _characters(singles: Sequence[DataConfig], base: Path | None) -> Tokenizer:
    """Return a tokenizer of the characters of all sources."""
    own = (read_with_tokenizer(single, base)[1] for single in singles)
    return CharTokenizer(sorted({char for tokenizer in own if isinstance(tokenizer, CharTokenizer) for char in tokenizer.chars}))
