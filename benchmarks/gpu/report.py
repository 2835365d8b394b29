"""The results as tables, in text and in Markdown, and the targets that were missed."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from io import StringIO
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from benchmarks.gpu.lab import BACKENDS
from benchmarks.gpu.problems import Row
from benchmarks.gpu.suite import counts, is_failure
from benchmarks.gpu.targets import CARD, SIDE, Results, verdicts

WIDTH = 200
UNITS = {"copy": ("GB/s", 1e9), "bfloat16": ("TFLOP/s in bfloat16", 1e12), "float32": ("TFLOP/s in float32", 1e12)}


@dataclass
class Table:
    """A title, column heads, rows of text, and notes below."""

    title: str
    heads: list[str]
    rows: list[list[str]]
    lines: list[str] = field(default_factory=list)
    figures: range = range(0)  # columns of numbers


def conclude(results: Results) -> None:
    """Add shares, verdicts and the list of what was missed to the results."""
    for row in [*results.get("kernels", []), *results.get("ceilings", [])]:
        if "ms" in row:
            row |= share_of(row, results.get("rates", {}))
    results["targets"] = verdicts(results)
    results["short"] = list(shortfalls(results))


def share_of(row: Row, rates: dict[str, float]) -> Row:
    """The least time at the card's rates over the row's time, and the rate that limits it; empty if the rates are not known."""
    dense = rates.get(row["dtype"], 0.0)
    if not rates.get("copy") or ("flops" in row and not dense):
        return {}
    moving = row["bytes"] / rates["copy"]
    computing = row["flops"] / dense if "flops" in row else 0.0
    return {"share": max(moving, computing) / row["ms"] * 1e3, "of": "copy" if moving >= computing else "dense"}


def shortfalls(results: Results) -> Iterator[str]:
    """A line for each part or test that failed, target missed or not measured, side without a figure, and reference in use."""
    for name, part in results.get("parts", {}).items():
        if part["state"] != "done":
            yield f"part {name}: {part['state']}"
    for reason in results.get("machine", {}).get("absent_backends", {}).values():
        yield str(reason)
    for name, outcome in results.get("tests", {}).items():
        yield from test_shortfalls(name, outcome)
    for verdict in results["targets"]:
        if not verdict["met"]:
            found = f"found {verdict['found']}" if "value" in verdict else f"not measured: {verdict['found']}"
            yield f"target {verdict['target']}: wanted {verdict['wanted']}, {found}"
    left_out = 0
    for part in ("ceilings", "kernels", "layer", "step"):
        for row in results.get(part, []):
            left_out += "left_out" in row
            if "failed" in row:
                yield f"{described(row)}: {row['failed']}"
    for kernel, dtype, side in references(results.get("kernels", [])):
        yield f"{kernel}, {dtype}, {side}: ran the reference, not a kernel of the backend's own"
    if left_out:
        yield f"{left_out} rows left out"


def references(rows: list[Row]) -> list[tuple[str, str, str]]:
    """Each kernel, dtype and side that ran the reference, once."""
    return list(dict.fromkeys((row["kernel"], row["dtype"], row["side"]) for row in rows if row.get("kind") == "reference"))


def test_shortfalls(name: str, outcome: Row) -> Iterator[str]:
    if "left_out" in outcome:
        yield f"{name}: left out: {outcome['left_out']}"
    elif "errors" in outcome:
        if outcome["errors"] or not counts(outcome):
            yield f"{name}: {outcome_text(outcome)}"
    else:
        yield from (f"test {failed['test']}: {failed['error']}" for failed in outcome["failed"])
        if outcome["not_reached"] or outcome["skipped"] or is_failure(outcome):
            yield f"{name}: {outcome_text(outcome)}"


def described(row: Row) -> str:
    """The name of a row, for a line about it."""
    return ", ".join(text for text in (row.get("kernel", ""), sizes(row), row["dtype"], row["side"]) if text)


# ---- tables ----------------------------------------------------------------------------------------------------------------------------


def tables(results: Results) -> Iterator[Table]:
    """All tables, in the order of the parts."""
    machine = results.get("machine", {})
    yield Table("Machine", ["", ""], [[name, str(value)] for name, value in machine.items()])
    if results.get("tests"):
        yield Table("Tests", ["", "outcome"], [[name, outcome_text(outcome)] for name, outcome in results["tests"].items()])
    if results.get("rates"):
        rows = [[f"{rate / UNITS[name][1]:,.0f} {UNITS[name][0]}"] for name, rate in results["rates"].items()]
        yield Table("Ceilings of this card, measured", ["rate"], rows)
    for part in ("ceilings", "kernels"):
        if results.get(part):
            yield problem_table(part, results[part])
    for part in ("layer", "step"):
        for case in by_sizes(results.get(part, [])):
            yield side_table(part, case)
    if results.get("targets"):
        rows = [[v["target"], v["wanted"], v["found"], verdict_text(v)] for v in results["targets"]]
        yield Table(f"Targets, set for an {CARD}", ["target", "wanted", "found", ""], rows)
    yield Table("What fell short", ["line"], [[line] for line in results.get("short", [])] or [["nothing"]])


def outcome_text(outcome: Row) -> str:
    if "left_out" in outcome:
        return f"left out: {outcome['left_out']}"
    if "errors" in outcome:
        found = "unknown" if outcome["errors"] is None else outcome["errors"]
        return f"{found} errors in {outcome['seconds']:.0f} s, {'' if outcome['complete'] else 'not all of it was run, '}{outcome['ended']}"
    numbers = [f"{outcome['passed']} passed", f"{len(outcome['failed'])} failed", f"{outcome['skipped']} skipped"]
    return ", ".join([*numbers, f"{outcome['not_reached']} not reached", outcome["ended"]])


def verdict_text(verdict: Row) -> str:
    if verdict["met"] is None:
        return "not measured"
    return ("met, stretch too" if verdict.get("stretched") else "met") if verdict["met"] else "MISSED"


def problem_table(part: str, rows: list[Row]) -> Table:
    """A row for each problem: each backend's time and share, and the peer's time."""
    heads = ["kernel", "sizes", "dtype", *(head for name in BACKENDS for head in (name, "share")), "of", "PyTorch", "kind"]
    title = f"{part.capitalize()}: median of the device's time; share of what the card could do"
    table = Table(title, heads, [], figures=range(3, 3 + 2 * len(BACKENDS)))
    problems: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in rows:
        problems.setdefault((row["kernel"], sizes(row), row["dtype"]), {})[row["side"]] = row
    for key, sides in problems.items():
        cells = [*key]
        for name in BACKENDS:
            row = sides.get(name, {})
            cells += [time_text(row), f"{row['share']:.0%}" if "share" in row else ""]
        peers = [row for side, row in sides.items() if side not in (*BACKENDS, "all")]
        bounds = [row["of"] for row in sides.values() if "of" in row]
        kinds = dict.fromkeys(str(sides[name]["kind"]) for name in BACKENDS if sides.get(name, {}).get("kind"))
        left_out = ["left out"] if "all" in sides else []
        table.rows.append([*cells, bounds[0] if bounds else "", time_text(peers[0]) if peers else "", ", ".join([*kinds, *left_out])])
    return table


def side_table(part: str, rows: list[Row]) -> Table:
    """A row for each side: its time, and how many times as long as minimoe's it is."""
    ours = next((row["ms"] for row in rows if row["side"] == SIDE and "ms" in row), None)
    heads = ["side", "dtype", "median", "fastest", "tokens/s", "first", f"over {SIDE}"]
    table = Table(f"{part.capitalize()}: {sizes(rows[0])}", heads, [], figures=range(2, len(heads)))
    for row in rows:
        if "ms" not in row:
            table.rows.append([row["side"], row["dtype"], "failed" if "failed" in row else "left out", "", "", "", ""])
            table.lines.append(f"{row['side']}: {row.get('failed') or row['left_out']}")
            continue
        over = f"{row['ms'] / ours:.2f}" if ours else ""
        table.rows.append([
            row["side"], row["dtype"], f"{row['ms']:.3f} ms", f"{row['fastest_ms']:.3f} ms", f"{row['tokens_per_s']:,.0f}",
            f"{row['first_s']:.1f} s", over,
        ])  # fmt: skip
        table.lines += [f"{row['side']}: {note}" for note in row.get("notes", [])]
    return table


