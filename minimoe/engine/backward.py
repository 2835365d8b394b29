"""Backward: walks the nodes of a graph from the newest to the oldest and adds the gradient of every leaf."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Any

from minimoe.backend import Array
from minimoe.engine.creation import tensor
from minimoe.engine.tensor import Node, Tensor, _Edge, _edge

# ---- backward ---------------------------------------------------------------------------------------------------------------------


def backward(roots: Sequence[Tensor], gradients: Sequence[Array | Tensor | None] | None = None) -> None:
    """Add to `.grad` of every leaf the gradient of all roots together, each weighted by its gradient (None: 1, for scalars)."""
    walk = _Walk()
    for root, gradient in zip(roots, gradients or [None] * len(roots), strict=True):
        walk.give(_root_edge(root), _root_gradient(root, gradient), ours=False)
    walk.run()


def _root_edge(root: Tensor) -> _Edge:
    if not root.requires_grad:
        raise ValueError("backward: this tensor depends on nothing that requires a gradient")
    return _edge(root)


def _root_gradient(root: Tensor, gradient: Array | Tensor | None) -> Array:
    xp = root.backend.xp
    if gradient is None:
        if root.size != 1:
            raise ValueError(f"backward: a tensor of shape {root.shape} is no scalar: give backward its gradient")
        return xp.ones_like(root.data)
    given = gradient.data if isinstance(gradient, Tensor) else gradient
    if not isinstance(given, type(root.data)):
        given = tensor(given, backend=root.backend).data
    if tuple(given.shape) != root.shape:
        raise ValueError(f"backward: the gradient has shape {tuple(given.shape)}, the tensor {root.shape}")
    return given if given.dtype == root.data.dtype else xp.astype(given, root.data.dtype)


class _Walk:
    """The gradients that wait for their nodes, and the nodes that wait for their turn."""

    def __init__(self) -> None:
        self.waiting: dict[int, tuple[Node, list[Array | None], list[bool]]] = {}
        self.numbers: list[int] = []  # a heap of negated creation numbers: the newest first

    def give(self, edge: _Edge, gradient: Array, ours: bool) -> None:
        """Add a gradient to a leaf, or to a node's output, in place only where the sum is already ours."""
        if edge is None:
            return
        if isinstance(edge, Tensor):
            edge.accumulate(gradient, ours)
            return
        node, index = edge
        if node.number not in self.waiting:
            self.waiting[node.number] = (node, [None] * node.outputs, [False] * node.outputs)
            heapq.heappush(self.numbers, -node.number)
        _, sums, owned = self.waiting[node.number]
        if sums[index] is None:
            sums[index], owned[index] = gradient, ours
        elif ours and gradient is sums[index]:  # a kernel has added it there
            return
        elif owned[index]:
            sums[index] += gradient
        else:
            sums[index], owned[index] = sums[index] + gradient, True

    def places(self, edges: tuple[_Edge, ...]) -> list[dict[str, Any]]:
        """Where the gradients of a node's inputs may be written: into a leaf's, or added to a sum that is already ours.

        What stands there twice gets one place: the second is added to it.
        """
        places: list[dict[str, Any]] = []
        for i, edge in enumerate(edges):
            place: dict[str, Any] = {}
            if edge is None or edge in edges[:i]:
                pass
            elif isinstance(edge, Tensor):
                place = edge.place()
            elif edge[0].number in self.waiting:
                _, sums, owned = self.waiting[edge[0].number]
                if owned[edge[1]]:
                    place = {"out": sums[edge[1]], "accumulate": True}
            places.append(place)
        return places

    def run(self) -> None:
        while self.numbers:
            node, sums, _ = self.waiting.pop(-heapq.heappop(self.numbers))
            if node.backward is None:
                raise ValueError(
                    "backward: this graph was already walked and freed; run the forward pass again (there is no double backward)"
                )
            gradients = node.backward(*sums, self.places(node.parents)) if node.into else node.backward(*sums)
            parents, fresh = node.parents, not node.aliases
            node.backward, node.parents = None, ()
            if len(parents) == 1 and not isinstance(gradients, tuple):
                gradients = (gradients,)
            for edge, gradient in zip(parents, gradients, strict=True):
                if gradient is not None:
                    self.give(edge, gradient, fresh)
            del node, sums, gradients, gradient
