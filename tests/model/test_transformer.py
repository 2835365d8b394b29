"""The parts of a Transformer: one idea a file, names that checkpoints rely on, nothing that belongs to files."""

from pathlib import Path

import numpy as np
import pytest
from fresh_process import first_words

import minimoe as mm
from minimoe import model as package
from minimoe.config import ModelConfig
from minimoe.model.transformer import Transformer

SHAPE = {"d_model": 8, "n_layers": 1, "n_heads": 2, "d_hidden": 12, "max_seq_len": 9, "vocab_size": 11}
BLOCK = ["attention_norm.weight", "attention.qkv_proj.weight", "attention.o_proj.weight", "ffn_norm.weight", "ffn.gate_up_proj.weight",
         "ffn.down_proj.weight"]  # fmt: skip
DECODER = [f"blocks.0.{name}" for name in BLOCK]
IMAGES = {"d_model": 8, "n_layers": 1, "n_heads": 2, "d_hidden": 12, "image_size": 4, "patch_size": 2, "n_channels": 1, "causal": False,
          "n_classes": 3, "head": "classifier", "position": "learned"}  # fmt: skip
ENCODER = {**SHAPE, "head": "mlm", "causal": False, "position": "learned", "type_vocab_size": 2, "norm_position": "post"}
HEAD = ["head.bias", "head.dense.weight", "head.dense.bias", "head.norm.weight", "head.norm.bias"]
INPUT = ["embed.weight", "positions.weight", "token_types.weight", "embed_norm.weight"]

NAMES = {
    "decoder": (SHAPE, ["embed.weight", *DECODER, "norm.weight", "head.weight"]),
    "tied": ({**SHAPE, "tie_embeddings": True}, ["embed.weight", *DECODER, "norm.weight"]),
    "without a head": ({**SHAPE, "head": "none"}, ["embed.weight", *DECODER, "norm.weight"]),
    "encoder": (ENCODER, [*INPUT, *DECODER, "head.bias", "head.weight", *HEAD[1:]]),
    "tied encoder": ({**ENCODER, "tie_embeddings": True}, [*INPUT, *DECODER, *HEAD]),
    "images": (IMAGES, ["class_token", "patch_embed.weight", "patch_embed.bias", "positions.weight", *DECODER, "norm.weight", "head.weight",
                        "head.bias"]),
}  # fmt: skip


@pytest.mark.parametrize("form", NAMES)
def test_parameters_have_the_names_and_the_order_that_checkpoints_rely_on(form: str) -> None:
    settings, expected = NAMES[form]
    assert [name for name, _ in Transformer(ModelConfig(**settings), seed=None).named_state()] == expected


def test_a_transformer_inside_another_module_puts_its_path_before_every_name() -> None:
    class Pair(mm.nn.Module):
        def __init__(self) -> None:
            self.first = Transformer(ModelConfig(**IMAGES), seed=None)

    assert next(name for name, _ in Pair().named_state()) == "first.class_token"


def test_a_transformer_knows_nothing_of_files() -> None:
    found = dir(Transformer(ModelConfig(**SHAPE)))
    assert not {"tokenizer", "weights", "origin", "provenance", "end_tokens", "expert_rows", "resident", "save_pretrained"} & set(found)


def test_every_file_of_the_model_is_shorter_than_150_lines() -> None:
    lengths = {file.name: len(file.read_text().splitlines()) for file in Path(package.__file__).parent.glob("*.py")}
    assert lengths.keys() >= {"transformer.py", "block.py", "inputs.py", "heads.py", "loss.py"}
    assert max(lengths.values()) < 150


def test_a_model_saves_itself_after_import_minimoe_alone(tmp_path: Path) -> None:
    lines = [
        "import minimoe as mm",
        f"mm.Transformer(mm.ModelConfig(**{SHAPE})).save_pretrained({str(tmp_path / 'folder')!r})",
    ]
    first_words(code="\n".join(lines))
    model = mm.load(tmp_path / "folder")
    assert isinstance(model, mm.Transformer) and isinstance(model, Transformer)
    assert model(np.arange(5)[None]).shape == (1, 5, 11)
