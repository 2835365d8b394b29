"""The conformance suite of minimoe, one test for each case: what every backend must do. `pytest -k kernels` runs one level."""

import pytest

from minimoe.backend import load
from minimoe.testing import Case, cases


@pytest.mark.parametrize("case", cases(load("placeholder")), ids=str)
def test_it_conforms(case: Case) -> None:
    case.run()
