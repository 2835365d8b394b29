"""Tools to check gradients and backends: `check_grads` for any function of tensors, `cases` for a backend's conformance."""

from minimoe.testing.cases import LEVELS, cases
from minimoe.testing.conformance import Case, ConformanceError
from minimoe.testing.gradients import check_grads

__all__ = ["LEVELS", "Case", "ConformanceError", "cases", "check_grads"]
