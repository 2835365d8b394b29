"""Comparing models at equal cost: configurations are trained, finished runs are read, and both stand side by side."""

from minimoe.compare.comparison import Comparison as Comparison
from minimoe.compare.comparison import Row as Row
from minimoe.compare.comparison import Spread as Spread
from minimoe.compare.race import BUDGETS as BUDGETS
from minimoe.compare.race import compare as compare
