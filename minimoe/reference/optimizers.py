"""Optimizers, one object each: the array function that updates parameters, and the facts that all other parts of minimoe read.

An update works in place on a flat buffer of parameters, or on one parameter in its shape. The entries here call the contract's kernels,
whose formulas are in optimizer.py; one from another package (entry-point group `minimoe.optimizers`) is written in array code, which runs
on every backend. Configuration, cost, the trainer and conformance look an optimizer up by its name in `OPTIMIZERS`, or with `find`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from minimoe.reference.extensions import Option, load_outside, outside_names

if TYPE_CHECKING:  # `minimoe train --help` lists the names, without NumPy
    from minimoe.reference.arrays import Array
    from minimoe.reference.optimizer import OptimizerKernels

GROUP = "minimoe.optimizers"


class Step(NamedTuple):
    """Values that change from step to step: 0-d arrays, which a recorded step reads anew."""

    lr: Array
    scale: Array  # clips the gradient
    ok: Array  # bool: if it is false nothing may change
    count: Array  # int32: updates applied, this one included


Settings: TypeAlias = Any
"""The table [train] (`minimoe.config.TrainConfig`), which is defined above this module."""
Update = Callable[..., None]
"""update(backend, inout_param, inout_states, grad, step, *, weight_decay, ...); keys of `reads` and options follow by name."""


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """An optimizer: the array function that updates parameters, and facts about it."""

    name: str
    formula: str
    paper: str
    update: Update
    states: tuple[str, ...]  # buffers of the parameters' size and dtype that it keeps; they start at zero
    reads: tuple[str, ...] = ()  # keys of [train] that it receives besides lr, clipping and weight_decay
    options: Mapping[str, Option] = field(default_factory=dict)  # its settings in [train.options]
    flat: bool = True  # False: `update` is called for one parameter at a time, in its shape
    others: str = ""  # if it updates only the matrices of the blocks: the optimizer of all other parameters
    refuses: Callable[[Settings], str | None] = lambda train: None  # what is wrong with a configuration, in one line

    def for_role(self, role: str) -> Optimizer:
        """Return the optimizer of parameters of a role: itself, or the one of all that are not matrices."""
        return find(self.others) if self.others and role != "matrix" else self

    def all_used(self) -> Iterator[Optimizer]:
        """Yield itself, and the optimizer of other parameters if there is one."""
        yield self
        if self.others:
            yield find(self.others)

    def settings(self, train: Settings) -> dict[str, Any]:
        """Return what it and the optimizer of other parameters read from a [train] table, by name."""
        keys = {key: getattr(train, key) for used in self.all_used() for key in used.reads}
        return {**keys, **dict(train.options)}


def adamw(
    b: OptimizerKernels, inout_param: Array, inout_states: Mapping[str, Array], grad: Array, step: Step, *,
    weight_decay: float, beta1: float, beta2: float, eps: float,
) -> None:  # fmt: skip
    """Call the kernel `adamw`; a first step that is skipped counts as step 1, for which the correction is defined."""
    b.adamw(
        inout_param, inout_states["m"], inout_states["v"], grad, lr=step.lr, scale=step.scale, ok=step.ok,
        step=b.xp.clip(step.count, min=1), beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay,
    )  # fmt: skip


def sgd(
    b: OptimizerKernels, inout_param: Array, inout_states: Mapping[str, Array], grad: Array, step: Step, *,
    weight_decay: float, momentum: float,
) -> None:  # fmt: skip
    """Call the kernel `sgd`."""
    given = {"lr": step.lr, "scale": step.scale, "ok": step.ok}
    b.sgd(inout_param, inout_states["m"], grad, **given, momentum=momentum, weight_decay=weight_decay)


def lion(
    b: OptimizerKernels, inout_param: Array, inout_states: Mapping[str, Array], grad: Array, step: Step, *,
    weight_decay: float, beta1: float, beta2: float,
) -> None:  # fmt: skip
    """Call the kernel `lion`."""
    given = {"lr": step.lr, "scale": step.scale, "ok": step.ok}
    b.lion(inout_param, inout_states["m"], grad, **given, beta1=beta1, beta2=beta2, weight_decay=weight_decay)


def muon(
    b: OptimizerKernels, inout_param: Array, inout_states: Mapping[str, Array], grad: Array, step: Step, *,
    weight_decay: float, momentum: float,
) -> None:  # fmt: skip
    """Call the kernel `muon`, which takes a matrix, or a stack of them that are updated one by one."""
    given = {"lr": step.lr, "scale": step.scale, "ok": step.ok}
    b.muon(inout_param, inout_states["m"], grad, **given, momentum=momentum, weight_decay=weight_decay)


_TABLE = (
    Optimizer(
        name="adamw",
        formula="m = b1 m + (1-b1) g, v = b2 v + (1-b2) g^2, w = w (1 - lr wd) - lr m^ / (sqrt(v^) + eps), ^ over 1 - b^step",
        paper="Loshchilov & Hutter 2019",
        update=adamw,
        states=("m", "v"),
        reads=("beta1", "beta2", "eps"),
    ),
    Optimizer(
        name="sgd",
        formula="m = mu m + g, w = w (1 - lr wd) - lr m",
        paper="Polyak 1964",
        update=sgd,
        states=("m",),
        reads=("momentum",),
    ),
    Optimizer(
        name="lion",
        formula="w = w (1 - lr wd) - lr sign(b1 m + (1-b1) g), m = b2 m + (1-b2) g",
        paper="Chen et al. 2023",
        update=lion,
        states=("m",),
        reads=("beta1", "beta2"),
    ),
    Optimizer(
        name="muon",
        formula="m = mu m + g, w = w (1 - lr wd) - lr 0.2 sqrt(max(O, I)) orthogonal(g + mu m)",
        paper="Jordan et al. 2024",
        update=muon,
        states=("m",),
        reads=("momentum",),
        flat=False,
        others="adamw",
    ),
)
OPTIMIZERS: dict[str, Optimizer] = {optimizer.name: optimizer for optimizer in _TABLE}
"""The optimizers that come with minimoe."""


def find(name: str) -> Optimizer:
    """Return the optimizer of that name, from minimoe or an installed package.

    Raises UnknownName, a ConfigError, with the nearest name; ConfigError if a package's entry is not an optimizer.
    """
    return OPTIMIZERS[name] if name in OPTIMIZERS else from_outside(name)


@cache
def from_outside(name: str) -> Optimizer:
    found: Optimizer = load_outside(Optimizer, GROUP, name, OPTIMIZERS)
    return found


def names() -> list[str]:
    """Return the names of all optimizers: minimoe's, then those of installed packages."""
    return [*OPTIMIZERS, *(name for name in outside_names(GROUP) if name not in OPTIMIZERS)]