def by_sizes(rows: list[Row]) -> list[list[Row]]:
    """The rows of each case."""
    cases: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        cases.setdefault((sizes(row), row["case"]), []).append(row)
    return list(cases.values())


def sizes(row: Row) -> str:
    return ", ".join(f"{name} {value:,}" if isinstance(value, int) else f"{name} {value}" for name, value in row["sizes"].items())


def time_text(row: Row) -> str:
    if "ms" not in row:
        return "failed" if "failed" in row else ""
    return f"{row['ms'] * 1e3:,.1f} us" if row["ms"] < 1.0 else f"{row['ms']:,.2f} ms"


# ---- as text ---------------------------------------------------------------------------------------------------------------------------


def as_text(results: Results) -> str:
    """The tables as text for a terminal."""
    output = StringIO()
    console = Console(file=output, width=WIDTH, no_color=True)
    for table in tables(results):
        shown = RichTable(title=escape(table.title), box=box.SIMPLE_HEAD, title_justify="left", padding=(0, 1, 0, 0))
        for i, head in enumerate(table.heads):
            shown.add_column(escape(head), overflow="fold", justify="right" if i in table.figures else "left")
        for row in table.rows:
            shown.add_row(*map(escape, row))
        console.print(shown)
        for line in table.lines:
            console.print(line, markup=False)
    return output.getvalue()


def as_markdown(results: Results) -> str:
    """The tables as Markdown."""
    parts = ["# minimoe on a GPU\n"]
    for table in tables(results):
        lines = [f"## {table.title}\n", row_of(table.heads), row_of(["---"] * len(table.heads))]
        lines += [row_of(row) for row in table.rows] + [f"\n- {line}" for line in table.lines]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def row_of(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def failures(results: Results) -> bool:
    """True if a part, a test or a sanitizer's case failed. Targets that were missed and work that was left out are not failures."""
    parts: dict[str, Any] = results.get("parts", {})
    return any(map(is_failure, results.get("tests", {}).values())) or any(part["state"] != "done" for part in parts.values())
