"""Pictures of runs: their losses over the steps, and the load of each expert. They need matplotlib, the extra `plot`."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from minimoe.errors import UserError, printable
from minimoe.hints import install

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Metrics: TypeAlias = "Sequence[Mapping[str, Any]]"
"""The lines of a run's metrics."""

STYLE: Any = {
    "svg.hashsalt": "minimoe", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 9,
    "axes.titlelocation": "left", "legend.frameon": False, "figure.constrained_layout.use": True,
}  # fmt: skip
MOST_POINTS = 400  # in a curve, or columns of a heat map: of more steps, the means of groups are drawn
WIDTH, LOSS, LAYER = 8.0, 3.6, 1.1  # inches: of the picture, the height of the losses, and that of a layer's load
FAINT = 0.35
COLOURS = 10  # that are told apart at a glance; more runs get a rainbow, and their names to the right
MOST_SIDE_BY_SIDE = 4  # heat maps


def draw(runs: Mapping[str, Metrics], load: bool = False) -> Figure:
    """Return a picture of the losses of some runs, {name: metrics}; with `load`, also of the load of their experts, below.

    Training losses are thin lines, validation losses (over the same batches at each evaluation) thick ones with dots. The load is a heat
    map for each routed layer: an expert's share over the even share. In a notebook the picture shows itself.
    Raises `UserError` if matplotlib is missing, if no run has a step, or, with `load`, if none has experts or more than four have.
    """
    figure_class, style = _matplotlib()
    known = {name: rows for name, rows in runs.items() if rows}
    if not known:
        raise UserError(f"{', '.join(runs)}: no step was recorded yet, so there is nothing to plot")
    maps = {name: grid for name, rows in known.items() if (grid := loads(rows))} if load else {}
    if load and not maps:
        raise UserError(f"{', '.join(runs)}: the models are dense: there is no load of experts to plot")
    if len(maps) > MOST_SIDE_BY_SIDE:
        raise UserError(f"the load of {len(maps)} runs does not fit side by side: name up to {MOST_SIDE_BY_SIDE}")
    layers = max(map(len, maps.values()), default=0)
    height = max(LOSS, 0.15 * len(known))
    with style(STYLE):
        figure = figure_class(figsize=(WIDTH, height + LAYER * layers))
        if not maps:
            _draw_losses(figure, known)
            return figure
        parts: Any = figure.subfigures(2, 1, height_ratios=[height, LAYER * layers])
        above, below = parts
        _draw_losses(above, known)
        _draw_loads(below, maps, known)
        return figure


