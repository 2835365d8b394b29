"""Optimizers over flat buffers, and learning-rate schedules.

An optimizer moves the parameters into one flat buffer for each kind (decayed or not, by dtype), and their gradients into another; each
parameter becomes a view of its slice, and its `.grad` keeps that address from then on. So one kernel call updates a whole group, and the
norm of all gradients is two or three sums. Slices begin at multiples of the backend's `alignment`; the elements between them have zero
gradients, so they stay zero, and no file has them. How a group is updated is looked up in the table of `reference/optimizers.py`; the
formulas are in `reference/optimizer.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from minimoe.backend import Array, Backend
from minimoe.config import TrainConfig
from minimoe.engine.tensor import Tensor
from minimoe.errors import CheckpointError, ConfigError
from minimoe.layers.module import Role
from minimoe.reference import optimizers
from minimoe.reference.optimizers import Step


class Group:
    """Parameters of one dtype that are treated alike, in one flat buffer. `facts`: the optimizer that updates them."""

    def __init__(self, parameters: list[Tensor], backend: Backend, weight_decay: float, facts: optimizers.Optimizer) -> None:
        xp, dtype = backend.xp, parameters[0].dtype
        self.parameters, self.weight_decay, self.facts, self.xp = parameters, weight_decay, facts, xp
        self.slices, total = _slices(parameters, max(1, backend.alignment // dtype.itemsize) if backend.alignment > 1 else 1)
        self.packed = total == sum(p.size for p in parameters)  # no elements between the slices
        self.param, self.grad = (xp.empty if self.packed else xp.zeros)(total, dtype=dtype), xp.zeros(total, dtype=dtype)
        self.states = {name: xp.zeros(total, dtype=dtype) for name in facts.states}
        for p, part in zip(parameters, self.slices, strict=True):
            self.param[part] = xp.reshape(p.data, (-1,))
            if p.grad is not None:
                self.grad[part] = xp.reshape(p.grad, (-1,))
            p.data, p.grad = xp.reshape(self.param[part], p.shape), xp.reshape(self.grad[part], p.shape)
        self.grads: list[Array] = [p.grad for p in parameters]

    def pack(self, state: Array) -> Array:
        """Return a state without what lies between the slices, as files have it: the state itself if there is nothing."""
        return state if self.packed else self.xp.concat([state[part] for part in self.slices])

    def unpack(self, inout_state: Array, packed: Array) -> None:
        """Write what `pack` returned into a state."""
        if self.packed:
            inout_state[...] = packed
            return
        start = 0
        for part in self.slices:
            size = part.stop - part.start
            inout_state[part] = packed[start : start + size]
            start += size

    def attach(self) -> None:
        """Put gradients that were detached (`p.grad = None`) back into their slices, with what was accumulated since."""
        for p, view in zip(self.parameters, self.grads, strict=True):
            gradient = p.grad
            if gradient is not view:
                view[...] = 0.0 if gradient is None else gradient
                p.grad = view

    def zero(self) -> None:
        """Mark every gradient as zero: the next one overwrites it, so no pass has to clear it."""
        for p, view in zip(self.parameters, self.grads, strict=True):
            p.grad, p.grad_is_zero = view, True


def _slices(parameters: list[Tensor], step: int) -> tuple[list[slice], int]:
    """Return the slice of each parameter in a flat buffer, and the buffer's size: slices begin at multiples of `step` elements."""
    slices, end = [], 0
    for p in parameters:
        start = -(-end // step) * step
        end = start + p.size
        slices.append(slice(start, end))
    return slices, end


def role_of(p: Tensor) -> Role:
    """Return a parameter's role; that of a plain tensor follows from its shape."""
    role: Role | None = getattr(p, "role", None)
    return role if role is not None else ("vector" if p.ndim < 2 else "matrix")


def kind_of(p: Tensor, facts: optimizers.Optimizer, decay_embeddings: bool) -> tuple[str, bool]:
    """Return the name of the optimizer that updates a parameter, and whether its weights decay."""
    role = role_of(p)
    return facts.for_role(role).name, role in ("matrix", "head") or (role == "embedding" and decay_embeddings)


def state_shapes(parameters: Iterable[Tensor], train: TrainConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of `Optimizer.state_dict` for parameters of one dtype, which need not hold numbers yet."""
    sizes: dict[tuple[str, bool], int] = {}
    for p in parameters:
        kind = kind_of(p, train.optimizer_facts, train.decay_embeddings)
        sizes[kind] = sizes.get(kind, 0) + math.prod(p.shape)
    states = {used.name: used.states for used in train.optimizer_facts.all_used()}
    moments = {f"group{i}.{state}": (size,) for i, ((name, _), size) in enumerate(sizes.items()) for state in states[name]}
    return {"steps": (), **moments}


class Optimizer:
    """Parameters in groups, each updated as the table of optimizers says; the gradient's norm; the state.

    `facts` is an entry of the table, `settings` its keyword arguments. The classes below spell these out for minimoe's own optimizers.
    """

    def __init__(
        self, parameters: Iterable[Tensor], facts: optimizers.Optimizer, lr: float, weight_decay: float = 0.0,
        decay_embeddings: bool = False, **settings: Any,
    ) -> None:  # fmt: skip
        self.facts, self.lr, self.weight_decay, self.settings = facts, lr, weight_decay, settings
        everything = list(parameters)
        if not everything:
            raise ConfigError("an optimizer needs at least one parameter")
        self.backend = everything[0].backend
        self.steps = self.backend.from_host(np.zeros((), dtype=np.int32))  # updates applied; skipped steps do not count
        self.groups = [Group(members, self.backend, decay, used) for members, decay, used in self._sort(everything, decay_embeddings)]

    def _sort(self, parameters: list[Tensor], decay_embeddings: bool) -> list[tuple[list[Tensor], float, optimizers.Optimizer]]:
        """Sort parameters by optimizer, dtype and decay: matrices decay, norms and biases never, embeddings if asked."""
        sorted_: dict[tuple[str, str, bool], list[Tensor]] = {}
        for p in parameters:
            name, decays = kind_of(p, self.facts, decay_embeddings)
            sorted_.setdefault((name, str(p.dtype), decays), []).append(p)
        of = {used.name: used for used in self.facts.all_used()}
        return [(members, self.weight_decay if decays else 0.0, of[name]) for (name, _, decays), members in sorted_.items()]

    def update(self, group: Group, step: Step) -> None:
        """Update one group."""
        facts, b = group.facts, self.backend
        given = {key: self.settings[key] for key in (*facts.reads, *facts.options)}
        if facts.flat:
            facts.update(b, group.param, group.states, group.grad, step, weight_decay=group.weight_decay, **given)
            return
        for p, part in zip(group.parameters, group.slices, strict=True):
            states = {name: b.xp.reshape(state[part], p.shape) for name, state in group.states.items()}
            facts.update(b, p.data, states, p.grad, step, weight_decay=group.weight_decay, **given)

    # ---- a step ------------------------------------------------------------------------------------------------------------------

    def step(self, lr: Array | float | None = None, scale: Array | None = None, ok: Array | None = None) -> None:
        """Update every parameter from its gradient, times `scale`; if `ok` (0-d bool) is false nothing changes."""
        xp = self.backend.xp
        ok = xp.asarray(True) if ok is None else ok
        self.steps += xp.astype(ok, xp.int32)  # in place, like everything that a recorded step keeps
        for group in self.groups:
            group.attach()
            dtype = group.param.dtype
            rate = xp.asarray(self.lr if lr is None else lr, dtype=dtype) if not hasattr(lr, "dtype") else xp.astype(lr, dtype)
            factor = xp.ones((), dtype=dtype) if scale is None else xp.astype(scale, dtype)
            self.update(group, Step(rate, factor, ok, self.steps))

    def zero_grad(self) -> None:
        """Set every gradient to zero, in place."""
        for group in self.groups:
            group.zero()

    def grad_norm(self) -> Array:
        """Return the root of the sum of squares of all gradients.   0-d"""
        xp = self.backend.xp
        for group in self.groups:
            group.attach()
        total = self.backend.sum_of_squares(self.groups[0].grad)
        for group in self.groups[1:]:
            total = total + self.backend.sum_of_squares(group.grad)
        return xp.sqrt(total)

    def clip_scale(self, norm: Array, limit: float) -> Array:
        """Return min(1, limit / norm), or 1 for limit 0.   0-d"""
        xp = self.backend.xp
        if not limit:
            return xp.ones_like(norm)
        return xp.clip(limit / (norm + 1e-6), max=1.0)

    # ---- state -------------------------------------------------------------------------------------------------------------------

    def arrays(self) -> list[Array]:
        """Return every array that an update reads or writes: flat parameters, gradients, moments, and the number of updates."""
        return [array for group in self.groups for array in (group.param, group.grad, *group.states.values())] + [self.steps]

    def state_dict(self) -> dict[str, Array]:
        """Return the moments of each group and the number of updates."""
        state = {f"group{i}.{name}": group.pack(array) for i, group in enumerate(self.groups) for name, array in group.states.items()}
        return {"steps": self.steps, **state}

    def load_state_dict(self, arrays: Mapping[str, Any]) -> None:
        """Copy in what `state_dict` returned. Raises CheckpointError if it does not fit."""
        state = self.state_dict()
        if set(state) != set(arrays) or any(tuple(arrays[name].shape) != tuple(state[name].shape) for name in state):
            raise CheckpointError("the optimizer's state does not fit: it was saved with another model or optimizer")
        self.steps[...] = self._own(arrays["steps"])
        for i, group in enumerate(self.groups):
            for name, array in group.states.items():
                group.unpack(array, self._own(arrays[f"group{i}.{name}"]))

    def _own(self, array: Any) -> Array:
        """Return an array of any library as one of the backend's."""
        return array if isinstance(array, type(self.steps)) else self.backend.from_host(np.asarray(array))


class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019)."""

    def __init__(
        self, parameters: Iterable[Tensor], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.99), eps: float = 1e-8,
        weight_decay: float = 0.1, decay_embeddings: bool = False,
    ) -> None:  # fmt: skip
        self.betas, self.eps = betas, eps
        facts = optimizers.OPTIMIZERS["adamw"]
        super().__init__(parameters, facts, lr, weight_decay, decay_embeddings, beta1=betas[0], beta2=betas[1], eps=eps)


class SGD(Optimizer):
    """Stochastic gradient descent with momentum (Polyak 1964)."""

    def __init__(
        self, parameters: Iterable[Tensor], lr: float = 0.1, momentum: float = 0.9, weight_decay: float = 0.0,
        decay_embeddings: bool = False,
    ) -> None:  # fmt: skip
        self.momentum = momentum
        super().__init__(parameters, optimizers.OPTIMIZERS["sgd"], lr, weight_decay, decay_embeddings, momentum=momentum)


class Lion(Optimizer):
    """Updates by the sign of a momentum (Chen et al. 2023). Its learning rate should be three to ten times below AdamW's."""

    def __init__(
        self, parameters: Iterable[Tensor], lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.1,
        decay_embeddings: bool = False,
    ) -> None:  # fmt: skip
        self.betas = betas
        facts = optimizers.OPTIMIZERS["lion"]
        super().__init__(parameters, facts, lr, weight_decay, decay_embeddings, beta1=betas[0], beta2=betas[1])


class Muon(Optimizer):
    """Orthogonalised momentum for the matrices of the blocks, expert by expert; AdamW for everything else (Jordan et al. 2024)."""

    def __init__(
        self, parameters: Iterable[Tensor], lr: float = 1e-3, momentum: float = 0.95, betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8, weight_decay: float = 0.1, decay_embeddings: bool = False,
    ) -> None:  # fmt: skip
        self.momentum, self.betas, self.eps = momentum, betas, eps
        settings: dict[str, Any] = {"momentum": momentum, "beta1": betas[0], "beta2": betas[1], "eps": eps}
        super().__init__(parameters, optimizers.OPTIMIZERS["muon"], lr, weight_decay, decay_embeddings, **settings)


CLASSES: dict[str, type[Any]] = {"adamw": AdamW, "sgd": SGD, "lion": Lion, "muon": Muon}


def make_optimizer(parameters: Iterable[Tensor], train: TrainConfig) -> Optimizer:
    """Return the optimizer that a [train] table names, from the table of optimizers."""
    facts = train.optimizer_facts
    settings = facts.settings(train)
    settings |= {"weight_decay": train.weight_decay, "decay_embeddings": train.decay_embeddings}
    if train.optimizer not in CLASSES:
        return Optimizer(parameters, facts, train.lr, **settings)
    if "beta1" in settings:
        settings["betas"] = settings.pop("beta1"), settings.pop("beta2")
    made: Optimizer = CLASSES[train.optimizer](parameters, train.lr, **settings)
    return made


def learning_rate(step: int, train: TrainConfig) -> float:
    """Return the rate of a step that counts from 0: linear warm-up to lr, then cosine or linear to min_lr (never up to it), or constant."""
    low = min(train.lr, train.min_lr)
    if step < train.warmup_steps:
        return train.lr * (step + 1) / train.warmup_steps
    done = min(1.0, (step - train.warmup_steps) / max(1, train.steps - train.warmup_steps))
    if train.schedule == "constant":
        return train.lr
    if train.schedule == "linear":
        return train.lr + (low - train.lr) * done
    return low + 0.5 * (train.lr - low) * (1.0 + math.cos(math.pi * done))
