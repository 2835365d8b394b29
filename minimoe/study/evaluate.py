"""What `minimoe eval` measures: a run or a model folder on held-out data."""

from __future__ import annotations

import os
from typing import Any

from msgspec.structs import replace

from minimoe.config.given import Sources
from minimoe.errors import UserError, notice, printable
from minimoe.pretrained.folder import is_model_folder
from minimoe.pretrained.loading import Loaded, open_model
from minimoe.training.tasks import load_task


def evaluate(what: str | os.PathLike[str] | None = None, data: Sources | None = None) -> dict[str, Any]:
    """Measure a run, a checkpoint or a model folder on its own held-out data, or on all of another source; None: the newest run.

    Returns what `minimoe eval --json` prints: the loss in nats per token (image), perplexity or accuracy, tokens, the load of each expert.
    Raises `UserError` for what cannot be measured; a `Notice` says what was left out of a text.
    """
    loaded = open_model(what)
    for problem in loaded.problems:
        notice(f"damaged: {problem}; step {loaded.step} is measured")
    found = evaluate_run(loaded, data)
    for text in found.pop("notes"):
        notice(text)
    del found["summary"], found["read"]
    return found


def evaluate_run(loaded: Loaded, data: Sources | None) -> dict[str, Any]:
    """Measure a trained model's loss, and its accuracy if its task has one, on its own held-out data or on all of another source.

    `summary` is the result in one line, `read` what was read, `notes` what a user should know of it.
    """
    config = loaded.config
    if data is None and is_model_folder(loaded.folder):
        raise UserError(f"{loaded.folder}: a model folder has no data: give some with --data")
    if not config.model.image_size and config.train.seq_len > config.model.max_seq_len:  # a model that was trained elsewhere
        config = replace(config, train=replace(config.train, seq_len=config.model.max_seq_len))
    recorded = loaded.data_sha256 if data is None else None
    task = load_task(config, None if config.model.image_size else loaded.text, all_of=data, sha256=recorded)
    result = task.measure(loaded.model, by_domain=True)
    read, notes = tuple(task.read()), () if task.corpus is None else task.corpus.notes
    if recorded not in (None, task.sha256):
        notes = (*notes, f"{task.source} has changed since the training: what is held out now may have been trained on")
    images, domains = task.unit == "image", () if task.corpus is None else task.corpus.domains
    found: dict[str, Any] = {"model": str(loaded.folder), "step": loaded.step, "loss": result.loss}
    words = [f"loss {result.loss:.4f} nats per {task.unit}"]
    if not images:
        found["perplexity"] = result.perplexity
        words.append(f"perplexity {result.perplexity:.2f}")
        bits = result.bits_per_byte
        found |= {"bits_per_byte": bits} if bits is not None else {"bits_per_byte": None, "no_bits_per_byte": task.token_bytes.why_not}
        words.append("no bits per byte" if bits is None else f"{bits:.4f} bits per byte")
    if task.chance is not None:
        found |= {"accuracy": result.accuracy, "baseline_accuracy": task.chance}
        words.append(task.accuracy(result.accuracy))
    split = "validation split" if data is None else "all of it"
    words.append(f"{result.tokens:,} {task.unit}s of {task.source} ({split})")
    return {
        **found, "images" if images else "tokens": result.tokens, "source": task.source, "split": split,
        "expert_load": result.expert_load, "expert_load_by_domain": dict(zip(domains, result.domain_load or [], strict=True)),
        "read": read, "notes": notes, "summary": printable(f"{loaded.folder}: {', '.join(words)}"),
    }  # fmt: skip
