"""Small tokenizers of the kinds that published models use, each with the template that its kind puts around a text.

They need the extra `hf`; a test that uses one is skipped without it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PLAIN = "the router sends every token to two experts and the gate weighs what they say. a token waits, and the expert sorts it."


def _library() -> Any:
    return pytest.importorskip("tokenizers")


def _train(tokenizer: Any, kind: str, special: list[str], **settings: Any) -> Any:
    trainer = getattr(_library().trainers, f"{kind}Trainer")(vocab_size=150, special_tokens=special, show_progress=False, **settings)
    tokenizer.train_from_iterator([PLAIN], trainer)
    return tokenizer


def _around(tokenizer: Any, template: str, tokens: list[str]) -> Any:
    pairs = [(token, tokenizer.token_to_id(token)) for token in tokens]
    tokenizer.post_processor = _library().processors.TemplateProcessing(single=template, special_tokens=pairs)
    return tokenizer


def wordpiece() -> Any:
    """BERT's: lower case, [CLS] before a text and [SEP] after it."""
    t = _library()
    tokenizer = t.Tokenizer(t.models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = t.normalizers.BertNormalizer(), t.pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = t.decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    return _around(_train(tokenizer, "WordPiece", special), "[CLS] $A [SEP]", ["[CLS]", "[SEP]"])


def sentencepiece() -> Any:
    """Llama's and Mistral's: words begin with a mark for their space, other bytes are tokens, <s> before a text."""
    t = _library()
    tokenizer = t.Tokenizer(t.models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = t.pre_tokenizers.Metaspace(prepend_scheme="first")
    d = t.decoders
    tokenizer.decoder = d.Sequence([d.Replace("▁", " "), d.ByteFallback(), d.Fuse(), d.Strip(" ", 1, 0)])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = t.trainers.BpeTrainer(vocab_size=340, special_tokens=special[:3], initial_alphabet=[], show_progress=False)
    tokenizer.train_from_iterator([PLAIN], trainer)
    return _around(_with_bytes(tokenizer, special[3:]), "<s> $A", ["<s>"])


def _with_bytes(tokenizer: Any, names: list[str]) -> Any:
    """Give a trained BPE tokens for the bytes, which its trainer does not make."""
    import json

    table = json.loads(tokenizer.to_str())
    vocab = table["model"]["vocab"]
    vocab.update({name: len(vocab) + i for i, name in enumerate(names)})
    return _library().Tokenizer.from_str(json.dumps(table))


def metaspace() -> Any:
    """A byte-pair encoding that has neither an unknown token nor bytes: what it has no token for, it drops. <s> before and </s> after."""
    t = _library()
    tokenizer = t.Tokenizer(t.models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = t.pre_tokenizers.Metaspace(), t.decoders.Metaspace()
    return _around(_train(tokenizer, "Bpe", ["<s>", "</s>"]), "<s> $A </s>", ["<s>", "</s>"])


def unigram() -> Any:
    """ALBERT's and T5's kind: the likeliest pieces, with an unknown token, [CLS] before a text and [SEP] after it."""
    t = _library()
    tokenizer = t.Tokenizer(t.models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = t.pre_tokenizers.Metaspace(), t.decoders.Metaspace()
    special = ["<unk>", "[CLS]", "[SEP]", "<mask>"]
    return _around(_train(tokenizer, "Unigram", special, unk_token="<unk>"), "[CLS] $A [SEP]", ["[CLS]", "[SEP]"])


def byte_level() -> Any:
    """GPT-2's and Qwen's: bytes as printable characters, nothing around a text; the file asks for truncation and padding."""
    t = _library()
    tokenizer = t.Tokenizer(t.models.BPE())
    tokenizer.pre_tokenizer = t.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder, tokenizer.post_processor = t.decoders.ByteLevel(), t.processors.ByteLevel(trim_offsets=False)
    alphabet = sorted(t.pre_tokenizers.ByteLevel.alphabet())
    trainer = t.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<|end|>"], show_progress=False)
    tokenizer.train_from_iterator([PLAIN], trainer)
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=8, pad_token="<|end|>", pad_id=tokenizer.token_to_id("<|end|>"))
    return tokenizer


KINDS: dict[str, Callable[[], Any]] = {
    "wordpiece": wordpiece, "sentencepiece": sentencepiece, "metaspace": metaspace, "unigram": unigram, "byte-level": byte_level,
}  # fmt: skip
BEFORE = {"wordpiece": ["[CLS]"], "sentencepiece": ["<s>"], "metaspace": ["<s>"], "unigram": ["[CLS]"], "byte-level": []}
AFTER = {"wordpiece": ["[SEP]"], "sentencepiece": [], "metaspace": ["</s>"], "unigram": ["[SEP]"], "byte-level": []}


def write(kind: str, folder: Path) -> Path:
    """Write the tokenizer.json of a kind into a folder.   -> the file"""
    path = folder / "tokenizer.json"
    KINDS[kind]().save(str(path))
    return path
