"""benchmarks/cuda_ladder.py: each rung costs less than the one before it, and docs/gpu.md has the counts that the command gives."""

import re
import shutil

import numpy as np
import pytest

from benchmarks.cuda_ladder import (
    PAGE,
    PRODUCTS,
    Counting,
    attention_counts,
    between_marks,
    compiler,
    counted,
    digits,
    product_counts,
    product_problem,
    tables,
    write,
)
from minimoe_cupy.loader import KERNELS

COUNTS = {"product": product_counts, "attention": attention_counts}


@pytest.mark.parametrize("ladder", COUNTS)
def test_each_rung_executes_fewer_instructions_and_moves_no_more_bytes_than_the_one_before_it(ladder):
    rungs = list(COUNTS[ladder]().values())
    for before, after in zip(rungs, rungs[1:], strict=False):
        assert after.instructions < before.instructions and after.moved < 1.01 * before.moved  # Hopper's tile is the same
    assert rungs[-1].moved < rungs[0].moved / 100 and rungs[-1].instructions < rungs[0].instructions / 30
    tensor_cores = [rung.tensor_cores > 0 for rung in rungs]
    assert tensor_cores == sorted(tensor_cores) and tensor_cores[-1]


def test_shared_memory_is_read_less_from_rung_to_rung():
    waves = [rung.waves for rung in product_counts().values()]
    assert waves[0] == 0 and waves[1:] == sorted(waves[1:], reverse=True)


def test_the_counts_are_those_that_the_formulas_give():
    naive, shared, mma = (product_counts()[name] for name in ("product_naive", "product_shared", "product_mma"))
    assert naive.asked == pytest.approx(4, rel=0.02) and naive.sectors == pytest.approx((32 + 1) / 2, rel=0.02)
    assert shared.waves == pytest.approx(
        1000 * (2 / 32 + 2 / 32 / 32)
    )  # two loads for each multiply-add of a warp, and a store of each number
    assert (naive.conflicts, shared.conflicts, mma.conflicts) == (0, 0, 0)


class Edited(Counting):
    """Compiles copies of the kernels, one of which is changed."""

    def __init__(self, folder, file, old, new):
        super().__init__()
        self.folder = shutil.copytree(KERNELS, folder / "kernels")
        text = (self.folder / file).read_text()
        assert text.count(old) == 1
        (self.folder / file).write_text(text.replace(old, new))

    def __call__(self, path, names, architecture=None):
        return super().__call__(self.folder / path.name, names, architecture)


@pytest.mark.parametrize(
    "rung, old, new, lanes",
    [
        ("product_shared", "xs[SIDE][SIDE + 1], ws[SIDE][SIDE + 1]", "xs[SIDE][SIDE], ws[SIDE][SIDE]", 32),
        ("product_mma", "PITCH = STEP + CHUNK", "PITCH = STEP", 8),
    ],
)
def test_without_its_padding_a_rung_has_bank_conflicts(rung, old, new, lanes, tmp_path):
    given = [argument[:64] if i in (1, 4) else argument for i, argument in enumerate(product_problem())]
    given[3] = np.array([0, 32, 64], np.int32)
    counts = [counted(PRODUCTS[rung], *given, loader=loader) for loader in (Counting(), Edited(tmp_path, "ladder_product.cu", old, new))]
    assert counts[0].conflicts == 0 and 1 / (1 - counts[1].conflicts) > lanes / 3


def test_the_page_has_the_counts_that_the_command_gives():
    page = PAGE.read_text(encoding="utf-8")
    same_compiler = f"(PTX of {compiler()}.)" in page
    for name, made in tables().items():
        first, last = between_marks(page, name)
        rows = [re.findall(r"(?<=\| )[\d.]+", text) for text in (page[first:last], made)]
        assert len(rows[0]) == len(rows[1]) >= 3 * 7
        # compilers differ in instructions, and in how often a thread asks for a stage that is not there yet, so do schedules
        np.testing.assert_allclose(*(np.array(row, float) for row in rows), rtol=0.05 if same_compiler else 0.2)


def test_the_tables_are_written_between_their_marks(tmp_path):
    page = tmp_path / "page.md"
    marks = [f"<!-- cuda-ladder-{name}:{word} -->" for name in COUNTS for word in ("begin", "end")]
    page.write_text("\n".join(["before", *marks, "after", ""]))
    write(page)
    write(page)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and all(text.count(mark) == 1 for mark in marks)
    assert all(made in text for made in tables().values())


@pytest.mark.parametrize("value, shown", [(0, "0"), (1234.5, "1234"), (16.44, "16.4"), (8.666, "8.67"), (0.027523, "0.0275")])
def test_numbers_have_three_digits(value, shown):
    assert digits(value) == shown
