"""A backend package whose device is absent: its class can be inspected, but not instantiated."""

from typing import NoReturn

from minimoe.backend import Array, Backend, BackendUnavailable
from minimoe_numpy import NumpyBackend


class AbsentBackend(NumpyBackend):
    """Has two hand-written kernels, one of them proven, and one library kernel."""

    name = "absent"
    library = frozenset({"linear"})
    proven = {"relu": "on a card, 2026-11-24"}

    def linear(self, x: Array, weight: Array, bias: Array | None = None, out: Array | None = None) -> Array:
        return super().linear(x, weight, bias, out)

    def relu(self, x: Array, out: Array | None = None) -> Array:
        return super().relu(x, out)

    def relu_backward(self, dy: Array, x: Array) -> Array:
        return super().relu_backward(dy, x)


def backend_class() -> type[Backend]:
    return AbsentBackend


def backend() -> NoReturn:
    raise BackendUnavailable("backend absent: no such device")
