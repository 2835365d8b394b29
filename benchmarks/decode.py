"""Decoding on the CPU: minimoe's greedy text beside transformers' from the same weights, in tokens per second.

`python -m benchmarks.decode [--batch 1 --batch 8] [--rounds 5] [--threads 2] [--out FILE.json]` lets a small Mixtral with random
weights continue random prompts. Peers are transformers' `generate` and a bare loop over its forward pass with its cache, without what
`generate` does besides; both with each implementation of the experts. All use the same number of threads and float32.

- Each has its own process and makes two untimed runs. Implementations far behind another are dropped, the others take turns. A peer's
  figure is that of its implementation with the lowest median.
- A run is a whole call: it reads the prompts, then makes every new token. Ratios are of median times.
- A side's tokens are compared with minimoe's by their checksum; a row whose tokens differ says so.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
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
PROMPT, NEW = 32, 128  # tokens read and tokens made in each row
FAR = 3.0  # an implementation so many times slower than another is dropped
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
OURS, GENERATE, LOOP = "minimoe, numba", "transformers generate", "transformers forward in a loop"


def prompts_of(case: Case) -> Any:
    """Random prompts.   -> int64 [batch, PROMPT]"""
    assert case.model.vocab_size is not None
    return np.random.default_rng(0).integers(0, case.model.vocab_size, (case.batch, PROMPT))


def checksum(tokens: Any) -> float:
    return float(crc32(np.ascontiguousarray(tokens, dtype=np.int64).tobytes()))


# ---- in a side's process -------------------------------------------------------------------------------------------------------------


def minimoe_run(case: Case, threads: int) -> Step:
    from minimoe.backend import load
    from minimoe.generation.generation import Sampling, generate_batch
    from minimoe.model.transformer import Transformer

    backend, prompts = load("numba"), prompts_of(case)
    backend.use_threads(threads)
    model = Transformer(case.model, seed=0, backend=backend)
    return lambda: checksum(np.array(list(generate_batch(model, list(prompts), NEW, Sampling(temperature=0.0)))).T)


def their_model(case: Case, implementation: str) -> Any:
    """transformers' Mixtral with minimoe's weights."""
    import torch

    from minimoe.backend import load
    from minimoe.model.transformer import Transformer

    c = case.model
    arrays = Transformer(c, seed=0, backend=load("numpy")).state_dict()
    state = {
        "model.embed_tokens.weight": arrays["embed.weight"],
        "model.norm.weight": arrays["norm.weight"],
        "lm_head.weight": arrays["head.weight"],
    }
    ends = np.cumsum([c.n_heads * c.head_width, c.kv_heads * c.head_width])
    for i in range(c.n_layers):
        a, b = f"model.layers.{i}.", f"blocks.{i}."
        qkv = np.split(arrays[f"{b}attention.qkv_proj.weight"], ends)
        state |= {f"{a}self_attn.{name}_proj.weight": part for name, part in zip("qkv", qkv, strict=True)}
        state |= {
            a + "self_attn.o_proj.weight": arrays[b + "attention.o_proj.weight"],
            a + "input_layernorm.weight": arrays[b + "attention_norm.weight"],
            a + "post_attention_layernorm.weight": arrays[b + "ffn_norm.weight"],
            a + "mlp.gate.weight": arrays[b + "moe.router.weight"],
            a + "mlp.experts.gate_up_proj": arrays[b + "moe.experts.gate_up_proj"],
            a + "mlp.experts.down_proj": arrays[b + "moe.experts.down_proj"],
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


class Contender(NamedTuple):
    """A side with one implementation of the experts, and the process in which it takes its turns."""

    side: str
    experts: str
    worker: Worker

    @property
    def median(self) -> float:
        """Median seconds of a run."""
        return statistics.median(self.worker.times)


def sides(threads: int) -> list[tuple[str, str, Side]]:
    """All sides: name, implementation of the experts, and how it is made."""
    libraries = ("torch", "transformers", "transformers.models.mixtral.modeling_mixtral")
    peers: dict[str, Callable[..., Step]] = {GENERATE: generate_run, LOOP: loop_run}
    theirs = [(name, style, Side("eager", libraries, make, (style,))) for name, make in peers.items() for style in IMPLEMENTATIONS]
    return [(OURS, "", Side("minimoe", ("minimoe_numba",), minimoe_run, (threads,))), *theirs]


def started(case: Case, threads: int, console: Console) -> Iterator[Contender]:
    """Start each side and run it twice; -> those that work here and are not far behind"""
    best: dict[str, float] = {}
    for name, experts, side in sides(threads):
        worker = Worker(side, case, threads, patience=300.0)
        worker.times = worker.take(1)
        if not worker.failed and worker.times[0] < FAR * best.get(name, math.inf):
            worker.times = worker.take(1)
        if worker.failed:
            console.print(f"  {name} {experts}: failed: {worker.failed}", markup=False)
            continue
        console.print(f"  {name} {experts}: {case.tokens / worker.times[0]:.0f} tokens/s", markup=False)
        best[name] = min(worker.times[0], best.get(name, math.inf))
        if worker.times[0] < FAR * best[name]:
            yield Contender(name, experts, worker)
        else:
            worker.stop()


def measure(case: Case, threads: int, rounds: int, console: Console) -> dict[str, Any]:
    """Measure all in turns.   -> for each side a row of figures of its fastest implementation"""
    contenders: list[Contender] = []
    try:
        contenders.extend(started(case, threads, console))
        for _, _, worker in contenders:
            worker.times = []
        for done in range(1, rounds + 1):
            for _, _, worker in contenders:
                worker.times += worker.take(1)
            console.print(f"  round {done} of {rounds}: " + " | ".join(f"{contender.worker.times[-1]:.2f} s" for contender in contenders))
    finally:
        for _, _, worker in contenders:
            worker.stop()
    names = dict.fromkeys(c.side for c in contenders)
    best = {name: min((c for c in contenders if c.side == name), key=lambda c: c.median) for name in names}
    return {name: row(case, contender, best[OURS], [c for c in contenders if c.side == name]) for name, contender in best.items()}


def row(case: Case, contender: Contender, own: Contender, tried: list[Contender]) -> dict[str, Any]:
    """A side's row in the JSON file."""
    times = contender.worker.times
    return {
        "experts": contender.experts, "median_s": contender.median, "fastest_s": min(times), "slowest_s": max(times), "runs": len(times),
        "tokens_per_s": case.tokens / contender.median, "over_minimoe": contender.median / own.median,
        "same_tokens": contender.worker.loss == own.worker.loss, "peak_mb": contender.worker.peak / 1e6,
        "tokens_per_s_by_experts": {other.experts: case.tokens / other.median for other in tried},
    }  # fmt: skip


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
