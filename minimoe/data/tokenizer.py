"""Tokenizers: text to integer ids and back. Bytes and characters are built in; any other tokenizer.json needs the extra `hf`.

Each is saved as a tokenizer.json from which Hugging Face's `tokenizers` makes the same ids: a byte or a character is a base symbol of a
byte-pair encoding (Sennrich et al. 2016) without merges.
"""

import codecs
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from minimoe.data.dropped import dropped_characters, may_drop
from minimoe.data.windows import Window, encode_in_windows
from minimoe.errors import UserError, nearest
from minimoe.hints import install
from minimoe.signatures import START, what_it_is
from minimoe.untrusted import Malformed, decode_text, parse_json, read_bounded

Ids = npt.NDArray[np.int32]
Places = npt.NDArray[np.int64]
REPLACEMENT = "\ufffd"  # Unicode's replacement for bytes that are not text; minimoe also uses it for unknown ids
BUILT_IN = ("byte", "char")
END_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")  # of tokens that end a text
CHECKED = 1 << 20  # ids of a text that are looked at together
PROBES = 1000  # names of tokens that are encoded to see what precedes a text; the first suffices in all but odd vocabularies
MOST_JSON = 200_000_000  # bytes of a tokenizer.json; those of vocabularies of 260,000 tokens take 35 MB


class StreamDecoder(ABC):
    """Turns ids into text one at a time, as they are generated.

    The prompt's text and all pieces, joined, equal `Tokenizer.decode` of the prompt's and all later ids. There is one exception: if
    invalid bytes follow a character, a decoder with byte tokens may replace the character too, even if it was returned already.
    """

    @abstractmethod
    def push(self, token: int) -> str:
        """Return the text that this id completes; it is empty while a character lacks some of its bytes."""

    def flush(self) -> str:
        """Return the text of what is still incomplete, and end the stream."""
        return ""


class Tokenizer(ABC):
    """Turns text into ids in [0, vocab_size) and back."""

    name: str
    vocab_size: int
    mask_id: int | None = None  # the id of its mask token, if it has one
    end_id: int | None = None  # the id of the token that ends a text, if it has one

    @abstractmethod
    def encode(self, text: str, what: str = "text") -> Ids:
        """Return the ids of a text, int32 [n]. Raises `UserError` for text that the vocabulary lacks; the message calls it `what`."""

    def encode_prompt(self, text: str) -> Ids:
        """Return the ids of a text that is to be continued: what precedes a text is added (Llama's <s>, BERT's [CLS]), nothing after it."""
        return self.encode(text, "prompt")

    def encode_template(self, text: str, what: str = "text") -> Ids:
        """Return the ids of a text with all special tokens that the tokenizer puts around it, as encoders read it: [CLS] ... [SEP]."""
        return self.encode(text, what)

    def encode_many(self, texts: Sequence[str], what: str = "text", places: bool = False) -> list[tuple[Ids, Places | None]]:
        """Return the ids of each text and, with `places`, where in the text each token's last character stands, int64 [n]."""
        return [(self.encode(text, what), self._places(text) if places else None) for text in texts]

    def _places(self, text: str) -> Places:
        """Return where each token's last character stands in a text, int64 [n], unless `encode_many` finds that out by itself."""
        raise NotImplementedError

    def encode_pieces(self, pieces: Iterable[str], what: str = "text") -> Iterator[Ids]:
        """Yield the ids of a text that comes in pieces; joined, they are those of the whole."""
        return (self.encode(piece, what) for piece in pieces)

    def dropped(self, text: str) -> dict[str, int]:
        """Return the characters of a text that `encode` drops without an error, and how often each occurs; the most frequent first."""
        return {}

    @abstractmethod
    def decode(self, ids: npt.ArrayLike) -> str:
        """Return the text of ids [n]; incomplete or unknown ones become the replacement character (U+FFFD)."""

    def token(self, id: int) -> str:
        """Return the name of a token."""
        return self.decode([id])

    @abstractmethod
    def stream(self, prompt: npt.ArrayLike = ()) -> StreamDecoder:
        """Return a new decoder of ids that follow those of a prompt [n]. It takes one id at a time, and returns only what is new."""

    @abstractmethod
    def to_json(self) -> str:
        """Return the tokenizer.json; equal tokenizers give equal text."""

    def save(self, path: Path) -> None:
        """Write the tokenizer.json to this file, or into this folder."""
        json_file(path).write_text(self.to_json(), encoding="utf-8", newline="\n")


