"""Measures how many small changes of a whole backend the conformance suite sees.

    PYTHONPATH=tests:backends python -m mutants --seed 1                  # 100 mutants of tests/toy_backend/, sampled by a seed
    PYTHONPATH=tests:backends python -m mutants --seed 1 --count 20 --file norms.py
    PYTHONPATH=tests:backends python -m mutants --list                    # how many there are, by operator and file

Every mutant of the files is listed by the operators of operators.py; the sample is uniform over that list, and is printed with its seed
before any mutant runs. The whole suite runs on each until a case fails. A hang or a crash is caught too, and is named. Survivors that
equivalent.toml lists are equivalent, each for the reason given there. The exit code is 1 if another one survived.
"""

import argparse
import json
import os
import sys
import time
import tomllib
from collections import Counter
from pathlib import Path
from random import Random

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # a forked child has no threads of its parent

from mutants.operators import Mutant, mutants_of
from mutants.trials import FILES, Outcome, Trials

EQUIVALENT = Path(__file__).with_name("equivalent.toml")


def all_mutants(file: str | None = None) -> list[Mutant]:
    """Return every mutant of every file, or of one."""
    return [mutant for path in FILES if file in (None, path.name) for mutant in mutants_of(path)]


def sampled(seed: int, count: int, file: str | None = None) -> list[Mutant]:
    """Return a sample that is uniform over all mutants, in the order of the files."""
    every = all_mutants(file)
    chosen = sorted(Random(seed).sample(range(len(every)), min(count, len(every))))
    return [every[i] for i in chosen]


def equivalents() -> dict[tuple[str, ...], str]:
    """Return the known mutants that change nothing that a caller could see, with the reason."""
    entries = tomllib.loads(EQUIVALENT.read_text(encoding="utf-8")).get("equivalent", [])
    return {tuple(entry[key] for key in ("file", "function", "operator", "before", "after")): entry["reason"] for entry in entries}


def described(outcome: Outcome, reasons: dict[tuple[str, ...], str]) -> str:
    """Return one line of the table, and the reason under it if the mutant is equivalent."""
    mutant = outcome.mutant
    by = outcome.caught_by if not outcome.survived else "equivalent" if mutant.key() in reasons else "SURVIVED"
    return f"{mutant.file}:{mutant.line} {mutant.operator}: {mutant.before}  ->  {mutant.after}\n    {by}   ({outcome.seconds:.1f} s)"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m mutants", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1, help="of the sample (default 1)")
    parser.add_argument("--count", type=int, default=100, help="how many mutants (default 100)")
    parser.add_argument("--file", help="of this file alone, such as norms.py")
    parser.add_argument("--small", action="store_true", help="without the cases of large sizes")
    parser.add_argument("--list", action="store_true", help="count the mutants, and run none")
    parser.add_argument("--json", type=Path, help="write the results to this file as well")
    options = parser.parse_args()
    every = all_mutants(options.file)
    for what, counts in (("operator", Counter(m.operator for m in every)), ("file", Counter(m.file for m in every))):
        print(f"by {what}: " + ", ".join(f"{name} {count}" for name, count in sorted(counts.items())))
    if options.list:
        print(f"{len(every)} mutants")
        return 0
    chosen = sampled(options.seed, options.count, options.file)
    print(f"seed {options.seed}: {len(chosen)} of {len(every)} mutants, uniformly")
    for number, mutant in enumerate(chosen, start=1):
        print(f"{number:4} {mutant.file}:{mutant.line} {mutant.operator}: {mutant.after}")
    sys.stdout.flush()
    return report(chosen, Trials(large=not options.small), options)


def report(chosen: list[Mutant], trials: Trials, options: argparse.Namespace) -> int:
    """Run the mutants, print who caught each, and return the exit code."""
    began, reasons, outcomes = time.monotonic(), equivalents(), []
    for mutant in chosen:
        outcome = trials.run(mutant)
        outcomes.append(outcome)
        print(described(outcome, reasons), flush=True)
    survivors = [outcome for outcome in outcomes if outcome.survived]
    unknown = [outcome for outcome in survivors if outcome.mutant.key() not in reasons]
    for outcome in survivors:
        mutant = outcome.mutant
        print(f"\n{mutant.file}:{mutant.line} {mutant.function}, {mutant.operator}\n  {mutant.before}\n  {mutant.after}")
        print(f"  {reasons.get(mutant.key(), 'survived, and is not known to be equivalent')}")
    levels = Counter(outcome.caught_by.partition(":")[0] for outcome in outcomes if not outcome.survived)
    print(f"\nseed {options.seed}: {len(outcomes)} mutants, {sum(levels.values())} caught ({dict(levels)}),", end=" ")
    print(f"{len(survivors) - len(unknown)} equivalent, {len(unknown)} missed; {time.monotonic() - began:.0f} s")
    if options.json:
        write(options, outcomes, reasons)
    return 1 if unknown else 0


def write(options: argparse.Namespace, outcomes: list[Outcome], reasons: dict[tuple[str, ...], str]) -> None:
    """Write the figures and, a line for each, the mutants of the sample."""
    rows = []
    for outcome in outcomes:
        mutant, key = outcome.mutant, outcome.mutant.key()
        named = dict(zip(("file", "function", "operator", "before", "after"), key, strict=True))
        verdict = "caught" if not outcome.survived else "equivalent" if key in reasons else "missed"
        found = {"caught_by": outcome.caught_by} if verdict == "caught" else {"reason": reasons.get(key, "")}
        rows.append({"verdict": verdict, **named, "line": mutant.line, **found})
    counts = {verdict: sum(row["verdict"] == verdict for row in rows) for verdict in ("caught", "equivalent", "missed")}
    command = f"PYTHONPATH=tests:backends python -m mutants {' '.join(sys.argv[1:])}"
    figures = {"command": command, "seed": options.seed, "mutants": len(rows), "of": len(all_mutants(options.file)), **counts}
    lines = [f" {json.dumps(name)}: {json.dumps(value)},\n" for name, value in figures.items()]
    sample = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    options.json.write_text(f'{{\n{"".join(lines)} "sample": [\n{sample}\n ]\n}}\n', encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
