"""The pictures of the pages: `python -m docs.plots` draws them anew into docs/images (needs the extra `report`).

Every curve is computed by minimoe itself on NumPy, with fixed seeds; the same matplotlib writes the same bytes.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "backends")) if path not in sys.path]  # a clone that is not installed

import minimoe as mm  # noqa: E402
from minimoe.backend import load  # noqa: E402
from minimoe.cost import cost  # noqa: E402
from minimoe.random import host_normal  # noqa: E402
from minimoe.reference.gating import Rule  # noqa: E402

IMAGES = ROOT / "docs" / "images"
BLUE, ORANGE, GREEN, GREY = "#2563a8", "#d9731a", "#2a8a57", "#8a8f98"
STYLE: Any = {
    "svg.hashsalt": "minimoe", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10,
    "axes.titlelocation": "left", "legend.frameon": False, "figure.constrained_layout.use": True,
}  # fmt: skip
Axes = Any  # matplotlib is an extra


# ---- what is drawn, as numbers ------------------------------------------------------------------------------------------------------


def cost_over_experts(experts: Sequence[int]) -> dict[str, list[float]]:
    """Millions of parameters and of forward FLOPs a token of tiny-moe's shape with 2 of E experts, and of a dense model as large."""
    found: dict[str, list[float]] = {"total": [], "active": [], "sparse_flops": [], "dense_flops": []}
    for e in experts:
        shape: Any = {"d_model": 128, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 128, "vocab_size": 256}
        sparse = cost(mm.ModelConfig(**shape, moe=mm.MoEConfig(n_experts=e, top_k=2, d_hidden=256)))
        dense = cost(mm.ModelConfig(**shape, d_hidden=256 * e))
        found["total"].append(sparse.total / 1e6)
        found["active"].append(sparse.active / 1e6)
        found["sparse_flops"].append(sparse.flops_per_token / 1e6)
        found["dense_flops"].append(dense.flops_per_token / 1e6)
    return found


def skewed_logits(n: int, e: int, skew: float) -> np.ndarray[Any, Any]:
    """Gaussian logits with one expert's raised by `skew`.   [N,E]"""
    logits = host_normal(n * e, 0, "docs.skew").reshape(n, e)
    logits[:, 0] += skew
    return logits


def balance_over_skew(skews: Sequence[float], n: int = 4096, e: int = 8) -> dict[int, list[float]]:
    """E sum f P of 4096 tokens whose logits favour one of 8 experts, for k = 1 and 2."""
    b = load("numpy")
    losses: dict[int, list[float]] = {1: [], 2: []}
    for k, values in losses.items():
        for skew in skews:
            gate = b.gate(skewed_logits(n, e, skew), None, None, rule=Rule("softmax_topk", k))
            values.append(float(e * np.sum(gate.counts / (n * k) * gate.prob_sum / n)))
    return losses


def allowed(t: int, causal: bool, window: int) -> np.ndarray[Any, Any]:
    """Which key each query sees: with the identity as values attention gives its own weights.   -> bool [T,T]"""
    b = load("numpy")
    zeros, positions = np.zeros((1, t, 1, 1)), np.arange(t, dtype=np.int32)[None]
    options: Any = {"scale": 1.0, "causal": causal, "window": window, "q_pos": positions, "k_pos": positions}
    weights, _ = b.attention(zeros, zeros, np.eye(t)[None, :, None, :], **options)
    return np.asarray(weights[0, :, 0, :] > 0)


def dropped_over_capacity(factors: Sequence[float], skew: float, n: int = 4096, e: int = 8, k: int = 2) -> list[float]:
    """The fraction of all chosen slots that capacity_factor drops."""
    b = load("numpy")
    gate = b.gate(skewed_logits(n, e, skew), None, None, rule=Rule("softmax_topk", k))
    dropped = []
    for factor in factors:
        plan = b.route(gate.ids, gate.weights, None, n_experts=e, rows=n * k, capacity=b.capacity(n, None, k, e, factor))
        dropped.append(1.0 - int(plan.offsets[-1]) / (n * k))
    return dropped


