"""Model folders of transformers: their files, how their names map to ours, and models opened from them."""

from pathlib import Path

from minimoe.model.transformer import Transformer
from minimoe.pretrained.models import save_pretrained


def _save_pretrained(model: Transformer, path: str | Path, dtype: str | None = None) -> None:
    """Write the model as a folder that transformers opens (`pretrained.models.save_pretrained`)."""
    save_pretrained(model, path, dtype, model.tokenizer)


Transformer.save_pretrained = _save_pretrained  # type: ignore[method-assign, assignment]
