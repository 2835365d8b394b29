"""Measures how many small changes of the GPU kernels the tests find, on the PTX machine.

    PYTHONPATH=tests:backends python -m cuda_mutants --planted            # faults planted by hand, by topic (planted.py)
    PYTHONPATH=tests:backends python -m cuda_mutants --seed 1             # 60 mutants made by operators (operators.py) over named files

The sample of the made ones is drawn by the seed, and printed, before any is run: half are changes of CUDA C, half of PTX. A mutant is found
if the machine reports a fault, a case of the conformance suite or of deep.py fails, or the compiler refuses it. Survivors that
equivalent.toml lists change nothing that can be seen, each for the reason given there. The exit code is 1 if another one survived.

results/ has what --json wrote, of the planted faults and of two seeds: the run that came first, and one after what it showed was mended.
"""

import argparse
import json
import os
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from random import Random

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from ptx_machine.cupy_on_ptx import HOPPER
from ptx_machine.nvrtc import compile_ptx, loaded, newest

from minimoe_cupy.loader import KERNELS

from .operators import Mutant, mutants_of_ptx, mutants_of_source
from .planted import ATTENTION_BF16, COMBINE, GATE, GROUPED_BF16, LOSS, NORM, PLANTED, ROUTE, SORT, WGMMA
from .trials import Target, found

EQUIVALENT = Path(__file__).with_name("equivalent.toml")
SOURCES = {  # files whose CUDA C is changed, and what runs them
    "norm.cuh": NORM, "norm.cu": NORM, "gate.cu": GATE, "route.cu": ROUTE, "scan.cuh": ROUTE, "sort.cu": SORT, "loss.cu": LOSS,
    "combine.cu": COMBINE, "mma_tile.cuh": GROUPED_BF16, "tiles.cuh": GROUPED_BF16,
    "wgmma_tile.cuh": WGMMA, "optimizer.cu": Target(("adamw", "sgd", "lion", "sum_of_squares"), deep=("squares",)),
}  # fmt: skip
KERNELS_OF = {  # kernels whose PTX is changed
    ("route.cu", "route_place"): ROUTE, ("gate.cu", "gate<0, 1, 1>"): GATE, ("combine.cu", "combine<float, 1, 1>"): COMBINE,
    ("sort.cu", "place_keys"): SORT, ("loss.cu", "cross_entropy<4, float>"): LOSS,
    ("grouped_bf16.cu", "grouped_rows_bf16<64, 64, true, 0>"): GROUPED_BF16, ("attention_bf16.cu", "attention_bf16<32>"): ATTENTION_BF16,
}  # fmt: skip


@dataclass(frozen=True)
class Trial:
    """A mutant, where it is, and what runs it; `kernel` names the kernel if it is one of PTX."""

    file: str
    kernel: str
    mutant: Mutant
    target: Target

    @property
    def name(self) -> str:
        place = f"PTX of {self.kernel}" if self.kernel else self.file
        return f"{place}:{self.mutant.line} {self.mutant.operator}: {self.mutant.before}  ->  {self.mutant.after or 'nothing'}"

    def key(self) -> tuple[str, str, str, str]:
        return self.kernel or self.file, self.mutant.operator, self.mutant.before, self.mutant.after

    def run(self) -> str:
        if not self.kernel:
            return found(self.target, self.file, self.mutant.applied((KERNELS / self.file).read_text(encoding="utf-8")))
        ptx, lowered = compile_ptx(KERNELS / self.file, [self.kernel], HOPPER)

        compiled = []

        def change(text: str, name: str) -> str:
            compiled.append(name)
            return self.mutant.applied(ptx) if name == lowered[self.kernel] else text

        by = found(self.target, change=change)
        if lowered[self.kernel] not in compiled:
            raise LookupError(f"no case of {self.target} launches {self.kernel}: {by or 'all pass'}")
        return by


def all_trials() -> tuple[list[Trial], list[Trial]]:
    """Return every mutant of CUDA C, and every one of PTX."""
    texts = {file: (KERNELS / file).read_text(encoding="utf-8") for file in SOURCES}
    of_source = [Trial(file, "", mutant, target) for file, target in SOURCES.items() for mutant in mutants_of_source(texts[file])]
    of_ptx = []
    for (file, kernel), target in KERNELS_OF.items():
        ptx, lowered = compile_ptx(KERNELS / file, [kernel], HOPPER)
        of_ptx += [Trial(file, kernel, mutant, target) for mutant in mutants_of_ptx(ptx, lowered[kernel])]
    return of_source, of_ptx


def sampled(seed: int, count: int) -> list[Trial]:
    """Return a sample of which one half is of CUDA C and one of PTX, each uniform."""
    random = Random(seed)
    of_source, of_ptx = all_trials()
    return random.sample(of_source, count // 2) + random.sample(of_ptx, count - count // 2)


def equivalents() -> dict[tuple[str, ...], str]:
    entries = tomllib.loads(EQUIVALENT.read_text(encoding="utf-8")).get("equivalent", [])
    return {tuple(entry[key] for key in ("where", "operator", "before", "after")): entry["reason"] for entry in entries}


def run_planted(number: int) -> str:
    return found(PLANTED[number].target, PLANTED[number].file, PLANTED[number].text(), seeds=(1, 2))


def report(mutants: list[dict[str, str]], reasons: list[str], results: Iterable[str], path: Path | None, **about: object) -> int:
    """Print a line for each mutant as it is done, then the figures; write them to `path`.   -> the exit code"""
    began = time.monotonic()
    for row, reason, by in zip(mutants, reasons, results, strict=True):
        row["outcome"] = "found" if by else "equivalent" if reason else "survived"
        row["by"] = by or reason
        print(f"{row['mutant']}\n    {row['outcome']}: {row['by']}   ({time.monotonic() - began:.0f} s)", flush=True)
    counts = Counter(row["outcome"] for row in mutants)
    print(f"{len(mutants)} mutants: " + ", ".join(f"{counts[outcome]} {outcome}" for outcome in ("found", "equivalent", "survived")))
    if path:
        version = ".".join(map(str, loaded(newest()).version))
        path.write_text(json.dumps({**about, "compiler": f"NVRTC {version}", "mutants": mutants}, indent=1) + "\n", encoding="utf-8")
    return int(counts["survived"] > 0)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m cuda_mutants", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--planted", action="store_true", help="the faults of planted.py")
    parser.add_argument("--seed", type=int, default=1, help="of the sample (default 1)")
    parser.add_argument("--count", type=int, default=60, help="how many made mutants (default 60)")
    parser.add_argument("--only", default="", help="mutants whose line has this text")
    parser.add_argument("--json", type=Path, help="write the results to this file as well")
    options = parser.parse_args()
    with ProcessPoolExecutor(2) as pool:
        if options.planted:
            chosen = [number for number, fault in enumerate(PLANTED) if options.only in f"{fault.topic} {fault.name}"]
            mutants = [{"topic": PLANTED[n].topic, "mutant": PLANTED[n].name} for n in chosen]
            return report(mutants, [""] * len(chosen), pool.map(run_planted, chosen), options.json)
        trials = [trial for trial in sampled(options.seed, options.count) if options.only in trial.name]
        known = equivalents()
        print(f"seed {options.seed}: {len(trials)} mutants")
        for trial in trials:
            print(f"  {trial.name}")
        reasons = [known.get(trial.key(), "") for trial in trials]
        mutants = [{"mutant": trial.name} for trial in trials]
        return report(mutants, reasons, pool.map(Trial.run, trials), options.json, seed=options.seed)


if __name__ == "__main__":
    sys.exit(main())
