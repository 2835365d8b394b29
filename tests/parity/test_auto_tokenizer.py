"""transformers' AutoTokenizer opens a folder that minimoe has written: the same ids and the same text, for every family and tokenizer."""

import json
from pathlib import Path
from typing import Any

import made_tokenizers
import pytest
import transformers
from made_tokenizers import KINDS, PLAIN
from parity.test_pretrained_use import MADE, SIZES

import minimoe as mm
from minimoe.data.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer, load_tokenizer
from minimoe.pretrained.families.table import FAMILIES
from minimoe.study.convert import convert

pytestmark = pytest.mark.parity
TEXTS = (
    PLAIN, "the gate weighs", " the  gate\n\nweighs\t", "The Gate, it WEIGHS .  It's n't", "", " ", "é 漢字 🙂 e\u0301",
    "don ' t [SEP] </s>", "router",
)  # fmt: skip
WRITTEN_AS = {family: next(case for case in MADE if MADE[case][0] == family) for family in FAMILIES if family != "vit"}
TOKENIZERS = ("byte", "char", *KINDS)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    found: dict[str, Tokenizer] = {"byte": ByteTokenizer(), "char": CharTokenizer.from_text("".join(TEXTS))}
    for kind in KINDS:
        found[kind] = load_tokenizer(made_tokenizers.write(kind, tmp_path_factory.mktemp("tokenizer")))
    return found


def exported(family: str, tokenizer: Tokenizer, folder: Path) -> Path:
    """A model of a family with a tokenizer, as a folder for transformers."""
    _, options, moe = MADE[WRITTEN_AS[family]]
    config = mm.ModelConfig(**{**SIZES, **options, "vocab_size": tokenizer.vocab_size + 1}, moe=moe and mm.MoEConfig(**moe))
    model = mm.Transformer(config, backend=mm.set_backend("numpy"), tokenizer=tokenizer)
    model.save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["model_type"] == family
    return folder


def test_every_family_that_reads_text_is_tested() -> None:
    assert set(WRITTEN_AS) == set(FAMILIES) - {"vit"}


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("family", WRITTEN_AS)
def test_auto_tokenizer_makes_the_same_ids_and_text(family: str, kind: str, tokenizers: dict[str, Tokenizer], tmp_path: Path) -> None:
    ours = tokenizers[kind]
    theirs: Any = transformers.AutoTokenizer.from_pretrained(exported(family, ours, tmp_path / "model"))
    assert len(theirs) == ours.vocab_size, "no token is added"
    for text in TEXTS:
        assert theirs(text)["input_ids"] == ours.encode_template(text).tolist(), text
        plain = theirs(text, add_special_tokens=False)["input_ids"]
        assert plain == ours.encode(text).tolist(), text
        assert theirs.decode(plain) == ours.decode(plain), text
    if kind in ("byte", "char"):
        assert [theirs.decode(theirs(text)["input_ids"]) for text in TEXTS] == list(TEXTS)


def test_a_model_made_elsewhere_keeps_its_own_tokenizer_configuration(tmp_path: Path, tokenizers: dict[str, Tokenizer]) -> None:
    """Also if it has none: transformers then chooses a class by the family, as it did for the folder before."""
    for own in ('{"tokenizer_class": "BertTokenizer", "do_lower_case": true}', None):
        source = exported("bert", tokenizers["wordpiece"], tmp_path / f"source {own is None}")
        (source / "tokenizer_config.json").unlink()
        if own is not None:
            (source / "tokenizer_config.json").write_text(own)
        for name in ("converted", "saved"):
            target = tmp_path / f"{name} {own is None}"
            if name == "converted":
                convert(source, target)
            else:
                mm.load(source).save_pretrained(target)
            written = target / "tokenizer_config.json"
            assert (written.read_text() if written.exists() else None) == own


def test_an_export_that_is_opened_and_saved_again_keeps_its_ids(tmp_path: Path, tokenizers: dict[str, Tokenizer]) -> None:
    ours = tokenizers["char"]
    exported("qwen3_moe", ours, tmp_path / "first")
    convert(tmp_path / "first", tmp_path / "second")
    theirs: Any = transformers.AutoTokenizer.from_pretrained(tmp_path / "second")
    assert theirs("the gate weighs")["input_ids"] == ours.encode("the gate weighs").tolist()


def test_an_encoder_reads_a_text_as_the_ids_of_auto_tokenizer(tmp_path: Path, tokenizers: dict[str, Tokenizer]) -> None:
    for kind in TOKENIZERS:
        folder = exported("bert", tokenizers[kind], tmp_path / kind)
        model, theirs = mm.load(folder), transformers.AutoTokenizer.from_pretrained(folder)
        assert model.encode("the gate weighs").tolist() == theirs("the gate weighs")["input_ids"]