def render(figure: Figure, kind: str) -> bytes:
    """Return a picture as the bytes of a file: `png`, `svg` or `pdf`. Equal pictures give equal bytes."""
    _, style = _matplotlib()
    data = io.BytesIO()
    dates = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
    with style(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # of a run's name: a box stands for it
        figure.savefig(data, format=kind, dpi=150, metadata=dates.get(kind))
    return data.getvalue()


def _matplotlib() -> tuple[type[Figure], Any]:
    """Return the class of pictures, and the context in which they are drawn: no window is opened, and no setting changes."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(f"pictures are drawn by matplotlib, which is not installed: {install('plot')}") from None

    class Picture(Figure):
        """A figure that a notebook shows, also where pyplot was not imported."""

        def _repr_png_(self) -> bytes:
            return render(self, "png")

    return Picture, rc_context


# ---- the losses -----------------------------------------------------------------------------------------------------------------


def _draw_losses(figure: Any, runs: Mapping[str, Metrics]) -> None:
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator

    axes = figure.add_subplot()
    many = len(runs) > COLOURS
    for i, (name, rows) in enumerate(runs.items()):
        colour = colormaps["turbo"](0.05 + 0.9 * i / (len(runs) - 1)) if many else f"C{i}"
        steps, losses = grouped([row["step"] for row in rows], [_number(row.get("loss")) for row in rows])
        axes.plot(steps, losses, color=colour, linewidth=0.9, alpha=FAINT if _measured(rows) else 1.0)
        at, values = _measured(rows) or ([], [])
        axes.plot(at, values, color=colour, linewidth=1.6, marker="o", markersize=3, label=_label(name, rows))
    axes.set(xlabel="step", ylabel="loss (nats)", title="thin: training; thick: validation, and its lowest behind the name")
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.margins(x=0.01)
    if many:
        figure.legend(loc="outside right upper", fontsize=7)
    else:
        axes.legend(loc="upper right", fontsize=8)


def _measured(rows: Metrics) -> tuple[list[int], list[float]] | None:
    """Return the steps with an evaluation, and what each found over the batches that all of them share."""
    found = [(row["step"], compared) for row in rows if (compared := row.get("val_loss_sampled", row.get("val_loss"))) is not None]
    return ([step for step, _ in found], [loss for _, loss in found]) if found else None


def _label(name: str, rows: Metrics) -> str:
    """Return a run's name, with its lowest validation loss."""
    measured = _measured(rows)
    shown = printable(name).replace("$", r"\$")
    shown = f" {shown}" if shown.startswith("_") else shown  # matplotlib hides such a label
    return f"{shown}: {min(measured[1]):.4f}" if measured else shown


# ---- the load of experts ----------------------------------------------------------------------------------------------------------


def loads(rows: Metrics) -> list[list[list[float]]]:
    """Return the load of each expert of each layer over the steps, as a multiple of the even load; empty if the model is dense.   [L][E][S]

    Steps whose load has another shape, of a damaged file, are left out.
    """
    shape = [len(layer) for layer in next((row["expert_load"] for row in reversed(rows) if row.get("expert_load")), [])]
    good = [row["expert_load"] for row in rows if [len(layer) for layer in row.get("expert_load", [])] == shape]
    return [
        [grouped(range(len(good)), [_number(load[layer][expert]) * experts for load in good])[1] for expert in range(experts)]
        for layer, experts in enumerate(shape)
    ]


def _draw_loads(figure: Any, maps: Mapping[str, list[list[list[float]]]], runs: Mapping[str, Metrics]) -> None:
    from matplotlib.ticker import MaxNLocator

    layers = max(map(len, maps.values()))
    grid = figure.subplots(layers, len(maps), squeeze=False, sharex="col")
    for column, (name, layers_of) in enumerate(maps.items()):
        last = runs[name][-1]["step"]
        for layer in range(layers):
            axes = grid[layer][column]
            if layer >= len(layers_of):
                axes.set_axis_off()
                continue
            experts = len(layers_of[layer])
            image = axes.imshow(
                layers_of[layer], aspect="auto", interpolation="nearest", cmap="RdBu_r", vmin=0.0, vmax=2.0,
                extent=(0.5, last + 0.5, experts - 0.5, -0.5),
            )  # fmt: skip
            axes.set_facecolor("0.8")  # a load that is not a number
            axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
            if column == 0:
                axes.set_ylabel(f"layer {layer}\nexpert")
        grid[0][column].set_title(f"expert load: {_label(name, [])}")
        grid[len(layers_of) - 1][column].set_xlabel("step")
    where: Any = {"ax": grid.ravel().tolist(), "anchor": (0.0, 1.0), "shrink": min(1.0, 2 / layers), "aspect": 20}
    bar = figure.colorbar(image, label="share / even share", ticks=[0, 0.5, 1, 1.5, 2], extend="max", **where)
    bar.ax.set_yticklabels(["0", "0.5", "even", "1.5", "2"])


# ---- numbers ----------------------------------------------------------------------------------------------------------------------


def grouped(steps: Sequence[int], values: Sequence[float]) -> tuple[list[float], list[float]]:
    """Return steps and values, or the means of consecutive groups of equal size if there are more than `MOST_POINTS`."""
    size = -(-len(steps) // MOST_POINTS) or 1
    groups = range(0, len(steps), size)
    return [_mean(steps[start : start + size]) for start in groups], [_mean(values[start : start + size]) for start in groups]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)
