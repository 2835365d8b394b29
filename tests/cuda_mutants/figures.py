"""What docs/gpu.md says of the mutants: a table of the planted faults by topic, and one of the made ones by seed, from results/*.json.

PYTHONPATH=tests:backends python -m cuda_mutants.figures        # writes them into the page
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results")
PAGE = Path(__file__).parents[2] / "docs" / "gpu.md"
MARKS = "<!-- cuda-mutants:begin -->\n", "<!-- cuda-mutants:end -->\n"
SEEDS = 20261130, 1  # in the order in which they were drawn
TOPICS = {
    "barriers": "barriers of a block",
    "warps": "synchronisation, masks and shuffles within a warp",
    "bounds": "bounds and indices",
    "unwritten": "memory that nobody wrote",
    "copies": "copies in the background",
    "fragments": "fragments of tensor cores",
    "wgmma": "Hopper's products: descriptors, `mbarrier`s, fences",
    "blocks": "races and indices between blocks",
    "arithmetic": "arithmetic",
}


def result(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def outcomes(name: str) -> Counter[str]:
    return Counter(mutant["outcome"] for mutant in result(name)["mutants"])


def figures() -> str:
    """Return the text between the marks."""
    planted = result("planted")["mutants"]
    lines = ["| planted faults | found | of |", "| --- | ---: | ---: |"]
    for topic, title in TOPICS.items():
        found = [mutant["outcome"] == "found" for mutant in planted if mutant["topic"] == topic]
        lines.append(f"| {title} | {sum(found)} | {len(found)} |")
    lines.append(f"| all | {outcomes('planted')['found']} | {len(planted)} |")
    for mutant in planted:
        if mutant["outcome"] != "found":
            lines += ["", f"Not found: `{mutant['mutant']}`."]
    start = outcomes("planted-first")
    lines += [
        "",
        f"The first list had {start.total()} faults, of which {start['found']} were found. {start['survived']} needed"
        f" larger cases, which were added. {start['equivalent']} changed nothing",
        "that can be seen; others took their place, and more were planted.",
    ]
    lines += ["", "| made mutants, by the seed that drew them | found when first run | found now | of | change nothing |"]
    lines += ["| --- | ---: | ---: | ---: | ---: |"]
    for seed in SEEDS:
        now, first = outcomes(f"seed-{seed}"), outcomes(f"seed-{seed}-first")
        lines.append(f"| {seed} | {first['found']} | {now['found']} | {now.total()} | {now['equivalent']} |")
    lines += [
        "",
        "Each sample was run once as it was drawn. Then a case was added for each mutant that was missed and changes results, to the tests",
        "of the kernels too where they lacked it, and the sample was run again. So the first figure tells how many others are found, and",
        "the second only that these are. The second seed was drawn after the cases for the first. Of kernels that have changed since, a",
        "seed draws others. For mutants that change nothing, [equivalent.toml](../tests/cuda_mutants/equivalent.toml) has the reasons.",
        f"What found each, in both runs, is in [results](../tests/cuda_mutants/results). ({result('planted')['compiler']}.)",
    ]
    return "\n".join(lines) + "\n"


def parts_of_page() -> tuple[str, str, str]:
    """Return the page before the text, the text, and the page after it."""
    before, rest = PAGE.read_text(encoding="utf-8").split(MARKS[0])
    text, after = rest.split(MARKS[1])
    return before + MARKS[0], text, MARKS[1] + after


if __name__ == "__main__":
    first_part, _, last_part = parts_of_page()
    PAGE.write_text(first_part + figures() + last_part, encoding="utf-8")
