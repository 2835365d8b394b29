"""What a model is trained to do, chosen by its head: predict the next token, fill in hidden tokens, or classify an image.

    task = load_task(config)             # reads the data; task.config has the keys that depend on them
    inputs, targets = task.batch(0, 0)   # step 0, micro-batch 0: a pure function of both and of the seed
    task.measure(model).loss
"""

from __future__ import annotations

from collections.abc import Callable

from msgspec.structs import replace

from minimoe.config import Config
from minimoe.config.given import Sources, with_sources
from minimoe.data.sources import IMAGE_SOURCES
from minimoe.data.tokenizer import Tokenizer
from minimoe.errors import UserError
from minimoe.training.tasks.folder import FolderClassification as FolderClassification
from minimoe.training.tasks.images import ImageClassification as ImageClassification
from minimoe.training.tasks.language import LanguageModelling as LanguageModelling
from minimoe.training.tasks.masked import MaskedLanguageModelling as MaskedLanguageModelling
from minimoe.training.tasks.task import Task as Task


def classification(config: Config, tokenizer: Tokenizer | None, whole: bool, sha256: str | None) -> Task:
    kind = ImageClassification if config.data.name in IMAGE_SOURCES else FolderClassification
    return kind(config, tokenizer, whole, sha256)


TASKS: dict[str, Callable[[Config, Tokenizer | None, bool, str | None], Task]] = {
    "lm": LanguageModelling, "mlm": MaskedLanguageModelling, "classifier": classification,
}  # fmt: skip


def load_task(config: Config, tokenizer: Tokenizer | None = None, all_of: Sources | None = None, *, sha256: str | None = None) -> Task:
    """Read the data of the task that `model.head` names.

    A given `tokenizer` (that of a trained model) replaces `data.tokenizer`. With `all_of` nothing will be trained: all of that source,
    or of several, is held-out data. `sha256` is the digest of its data that a run recorded: see `whole_corpus`. Raises `UserError` for a
    head without a task, and for data that are missing or do not fit.
    """
    config.check_task()
    if all_of is not None:
        measured = replace(config, data=with_sources(config.data, all_of))
        if config.model.image_size and config.data.name in IMAGE_SOURCES and measured.data.name != config.data.name:
            raise UserError(f"{config.name!r} was trained on {config.data.name}, whose images are like no others: leave out --data")
        config = measured
    return TASKS[config.model.head](config, tokenizer, all_of is not None, sha256)
