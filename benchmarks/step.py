"""A whole training step (forward, backward, clip to 1.0, AdamW; float32) of minimoe and of PyTorch, side by side.

`python -m benchmarks.step [PRESET ...] [--rounds 15] [--backend numpy] [--out FILE]`. The same model and the same batches, a
process for each side, steps taken in turns (A B A B): medians and their ratio; the first step stands apart. PyTorch runs eagerly with a
loop over experts and with sorted tokens, fused AdamW, and all threads; the best of its rows counts.
"""

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import numpy as np
from msgspec.structs import replace

from benchmarks.machine import machine
from minimoe.config import Config, load_config

VOCABULARY = 256


def batches(config: Config) -> Any:
    """Random tokens and targets, [batch,T] int32."""
    rows = np.random.default_rng(0).integers(0, VOCABULARY, (config.train.batch_size, config.train.seq_len + 1)).astype(np.int32)
    return rows[:, :-1].copy(), rows[:, 1:].copy()


def minimoe_step(config: Config, backend: str) -> Callable[[], float]:
    from minimoe.backend import load
    from minimoe.model import Transformer
    from minimoe.optim import AdamW
    from minimoe.random import Rng

    model = Transformer(config.model, seed=0, backend=load(backend))
    optimizer = AdamW(model.parameters(), lr=1e-3)
    tokens, targets = batches(config)
    count = iter(range(10**9))

    def step() -> float:
        parts = model.loss(tokens, targets, rng=Rng(0, next(count)))
        parts.total.backward()
        norm = optimizer.grad_norm()
        optimizer.step(scale=optimizer.clip_scale(norm, 1.0))
        optimizer.zero_grad()
        return float(parts.cross_entropy.item())

    return step


def torch_step(config: Config, style: Literal["loop", "sorted"]) -> Callable[[], float]:
    import torch

    from benchmarks.torch_models import TorchTransformer

    model = TorchTransformer(config.model, moe_style=style)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1, fused=True)
    tokens, targets = (torch.from_numpy(a).long() for a in batches(config))

    def step() -> float:
        cross_entropy, router_loss = model(tokens, targets)
        (cross_entropy + router_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(cross_entropy.detach())

    return step


def serve(make: Callable[..., Callable[[], float]], arguments: tuple[Any, ...], pipe: Connection) -> None:
    """A process of its own for each side: neither's threads or memory settings touch the other's."""
    step = make(*arguments)
    while pipe.recv():
        began = time.perf_counter()
        loss = step()
        pipe.send((time.perf_counter() - began, loss))


def measure(config: Config, backend: str, rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of each side: first step, median, fastest; the loss after all rounds."""
    context = multiprocessing.get_context("spawn")
    sides: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {f"minimoe {backend}": (minimoe_step, (config, backend))}
    for style in ["loop", "sorted"] if config.model.moe else ["loop"]:
        sides[f"torch eager, {style}" if config.model.moe else "torch eager"] = (torch_step, (config, style))
    pipes, workers = {}, []
    times: dict[str, list[float]] = {name: [] for name in sides}
    for name, (make, arguments) in sides.items():
        ours, theirs = context.Pipe()
        worker = context.Process(target=serve, args=(make, arguments, theirs), daemon=True)
        worker.start()
        pipes[name] = ours
        workers.append(worker)
    losses: dict[str, float] = {}
    for _ in range(rounds + 1):
        for name, pipe in pipes.items():
            pipe.send(True)
            seconds, losses[name] = pipe.recv()
            times[name].append(seconds)
    for pipe in pipes.values():
        pipe.send(False)
    for worker in workers:
        worker.join()
    return {
        name: {"first_ms": t[0] * 1e3, "median_ms": statistics.median(t[1:]) * 1e3, "fastest_ms": min(t[1:]) * 1e3, "loss": losses[name]}
        for name, t in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="*", default=["tiny-moe"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--backend", default="numpy")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    results: dict[str, Any] = {"machine": machine(), "rounds": options.rounds, "presets": {}}
    print(f"{results['machine']}")
    for preset in options.presets:
        config = load_config(preset)
        config = replace(config, model=replace(config.model, vocab_size=VOCABULARY))
        rows = measure(config, options.backend, options.rounds)
        best_peer = min(row["median_ms"] for name, row in rows.items() if name.startswith("torch"))
        results["presets"][preset] = rows
        print(f"\n{preset:<24} {'first':>9} {'median':>9} {'fastest':>9}   its time over the best peer's")
        for name, row in rows.items():
            ratio = row["median_ms"] / best_peer
            print(f"{name:<24} {row['first_ms']:>6.0f} ms {row['median_ms']:>6.0f} ms {row['fastest_ms']:>6.0f} ms   {ratio:.2f} times")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
