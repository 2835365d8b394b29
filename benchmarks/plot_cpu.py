"""The plot of the CPU benchmark: a panel for each model, a bar for each side. `python -m benchmarks.plot_cpu RESULTS.json FILE.svg`"""

import json
import sys
from pathlib import Path
from typing import Any

INK = "#7d8590"  # reads on white and on black
COLOURS = {"minimoe": "#2f81c5", "eager": "#9aa1ab", "compiled": "#c2873c"}
LABELS = {"minimoe": "minimoe", "eager": "PyTorch, transformers: eager", "compiled": "torch.compile"}
DASHES = (0, (3, 2))
BAR, PANEL = 0.22, 0.4  # inches: height of a bar, space around the bars of a panel


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw medians in ms per step as horizontal bars, with a line for the matrix products alone. Sides that failed are left out."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    panels = {name: drawn_rows(found) for name, found in results["models"].items()}
    style: Any = {
        "svg.hashsalt": "minimoe",
        "font.size": 8,
        "text.color": INK,
        "axes.labelcolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
    }
    with plt.rc_context(style):
        counts = [max(1, len(rows)) for rows in panels.values()]
        size = (8, sum(counts) * BAR + len(counts) * PANEL + 0.8)
        figure, axes = plt.subplots(len(counts), 1, figsize=size, height_ratios=counts, squeeze=False, layout="constrained")
        for axis, (name, rows) in zip(axes[:, 0], panels.items(), strict=True):
            panel(axis, name, rows, results["models"][name])
        m = results["machine"]
        figure.suptitle(
            f"A whole training step: ms a step, lower is better\n{m['processor']}, {results['threads']} threads, float32, {m['date']}",
            x=0.01, ha="left", fontsize=9,
        )  # fmt: skip
        handles: list[Any] = [Patch(color=colour, label=LABELS[kind]) for kind, colour in COLOURS.items()]
        handles.append(Line2D([], [], color=INK, linewidth=0.9, linestyle=DASHES, label="its matrix products alone"))
        figure.legend(handles=handles, loc="outside lower left", ncols=len(handles), frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, transparent=True, metadata={"Date": None})
        plt.close(figure)


def drawn_rows(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The sides that have a bar: all except the products and those that failed."""
    return {name: row for name, row in found["sides"].items() if "failed" not in row and row["kind"] != "products"}


def panel(axis: Any, name: str, rows: dict[str, dict[str, Any]], found: dict[str, Any]) -> None:
    """Draw one model: its bars from top to bottom, each with its figure."""
    values = [row["median_ms"] for row in rows.values()]
    bars = axis.barh(list(rows), values, color=[COLOURS[row["kind"]] for row in rows.values()], height=0.72)
    axis.bar_label(bars, labels=[f"{value:,.0f}" if value >= 100 else f"{value:.1f}" for value in values], padding=3)
    for row in found["sides"].values():
        if row["kind"] == "products" and "failed" not in row:
            axis.axvline(row["median_ms"], color=INK, linewidth=0.9, linestyle=DASHES, zorder=3)
    axis.invert_yaxis()
    axis.margins(x=0.12)
    axis.set_title(name, loc="left", fontsize=9, fontweight="bold", color=INK)
    axis.tick_params(left=False, bottom=False, labelbottom=False)
    for spine in axis.spines.values():
        spine.set_visible(False)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m benchmarks.plot_cpu RESULTS.json FILE.svg")
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
