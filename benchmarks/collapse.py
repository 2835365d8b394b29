"""Expert collapse and what each remedy does to it: the preset `collapse`, and the same with one remedy at a time, three seeds each.

`python -m benchmarks.collapse [--seeds 0 1 2] [--steps N] [--write]` prints a table; --write puts it, and a plot, into
docs/losses-and-collapse.md and docs/images/, and the figures into benchmarks/results/collapse.json. About four minutes on 2 cores.
"""

import argparse
import json
import math
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

import minimoe as mm
from benchmarks.machine import machine
from minimoe.data.batches import batch
from minimoe.training.trained_run import TrainedRun

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "losses-and-collapse.md"
LAST = 20  # steps over which the load is averaged

VARIANTS: dict[str, list[str]] = {
    "every remedy off": [],
    "`aux_loss_coef = 0.05`": ["moe.aux_loss_coef=0.05"],
    "`sigmoid_bias`, `bias_rate = 0.02`": ["moe.router=sigmoid_bias", "moe.bias_rate=0.02"],
    "`noisy_topk`, its losses at 0.1": ["moe.router=noisy_topk", "moe.aux_loss_coef=0.1"],
    "`capacity_factor = 1.25`": ["moe.capacity_factor=1.25"],
    "`z_loss_coef = 0.01`": ["moe.z_loss_coef=0.01"],
    "`jitter = 0.2`": ["moe.jitter=0.2"],
    "`noise_std = 1.0`": ["moe.noise_std=1.0"],
}


def measure(overrides: Iterable[str], seed: int, steps: int | None = None) -> dict[str, float]:
    """Train once.   -> figures of the worst layer's load over the last steps, and of what the remedies act on"""
    with tempfile.TemporaryDirectory() as folder:
        run = mm.train("collapse", seed=seed, steps=steps, overrides=overrides, root=folder)
    rows = run.metrics[-LAST:]
    load = np.mean([row["expert_load"] for row in rows], axis=0)  # [layer, expert]
    e = load.shape[1]
    entropy = [-sum(share * math.log(share) for share in layer if share > 0) / math.log(e) for layer in load.tolist()]
    return {
        "entropy": min(entropy),
        "dead": float((load < 1 / (20 * e)).sum()),
        "fullest": float(load.max()),
        "processed": largest_processed(run),
        "dropped": float(np.mean([row["dropped"] for row in rows])),
        "z": float(np.mean([row["z_loss"] for row in rows])),
        "val_loss": run.val_loss,
    }


def largest_processed(run: TrainedRun) -> float:
    """The most rows that one expert worked on in a training batch, over its even share N k / E; ten batches after the last step."""
    settings, moe = run.config.train, run.config.model.moe
    assert moe is not None
    even = settings.batch_size * settings.seq_len * moe.k / moe.n_experts
    worst = 0
    with mm.no_grad():
        for step in range(settings.steps, settings.steps + 10):
            tokens, targets = batch(run.corpus.train, settings.seed, step, 0, settings.batch_size, settings.seq_len)
            parts = run.model.loss(tokens, targets, rng=mm.Rng(settings.seed, step))
            worst = max(worst, *(int(stats.processed.max()) for stats in parts.stats))
    return worst / even


COLUMNS = {
    "entropy": "load entropy / ln E", "dead": "dead experts (of 16)", "fullest": "fullest expert",
    "processed": "rows processed / even share", "dropped": "dropped", "z": "mean squared logsumexp", "val_loss": "validation loss",
}  # fmt: skip


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """A Markdown table: mean over seeds, and range; entropy is that of the worst layer."""
    lines = ["| remedy | " + " | ".join(COLUMNS.values()) + " |", "| --- |" + " ---: |" * len(COLUMNS)]
    for name, seeds in results.items():
        cells = []
        for key in COLUMNS:
            values = [seed[key] for seed in seeds]
            percent = key in ("fullest", "dropped")
            digits = 1 if key in ("dead", "z") or percent else 2 if key != "val_loss" else 3
            shown = [f"{100 * v if percent else v:.{digits}f}" for v in (float(np.mean(values)), min(values), max(values))]
            cells.append(f"{shown[0]}{'%' if percent else ''} ({shown[1]} to {shown[2]})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(results: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Plot the load entropy of each variant, with a dot for each seed."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "minimoe"
    import matplotlib.pyplot as plt

    names = [re.sub("`", "", name) for name in results]
    figure, axes = plt.subplots(figsize=(8, 3.6))
    for y, seeds in enumerate(results.values()):
        values = [seed["entropy"] for seed in seeds]
        axes.barh(y, float(np.mean(values)), color="#c44" if y == 0 else "#48a", alpha=0.55, height=0.6)
        axes.plot(values, [y] * len(values), "o", color="#222", markersize=4)
    axes.axvline(0.9, color="#2a7", linestyle="--", linewidth=1, label="0.9: balanced")
    axes.axvline(0.5, color="#c44", linestyle="--", linewidth=1, label="0.5: collapsed")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.02)
    axes.set_xlabel("entropy of the load in the worst layer / ln E")
    axes.legend(loc="lower right", frameon=True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def write(results: dict[str, list[dict[str, float]]]) -> None:
    """Write the table and the plot into the page, and the figures into benchmarks/results."""
    plot(results, ROOT / "docs" / "images" / "collapse.svg")
    facts = machine()
    where = f"{facts['processor']}, {facts['cores']} cores, {facts['date']}"
    body = (
        f"<!-- collapse:begin -->\n{table(results)}\n\n![Load entropy by remedy](images/collapse.svg)\n\n"
        f"Mean over seeds, lowest to highest in brackets, the last {LAST} of the preset's steps; made by "
        f"`python -m benchmarks.collapse --write` "
        f"({where}).\n<!-- collapse:end -->"
    )
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(re.sub(r"<!-- collapse:begin -->.*<!-- collapse:end -->", lambda _: body, page, flags=re.DOTALL), encoding="utf-8")
    out = ROOT / "benchmarks" / "results" / "collapse.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"machine": facts, "results": results}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    results: dict[str, list[dict[str, float]]] = {}
    for name, overrides in VARIANTS.items():
        results[name] = []
        for seed in options.seeds:
            results[name].append(measure(overrides, seed, options.steps))
            shown = "  ".join(f"{key} {value:.3f}" for key, value in results[name][-1].items())
            print(f"{name:<36} seed {seed}  {shown}", flush=True)
    print("\n" + table(results))
    if options.write:
        write(results)


if __name__ == "__main__":
    main()
