"""Whether operations are recorded for backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_enabled: ContextVar[bool] = ContextVar("minimoe_grad_enabled", default=True)
grad_enabled = _enabled.get
"""True if operations are recorded here."""


@contextmanager
def grad_mode(enabled: bool) -> Iterator[None]:
    """Record operations within the block if `enabled`."""
    token = _enabled.set(enabled)
    try:
        yield
    finally:
        _enabled.reset(token)


def no_grad() -> Any:
    """Record no operations within the block: for evaluation and generation."""
    return grad_mode(False)