# ---- bytes -------------------------------------------------------------------------------------------------------------------


class ByteTokenizer(Tokenizer):
    """The 256 bytes of UTF-8: an id is a byte. It can encode every text."""

    name = "byte"
    vocab_size = 256

    def encode(self, text: str, what: str = "text") -> Ids:
        try:
            data = text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(f"{what}: not valid Unicode: {text[error.start]!r} at position {error.start} is half a character") from None
        return np.frombuffer(data, np.uint8).astype(np.int32)

    def _places(self, text: str) -> Places:
        codes = code_points(text)
        return np.repeat(np.arange(len(text)), 1 + (codes > 0x7F) + (codes > 0x7FF) + (codes > 0xFFFF))

    def decode(self, ids: npt.ArrayLike) -> str:
        ids = flat(ids)
        known = (ids >= 0) & (ids < 256)
        return np.where(known, ids, 0xFF).astype(np.uint8).tobytes().decode("utf-8", errors="replace")  # 0xFF never occurs in UTF-8

    def stream(self, prompt: npt.ArrayLike = ()) -> StreamDecoder:
        return ByteStream()

    def to_json(self) -> str:
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
        return to_text(bpe_json(byte_alphabet(), pre_tokenizer=level, decoder=level))


class ByteStream(StreamDecoder):
    """Holds back the first bytes of a character until the last one has come."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(bytes([token if 0 <= token < 256 else 0xFF]))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


def byte_alphabet() -> list[str]:
    """Return GPT-2's printable character for each byte: its own if Latin-1 prints it, else the next from U+0100 (Radford et al. 2019)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    free = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(free)) for byte in range(256)]


# ---- characters --------------------------------------------------------------------------------------------------------------


class CharTokenizer(Tokenizer):
    """Distinct characters (Unicode code points); an id is the index in `chars`. `encode` refuses characters that are not in `chars`."""

    name = "char"

    def __init__(self, chars: Iterable[str]) -> None:
        self.chars = tuple(chars)
        if any(len(char) != 1 for char in self.chars) or len(set(self.chars)) != len(self.chars):
            raise ValueError("CharTokenizer: chars must be single characters, all different")
        self.vocab_size = len(self.chars)
        codes = code_points("".join(self.chars))
        self._codes = np.append(codes, np.uint32(ord(REPLACEMENT))).astype("<u4")  # id -> code point; the last is for unknown ids
        self._ids = np.full(int(codes.max(initial=0)) + 2, -1, np.int32)  # code point -> id; the last is for all above
        self._ids[codes] = np.arange(self.vocab_size)

    @classmethod
    def from_text(cls, text: str) -> "CharTokenizer":
        """Make a tokenizer of the characters of a text, sorted."""
        return cls(sorted(set(text)))

    def encode(self, text: str, what: str = "text") -> Ids:
        ids: Ids = self._ids[np.minimum(code_points(text), len(self._ids) - 1)]
        if ids.size and ids.min() < 0:
            self._refuse(text, what)
        return ids

    def _places(self, text: str) -> Places:
        return np.arange(len(text))

    def _refuse(self, text: str, what: str) -> None:
        unknown = sorted(set(text) - set(self.chars))
        shown = ", ".join(repr(char) for char in unknown[:5]) + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
        subject = f"the character {shown} is" if len(unknown) == 1 else f"the characters {shown} are"
        raise UserError(
            f"{what}: {subject} not in the char tokenizer's vocabulary of {self.vocab_size}; "
            "use characters of the training text, or train with data.tokenizer = 'byte'"
        )

    def decode(self, ids: npt.ArrayLike) -> str:
        ids = flat(ids)
        known = (ids >= 0) & (ids < self.vocab_size)
        return self._codes[np.where(known, ids, self.vocab_size)].tobytes().decode("utf-32-le", errors="surrogatepass")

    def stream(self, prompt: npt.ArrayLike = ()) -> StreamDecoder:
        return CharStream(self.chars)

    def to_json(self) -> str:
        return to_text(bpe_json(self.chars, pre_tokenizer=None, decoder={"type": "Fuse"}))


