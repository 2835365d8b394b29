"""Draws the pictures of the pages into docs/images: `python -m docs.plots` (needs the extra `report`).

Every curve is computed by minimoe itself on NumPy, with fixed seeds; the same matplotlib writes the same bytes.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "backends")) if path not in sys.path]  # a clone that is not installed

import minimoe as mm  # noqa: E402
from minimoe.backend import load  # noqa: E402
from minimoe.config.cost import cost  # noqa: E402
from minimoe.engine.random import host_normal  # noqa: E402
from minimoe.reference.gating import Rule  # noqa: E402

IMAGES = ROOT / "docs" / "images"
BLUE, ORANGE, GREEN, GREY = "#2563a8", "#d9731a", "#2a8a57", "#8a8f98"
STYLE: Any = {
    "svg.hashsalt": "minimoe", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10,
    "axes.titlelocation": "left", "legend.frameon": False, "figure.constrained_layout.use": True,
}  # fmt: skip
Axes = Any  # matplotlib is an extra


class Tint(NamedTuple):
    """The colours of a box."""

    fill: str
    line: str
    ink: str = "#1f2430"


INK, SOFT = "#1f2430", "#5b6270"
PLAIN, PANEL, IDLE = Tint("white", SOFT), Tint("#f5f6f8", "#c9cdd4"), Tint("#e6e8ec", "#c9cdd4", GREY)
COOL, LIT, GOOD = Tint("#e4eefa", BLUE), Tint("#fdecd9", ORANGE), Tint("#dff2e8", GREEN)


# ---- what is drawn, as numbers ------------------------------------------------------------------------------------------------------


def cost_over_experts(experts: Sequence[int]) -> dict[str, list[float]]:
    """Millions of parameters and of forward FLOPs per token of tiny-moe's shape with 2 of E experts, and of a dense model of that size."""
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
    """Gaussian logits, with those of one expert raised by `skew`.   [N,E]"""
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
    """The keys that each query attends to: with the identity as values, attention returns its weights.   -> bool [T,T]"""
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


def one_token(e: int = 8, k: int = 2) -> tuple[list[float], list[int], list[float]]:
    """A token's probabilities over the experts, its k experts, and their weights."""
    gate = load("numpy").gate(1.2 * host_normal(e, 0, "docs.one_token").reshape(1, e), None, None, rule=Rule("softmax_topk", k))
    return gate.scores[0].tolist(), gate.ids[0].tolist(), gate.weights[0].tolist()


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
    right.set(title="Forward FLOPs per token, millions", xlabel="experts E", ylim=(0.8, 60))
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


class Sketch:
    """Boxes, arrows and words on a sheet measured in points, y downwards from the top."""

    def __init__(self, figure: Any) -> None:
        figure.set_layout_engine("none")
        width, height = (72.0 * inches for inches in figure.get_size_inches())
        self.axes = figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, width), ylim=(height, 0))
        self.axes.axis("off")

    def words(self, x: float, y: float, text: str, size: float = 8.0, colour: str = SOFT, **style: Any) -> None:
        """Text centred on a point, or as `ha` says."""
        self.axes.text(x, y, text, **{"fontsize": size, "color": colour, "ha": "center", "va": "center", "linespacing": 1.2, **style})

    def box(self, x: float, y: float, w: float, h: float, name: str = "", note: str = "", tint: Tint = PLAIN, dashed: bool = False) -> None:
        """A rounded box from its upper left corner: a name, and a remark under it."""
        from matplotlib.patches import FancyBboxPatch

        style: Any = {"boxstyle": "round,pad=0,rounding_size=4", "linestyle": (0, (3, 2)) if dashed else "-", "linewidth": 1.1}
        self.axes.add_patch(FancyBboxPatch((x, y), w, h, facecolor=tint.fill, edgecolor=tint.line, zorder=2 if name else 0.4, **style))
        lines = [name, *note.splitlines()]
        for i, line in enumerate(lines):
            size: Any = {"size": 8} if i else {"size": 9, "fontweight": "bold"}
            self.words(x + w / 2, y + h / 2 + 12 * (i - (len(lines) - 1) / 2) + 3, line, colour=tint.ink, va="baseline", **size)

    def arrow(self, *points: tuple[float, float], colour: str = INK) -> None:
        """A line through the points, with a head at the last."""
        self.axes.plot(*zip(*points[:-1], strict=True), color=colour, linewidth=1.1, solid_joinstyle="round", zorder=1)
        arrow = {"arrowstyle": "-|>,head_length=0.32,head_width=0.16", "color": colour, "linewidth": 1.1, "mutation_scale": 14}
        self.axes.annotate("", points[-1], points[-2], arrowprops={**arrow, "shrinkA": 0, "shrinkB": 0}, zorder=1)

    def plus(self, x: float, y: float) -> None:
        """A sum: a cross in a circle of radius 7."""
        self.axes.plot([x], [y], "o", markersize=13, markerfacecolor="white", markeredgecolor=INK, markeredgewidth=1.1, zorder=3)
        self.axes.plot([x], [y], "+", markersize=7, markeredgecolor=INK, markeredgewidth=1.2, zorder=4)


