"""The schedules that tests run kernels in: one in every run, five with --all.

Their seeds are drawn when pytest starts (`tests/conftest.py`), and printed; MINIMOE_PTX_SEEDS=3,5,8 sets them.
"""

import os

import pytest

SEEDS = tuple(int(seed) for seed in os.environ.get("MINIMOE_PTX_SEEDS", "1").split(","))
EVERY_SCHEDULE = [pytest.param(seed, id=f"schedule {i}") for i, seed in enumerate(SEEDS)]
