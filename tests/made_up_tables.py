"""Tables with made-up figures, of short names and of long ones; test_screens.py keeps what a terminal of some widths makes of them."""

from dataclasses import replace
from typing import Any

from minimoe.config import load_config
from minimoe.config.cost import cost
from minimoe.study.backends import backends_table
from minimoe.study.bench.kernels import KernelTiming, kernels_table
from minimoe.study.bench.profile import Ceilings, KernelUse, StepProfile
from minimoe.study.compare.comparison import Comparison, Row, Spread
from minimoe.study.inspect import cost_table
from minimoe.study.tables import domains_table, runs_table

RUNS = [
    {
        "name": "tiny-moe-001", "state": "finished", "step": 300, "steps": 300, "loss": 1.4264, "val_loss": 1.5651, "best_val_loss": 1.5651,
        "val_accuracy": None, "parameters": 3_413_120, "bytes": 82000000, "tags": [],
    },
    {
        "name": "shakespeare-dense-of-many-layers-001", "state": "interrupted", "step": 215, "steps": 300, "loss": 1.6463,
        "val_loss": 1.7254, "best_val_loss": 1.7251, "val_accuracy": 0.9731, "parameters": None, "bytes": 4100, "tags": [],
    },
]  # fmt: skip
BACKENDS = {
    "cupy": {"available": False, "dtypes": ["float32", "bfloat16"], "kernels": {"gate": "hand-written", "linear": "library"}},
    "numba-cuda": {"available": False, "dtypes": ["float32", "bfloat16"], "kernels": {"gate": "hand-written"}},
    "numpy": {"available": True, "dtypes": ["float32", "float64", "float16", "bfloat16"], "kernels": {"gate": "reference"}},
}
MOE = Row(
    "tiny-moe", "tiny-moe", ["a", "b"], True, "numba", 3_413_120, 1_053_824, 2_301_952, 300, 614_400, 4_243_000_000_000, 48.2, 18_322.0,
    Spread(1.43, 1.42, 1.44), Spread(1.5651, 1.56, 1.57), 0.98, 0.0125, 1.0, 32,
)  # fmt: skip
DENSE = replace(
    MOE, name="tiny-dense", val_loss=Spread(1.6, 1.5, 1.7), load_entropy=None, dropped=None, dead_experts=None, experts=0
)  # fmt: skip
KERNELS = [
    KernelTiming("linear_cross_entropy_backward", "numba", "hand-written", 12, 3.456, 0.123, 9.87, [[2048, 128]]),
    KernelTiming("gate", "numba", "reference", 4, 0.5, 0.01, None, []),
]
STEP = [
    KernelUse(("moe_ffn",), "hand-written", 4, 9.5, 0.3, 35.2, None, 0.71),
    KernelUse(("moe_ffn", "route"), "reference", 4, 0.5, 0.01, None, 1.2, 0.1),
]


def tables() -> dict[str, Any]:
    """Return each by its name."""
    profile = StepProfile("tiny-moe", "numba", 2048, 31.2, 30.9, 35.0, 33.3, 2.2, 14_000_000_000, Ceilings(49.6, 11.2), STEP)
    shares = [[expert / 120 for expert in range(16)]] * 2
    long = replace(DENSE, name="tiny-dense-of-a-very-long-name")
    return {
        "runs": runs_table(RUNS[:1]),
        "runs with long names": runs_table(RUNS),
        "inspect": cost_table(cost(load_config("mixtral-8x7b").model)),
        "compare": Comparison("steps", 2, [MOE, DENSE]).table(),
        "compare with long names": Comparison("flops", 2, [MOE, long, replace(MOE, name="three")], ["A note about the figures."]).table(),
        "bench kernels": kernels_table(KERNELS),
        "bench step": profile.table(),
        "backends": backends_table(BACKENDS),
        "eval": domains_table({"python": shares, "docs": shares}),
    }
