"""Targets for the kernels of `cupy`, and whether they were met: for bfloat16 on `CARD`; all but one are ratios within one run."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.gpu.lab import OURS
from benchmarks.gpu.problems import Row

Results = dict[str, Any]
CARD = "NVIDIA H200"
SIDE = f"minimoe, {OURS}"
MOVES = ("dispatch", "dispatch_backward", "combine", "combine_backward")
PRODUCTS = ("grouped_matmul", "grouped_matmul, transpose", "grouped_matmul_dw")


@dataclass(frozen=True)
class Target:
    """A target: `found(results)` gives a number, or the reason why there is none."""

    text: str
    found: Callable[[Results], float | str]
    wanted: float
    unit: str  # share, times, microseconds
    most: bool = False  # True if `wanted` is an upper limit, False if it is a lower one
    stretch: float | None = None

    def verdict(self, results: Results) -> Row:
        """Its entry in the JSON file; `met` is None if it was not measured."""
        found = self.found(results)
        row: Row = {"target": self.text, "wanted": f"{'at most' if self.most else 'at least'} {shown(self.wanted, self.unit)}"}
        if isinstance(found, str):
            return {**row, "found": found, "met": None}
        row |= {"found": shown(found, self.unit), "value": found, "met": self.holds(found, self.wanted)}
        return row if self.stretch is None else {**row, "stretch": shown(self.stretch, self.unit), "stretched": found >= self.stretch}

    def holds(self, found: float, wanted: float) -> bool:
        return found <= wanted if self.most else found >= wanted


def targets() -> Iterator[Target]:
    """All targets."""
    for kernel in MOVES:
        yield Target(f"{kernel}, of the copy rate", partial(share, goal=kernel, ceiling="copy"), 0.75, "share")
    yield Target("gate, of the copy rate", partial(share, goal="gate", ceiling="copy"), 0.60, "share")
    yield Target("route of 65,536 x 8 over 256 experts", microseconds_of_route, 60.0, "microseconds", most=True)
    for kernel in PRODUCTS:
        for e in (8, 64):
            goal = f"{kernel}, E {e}"
            yield Target(f"{goal}, of the dense rate", partial(share, goal=goal, ceiling="bfloat16"), 0.60, "share", stretch=0.75)
    for e in (8, 64):
        goal = f"layer, E {e}"
        yield Target(f"{goal}, over PyTorch's best grouped", partial(ahead, part="layer", goal=goal, words="grouped"), 1.0, "times")
        yield Target(f"{goal}, over PyTorch's expert loop", partial(ahead, part="layer", goal=goal, words="eager, loop"), 3.0, "times")
    for kernel, most in (("attention", 1.5), ("attention_backward", 2.0)):
        yield Target(f"{kernel}, its time over PyTorch's fused one", partial(behind, goal=kernel), most, "times", most=True)
    yield Target("step, over PyTorch's best compiled", partial(ahead, part="step", goal="step", words="compiled"), 1.0, "times")
    yield Target("step, over PyTorch's eager loop", partial(ahead, part="step", goal="step", words="eager, loop"), 3.0, "times")


def verdicts(results: Results) -> list[Row]:
    return [target.verdict(results) for target in targets()]


# ---- where the numbers come from -------------------------------------------------------------------------------------------------------


def goal_rows(results: Results, part: str, goal: str) -> list[Row]:
    """The rows of a part that were measured for a target."""
    return [row for row in results.get(part, []) if row.get("goal") == goal]


def milliseconds(rows: list[Row], fits: Callable[[str], bool], who: str) -> float | str:
    """The best time of the sides whose name fits, or the reason why there is none."""
    chosen = [row for row in rows if fits(row["side"])]
    times = [row["ms"] for row in chosen if "ms" in row]
    if times:
        return float(min(times))
    why = next((row.get("failed") or row.get("left_out") for row in chosen), None)
    why = why or next((row["left_out"] for row in rows if "left_out" in row), "it was not measured")
    return f"{who}: {why}"


def share(results: Results, goal: str, ceiling: str) -> float | str:
    """The rate of minimoe's kernel over a ceiling of this run."""
    rows = goal_rows(results, "kernels", goal)
    time, limit = milliseconds(rows, lambda side: side == OURS, OURS), results.get("rates", {}).get(ceiling)
    if isinstance(time, str):
        return time
    amount = rows[0]["bytes" if ceiling == "copy" else "flops"]
    return amount / time * 1e3 / limit if limit else f"the card's rate of {ceiling} was not measured"


def microseconds_of_route(results: Results) -> float | str:
    time = milliseconds(goal_rows(results, "kernels", "route"), lambda side: side == OURS, OURS)
    return time if isinstance(time, str) else time * 1e3


def ahead(results: Results, part: str, goal: str, words: str) -> float | str:
    """Return how many times faster minimoe is than the best of PyTorch's sides with these words in their names."""
    rows = goal_rows(results, part, goal)
    ours = milliseconds(rows, lambda side: side == SIDE, SIDE)
    theirs = milliseconds(rows, lambda side: side.startswith("PyTorch") and words in side, f"PyTorch, {words}")
    return ratio(theirs, ours)


def behind(results: Results, goal: str) -> float | str:
    """The time of minimoe's kernel over PyTorch's."""
    rows = goal_rows(results, "kernels", goal)
    ours = milliseconds(rows, lambda side: side == OURS, OURS)
    return ratio(ours, milliseconds(rows, lambda side: side == "PyTorch", "PyTorch"))


def ratio(above: float | str, below: float | str) -> float | str:
    """The ratio of two times, or why one is missing."""
    if isinstance(above, str) or isinstance(below, str):
        return below if isinstance(below, str) else str(above)
    return above / below


def shown(value: float, unit: str) -> str:
    return {"share": f"{value:.0%}", "times": f"{value:.2f} x", "microseconds": f"{value:.1f} us"}[unit]
