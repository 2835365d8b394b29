"""Decoding on the CPU: minimoe's greedy text beside transformers' from the same weights, in tokens a second.

`python -m benchmarks.decode [--batch 1 --batch 8] [--rounds 5] [--threads 2] [--out FILE.json]` has a small Mixtral, of random weights, go
on from random prompts. Peers are transformers' `generate` and a bare loop over its forward with its cache, which leaves out what `generate`
does besides; both with each implementation of the experts. All have the same number of threads and float32.

- A process for each side. Each makes two runs first; then of each peer only its fastest implementation stays, and all take turns.
- A run is a whole call: the prompts read, then every new token. Ratios are of median times.
- A side's tokens are compared by their checksum: equal to minimoe's, or the row says so.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.cpu import surroundings
from benchmarks.machine import machine
from benchmarks.models import Case
from benchmarks.peers import Side, Step, mixtral_model
from benchmarks.turns import Worker
from minimoe.config import ModelConfig, MoEConfig

MODEL = ModelConfig(
    d_model=512, n_layers=8, n_heads=8, n_kv_heads=4, d_hidden=1024, max_seq_len=512, vocab_size=8192, init_std=0.2,
    moe=MoEConfig(n_experts=8, top_k=2),
)  # fmt: skip
PROMPT, NEW = 32, 128  # tokens read, and made, in each row
FAR = 3.0  # times slower in its first run than another in its second: there is no need of a second
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
OURS, GENERATE, LOOP = "minimoe, numba", "transformers generate", "transformers forward in a loop"


def prompts_of(case: Case) -> Any:
    """int64 [batch, PROMPT]"""
    assert case.model.vocab_size is not None
    return np.random.default_rng(0).integers(0, case.model.vocab_size, (case.batch, PROMPT))


def checksum(tokens: Any) -> float:
    return float(crc32(np.ascontiguousarray(tokens, dtype=np.int64).tobytes()))


# ---- in a side's process -------------------------------------------------------------------------------------------------------------


def minimoe_run(case: Case, threads: int) -> Step:
    from minimoe.backend import load
    from minimoe.generation import Sampling, generate_batch
    from minimoe.model import Transformer

    backend, prompts = load("numba"), prompts_of(case)
    backend.use_threads(threads)
    model = Transformer(case.model, seed=0, backend=backend)
    return lambda: checksum(np.array(list(generate_batch(model, list(prompts), NEW, Sampling(temperature=0.0)))).T)


def their_model(case: Case, implementation: str) -> Any:
    """transformers' Mixtral with minimoe's weights."""
    import torch

    from minimoe.backend import load
    from minimoe.model import Transformer

    c = case.model
    ours = Transformer(c, seed=0, backend=load("numpy")).state_dict()
    state = {
        "model.embed_tokens.weight": ours["embed.weight"],
        "model.norm.weight": ours["norm.weight"],
        "lm_head.weight": ours["head.weight"],
    }
    ends = np.cumsum([c.n_heads * c.head_width, c.kv_heads * c.head_width])
    for i in range(c.n_layers):
        a, b = f"model.layers.{i}.", f"blocks.{i}."
        qkv = np.split(ours[f"{b}attention.qkv_proj.weight"], ends)
        state |= {f"{a}self_attn.{name}_proj.weight": part for name, part in zip("qkv", qkv, strict=True)}
        state |= {
            a + "self_attn.o_proj.weight": ours[b + "attention.o_proj.weight"],
            a + "input_layernorm.weight": ours[b + "attention_norm.weight"],
            a + "post_attention_layernorm.weight": ours[b + "ffn_norm.weight"],
            a + "mlp.gate.weight": ours[b + "moe.router.weight"],
            a + "mlp.experts.gate_up_proj": ours[b + "moe.experts.gate_up_proj"],
            a + "mlp.experts.down_proj": ours[b + "moe.experts.down_proj"],
        }
    model = mixtral_model(case, implementation).eval()
    model.load_state_dict({name: torch.from_numpy(array) for name, array in state.items()})
    model.config.use_cache, model.generation_config.eos_token_id = True, None
    return model


def generate_run(case: Case, implementation: str) -> Step:
    import torch

    model, prompts = their_model(case, implementation), torch.from_numpy(prompts_of(case))
    options = {"max_new_tokens": NEW, "do_sample": False, "use_cache": True, "pad_token_id": 0}

    def run() -> float:
        found = model.generate(prompts, attention_mask=torch.ones_like(prompts), **options)
        return checksum(found[:, PROMPT:].numpy())

    return run


def loop_run(case: Case, implementation: str) -> Step:
    import torch
    from transformers import DynamicCache

    model, prompts = their_model(case, implementation), torch.from_numpy(prompts_of(case))

    def run() -> float:
        cache, new, found = DynamicCache(config=model.config), prompts, []
        with torch.inference_mode():
            for _ in range(NEW):
                new = model(new, past_key_values=cache, use_cache=True, logits_to_keep=1).logits.argmax(dim=-1)
                found.append(new)
        return checksum(torch.cat(found, dim=1).numpy())

    return run


# ---- in the process that asks --------------------------------------------------------------------------------------------------------


def sides(threads: int) -> dict[str, list[tuple[str, Side]]]:
    """What competes: each with its implementations by name."""
    libraries = ("torch", "transformers", "transformers.models.mixtral.modeling_mixtral")
    peers: dict[str, Callable[..., Step]] = {GENERATE: generate_run, LOOP: loop_run}
    found = {OURS: [("", Side("minimoe", ("minimoe_numba",), minimoe_run, (threads,)))]}
    for name, make in peers.items():
        found[name] = [(style, Side("eager", libraries, make, (style,))) for style in IMPLEMENTATIONS]
    return found


def fastest(case: Case, choices: list[tuple[str, Side]], threads: int, console: Console) -> tuple[str, Worker, dict[str, float]]:
    """Of a side's implementations the quickest after its first run; the others are ended.   -> name, its process, tokens/s of all"""
    best: tuple[str, Worker] | None = None
    found: dict[str, float] = {}
    for style, side in choices:
        worker = Worker(side, case, threads, patience=300.0)
        first = worker.take(1)
        far = best is not None and first and first[0] > FAR * best[1].times[0]
        worker.times = first if far else worker.take(1)
        if worker.failed:
            console.print(f"  {style} failed: {worker.failed}", markup=False)
            continue
        found[style] = case.tokens / worker.times[0]
        slower = worker
        if best is None or worker.times[0] < best[1].times[0]:
            slower, best = (worker if best is None else best[1]), (style, worker)
        if slower is not best[1]:
            slower.stop()
    if best is None:
        raise SystemExit("benchmarks.decode: a side has no implementation that runs here")
    return *best, found


