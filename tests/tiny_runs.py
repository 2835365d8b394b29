"""Runs that train in a fraction of a second: a text, a configuration, a digest."""

import hashlib
import random
from pathlib import Path
from typing import Any

from msgspec.structs import replace

import minimoe as mm
from minimoe.config import Config, DataConfig, ModelConfig, MoEConfig, TrainConfig
from minimoe.runs.checkpoint import step_name
from minimoe.training.trained_run import TrainedRun

BACKEND = {"name": "numpy"}  # what `tiny` trains on; a test that is to hold on others puts theirs here
TIMINGS = {"step_ms", "tokens_per_s", "elapsed_s"}
VERBS, NOUNS = ("routes", "sorts", "weighs", "drops", "finds"), ("a token", "the expert", "every row", "one gate", "the plan")


def write_text(folder: Path, lines: int = 120) -> Path:
    """A small text with something to learn, the same at each call."""
    draw = random.Random(0)
    path = folder / "text.txt"
    path.write_text("".join(f"{draw.choice(NOUNS)} {draw.choice(VERBS)} {draw.choice(NOUNS)}\n" for _ in range(lines)), encoding="utf-8")
    return path


def tiny(source: str | Path, *, model: dict[str, Any] | None = None, moe: dict[str, Any] | None = None, dense: bool = False,
         **train: Any) -> Config:  # fmt: skip
    """Return a configuration of one routed layer with four experts, or a dense one. [model] and [moe] are dicts, [train] arguments."""
    routed = None if dense else MoEConfig(**{"n_experts": 4, "top_k": 2, **(moe or {})})
    shape = {"d_model": 16, "n_layers": 1, "n_heads": 2, "d_hidden": 16, "max_seq_len": 16, **(model or {})}
    settings = {
        "steps": 10, "batch_size": 4, "seq_len": 16, "warmup_steps": 2, "lr": 1e-2, "eval_every": 0, "checkpoint_every": 0, "log_every": 4,
        "backend": BACKEND["name"], **train,
    }  # fmt: skip
    return Config(name="tiny", model=ModelConfig(**shape, moe=routed), train=TrainConfig(**settings), data=DataConfig(source=str(source)))


def with_train(config: Config, **changes: Any) -> Config:
    """Return a configuration with other values in [train]."""
    return replace(config, train=replace(config.train, **changes))


def weights_of(run: Path, step: int) -> bytes:
    """Return the bytes of a checkpoint's model.safetensors."""
    return (run / "checkpoints" / step_name(step) / "model.safetensors").read_bytes()


def sha256_of(run: Path, step: int) -> str:
    return hashlib.sha256(weights_of(run, step)).hexdigest()


def train(config: Config, root: Path, **options: Any) -> TrainedRun:
    return mm.train(config, root=root, **options)


def untimed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the metrics without those that depend on the clock."""
    return [{key: value for key, value in row.items() if key not in TIMINGS} for row in rows]