# ---- the pictures -------------------------------------------------------------------------------------------------------------------


def draw_cost(figure: Any) -> None:
    experts = [2, 4, 8, 16, 32, 64]
    found = cost_over_experts(experts)
    left, right = figure.subplots(1, 2)
    left.plot(experts, found["total"], "o-", color=BLUE, label="total")
    left.plot(experts, found["active"], "o-", color=ORANGE, label="active: what one token uses")
    left.set(title="Parameters, millions", xlabel="experts E (2 of them for each token)")
    right.plot(experts, found["dense_flops"], "o-", color=BLUE, label="dense: one FFN of width 256 E")
    right.plot(experts, found["sparse_flops"], "o-", color=ORANGE, label="sparse: 2 of E experts of width 256")
    left.set_ylim(0.8, 60)
    right.set(title="Forward FLOPs a token, millions", xlabel="experts E", ylim=(0.8, 60))
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(experts, [str(e) for e in experts])
        axes.minorticks_off()
        axes.set_yticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"])
        axes.grid(alpha=0.25)
        axes.legend(loc="upper left")


def draw_balance(figure: Any) -> None:
    skews = [0.25 * i for i in range(33)]
    axes = figure.subplots()
    for (k, values), colour in zip(balance_over_skew(skews).items(), (BLUE, ORANGE), strict=True):
        axes.plot(skews, values, color=colour, label=f"k = {k}: at most {8 // k}")
    axes.axhline(1.0, color=GREY, linestyle=":", label="uniform: 1")
    axes.set(title="Balance loss, E = 8", xlabel="how much one expert's logits are raised", ylabel="E sum f P", ylim=(0, None))
    axes.legend()


def draw_masks(figure: Any) -> None:
    masks = {"causal": (True, 0), "causal, window 4": (True, 4), "both ways, window 4": (False, 4)}
    for axes, (title, (causal, window)) in zip(figure.subplots(1, 3), masks.items(), strict=True):
        axes.imshow(allowed(12, causal, window), cmap="Blues", vmin=0, vmax=1.35, interpolation="none")
        axes.set(title=title, xlabel="key position", ylabel="query position", xticks=(0, 4, 8), yticks=(0, 4, 8))
        edges = [i + 0.5 for i in range(11)]
        axes.vlines(edges, -0.5, 11.5, colors="white", linewidth=1.2)
        axes.hlines(edges, -0.5, 11.5, colors="white", linewidth=1.2)


def draw_capacity(figure: Any) -> None:
    factors = [round(0.1 * i, 1) for i in range(2, 41)]
    axes = figure.subplots()
    for skew, colour in zip((0.0, 1.0, 2.0, 4.0), (GREEN, BLUE, ORANGE, GREY), strict=True):
        axes.plot(factors, dropped_over_capacity(factors, skew), color=colour, label=f"one expert's logits + {skew:g}")
    axes.set(title="Dropped slots, E = 8, k = 2", xlabel="capacity_factor", ylabel="fraction dropped", ylim=(0, None))
    axes.axvline(1.0, color="black", linewidth=0.6, linestyle=":")
    axes.legend()


PICTURES: dict[str, tuple[Callable[[Any], None], tuple[float, float]]] = {
    "cost": (draw_cost, (8.2, 3.1)),
    "balance-loss": (draw_balance, (5.2, 3.1)),
    "attention-masks": (draw_masks, (8.2, 3.0)),
    "capacity": (draw_capacity, (5.2, 3.1)),
}


def draw_all(folder: Path, suffix: str = "svg") -> list[Path]:
    """Every picture, as a file of its name in the folder."""
    import matplotlib
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, (draw, size) in PICTURES.items():
        with matplotlib.rc_context(STYLE):
            figure = Figure(figsize=size)
            draw(figure)
            path = folder / f"{name}.{suffix}"
            figure.savefig(path, dpi=130, metadata={"Date": None} if suffix == "svg" else None)
        paths.append(path)
    return paths


if __name__ == "__main__":
    for drawn in draw_all(Path(sys.argv[1]) if len(sys.argv) > 1 else IMAGES, *sys.argv[2:3]):
        print(drawn)
