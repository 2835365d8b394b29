"""nanoGPT's CPU settings on tinyshakespeare in PyTorch: the loss that minimoe's preset shakespeare-dense has to reach.

`python -m benchmarks.torch_shakespeare --data tinyshakespeare.txt [--seeds 0 1 2] [--moe]` trains the dense model, or one with routed
layers of the same active width, and prints the loss over the whole validation split: windows side by side, so that every target
counts once. The trainer is PyTorch's own; of minimoe only the model's configuration is used. Settings: nanoGPT's README, "I only have
a macbook", with its GPT-2-like model, exact GELU and no dropout.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.torch_models import TorchTransformer
from minimoe.config import ModelConfig, MoEConfig

BATCH, CONTEXT = 12, 64
LR, MIN_LR, WARMUP = 1e-3, 1e-4, 100
EVAL_WINDOWS = 256


def model_config(vocab_size: int, moe: bool) -> ModelConfig:
    """4 layers of 4 heads and width 128; with `moe` every FFN becomes 8 experts of half its width, 2 per token."""
    experts = MoEConfig(n_experts=8, top_k=2, d_hidden=256) if moe else None
    return ModelConfig(
        d_model=128, n_layers=4, n_heads=4, d_hidden=512, max_seq_len=CONTEXT, vocab_size=vocab_size, norm="layer",
        position="learned", activation="gelu", bias=False, tie_embeddings=True, moe=experts,
    )  # fmt: skip


def read_splits(path: Path) -> tuple[Tensor, Tensor, int]:
    """The characters as ids in sorted order: the first 90% to train on, the rest to validate, and the vocabulary's size."""
    text = path.read_text(encoding="utf-8")
    characters = sorted(set(text))
    ids = {character: index for index, character in enumerate(characters)}
    data = torch.tensor([ids[character] for character in text])
    cut = int(0.9 * len(data))
    return data[:cut], data[cut:], len(characters)


def random_batch(data: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """tokens and the tokens that follow them, both [BATCH, CONTEXT]"""
    starts = torch.randint(len(data) - CONTEXT, (BATCH, 1), generator=generator)
    windows = data[starts + torch.arange(CONTEXT + 1)]
    return windows[:, :-1], windows[:, 1:]


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine from LR to MIN_LR."""
    if step < WARMUP:
        return LR * (step + 1) / (WARMUP + 1)
    done = (step - WARMUP) / max(1, steps - WARMUP)
    return MIN_LR + 0.5 * (LR - MIN_LR) * (1.0 + math.cos(math.pi * done))


def make_optimizer(model: TorchTransformer) -> torch.optim.AdamW:
    """AdamW that decays every matrix, embeddings included, and no norm."""
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.99), eps=1e-8, fused=True)


@torch.no_grad()
def validation_loss(model: TorchTransformer, data: Tensor) -> float:
    """Mean cross-entropy in nats over every target of the split once; the last window may be short."""
    total, n_targets = 0.0, len(data) - 1
    full = n_targets // CONTEXT
    tokens, targets = (part[: full * CONTEXT].view(full, CONTEXT) for part in (data[:-1], data[1:]))
    for x, y in zip(tokens.split(EVAL_WINDOWS), targets.split(EVAL_WINDOWS), strict=True):  # type: ignore[no-untyped-call]
        total += model(x, y)[0].item() * y.numel()
    if full * CONTEXT < n_targets:
        x, y = data[full * CONTEXT : -1][None], data[full * CONTEXT + 1 :][None]
        total += model(x, y)[0].item() * y.numel()
    return total / n_targets


def train_once(splits: tuple[Tensor, Tensor, int], seed: int, steps: int, moe: bool, quiet: bool) -> dict[str, Any]:
    """Train from one seed; the validation loss, the seconds of training and the number of parameters."""
    train, validation, vocab_size = splits
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = TorchTransformer(model_config(vocab_size, moe))
    optimizer = make_optimizer(model)
    start = time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        cross_entropy, router_loss = model(*random_batch(train, generator))
        optimizer.zero_grad(set_to_none=True)
        (cross_entropy + router_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if not quiet and (step + 1) % 250 == 0:
            print(f"seed {seed}  step {step + 1:5d}  loss {cross_entropy.item():.4f}  {time.perf_counter() - start:.1f} s", flush=True)
    seconds = time.perf_counter() - start
    parameters = sum(p.numel() for p in model.parameters())
    return {"seed": seed, "val_loss": validation_loss(model, validation), "train_seconds": seconds, "parameters": parameters}


def main() -> None:
    parser = argparse.ArgumentParser(description="nanoGPT's CPU settings on tinyshakespeare, in PyTorch")
    parser.add_argument("--data", type=Path, required=True, help="tinyshakespeare.txt")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--moe", action="store_true", help="8 experts of half the width, 2 per token, instead of every FFN")
    parser.add_argument("--threads", type=int, default=0, help="0: PyTorch's choice")
    parser.add_argument("--json", action="store_true", help="one JSON object and nothing else")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    splits = read_splits(args.data)
    runs = [train_once(splits, seed, args.steps, args.moe, quiet=args.json) for seed in args.seeds]
    mean = sum(run["val_loss"] for run in runs) / len(runs)
    if args.json:
        print(json.dumps({"torch": torch.__version__, "steps": args.steps, "moe": args.moe, "runs": runs, "mean_val_loss": mean}))
        return
    for run in runs:
        print(f"seed {run['seed']}  validation loss {run['val_loss']:.4f}  {run['train_seconds']:.1f} s  {run['parameters']:,} parameters")
    print(f"mean over {len(runs)} seeds: {mean:.4f}")


if __name__ == "__main__":
    main()
