"""Decoding on the CPU: minimoe's greedy text beside transformers' from the same weights, in tokens a second.

`python -m benchmarks.decode [--batch 1 --batch 8] [--rounds 5] [--threads 2] [--out FILE.json]` has a small Mixtral, of random weights, go
on from random prompts. Peers are transformers' `generate` and a bare loop over its forward with its cache, which leaves out what `generate`
does besides; both with each implementation of the experts. All have the same number of threads and float32.

- A process for each. Each makes two runs first; those far behind another implementation go, the others take turns. A peer's figure is that
  of its implementation with the lowest median.
- A run is a whole call: the prompts read, then every new token. Ratios are of median times.
- A side's tokens are compared by their checksum: equal to minimoe's, or the row says so.
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
PROMPT, NEW = 32, 128  # tokens read, and made, in each row
FAR = 3.0  # times slower than another implementation: it need not take turns
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


class Entry(NamedTuple):
    """One that takes its turns: which side, with which implementation of the experts."""

    side: str
    experts: str
    worker: Worker

    @property
    def median(self) -> float:
        """Seconds of a run."""
        return statistics.median(self.worker.times)


def sides(threads: int) -> list[tuple[str, str, Side]]:
    """What competes: name, implementation of the experts, how it is made."""
    libraries = ("torch", "transformers", "transformers.models.mixtral.modeling_mixtral")
    peers: dict[str, Callable[..., Step]] = {GENERATE: generate_run, LOOP: loop_run}
    theirs = [(name, style, Side("eager", libraries, make, (style,))) for name, make in peers.items() for style in IMPLEMENTATIONS]
    return [(OURS, "", Side("minimoe", ("minimoe_numba",), minimoe_run, (threads,))), *theirs]


def started(case: Case, threads: int, console: Console) -> Iterator[Entry]:
    """All that run here after their first run, but for those that are far behind."""
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
            yield Entry(name, experts, worker)
        else:
            worker.stop()


def measure(case: Case, threads: int, rounds: int, console: Console) -> dict[str, Any]:
    """All in turns; of each side a row of figures, of its fastest implementation."""
    entries: list[Entry] = []
    try:
        entries.extend(started(case, threads, console))
        for _, _, worker in entries:
            worker.times = []
        for done in range(1, rounds + 1):
            for _, _, worker in entries:
                worker.times += worker.take(1)
            console.print(f"  round {done} of {rounds}: " + " | ".join(f"{entry.worker.times[-1]:.2f} s" for entry in entries))
    finally:
        for _, _, worker in entries:
            worker.stop()
    best = {name: min((e for e in entries if e.side == name), key=lambda e: e.median) for name in dict.fromkeys(e.side for e in entries)}
    return {name: row(case, entry, best[OURS], [e for e in entries if e.side == name]) for name, entry in best.items()}


def row(case: Case, entry: Entry, own: Entry, tried: list[Entry]) -> dict[str, Any]:
    """What the JSON file says of a side."""
    times = entry.worker.times
    return {
        "experts": entry.experts, "median_s": entry.median, "fastest_s": min(times), "slowest_s": max(times), "runs": len(times),
        "tokens_per_s": case.tokens / entry.median, "over_minimoe": entry.median / own.median,
        "same_tokens": entry.worker.loss == own.worker.loss, "peak_mb": entry.worker.peak / 1e6,
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