class CharStream(StreamDecoder):
    """Turns ids into characters: every id is a whole one."""

    def __init__(self, chars: tuple[str, ...]) -> None:
        self._chars = chars

    def push(self, token: int) -> str:
        return self._chars[token] if 0 <= token < len(self._chars) else REPLACEMENT


def code_points(text: str) -> npt.NDArray[np.uint32]:
    """Return the Unicode code points of a text, uint32 [n]."""
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), "<u4").astype(np.uint32)


# ---- any other tokenizer.json ------------------------------------------------------------------------------------------------


class HuggingFaceTokenizer(Tokenizer):
    """Any tokenizer.json, run by Hugging Face's `tokenizers`. `encode` adds no special tokens; padding and truncation are off.

    Raises `UserError` if the extra `hf` is not installed, or if the file is not a tokenizer.json.
    """

    def __init__(self, path: Path) -> None:
        try:
            import tokenizers
        except ImportError:
            raise UserError(f"{path}: this tokenizer needs Hugging Face's tokenizers: {install('hf')}") from None
        self._json = read_json_text(json_file(path))
        with library_errors(f"{path}: not a tokenizer.json"):
            self._tokenizer = tokenizers.Tokenizer.from_str(self._json)
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
        self.path = json_file(path)
        self.name = self.path.name
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1  # ids may have holes
        self.mask_id = self._first_of("[MASK]", "<mask>")
        self.end_id = self._first_of(*END_NAMES)

    def _first_of(self, *names: str) -> int | None:
        """Return the id of the first of these tokens that there is."""
        return next((id for id in map(self._tokenizer.token_to_id, names) if id is not None), None)

    def encode(self, text: str, what: str = "text") -> Ids:
        return self._encode(text, what, add_special_tokens=False)

    def encode_prompt(self, text: str) -> Ids:
        ids = self.encode(text, "prompt")
        typed = 0  # how many of the tokens that precede a text stand at its beginning already
        for token in self._before:
            typed += typed < len(ids) and int(ids[typed]) == token
        with library_errors(f"prompt: {self.path} cannot encode it"):
            return np.concatenate([np.array(self._before, np.int32), ids[typed:]])

    def encode_template(self, text: str, what: str = "text") -> Ids:
        return self._encode(text, what, add_special_tokens=True)

    def dropped(self, text: str) -> dict[str, int]:
        with library_errors(f"{self.path} cannot encode it"):
            return dropped_characters(self._tokenizer, text)

    @cached_property
    def _before(self) -> list[int]:
        """The ids that the tokenizer puts before a text, found by encoding the name of a token, whichever works."""
        for name in islice(self._tokenizer.get_vocab(with_added_tokens=True), PROBES):
            with suppress(UserError), library_errors(name):  # a name that cannot be encoded as text
                found = self._tokenizer.encode(name, add_special_tokens=True)
                if 0 in found.sequence_ids:
                    return list(found.ids[: found.sequence_ids.index(0)])
        return []

    def encode_many(self, texts: Sequence[str], what: str = "text", places: bool = False) -> list[tuple[Ids, Places | None]]:
        with library_errors(f"{what}: {self.path} cannot encode it"):
            found = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
            lasts = [np.array([max(start, stop - 1) for start, stop in one.offsets], np.int64) if places else None for one in found]
            return [(np.array(one.ids, np.int32), last) for one, last in zip(found, lasts, strict=True)]

    def encode_pieces(self, pieces: Iterable[str], what: str = "text") -> Iterator[Ids]:
        def encode(texts: list[str]) -> list[Window]:
            with library_errors(f"{what}: {self.path} cannot encode it"):
                return [self._window(one) for one in self._tokenizer.encode_batch(texts, add_special_tokens=False)]

        return encode_in_windows(encode, pieces)

    def _window(self, found: Any) -> Window:
        """Return an encoding of the library as a window; within a word, the library loses count where characters are dropped."""
        words = np.array([-1 if word is None else word for word in found.word_ids], np.int64)
        begins = np.diff(words, prepend=-1) != 0
        if self._tokenizer.pre_tokenizer is None and not may_drop(self._tokenizer):
            begins[:] = True
        return np.array(found.ids, np.int32), np.array(found.offsets, np.int64).reshape(-1, 2), begins

    def _encode(self, text: str, what: str, add_special_tokens: bool) -> Ids:
        with library_errors(f"{what}: {self.path} cannot encode it"):
            return np.array(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids, np.int32)

    def decode(self, ids: npt.ArrayLike) -> str:
        with library_errors(f"{self.path} cannot decode tokens"):
            text: str = self._tokenizer.decode(flat(ids).tolist(), skip_special_tokens=False)
        return text

    def token(self, id: int) -> str:
        return self._tokenizer.id_to_token(id) or super().token(id)

    def has(self, id: int) -> bool:
        """Return True if an id is that of a token; an embedding may have more rows than there are tokens."""
        return id >= 0 and self._tokenizer.id_to_token(id) is not None

    def stream(self, prompt: npt.ArrayLike = ()) -> StreamDecoder:
        return WindowStream(self, flat(prompt).tolist())

    def to_json(self) -> str:
        return self._json


