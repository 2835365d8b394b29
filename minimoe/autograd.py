"""Reverse-mode differentiation: a Tensor remembers which operation made it, and `backward` walks those operations in reverse.

An operation (`ops.py`) calls a kernel and hands `Tensor.from_op` a closure that turns the output's gradient into its inputs' gradients.
The closure becomes a Node; nodes are numbered as they are made, so descending numbers are an order in which every node comes after
all that used its output. There is no recursion and no double backward: a node forgets its closure as soon as it has run.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import count
from typing import Any, TypeAlias

import numpy as np

from minimoe.backend import Array, Backend, load

Backward = Callable[..., Any]
_grad_enabled: ContextVar[bool] = ContextVar("minimoe_grad_enabled", default=True)
_backend: ContextVar[Backend | None] = ContextVar("minimoe_backend", default=None)  # of use_backend: in this thread alone
_default: list[Backend] = []  # of set_backend: everywhere; at most one
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

    def backward(self, gradient: Array | Tensor | None = None) -> None:
        """Add to `.grad` of every leaf how this tensor depends on it; `gradient` defaults to 1 for a scalar."""
        backward([self], [gradient])

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
        if gradient is self._grad:  # a kernel has written it there
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

    # ---- operators: each stands once in ops.py -----------------------------------------------------------------------------------

    def __add__(self, other: Any) -> Tensor:
        return ops.add(self, other)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Tensor:
        return ops.subtract(self, other)

    def __rsub__(self, other: Any) -> Tensor:
        return ops.subtract(other, self)

    def __mul__(self, other: Any) -> Tensor:
        return ops.multiply(self, other)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Tensor:
        return ops.divide(self, other)

    def __rtruediv__(self, other: Any) -> Tensor:
        return ops.divide(other, self)

    def __neg__(self) -> Tensor:
        return ops.multiply(self, -1.0)

    def __pow__(self, exponent: float) -> Tensor:
        return ops.power(self, exponent)

    def __matmul__(self, other: Any) -> Tensor:
        return ops.matmul(self, other)

    def __rmatmul__(self, other: Any) -> Tensor:
        return ops.matmul(other, self)

    def __getitem__(self, index: Any) -> Tensor:
        return ops.getitem(self, index)

    def sum(self, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Tensor:
        return ops.sum(self, axis, keepdims)

    def mean(self, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Tensor:
        return ops.mean(self, axis, keepdims)

    def max(self, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Tensor:
        return ops.max(self, axis, keepdims)

    def reshape(self, *shape: Any) -> Tensor:
        return ops.reshape(self, shape[0] if len(shape) == 1 and isinstance(shape[0], tuple | list) else shape)

    def permute(self, *axes: int) -> Tensor:
        return ops.permute(self, axes)

    @property
    def T(self) -> Tensor:
        return ops.permute(self, tuple(reversed(range(self.ndim))))

    def exp(self) -> Tensor:
        return ops.exp(self)

    def log(self) -> Tensor:
        return ops.log(self)

    def sqrt(self) -> Tensor:
        return ops.power(self, 0.5)

    def tanh(self) -> Tensor:
        return ops.tanh(self)

    def astype(self, dtype: Any) -> Tensor:
        return ops.astype(self, dtype)


def _edge(parent: Tensor) -> _Edge:
    if not parent.requires_grad:
        return None
    return parent if parent.node is None else (parent.node, parent.index)


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
        elif gradient is sums[index]:  # a kernel has added it there
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


def recompute(function: Callable[..., tuple[Any, ...]], *inputs: Tensor) -> tuple[Any, ...]:
    """function(*inputs), without keeping what lies between: backward runs it again (Chen et al. 2016, gradient checkpointing).

    It must draw the same random numbers each time, as counter-based ones do. Of the tuple that it returns, tensors are differentiable and
    everything else passes through. Parameters that it uses get their gradients as usual.
    """
    if not _grad_enabled.get():
        return function(*inputs)
    backend = inputs[0].backend
    arrays = [tensor.data for tensor in inputs]
    with no_grad():
        results = function(*inputs)
    places = [i for i, result in enumerate(results) if isinstance(result, Tensor)]

    def backward_again(*gradients: Array | None) -> tuple[Array | None, ...]:
        again = [Tensor(array, backend, requires_grad=True) for array in arrays]
        with grad_mode(True):
            outputs = function(*again)
        pairs = [(outputs[i], g) for i, g in zip(places, gradients, strict=True) if g is not None and outputs[i].requires_grad]
        backward([output for output, _ in pairs], [gradient for _, gradient in pairs])
        return tuple(tensor.grad for tensor in again)

    anchors = [tensor if tensor.requires_grad else Tensor(tensor.data, backend, requires_grad=True) for tensor in inputs]
    outputs = Tensor.from_op(tuple(results[i].data for i in places), anchors, backward_again)
    recorded = list(results)
    for place, output in zip(places, outputs, strict=True):
        recorded[place] = output
    return tuple(recorded)


# ---- the current backend, and tensors from anywhere ------------------------------------------------------------------------------


def current_backend() -> Backend:
    """The backend on which tensors and modules are made when none is named."""
    backend = _backend.get()
    if backend is not None:
        return backend
    return _default[0] if _default else set_backend("auto")


def set_backend(backend: str | Backend) -> Backend:
    """Make tensors and modules on this backend from now on."""
    chosen = load(backend) if isinstance(backend, str) else backend
    _default[:] = [chosen]
    return chosen


@contextmanager
def use_backend(backend: str | Backend) -> Iterator[Backend]:
    """`set_backend` for the length of a with block."""
    chosen = load(backend) if isinstance(backend, str) else backend
    token = _backend.set(chosen)
    try:
        yield chosen
    finally:
        _backend.reset(token)


def tensor(array: Any, requires_grad: bool = False, dtype: str | None = None, backend: Backend | None = None) -> Tensor:
    """A leaf tensor from numbers, or from an array of any library that speaks DLPack or `__array__` (NumPy, CuPy, PyTorch, JAX).

    Python's floats, and float64 arrays, keep float64 only if `dtype` says so or they came as an array. The array is copied.
    """
    backend = backend or current_backend()
    if isinstance(array, Tensor):
        array = array.data if array.backend is backend else array.numpy()
    if isinstance(array, type(backend.xp.zeros(()))):
        data = backend.xp.asarray(array, copy=True)
    else:
        data = backend.from_host(_to_numpy(array))
    wanted = data.dtype if dtype is None else backend.dtype(dtype)
    if requires_grad and not backend.xp.isdtype(wanted, "real floating"):
        raise ValueError(f"only tensors of floats have gradients, not {wanted}: give a dtype")
    return Tensor(data if data.dtype == wanted else backend.xp.astype(data, wanted), backend, requires_grad)


def _to_numpy(array: Any) -> np.ndarray[Any, Any]:
    if isinstance(array, np.ndarray):
        return array
    if hasattr(array, "__dlpack__"):
        if getattr(array, "requires_grad", False):
            array = array.detach()
        try:
            return np.from_dlpack(array)
        except (BufferError, TypeError, RuntimeError):
            return np.asarray(array.get() if hasattr(array, "get") else array)  # on another device
    host = np.asarray(array)
    if not hasattr(array, "dtype"):  # Python's own numbers: the library's working precision, as in every other framework
        host = host.astype({"f": np.float32, "i": np.int32, "u": np.int32}.get(host.dtype.kind, host.dtype))
    return host


from minimoe import ops  # noqa: E402  ops stands on Tensor, and Tensor's operators on ops
