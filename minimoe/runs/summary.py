"""A run on one screen: where it is, how far it has come, its losses, and the load of its experts. A notebook shows it for a run."""

from collections.abc import Sequence
from typing import Any

from minimoe.errors import printable
from minimoe.figures import BARS, duration, number, percent
from minimoe.runs.run import Run

MOST_LAYERS = 12
MOST_EXPERTS = 64


def summary(run: Run, metrics: Sequence[dict[str, Any]]) -> str:
    """Return the text: at most 16 lines of 80 columns, but for long names."""
    status, settings = run.status(), run.config.train
    lines = [f"{printable(str(run.path))}: {status['state']} at step {status.get('step') or 0} of {settings.steps}"]
    if metrics:
        last = metrics[-1]
        lines[0] += f", {duration(last['elapsed_s'])} on {settings.backend}"
        lines.append("   ".join([f"loss {number(metrics[0]['loss'])} -> {number(last['loss'])}", *_validation(metrics)]))
        lines += _load_lines(last["expert_load"])
    return "\n".join(lines)


def _validation(metrics: Sequence[dict[str, Any]]) -> list[str]:
    measured = [row for row in metrics if row.get("val_loss") is not None]
    if not measured:
        return []
    accuracy = measured[-1].get("val_accuracy")
    return [f"validation loss {number(measured[-1]['val_loss'])}", *([] if accuracy is None else [f"accuracy {percent(accuracy)}"])]


def _load_lines(loads: Sequence[Sequence[float]]) -> list[str]:
    """Return a bar for each expert of each layer: half as high as a bar can be for an even load."""
    found = []
    for layer, shares in enumerate(loads[:MOST_LAYERS]):
        bars = "".join(BARS[min(8, round(4 * share * len(shares)))] for share in shares[:MOST_EXPERTS])
        found.append(f"expert load, layer {layer:>2}  {bars}  {percent(min(shares))} to {percent(max(shares))}")
    return found + ([f"and {len(loads) - MOST_LAYERS} more layers"] if len(loads) > MOST_LAYERS else [])
