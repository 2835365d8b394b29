"""What a model is trained to do, chosen by its head: predict the next token, fill in blanks, or name what an image shows.

    task = load_task(config)             # reads the data; task.config has what they decide filled in
    inputs, targets = task.batch(0, 0)   # step 0, micro-batch 0: a pure function of both and of the seed
    task.measure(model).loss
"""

from __future__ import annotations

from collections.abc import Callable

from msgspec.structs import replace

from minimoe.config import Config
from minimoe.data.tokenizer import Tokenizer
from minimoe.training.tasks.images import ImageClassification as ImageClassification
from minimoe.training.tasks.language import LanguageModelling as LanguageModelling
from minimoe.training.tasks.masked import MaskedLanguageModelling as MaskedLanguageModelling
from minimoe.training.tasks.task import Task as Task

TASKS: dict[str, Callable[[Config, Tokenizer | None, bool], Task]] = {
    "lm": LanguageModelling, "mlm": MaskedLanguageModelling, "classifier": ImageClassification,
}  # fmt: skip


def load_task(config: Config, tokenizer: Tokenizer | None = None, all_of: str | None = None) -> Task:
    """The task of `model.head` with its data read.

    A given `tokenizer` (of a model that was trained) takes the place of `data.tokenizer`. With `all_of` nothing is to be trained: the
    held-out data are all of that source. Raises `UserError` for a head without a task, and for data that are not there or do not fit.
    """
    config.check_task()
    if all_of is not None:
        config = replace(config, data=replace(config.data, source=all_of))
    return TASKS[config.model.head](config, tokenizer, all_of is not None)
