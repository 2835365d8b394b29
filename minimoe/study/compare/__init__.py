"""Comparing models at equal cost: configurations are trained, finished runs are read, and both are shown side by side."""

from minimoe.study.compare.combinations import Combinations as Combinations
from minimoe.study.compare.comparison import Comparison as Comparison
from minimoe.study.compare.comparison import Row as Row
from minimoe.study.compare.comparison import Spread as Spread
from minimoe.study.compare.race import BUDGETS as BUDGETS
from minimoe.study.compare.race import compare as compare
from minimoe.study.compare.sweep import sweep as sweep
