"""What weights that were trained on another text are worth: `shakespeare-moe` from nothing, and from a run on Python's documentation.

    MINIMOE_SHAKESPEARE=tinyshakespeare.txt python -m benchmarks.finetune [--steps 500] [--seeds 3] [--write] [--out FILE.json]

One source is trained on `python-docs` for as many steps. Then, for each seed (of data and, from nothing, of weights) and with the same
schedule, a run on Shakespeare starts from nothing, one from the source, and one has adapters on the source. A token is a byte in all of
them, and Shakespeare's characters are bytes, so their losses, in nats per character, compare. The table has the mean over the seeds, and in
brackets the lowest and highest; `--write` puts it into docs/fine-tuning.md. Ten runs of about half a minute each on two idle cores.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import minimoe as mm
from benchmarks.machine import machine
from minimoe.backend import load
from minimoe.config.trained import trained_line
from minimoe.training.trained_run import TrainedRun

PAGE = Path(__file__).parent.parent / "docs" / "fine-tuning.md"
BEGIN, END = "<!-- finetune:begin -->", "<!-- finetune:end -->"
WAYS = ("from nothing", "from python-docs", "adapters on python-docs")


def train(root: Path, steps: int, *keys: str, **options: Any) -> TrainedRun:
    """Train shakespeare-moe on bytes, evaluated five times: Python's documentation lacks one of Shakespeare's characters."""
    overrides = ["data.tokenizer=byte", f"train.eval_every={max(1, steps // 5)}", "train.checkpoint_every=0", *keys]
    return mm.train("shakespeare-moe", steps=steps, root=root, overrides=overrides, **options)


def losses(run: TrainedRun) -> dict[int, float]:
    """Return the loss of the first batch, before any update, and the validation losses by step."""
    return {0: run.metrics[0]["loss"], **{row["step"]: row["val_loss"] for row in run.metrics if "val_loss" in row}}


def compare(text: str, steps: int, seeds: int, root: Path) -> dict[str, list[dict[int, float]]]:
    """Return the losses of each way, for each seed."""
    source = train(root, steps, data="python-docs", seed=0)
    print(f"the source: validation loss {source.val_loss:.4f} nats per byte of python-docs", flush=True)
    given: dict[str, dict[str, Any]] = {
        WAYS[0]: {"keys": ()}, WAYS[1]: {"keys": (), "init": source.path}, WAYS[2]: {"keys": ("lora.rank=4",), "init": source.path},
    }  # fmt: skip
    found: dict[str, list[dict[int, float]]] = {way: [] for way in WAYS}
    for seed in range(seeds):
        for way, options in given.items():
            began, keys = time.perf_counter(), options["keys"]
            run = train(root, steps, *keys, data=text, seed=seed, **({"init": options["init"]} if "init" in options else {}))
            found[way].append(losses(run))
            line = trained_line(run.config) or "all parameters train"
            print(f"{way}, seed {seed}: validation loss {run.val_loss:.4f}, {time.perf_counter() - began:.0f} s; {line}", flush=True)
    return found


def table(found: dict[str, list[dict[int, float]]]) -> str:
    """Return the table of the documentation."""
    lines = [f"| after | {' | '.join(WAYS)} |", f"| --- |{' ---: |' * len(WAYS)}"]
    for step in found[WAYS[0]][0]:
        cells = [[losses[step] for losses in found[way]] for way in WAYS]
        shown = [f"{statistics.mean(cell):.3f} ({min(cell):.3f} to {max(cell):.3f})" for cell in cells]
        lines.append(f"| {'nothing: loss of the first batch' if not step else f'{step} steps'} | {' | '.join(shown)} |")
    return "\n".join(lines)


def write(page: Path, text: str) -> None:
    """Replace what lies between the page's two marks."""
    start, rest = page.read_text(encoding="utf-8").split(f"{BEGIN}\n")
    _, end = rest.split(f"{END}\n")
    page.write_text(f"{start}{BEGIN}\n{text}\n{END}\n{end}", encoding="utf-8")


def backend() -> str:
    """Return the name of the backend that trained."""
    return load("auto").name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="update the table in docs/fine-tuning.md")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    text = os.environ.get("MINIMOE_SHAKESPEARE")
    if text is None:
        raise SystemExit("set MINIMOE_SHAKESPEARE to the path of tinyshakespeare.txt")
    with tempfile.TemporaryDirectory() as root:
        found = compare(text, options.steps, options.seeds, Path(root))
    print(table(found))
    if options.write:
        write(PAGE, f"{table(found)}\n\n{options.steps} steps, {options.seeds} seeds; {time.strftime('%Y-%m-%d')}, backend {backend()}.")
    if options.out:
        result = {"machine": machine(), "steps": options.steps, "losses": found}
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
