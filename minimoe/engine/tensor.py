"""Reverse-mode differentiation: a Tensor remembers which operation made it; `backward` walks back.

An operation (`ops/`) calls a kernel and gives `Tensor.from_op` a closure that turns the gradient of
its output into the gradients of its inputs. The closure becomes a Node. Nodes are numbered as they
are made, so in descending order every node comes after all that used its output: there is neither
sorting nor recursion. A node forgets its closure once it has run: there is no double backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, TypeAlias

from minimoe.backend import Array, Backend
from minimoe.engine import errors
from minimoe.engine.array import BackendArray
from minimoe.engine.buffers import Buffer
from minimoe.engine.grad_mode import grad_enabled
from minimoe.engine.operators import Operators

Backward = Callable[..., Any]
_numbers = count()


@dataclass(slots=True, eq=False)
class Node:
    """One operation that ran: where its gradients go, and the closure that computes them."""

    number: int
    name: str  # of the closure: "softmax.<locals>.<lambda>"
    parents: list[Edge]
    backward: Backward | None
    shapes: list[Any]  # of its outputs
    owned: bool  # True if nothing else holds the arrays that the closure returns
    outs: bool  # True if the closure takes where it may write


# Where a gradient goes: to an output of a node, to a leaf, or nowhere
Edge: TypeAlias = "tuple[Node, int] | Tensor | None"


class Tensor(BackendArray, Operators["Tensor"]):
    """An array that remembers what made it: `minimoe.tensor` or an operation."""

    __slots__ = ("buffer", "index", "leaf", "node", "requires_grad")

    def __init__(self, data: Array, backend: Backend, requires_grad: bool = False) -> None:
        self.data = data
        self.backend = backend
        self.requires_grad = requires_grad
        self.node: Node | None = None  # a leaf has none
        self.index = 0  # which of the node's outputs this is
        self.buffer: Buffer | None = None  # a leaf's gradient
        self.leaf: Tensor | None = None  # if this is a rounded copy of a leaf: gradients go there

    @staticmethod
    def from_op(
        outputs: Array | tuple[Array, ...],
        parents: Sequence[Tensor],
        backward: Backward,
        owned: bool = True,
        outs: bool = False,
    ) -> Any:
        """Return the tensor (or the tuple of tensors) that an operation on `parents` computed.

        `backward` takes a gradient for each output (None if nothing used it) and returns one for
        each parent (None if there is none); for a single parent the array alone. Set `owned` to
        False if others may hold what it returns: its argument, or one array for two parents. With
        `outs` it takes one argument more, for each parent the keywords of a kernel that writes the
        gradient where it is needed (`buffers.py`), and returns what it wrote.
        """
        backend, needed = parents[0].backend, False
        for parent in parents:
            needed = needed or parent.requires_grad
            if parent.backend is not backend:
                raise errors.mixed_backends(backward.__qualname__, parents[0], parent)
        many = isinstance(outputs, tuple)
        tensors = [Tensor(out, backend) for out in outputs] if many else [Tensor(outputs, backend)]
        if needed and grad_enabled():
            name, edges = getattr(backward, "__qualname__", ""), [*map(edge, parents)]
            node = Node(next(_numbers), name, edges, backward, [], owned, outs)
            for index, tensor in enumerate(tensors):
                tensor.requires_grad, tensor.node, tensor.index = True, node, index
                node.shapes.append(tensor.data.shape)
        return tuple(tensors) if many else tensors[0]

    def detach(self) -> Tensor:
        """Return the same array without a history."""
        return Tensor(self.data, self.backend)

    @property
    def grad(self) -> Array | None:
        """The gradient of a leaf, or None before the first."""
        return None if self.buffer is None else self.buffer.read()

    @grad.setter
    def grad(self, array: Array | None) -> None:
        self.buffer = None if array is None else Buffer(array, True)

    @property
    def grad_is_zero(self) -> bool:
        """True if `.grad` counts as zero: the next gradient is written over its numbers."""
        return self.buffer is not None and self.buffer.zeroed

    @grad_is_zero.setter
    def grad_is_zero(self, zeroed: bool) -> None:
        if self.buffer is not None:
            self.buffer.zeroed = zeroed


def edge(parent: Tensor) -> Edge:
    """Return where the gradient of an operation's input goes."""
    if not parent.requires_grad:
        return None
    if parent.node is not None:
        return parent.node, parent.index
    return parent if parent.leaf is None else parent.leaf
