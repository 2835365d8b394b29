"""Lets the process die at a call that changes a folder, and lose what it had not synced."""

import contextlib
import os
from typing import Any

import pytest

CALLS = ["replace", "rename", "link", "fsync", "mkdir", "unlink", "rmdir"]


class Killed(BaseException):
    """The process is gone: nothing that it wanted to do after this happens."""


def die_at(monkeypatch: pytest.MonkeyPatch, moment: int) -> list[str]:
    """Let the process die at its `moment`-th call that changes a folder; what a file held beyond its last fsync is half lost."""
    calls: list[str] = []

    def wrap(name: str) -> None:
        real = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            if len(calls) > moment:
                if name == "fsync" and len(calls) == moment + 1:
                    tear(args[0])
                raise Killed
            return real(*args, **kwargs)

        monkeypatch.setattr(os, name, call)

    for name in CALLS:
        wrap(name)
    return calls


def tear(descriptor: int) -> None:
    with contextlib.suppress(OSError):  # a folder cannot be cut
        os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
