"""The table in docs/gpu.md, and the file that it is made from."""

import json
import math
from pathlib import Path
from typing import Any

from benchmarks.sass.cards import CARDS
from benchmarks.sass.launches import TEXT

Row = dict[str, Any]
ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "sass.json"
PAGE = ROOT / "docs" / "gpu.md"
BEGIN, END = "<!-- sass:begin -->\n", "<!-- sass:end -->\n"
HEADS = (
    "kernel", "registers", "shared, KB", "warps per SM", "main loop", "in flight", "warp instructions, M", "per product",
    "sectors per load / store", "used", "bank waits", "MB", "GFLOP", "A100, us", "H100, us", "H200, us", "bound by",
)  # fmt: skip
PRODUCT = 4096  # FLOPs of an mma.sync of 16 x 8 x 16, the unit in which products are counted
BACKENDS = {"cupy": "CUDA C (`cupy`)", "numba-cuda": "Numba-CUDA (`numba-cuda`)"}


def save(results: dict[str, Any]) -> None:
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def load() -> dict[str, Any]:
    """The committed counts."""
    found: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))
    return found


def write_page(results: dict[str, Any]) -> None:
    """Puts the table between its marks. Raises ValueError if the page lacks them."""
    page = PAGE.read_text(encoding="utf-8")
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise ValueError(f"{PAGE} must have the lines {BEGIN.strip()} and {END.strip()} once each")
    before, rest = page.split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}{as_markdown(results)}{END}{rest.split(END)[1]}", encoding="utf-8")


def as_markdown(results: dict[str, Any]) -> str:
    """The table, and below it predictions beside measured times where there are any."""
    left = ("kernel", "main loop", "in flight", "bound by")
    align = ["---" if head in left else "---:" for head in HEADS]
    lines = [f"Counted on {results['date']} with NVRTC {results['nvrtc']} and nvJitLink {results['nvjitlink']}, for {TEXT}.", ""]
    lines += [line_of(HEADS), line_of(align)]
    for backend, title in BACKENDS.items():
        rows = [row for row in results["rows"] if row["backend"] == backend]
        if rows:
            lines += [line_of([f"**{title}**", *[""] * (len(HEADS) - 1)]), *(line_of(cells(row)) for row in rows)]
    if results.get("measured"):
        lines += ["", *beside(results["measured"])]
    return "\n".join(lines) + "\n"


def cells(row: Row) -> list[str]:
    """One kernel. Where sm_80 and sm_90a differ, the first number is that of sm_80."""
    codes, counted, occupancy = list(row["code"].values()), row["counted"], row["occupancy"]
    code = codes[-1]
    executed = counted["warp_instructions"] * code["per_ptx"]
    products = counted["products"] + counted["async_product_flops"] / PRODUCT
    sectors = counted["global_load_sectors"] + counted["global_store_sectors"]
    waves, ideal = counted["shared_waves"] + counted["matrix_load_waves"], counted["shared_ideal_waves"] + counted["matrix_loads"]
    return [
        f"`{row['kernel']}` ({row['operation'].removesuffix(' and its backward')})",
        both(each["registers"] for each in codes) + local_text(codes),
        f"{(code['shared'] + row['shared_asked']) / 1024:.1f}",
        both(occupancy[name]["warps"] for name in ("A100", "H100") if name in occupancy),
        loop_text(codes),
        in_flight(code),
        short(executed * row["scale"] / 1e6),
        f"{executed / products:.1f}" if products else "",
        f"{ratio(counted, 'global_load_sectors', 'global_loads')} / {ratio(counted, 'global_store_sectors', 'global_stores')}",
        f"{(counted['global_load_bytes'] + counted['global_store_bytes']) / (32 * sectors):.0%}" if sectors else "",
        f"{waves / ideal - 1:.0%}" if ideal else "",
        short(row["bytes"] / 1e6),
        short(row["flops"] / 1e9) if row["flops"] else "",
        *(short(row["prediction"][card.name]["us"]) if card.name in row["prediction"] else "" for card in CARDS),
        row["prediction"]["H200"]["bound"],
    ]  # fmt: skip


def loop_text(codes: list[Row]) -> str:
    """Instructions of the main loop, and how many of them multiply on the tensor cores."""
    code = codes[-1]
    if not code["loop"]:
        return "none"
    text = both(each["loop"] for each in codes)
    if code["loop_tensor"]:
        text += f", {code['loop_tensor']} tensor ({code['loop_tensor'] / code['loop']:.0%})"
    if code["chain"]:
        text += f", {code['chain']} in a chain"
    return text + (f", in {both(each['tile'] for each in codes)}" if code["tile"] > code["loop"] else "")


def in_flight(code: Row) -> str:
    """Copies to shared memory, in how many groups; of a kernel without them, loads into registers."""
    if code["copies"]:
        return f"{code['groups']} x {code['copies']} copies"
    return f"{code['loads']} x {code['load_bytes']} B" if code["loads"] else ""


def local_text(codes: list[Row]) -> str:
    local = max(each["stack"] + each["spilled"] for each in codes)
    return f", {local} B local" if local else ""


def both(values: Any) -> str:
    """One number if all are equal, else those of sm_80 and sm_90a."""
    return " / ".join(map(str, dict.fromkeys(values)))


def ratio(counted: Row, part: str, whole: str) -> str:
    return f"{counted[part] / counted[whole]:.1f}" if counted[whole] else "0"


def short(number: float) -> str:
    """Three significant digits."""
    if not number:
        return "0"
    return f"{number:,.{max(0, 2 - math.floor(math.log10(abs(number))))}f}"


def beside(measured: list[Row]) -> list[str]:
    """Predictions beside the times of a card."""
    heads = ["operation", "sizes", "dtype", "card", "predicted, us", "measured, us", "predicted / measured"]
    lines = [line_of(heads), line_of(["---"] * 4 + ["---:"] * 3)]
    for row in measured:
        predicted, measured_us = row["predicted_us"], row["measured_us"]
        texts = [row["operation"], row["sizes"], row["dtype"], row["card"], short(predicted), short(measured_us)]
        lines.append(line_of([*texts, f"{predicted / measured_us:.0%}"]))
    return lines


def line_of(texts: Any) -> str:
    return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"
