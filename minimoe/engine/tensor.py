"""Reverse-mode differentiation: a Tensor remembers which operation made it, and `backward` walks those operations in reverse.

An operation (`ops.py`) calls a kernel and hands `Tensor.from_op` a closure that turns the output's gradient into its inputs' gradients.
The closure becomes a Node; nodes are numbered as they are made, so descending numbers are an order in which every node comes after
all that used its output. There is no recursion and no double backward: a node forgets its closure as soon as it has run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import count
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from minimoe.backend import Array, Backend

Backward = Callable[..., Any]
_grad_enabled: ContextVar[bool] = ContextVar("minimoe_grad_enabled", default=True)
_numbers = count()


class Node:
    """One operation that was run: where its gradients go, and how they are found."""

    __slots__ = ("aliases", "backward", "into", "number", "outputs", "parents")

    def __init__(self, parents: tuple[_Edge, ...], backward: Backward, outputs: int, aliases: bool, into: bool) -> None:
        self.number = next(_numbers)
        self.parents = parents
        self.backward: Backward | None = backward
        self.outputs = outputs
        self.aliases = aliases  # what backward returns may be its argument, or given to two parents: not ours to add into
        self.into = into  # backward also takes the places of its parents' gradients, to write there


_Edge: TypeAlias = "tuple[Node, int] | Tensor | None"  # the output of a node, a leaf, or an input that needs no gradient


class Tensor:
    """An array of a backend, and how it came about. Made by `minimoe.tensor` and by operations."""

    __slots__ = ("_grad", "backend", "data", "grad_is_zero", "index", "node", "requires_grad")
    __array_priority__ = 1000  # NumPy's operators leave `array * tensor` to us

    def __init__(self, data: Array, backend: Backend, requires_grad: bool = False) -> None:
        self.data = data
        self.backend = backend
        self.requires_grad = requires_grad
        self._grad: Array | None = None
        self.grad_is_zero = False  # whatever the array holds: the next gradient is written over it, not added
        self.node: Node | None = None
        self.index = 0

    @staticmethod
    def from_op(
        outputs: Array | tuple[Array, ...], parents: Sequence[Tensor], backward: Backward, aliases: bool = False, into: bool = False
    ) -> Any:
        """The tensor (or tuple of tensors) that an operation on `parents` gave.

        `backward` takes a gradient for each output (None where nothing used it) and returns one for each parent, None where there is none;
        with a single parent the array alone. Set `aliases` if what it returns is not fresh. With `into` it is also given, for each parent,
        where the gradient may be written: {} or a kernel's `out` and `accumulate`; it returns what it wrote.
        """
        backend, needed = parents[0].backend, False
        for parent in parents:
            needed = needed or parent.requires_grad
            if parent.backend is not backend:
                raise ValueError(f"one operation on two backends, {backend.name} and {parent.backend.name}: convert one side first")
        many = isinstance(outputs, tuple)
        tensors = [Tensor(array, backend) for array in outputs] if many else [Tensor(outputs, backend)]
        if needed and _grad_enabled.get():
            node = Node(tuple([_edge(parent) for parent in parents]), backward, len(tensors), aliases, into)
            for index, tensor in enumerate(tensors):
                tensor.requires_grad, tensor.node, tensor.index = True, node, index
        return tuple(tensors) if many else tensors[0]

    # ---- the array ---------------------------------------------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.data.shape)

    @property
    def ndim(self) -> int:
        return len(self.data.shape)

    @property
    def size(self) -> int:
        size = 1
        for extent in self.data.shape:
            size *= extent
        return size

    @property
    def dtype(self) -> Any:
        return self.data.dtype

    def numpy(self) -> np.ndarray[Any, Any]:
        """A copy on the host."""
        return np.array(self.backend.to_host(self.data))

    def item(self) -> Any:
        """The one number of a tensor of one element."""
        return self.backend.to_host(self.data).item()

    def detach(self) -> Tensor:
        """The same array, without a history."""
        return Tensor(self.data, self.backend)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        host = self.backend.to_host(self.data)
        return np.array(host, dtype=dtype, copy=copy)

    def __dlpack__(self, **options: Any) -> Any:
        return self.backend.xp.asarray(self.data).__dlpack__(**options)  # NumPy gives 0-d results as scalars, which have no DLPack

    def __dlpack_device__(self) -> Any:
        return self.backend.xp.asarray(self.data).__dlpack_device__()

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len() of a 0-d tensor")
        return self.shape[0]

    def __repr__(self) -> str:
        values = np.array2string(self.numpy(), separator=", ", threshold=20, precision=4)
        return f"tensor({values}, {self.data.dtype}, {self.backend.name}{', requires_grad' if self.requires_grad else ''})"

    # ---- gradients ---------------------------------------------------------------------------------------------------------------

    @property
    def grad(self) -> Array | None:
        """The gradient of a leaf, or None before the first."""
        if self.grad_is_zero:
            self.grad_is_zero = False
            if self._grad is not None:
                self._grad[...] = 0.0
        return self._grad

    @grad.setter
    def grad(self, value: Array | None) -> None:
        self._grad, self.grad_is_zero = value, False

    def place(self) -> dict[str, Any]:
        """Where a kernel may write this leaf's gradient: its `out` and `accumulate`, or nothing."""
        if self._grad is None or self._grad.dtype != self.data.dtype:
            return {}
        return {"out": self._grad, "accumulate": not self.grad_is_zero}

    def accumulate(self, gradient: Array, ours: bool) -> None:
        """Add to `.grad`, in place where there is one: its address stays. `ours`: nobody else holds the array."""
        xp = self.backend.xp
        if ours and gradient is self._grad:  # a kernel has written it there
            self.grad_is_zero = False
            return
        if gradient.dtype != self.data.dtype:
            gradient, ours = xp.astype(gradient, self.data.dtype), True
        if self._grad is None:
            self._grad = xp.asarray(gradient, copy=None if ours else True)  # NumPy gives 0-d results as scalars: no address to keep
        elif self.grad_is_zero:
            self._grad[...] = gradient
        else:
            self._grad += gradient
        self.grad_is_zero = False

    # ---- methods whose definitions live in backward.py and ops.py; engine/__init__.py binds them ---------------------------------

    if TYPE_CHECKING:

        def backward(self, gradient: Array | Tensor | None = None) -> None: ...
        def __add__(self, other: Any) -> Tensor: ...
        def __radd__(self, other: Any) -> Tensor: ...
        def __sub__(self, other: Any) -> Tensor: ...
        def __rsub__(self, other: Any) -> Tensor: ...
        def __mul__(self, other: Any) -> Tensor: ...
        def __rmul__(self, other: Any) -> Tensor: ...
        def __truediv__(self, other: Any) -> Tensor: ...
        def __rtruediv__(self, other: Any) -> Tensor: ...
        def __neg__(self) -> Tensor: ...
        def __pow__(self, exponent: float) -> Tensor: ...
        def __matmul__(self, other: Any) -> Tensor: ...
        def __rmatmul__(self, other: Any) -> Tensor: ...
        def __getitem__(self, index: Any) -> Tensor: ...
        def sum(self, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Tensor: ...
        def mean(self, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Tensor: ...
        def max(self, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Tensor: ...
        def reshape(self, *shape: Any) -> Tensor: ...
        def permute(self, *axes: int) -> Tensor: ...
        @property
        def T(self) -> Tensor: ...
        def exp(self) -> Tensor: ...
        def log(self) -> Tensor: ...
        def sqrt(self) -> Tensor: ...
        def tanh(self) -> Tensor: ...
        def astype(self, dtype: Any) -> Tensor: ...


def _edge(parent: Tensor) -> _Edge:
    if not parent.requires_grad:
        return None
    return parent if parent.node is None else (parent.node, parent.index)


@contextmanager
def grad_mode(enabled: bool) -> Iterator[None]:
    """Within it operations are recorded, or not."""
    token = _grad_enabled.set(enabled)
    try:
        yield
    finally:
        _grad_enabled.reset(token)


def grad_enabled() -> bool:
    """Are operations remembered for backward here?"""
    return _grad_enabled.get()


def no_grad() -> Any:
    """Within it no operation is recorded: for evaluation and generation."""
    return grad_mode(False)
