"""Cases for routers and optimizers from other packages.

A router is among those that the cases of `gate` and `gate_backward` compare with NumPy's float64; here its gradient is compared with
differences. An optimizer is compared with itself on NumPy in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from minimoe.backend import Backend
from minimoe.config import TrainConfig
from minimoe.engine import ops
from minimoe.engine.tensor import Tensor
from minimoe.layers.moe import adjusted_logits
from minimoe.reference import optimizers, routers
from minimoe.reference.gating import Rule
from minimoe.reference.optimizers import Optimizer, Step
from minimoe.testing.conformance import Case, ConformanceError, compare, require, rounded, to_device, to_host
from minimoe.testing.dense_examples import Floats, floats, reference
from minimoe.testing.gradients import check_grads
from minimoe.testing.routed_examples import bias_of, spaced
from minimoe.testing.tolerances import KERNELS
from minimoe.testing.training_examples import FLAT, MATRICES, STEPS, gradient

TAKEN = [*STEPS, ("taken again", 1.0, True, "numbers")]


def router_cases(backend: Backend) -> Iterator[Case]:
    """Yield a case for each router from another package."""
    for name in routers.names():
        if name not in routers.ROUTERS:
            yield Case(f"router {name}, gradient", "kernels", name, partial(check_router, name))


def check_router(name: str) -> None:
    """Compare the gradients of weights, probability sums and what it learns with central differences, on NumPy in float64."""
    adjust = routers.find(name).adjust
    for label, make in routers.find(name).conformance_rules():
        for n, e, k in [(7, 8, 2), (5, 4, 3)]:
            rule = make(k, e)
            if rule is not None:
                bias = bias_of(rule, e, 0.2)
                z = Tensor(spaced(1, n, e) + 0.11 * np.arange(n)[:, None] * np.linspace(0.2, 1.0, e), reference(), requires_grad=True)
                try:
                    check_grads(partial(gate_outputs, bias=bias, rule=rule), z)
                    if adjust is not None:
                        w = Tensor(1.0 + 0.1 * floats(2, e), reference(), requires_grad=True)
                        check_grads(partial(adjusted_logits, adjust=adjust), z, w)
                except AssertionError as error:
                    raise ConformanceError(f"{name} at {label}, logits [{n},{e}], K {k}: {error}") from error


def gate_outputs(z: Tensor, bias: Floats | None, rule: Rule) -> tuple[Tensor, Tensor]:
    return ops.gate(z, bias, None, rule)[:2]


def optimizer_cases(backend: Backend) -> Iterator[Case]:
    """Yield a case for each optimizer from another package and each dtype of parameters."""
    for name in optimizers.names():
        for dtype in ("float32", "float64"):
            if name not in optimizers.OPTIMIZERS and dtype in backend.dtypes:
                yield Case(f"optimizer {name} [{dtype}]", "kernels", name, partial(check_optimizer, backend, name, dtype))


def check_optimizer(backend: Backend, name: str, dtype: str) -> None:
    """Compare parameters and states after each of five steps, at odd sizes; a skipped step must not change a byte."""
    facts = optimizers.find(name)
    for shape in FLAT if facts.flat else MATRICES:
        tested, expected = Steps(backend, facts, dtype, shape), Steps(reference(), facts, "float64", shape, rounded_to=(backend, dtype))
        for count, (what, scale, ok, holds) in enumerate(TAKEN, start=1):
            where = f"param {list(shape)}, step {count}, {what} [{dtype}]"
            before = tested.host()
            for side in (tested, expected):
                side.take(count, scale, ok, holds)
            if not ok:
                compare(tested.host(), before, 0.0, name, where, "If `ok` is false nothing may change")
            todo = "Use the backend's array layer alone, in the parameters' dtype"
            require(all(a.dtype == tested.param.dtype for a in tested.states.values()), name, where, "a state changed its dtype", todo)
            compare(tested.host(), expected.host(), KERNELS[dtype], name, where, todo)


class Steps:
    """One parameter, and what an optimizer keeps for it."""

    def __init__(
        self, backend: Backend, facts: Optimizer, dtype: str, shape: tuple[int, ...], rounded_to: tuple[Backend, str] | None = None
    ) -> None:
        self.backend, self.facts, self.dtype, self.rounded_to = backend, facts, dtype, rounded_to
        settings = facts.settings(TrainConfig(optimizer=facts.name))
        self.settings = {key: settings[key] for key in (*facts.reads, *facts.options)}
        self.param = self.device(floats(1, *shape))
        self.states = {name: backend.xp.zeros_like(self.param) for name in facts.states}

    def device(self, array: Floats) -> Any:
        """Return the array on the backend, with the numbers that the side under test has."""
        if self.rounded_to is not None:
            backend, dtype = self.rounded_to
            array = rounded(backend, array, dtype)
        return to_device(self.backend, array, self.dtype)

    def take(self, count: int, scale: float, ok: bool, holds: str) -> None:
        """Take one step; `holds` says what is in the gradient."""
        grad = gradient(holds, 8 + count, self.param.shape)
        lr, factor = self.device(np.array(0.01)), self.device(np.array(scale))
        counter = self.backend.from_host(np.array(count, dtype=np.int32))
        step = Step(lr, factor, self.backend.from_host(np.array(ok)), counter)
        with np.errstate(all="ignore"):
            self.facts.update(self.backend, self.param, self.states, self.device(grad), step, weight_decay=0.1, **self.settings)

    def host(self) -> Any:
        """Return parameter and states on the host."""
        return to_host(self.backend, (self.param, *self.states.values()))