def draw_architecture(figure: Any) -> None:
    sketch = Sketch(figure)
    sketch.axes.fill([142, 142, 171.4, 171.4], [215, 241, 345, 31], color=LIT.fill, linewidth=0, zorder=0.5)  # the layer, enlarged
    sketch_model(sketch)
    sketch_routed_layer(sketch)
    sketch_losses(sketch)
    sketch_code(sketch)


def sketch_model(s: Sketch) -> None:
    """A decoder around its residual stream, from ids to logits."""
    s.words(12, 13, "A token through the model", 10.5, INK, fontweight="bold", ha="left")
    s.box(12, 66, 138, 238, tint=PANEL)
    s.words(142, 291, "one of L blocks", ha="right")
    s.words(23, 208, "residual stream", rotation=90)
    s.arrow((34, 48), (34, 318))
    for top, name, note, tint in ((76, "attention", "", COOL), (180, "routed layer", "2 of 8 experts", LIT)):
        s.arrow((34, top + 10), (58, top + 10))
        s.box(58, top, 84, 20, "norm")
        s.arrow((100, top + 20), (100, top + 32))
        s.box(58, top + 32, 84, 32, name, note, tint)
        s.arrow((100, top + 64), (100, top + 80), (41, top + 80))
        s.plus(34, top + 80)
    for top, name, note in ((28, "embed", "ids [B,T] to\nx [B,T,D]"), (318, "norm", ""), (350, "head", "logits [B,T,V]")):
        s.box(12, top, 44, 20, name)
        s.words(63, top + 10, note, ha="left")
    s.arrow((34, 338), (34, 350))
    s.arrow((34, 370), (34, 382))


def sketch_routed_layer(s: Sketch) -> None:
    """From a router's logits to the weighted sum of the experts; the bars show a gate that ran."""
    probs, chosen, weights = one_token()
    s.box(172, 28, 278, 320, tint=Tint("white", ORANGE))
    s.words(182, 43, "routed layer", 9, INK, fontweight="bold", ha="left")
    s.words(270, 43, "x [N,D], N = B T", ha="left")
    s.arrow((264, 36), (264, 58))
    s.box(182, 58, 164, 32, "router", "logits z = x Wᵀ, p = softmax(z)", LIT)
    for top, name, note in ((160, "plan", "order, inverse, offsets: integers"), (204, "dispatch", "gather rows, expert by expert")):
        s.box(182, top, 164, 32, name, note)
    s.box(182, 292, 164, 32, "combine", "sum of rows times weights")
    for e, p in enumerate(probs):
        left, lit = 182 + 20.8 * e, e in chosen
        s.axes.bar(left + 9, -32 * p / max(probs), 14, 140, color=ORANGE if lit else "#c9cdd4", zorder=2)
        s.box(left, 250, 18, 26, str(e), tint=LIT if lit else IDLE)
        if lit:
            s.words(left + 9, 134 - 32 * p / max(probs), f"{weights[chosen.index(e)]:.2f}", colour=INK)
            s.arrow((left + 9, 236), (left + 9, 250), colour=ORANGE)
            s.arrow((left + 9, 276), (left + 9, 292), colour=ORANGE)
    s.words(182, 150, "top-k: k = 2", ha="left")
    s.words(346, 150, "weight p / Σ p", ha="right")
    s.arrow((264, 141), (264, 160))
    s.arrow((264, 192), (264, 204))
    s.arrow((346, 128), (356, 128), (356, 308), (346, 308), colour=ORANGE)
    s.words(364, 206, "weights", rotation=90)
    s.words(362, 263, "experts", ha="left")
    s.arrow((264, 324), (264, 342))
    s.words(270, 336, "y [N,D]", ha="left")


