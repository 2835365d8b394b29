"""Two things that must not grow: a routed layer's time with its number of experts, a model's memory with the square of sequence length.

`python -m benchmarks.scaling [--backend numba] [--rounds 9] [--out FILE]`. The layer: forward and backward of 8,192 tokens, D = H = 256, 2
experts per token, for 8 to 64 experts, beside the bytes of weights and their gradients. The model: a training step of 4,096 tokens in
sequences of 256 to 2,048, each length in a process of its own; memory is the peak of the process less what it held before the model
was made.
"""

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.machine import machine
from benchmarks.turns import memory

TOKENS, WIDTH, TOP_K, EXPERTS = 8192, 256, 2, (8, 16, 32, 64)
STEP_TOKENS, LENGTHS = 4096, (256, 512, 1024, 2048)


def layer_step(experts: int, backend: str) -> Callable[[], None]:
    """Forward and backward of one routed layer; each gradient overwrites the one before."""
    import minimoe as mm
    from minimoe.backend import use_backend

    draw = np.random.default_rng(0)
    with use_backend(backend):
        layer = mm.MoE(WIDTH, WIDTH, moe=mm.MoEConfig(n_experts=experts, top_k=TOP_K), seed=0)
        x = mm.tensor(draw.standard_normal((TOKENS, WIDTH)).astype(np.float32), requires_grad=True)
        dy = mm.tensor(draw.standard_normal((TOKENS, WIDTH)).astype(np.float32))

    def step() -> None:
        for leaf in (x, *layer.parameters()):
            leaf.grad_is_zero = True
        y, _ = layer(x)
        y.backward(dy)

    return step


def time_layers(backend: str, rounds: int) -> list[dict[str, float]]:
    """Time a layer of each size, in turns."""
    steps = {experts: layer_step(experts, backend) for experts in EXPERTS}
    times: dict[int, list[float]] = {experts: [] for experts in EXPERTS}
    for turn in range(rounds + 2):
        for experts, step in steps.items():
            began = time.perf_counter()
            step()
            if turn >= 2:
                times[experts].append(time.perf_counter() - began)
    base = statistics.median(times[EXPERTS[0]])
    weights = {experts: 2 * experts * 3 * WIDTH * WIDTH * 4 / 2**20 for experts in EXPERTS}
    return [
        {"experts": e, "ms": statistics.median(t) * 1e3, "times_first": statistics.median(t) / base, "weights_mb": weights[e]}
        for e, t in times.items()
    ]


def step_memory(length: int, backend: str, answer: Any) -> None:
    """Answer with the peak memory of three training steps; runs in its own process."""
    from minimoe.backend import load
    from minimoe.config import Config, ModelConfig, TrainConfig
    from minimoe.study.bench import TrainingStep

    model = ModelConfig(vocab_size=256, d_model=128, n_layers=4, n_heads=4, n_kv_heads=2, d_hidden=512, max_seq_len=length)
    config = Config(name="scaling", model=model, train=TrainConfig(batch_size=STEP_TOKENS // length, seq_len=length))
    chosen = load(backend)
    before = memory("VmRSS")
    step = TrainingStep(config, chosen)
    for _ in range(3):
        step()
    answer.put((memory("VmHWM") - before) / 2**20)


def measure_memory(backend: str) -> list[dict[str, float]]:
    context, rows = multiprocessing.get_context("spawn"), []
    for length in LENGTHS:
        answer = context.Queue()
        process = context.Process(target=step_memory, args=(length, backend, answer))
        process.start()
        rows.append({"seq_len": length, "peak_mb": answer.get()})
        process.join()
    return [{**row, "times_first": row["peak_mb"] / rows[0]["peak_mb"]} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="numba")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    console = Console()
    results: dict[str, Any] = {"machine": machine(), "backend": options.backend, "layer": time_layers(options.backend, options.rounds)}
    console.print(results["machine"])
    table = Table("experts", "ms", "times the first", "weights and gradients, MB", title="a routed layer, forward and backward")
    for row in results["layer"]:
        table.add_row(f"{row['experts']}", f"{row['ms']:.1f}", f"{row['times_first']:.2f}", f"{row['weights_mb']:.0f}")
    console.print(table)
    results["memory"] = measure_memory(options.backend)
    table = Table("tokens of a sequence", "peak, MB", "times the first", title=f"a training step of {STEP_TOKENS:,} tokens")
    for row in results["memory"]:
        table.add_row(f"{row['seq_len']}", f"{row['peak_mb']:.0f}", f"{row['times_first']:.2f}")
    console.print(table)
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