def measure(case: Case, threads: int, rounds: int, console: Console) -> dict[str, Any]:
    """All sides in turns; a row of figures for each."""
    workers: dict[str, tuple[str, Worker, dict[str, float]]] = {}
    try:
        for name, choices in sides(threads).items():
            workers[name] = fastest(case, choices, threads, console)
            console.print(f"  {name}: ready {shown(workers[name][2])}", markup=False)
        for _, worker, _ in workers.values():
            worker.times = []
        for done in range(1, rounds + 1):
            for _, worker, _ in workers.values():
                worker.times += worker.take(1)
            console.print(f"  round {done} of {rounds}: " + " | ".join(f"{w.times[-1]:.2f} s" for _, w, _ in workers.values()))
    finally:
        for _, worker, _ in workers.values():
            worker.stop()
    own = workers[OURS][1]
    rows: dict[str, Any] = {}
    for name, (style, worker, tried) in workers.items():
        median = statistics.median(worker.times)
        rows[name] = {
            "experts": style, "median_s": median, "fastest_s": min(worker.times), "slowest_s": max(worker.times), "runs": len(worker.times),
            "tokens_per_s": case.tokens / median, "over_minimoe": median / statistics.median(own.times),
            "same_tokens": worker.loss == own.loss, "peak_mb": worker.peak / 1e6, "tried_tokens_per_s": tried,
        }  # fmt: skip
    return rows


def shown(tried: dict[str, float]) -> str:
    return ", ".join(f"{style or 'once'} {speed:.0f} tokens/s" for style, speed in tried.items())


def table(case: Case, rows: dict[str, Any]) -> Table:
    title = f"batch {case.batch}: {PROMPT} tokens read, {NEW} made in each row"
    made = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", padding=(0, 1, 0, 0))
    made.add_column("side", no_wrap=True)
    for head in ("experts", "tokens/s", "median", "fastest", "its time / minimoe's", "same tokens", "peak MB"):
        made.add_column(head, justify="right", no_wrap=True)
    for name, row in rows.items():
        times = (f"{row[key]:.2f} s" for key in ("median_s", "fastest_s"))
        same = "yes" if row["same_tokens"] else "NO"
        made.add_row(
            name, row["experts"], f"{row['tokens_per_s']:.0f}", *times, f"{row['over_minimoe']:.2f}", same, f"{row['peak_mb']:,.0f}"
        )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, action="append", metavar="N", help="rows; once for each; default: 1 and 8")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="of every side")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    options = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 160)
    results: dict[str, Any] = {
        "machine": machine(), "threads": options.threads, "rounds": options.rounds, "prompt": PROMPT, "new": NEW, "batches": {},
    }  # fmt: skip
    with surroundings(options.threads, cold=False):
        for batch in options.batch or [1, 8]:
            case = Case("small Mixtral", MODEL, NEW, batch)
            console.print(f"batch {batch}")
            results["batches"][batch] = rows = measure(case, options.threads, options.rounds, console)
            console.print(table(case, rows))
            if options.out:
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