def sketch_losses(s: Sketch) -> None:
    """The sum of the task's loss and the router's."""
    s.arrow((346, 74), (368, 74), colour=GREEN)
    s.box(368, 58, 74, 44, "balance loss", "E Σ f P,\nand z-loss", GOOD)
    s.arrow((405, 102), (405, 391), colour=GREEN)
    s.words(399, 366, "times its coefficient", ha="right")
    s.box(12, 382, 88, 32, "cross-entropy", "of the next token", COOL)
    s.arrow((100, 398), (398, 398))
    s.plus(405, 398)
    s.arrow((412, 398), (428, 398))
    s.words(431, 398, "loss", 9, INK, ha="left", fontweight="bold")
    s.words(12, 426, "In backward, gradients follow every arrow in reverse, except the plan's: a plan is integers.", ha="left")


FOLDERS = [
    ("cli", "commands, display"), ("study", "inspect, compare, bench"), ("testing", "gradients, conformance"),
    ("training", "step, optimizers, tasks"), ("generation", "sampling, decoding"), ("pretrained", "transformers' folders"),
    ("runs", "checkpoints"), ("data", "text, tokens, batches"), ("model", "Transformer, block"), ("layers", "attention, experts"),
    ("engine", "Tensor, ops, backward"), ("functional", "immutable arrays"),
    ("backend", "by name"), ("config", "presets, cost"), ("reference", "kernels"),
]  # fmt: skip
BACKENDS = ("numpy", "numba", "cupy", "numba-cuda", "yours")


def sketch_code(s: Sketch) -> None:
    """The folders of minimoe/, from those that import to those that are imported, and the backends."""
    s.words(470, 13, "The layers of the code", 10.5, INK, fontweight="bold", ha="left")
    pitch, height = 25.6, 20.0
    beside = {"backend", "config", "reference"}  # the backends are drawn there
    for i, (name, note) in enumerate(FOLDERS):
        top, width = 28 + pitch * i, 104 if name in beside else 170
        s.box(470, top, width, height, " ", tint=LIT if name == "reference" else PLAIN)
        s.words(477, top + height / 2, name, 8.5, INK, fontweight="bold", ha="left")
        s.words(470 + width - 6, top + height / 2, note, 7.5, ha="right")
        if i + 1 < len(FOLDERS):
            s.arrow((527, top + height), (527, top + pitch))
    first = 28 + pitch * [name for name, _ in FOLDERS].index("backend")
    for i, name in enumerate(BACKENDS):
        top = first + 14.6 * i
        s.box(584, top, 56, 13, " ", tint=COOL, dashed=name == "yours")
        s.words(612, top + 6, name, 7.5, INK)
    s.arrow((584, first + 6.5), (574, first + 6.5))
    s.words(470, 419, "Imports point only downwards. A backend", ha="left")
    s.words(470, 430, "imports backend, and is found by its name.", ha="left")


PICTURES: dict[str, tuple[Callable[[Any], None], tuple[float, float]]] = {
    "architecture": (draw_architecture, (9.0, 6.05)),
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
