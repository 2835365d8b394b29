"""The constants that the host code of `cupy` shares with its kernels are read from the kernels' source."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import minimoe_cupy
from minimoe_cupy import constants

# A definition in a kernel's source, another value for it, and what the host code makes of that: expression, value.
CHANGES = [
    ("activation.cuh", "RELU = 3", "RELU = 7", "activation.KINDS['relu']", 7),
    ("attention_bf16.cu", "W <= 64 ? 64 : 32", "W <= 64 ? 48 : 16", "attention.FORWARD[BFLOAT16, 96].shared", 42752),
    ("attention_delta.cu", "LANES = 8", "LANES = 4", "attention.DELTA_ROWS", 64),
    ("attention_dq_bf16.cu", "M = 2", "M = 1", "attention.DQ[BFLOAT16, 128].own", 64),
    ("attention_dkv_bf16.cu", "W <= 64 ? 2 : 1;\n", "W <= 64 ? 4 : 1;\n", "attention.DKV[BFLOAT16, 64].own", 256),
    ("attention_fma.cuh", "TY = 16", "TY = 8", "attention.DKV[FLOAT32, 32].threads", 64),
    ("add_rows.cu", "JOIN_WARPS = 16", "JOIN_WARPS = 4", "embedding.JOIN_WARPS", 4),
    ("combine.cu", "WARPS = 8", "WARPS = 4", "dispatch.COMBINE_WARPS", 4),
    ("dispatch.cu", "WARPS = 8", "WARPS = 2", "dispatch.DISPATCH_WARPS", 2),
    ("embedding.cu", "WARPS = 8", "WARPS = 4", "embedding.WARPS", 4),
    ("expert_choice.cu", "PIECE = 1024", "PIECE = 512", "gating.PIECE", 512),
    ("gate.cuh", "SIGMOID_BIAS = 2, ALL = 3", "SIGMOID_BIAS = 3, ALL = 2", "gating.SIGMOID_BIAS", 3),
    ("gate.cuh", "WARPS = 8", "WARPS = 4", "selection.BLOCK", 128),
    ("grouped_bf16.cu", "BM >= 128 ? 64 : 32", "BM >= 128 ? 32 : 16", "grouped.TILINGS[BFLOAT16][0].threads", 1024),
    ("grouped_bias.cu", "SUM_WARPS = 16", "SUM_WARPS = 8", "grouped.SUM_WARPS", 8),
    ("grouped_finish.cuh", "FORWARD = 0, TRANSPOSED = 1", "FORWARD = 1, TRANSPOSED = 0", "grouped.TRANSPOSED", 0),
    ("grouped_float.cu", "BM >= 128 ? 8 : 4", "BM >= 128 ? 4 : 2", "grouped.TILINGS[FLOAT32][1].threads", 256),
    ("loss.cu", "MOST = 1024", "MOST = 512", "loss.MOST", 512),
    ("mma_tile.cuh", "STAGES = 4", "STAGES = 3", "grouped.TILINGS[BFLOAT16][1].shared", 24576),
    ("norm.cu", "MOST_BACKWARD = 512", "MOST_BACKWARD = 256", "norm.MOST_BACKWARD", 256),
    ("optimizer.cu", "SUM_BLOCK = 512", "SUM_BLOCK = 256", "optimizer.SUM_BLOCK", 256),
    ("partials.cu", "EXPERTS = 8", "EXPERTS = 4", "selection.EXPERTS", 4),
    ("philox.cuh", "WORDS = 4", "WORDS = 2", "random.WORDS", 2),
    ("rope.cu", "BLOCK = 256", "BLOCK = 128", "rope.BLOCK", 128),
    ("route.cu", "ROUNDS = 8", "ROUNDS = 4", "routing.PAIRS", 1024),
    ("route_select.cu", "WARPS = 32", "WARPS = 16", "routing.SELECT_BLOCK", 512),
    ("sort.cu", "ITEMS = 4", "ITEMS = 2", "sorting.TILE", 512),
    ("sort.cu", "BITS = 8", "BITS = 4", "sorting.DIGITS", 16),
    ("wgmma_tile.cuh", "STAGES = 4", "STAGES = 2", "grouped.WGMMA[1].shared", 65576),
]
SHOW = """
import json, sys
import minimoe_cupy
from minimoe_cupy import {topics}
from minimoe_cupy.launch import BFLOAT16, FLOAT32
print(json.dumps([{expressions}]))
"""


@pytest.fixture(scope="module")
def read_after_changes(tmp_path_factory):
    """Return the value of each of CHANGES in a copy of the package in whose kernels all of them were made."""
    folder = tmp_path_factory.mktemp("backends")
    shutil.copytree(Path(minimoe_cupy.__file__).parent, folder / "minimoe_cupy")
    for file, definition, changed, _, _ in CHANGES:
        path = folder / "minimoe_cupy" / "kernels" / file
        text = path.read_text()
        assert definition in text, f"{file} does not define {definition}"
        path.write_text(text.replace(definition, changed))
    topics = ", ".join(sorted({expression.partition(".")[0] for *_, expression, _ in CHANGES}))
    code = SHOW.format(topics=topics, expressions=", ".join(expression for *_, expression, _ in CHANGES))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("i", [pytest.param(i, id=change[3]) for i, change in enumerate(CHANGES)])
def test_a_constant_that_changes_in_a_kernels_source_changes_on_the_host(i, read_after_changes):
    assert read_after_changes[i] == CHANGES[i][-1]


@pytest.fixture
def kernels(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "KERNELS", tmp_path)
    constants.definitions.cache_clear()
    yield tmp_path
    constants.definitions.cache_clear()


def test_a_constant_may_come_from_a_header_and_be_computed_from_others_and_from_template_arguments(kernels):
    (kernels / "shared.cuh").write_text("#pragma once\nconstexpr int WARP = 32;  // LANES = 16\n")
    (kernels / "some.cu").write_text(
        '#include "shared.cuh"\n'
        "constexpr int WARPS = 4, THREADS = WARPS * WARP;\n"
        "template <int W>\nconstexpr int TALL = W >= 64 && W < 128 || W == 7 ? 2 : W == 32 ? 3 : 1;\n"
        "template <int W>\nconstexpr int SHARED = 4 * (THREADS / 3 + TALL<W>) * (1 << W % 5);\n"
    )
    assert constants.constant("some.cu", "THREADS") == 128
    assert [constants.constant("some.cu", "TALL", W=w) for w in (7, 32, 64, 128)] == [2, 3, 2, 1]
    assert constants.constant("some.cu", "SHARED", W=64) == 4 * (42 + 2) * 16
    for missing in ("LANES", "TALL"):  # a comment, and a template without its argument
        with pytest.raises(LookupError, match=r"some\.cu defines no constant"):
            constants.constant("some.cu", missing)
