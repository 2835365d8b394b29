"""Every differentiable operation: `minimoe.engine.ops` under its public name."""

from minimoe.engine.ops import *  # noqa: F403
from minimoe.engine.ops import __all__ as __all__
