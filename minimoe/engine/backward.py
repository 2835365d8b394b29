"""Backward: walks a graph from its newest node to its oldest and frees every node on the way."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from operator import attrgetter

from minimoe.backend import Array
from minimoe.engine import errors
from minimoe.engine.buffers import NOTHING, Buffer
from minimoe.engine.creation import array_like
from minimoe.engine.tensor import Edge, Node, Tensor, edge

_array = attrgetter("array")


def backward(
    roots: Sequence[Tensor], gradients: Sequence[Array | Tensor | None] | None = None
) -> None:
    """Add to `.grad` of every leaf the gradient of all roots, each weighted by its own gradient.

    A gradient of None means 1, which only a scalar root may have.
    """
    walk = _Walk()
    for root, gradient in zip(roots, gradients or [None] * len(roots), strict=True):
        given = _root_gradient(root, gradient)
        to = edge(root)
        assert to is not None
        walk.add(to, given, owned=False)
    while walk.numbers:
        walk.step(*walk.waiting.pop(-heapq.heappop(walk.numbers)))


def _root_gradient(root: Tensor, gradient: Array | Tensor | None) -> Array:
    if not root.requires_grad:
        raise errors.no_gradient()
    name = "this leaf" if root.node is None else root.node.name
    if gradient is None and root.size != 1:
        raise errors.not_a_scalar(name, root.shape)
    given = root.backend.xp.ones_like(root.data) if gradient is None else array_like(gradient, root)
    if tuple(given.shape) != root.shape:
        raise errors.wrong_root_gradient(name, given.shape, root.shape)
    return given


class _Walk:
    """The nodes that wait for their turn, and the gradients of their outputs."""

    def __init__(self) -> None:
        self.waiting: dict[int, tuple[Node, list[Buffer]]] = {}
        self.numbers: list[int] = []  # a heap of negated creation numbers: the newest node first

    def add(self, to: tuple[Node, int] | Tensor, part: Array, owned: bool, name: str = "") -> None:
        """Add a part, which the operation of this name returned, to the gradient of an input."""
        if isinstance(to, Tensor):
            if part.shape != to.data.shape:
                raise errors.wrong_shape(name, part.shape, to.data.shape)
            Buffer.add_to_leaf(to, part, owned)
            return
        node, index = to
        if part.shape != node.shapes[index]:
            raise errors.wrong_shape(name, part.shape, node.shapes[index])
        if node.number not in self.waiting:
            self.waiting[node.number] = node, [NOTHING] * len(node.shapes)
            heapq.heappush(self.numbers, -node.number)
        buffers = self.waiting[node.number][1]
        if buffers[index] is NOTHING:
            buffers[index] = Buffer(part, owned)
        else:
            buffers[index].add(part, owned)

    def step(self, node: Node, buffers: list[Buffer]) -> None:
        """Turn the gradients of a node's outputs into those of its inputs, and free the node."""
        if node.backward is None:
            raise errors.freed(node.name)
        arrays = [*map(_array, buffers)]
        if node.outs:
            arrays.append(Buffer.outs([*map(self.buffer, node.parents)]))
        try:
            parts = node.backward(*arrays)
        except Exception as error:
            error.add_note(errors.raised_in(node.name))
            raise
        parents, node.backward, node.parents = node.parents, None, []
        if not isinstance(parts, tuple):
            parts = (parts,)
        if len(parts) != len(parents):
            raise errors.wrong_count(node.name, len(parts), len(parents))
        for to, part in zip(parents, parts, strict=True):
            if to is not None and part is not None:
                self.add(to, part, node.owned, node.name)

    def buffer(self, to: Edge) -> Buffer:
        """Return where the gradient of an input is added up, or NOTHING before its first part."""
        if isinstance(to, Tensor):
            return Buffer.of_leaf(to)
        if to is None or to[0].number not in self.waiting:
            return NOTHING
        return self.waiting[to[0].number][1][to[1]]