@contextmanager
def library_errors(what: str) -> Iterator[None]:
    """Raise `UserError` for any error of the library, and for a panic of its Rust code, which is not an `Exception`."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{what}: {' '.join(str(error).split())}") from None


class WindowStream(StreamDecoder):
    """Decodes the last complete piece together with the ids after it, and returns what is new: decoders may treat a first token apart.

    At the start the last piece is the whole prompt.
    """

    def __init__(self, tokenizer: "HuggingFaceTokenizer", prompt: list[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt)  # those of the piece returned last, then those still incomplete
        self._done = len(prompt)  # how many of them were returned

    def push(self, token: int) -> str:
        if not self._tokenizer.has(token):  # it has no text: to wait for the rest of its character would be to wait for ever
            return ""
        self._ids.append(token)
        new = self._new()
        if not new or new.endswith(REPLACEMENT):
            return ""
        self._ids = self._ids[self._done :]
        self._done = len(self._ids)
        return new

    def flush(self) -> str:
        new = self._new()
        self._done = len(self._ids)
        return new

    def _new(self) -> str:
        return self._tokenizer.decode(self._ids)[len(self._tokenizer.decode(self._ids[: self._done])) :]


# ---- what a user should know of a text ----------------------------------------------------------------------------------------


def check_rows(tokenizer: Tokenizer, ids: npt.NDArray[np.integer[Any]], rows: int, what: str) -> None:
    """Raise `UserError` if a text (`what`) has a token that an embedding of `rows` rows lacks: it was added to the tokenizer alone."""
    if tokenizer.vocab_size <= rows:
        return
    for start in range(0, len(ids), CHECKED):
        part = ids[start : start + CHECKED]
        beyond = part[part >= rows]
        if beyond.size:
            id = int(beyond[0])
            raise UserError(
                f"{what}: has the token {tokenizer.token(id)!r} (id {id}), which the model lacks: its embedding has {rows} rows, "
                f"the tokenizer {tokenizer.vocab_size} tokens; leave the token out of the text, or resize the embedding"
            )


def note_of_dropped(tokenizer: Tokenizer, text: str, what: str) -> tuple[str, ...]:
    """Return a message, if there is reason for one, about characters of a text (`what`) that the tokenizer drops."""
    return note_of_counts(tokenizer, tokenizer.dropped(text), what)


def note_of_counts(tokenizer: Tokenizer, dropped: Mapping[str, int], what: str) -> tuple[str, ...]:
    """Return the same message for the characters that are dropped, and how often each occurs."""
    if not dropped:
        return ()
    count = sum(dropped.values())
    often = sorted(dropped, key=lambda char: -dropped[char])
    shown = ", ".join(map(repr, often[:5])) + (f" and {len(dropped) - 5} more" if len(dropped) > 5 else "")
    return (f"{tokenizer.name} drops {count:,} character{'s' * (count > 1)} of {what} that it has no token for: {shown}",)


# ---- by name and by file -----------------------------------------------------------------------------------------------------


def make_tokenizer(name: str, text: str, base: Path | None = None) -> Tokenizer:
    """Make the tokenizer of `data.tokenizer`: "byte", "char" (the characters of `text`), or the path of a tokenizer.json from `base`.

    Raises `UserError` for any other name.
    """
    if name == "byte":
        return ByteTokenizer()
    if name == "char":
        return CharTokenizer.from_text(text)
    path = (base or Path()) / os.path.expanduser(name)
    if path.exists():
        return load_tokenizer(path)
    if path.suffix == ".json" or path.name != name:
        raise UserError(f"data.tokenizer = {name!r}: no such file; give byte, char or the path of a tokenizer.json")
    raise UserError(f"data.tokenizer = {name!r} is not byte, char or the path of a tokenizer.json{nearest(name, BUILT_IN)}")


def load_tokenizer(path: Path) -> Tokenizer:
    """Load a tokenizer.json, or the one in a folder. The two built-in kinds need no extra.

    Raises `UserError` if there is no such file, if it is not a tokenizer.json, or if it needs the extra `hf`.
    """
    path = json_file(path)
    with suppress(OSError), open(path, "rb") as file:  # what cannot be read is said below
        odd = what_it_is(file.read(START))
        if odd:
            raise UserError(f"{path}: {odd}")
    try:
        table = parse_json(read_json_text(path).encode())
    except Malformed as error:
        raise UserError(f"{path}: not a tokenizer.json: {error}") from None
    return built_in(table) or HuggingFaceTokenizer(path)


def built_in(table: Any) -> Tokenizer | None:
    """Return the built-in tokenizer whose tokenizer.json equals `table`, or None if another library has to run it."""
    vocab = table.get("model", {}).get("vocab") if isinstance(table, dict) and isinstance(table.get("model"), dict) else None
    if not isinstance(vocab, dict):
        return None
    candidates: list[Tokenizer] = [ByteTokenizer()]
    if all(len(char) == 1 for char in vocab) and sorted(vocab.values(), key=str) == sorted(range(len(vocab)), key=str):
        candidates.append(CharTokenizer(sorted(vocab, key=vocab.__getitem__)))
    return next((tokenizer for tokenizer in candidates if json.loads(tokenizer.to_json()) == table), None)


def bpe_json(symbols: Iterable[str], pre_tokenizer: dict[str, Any] | None, decoder: dict[str, Any]) -> dict[str, Any]:
    """Return a tokenizer.json whose tokens are these symbols, in this order, without merges."""
    model: dict[str, Any] = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": {symbol: token for token, symbol in enumerate(symbols)},
        "merges": [],
    }
    head: dict[str, Any] = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None}
    return {**head, "pre_tokenizer": pre_tokenizer, "post_processor": None, "decoder": decoder, "model": model}


def to_text(table: dict[str, Any]) -> str:
    return json.dumps(table, indent=2, ensure_ascii=True) + "\n"


def json_file(path: Path) -> Path:
    return path / "tokenizer.json" if path.is_dir() else path


def read_json_text(path: Path) -> str:
    try:
        return decode_text(read_bounded(path, MOST_JSON))
    except Malformed as error:
        raise UserError(f"{path}: not a tokenizer.json: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def flat(ids: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Return ids of any integer dtype as int64 [n]."""
    return np.asarray(ids, dtype=np.int64).reshape(-1)
