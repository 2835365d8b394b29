"""Checks gradients by directional derivatives: compares the slope that backward gives along a random direction with differences.

With L = sum(w * y) for random weights w, backward gives <dL/dx, v>; central differences over steps h and h/2, extrapolated
(4 D(h/2) - D(h)) / 3 (Richardson 1911), give the same up to O(h^4). One number per input costs four forward passes, whatever its size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from minimoe.backend import Backend, current_backend
from minimoe.engine.backward import backward
from minimoe.engine.creation import tensor
from minimoe.engine.grad_mode import no_grad
from minimoe.engine.tensor import Tensor
from minimoe.testing.tolerances import CHECK_GRADS

Floats = npt.NDArray[np.float64]


def check_grads(function: Callable[..., Any], *inputs: Any, tolerance: float = CHECK_GRADS, seed: int = 0, eps: float = 1e-3) -> float:
    """Compare the gradient of `function(*inputs)` with differences, for each input alone and for all jointly -> the worst relative error.

    `function` takes tensors and returns one or a tuple of them. Inputs are NumPy arrays or tensors; float64 ones are differentiated,
    others pass through. A tensor that requires a gradient is changed in place and restored, so a layer's parameters can be given
    next to its input: `check_grads(lambda x, *_: layer(x), x, *layer.parameters())`. `eps` is the step for each element: kinks,
    and the gaps of a top-k, should be some ten times farther away.

    Raises `AssertionError` with the input and both slopes if they differ by more than `tolerance`.
    """
    backend = next((value.backend for value in inputs if isinstance(value, Tensor)), None) or current_backend()
    tensors = [_leaf(value, backend) for value in inputs]
    indices = [i for i, leaf in enumerate(tensors) if isinstance(leaf, Tensor) and leaf.requires_grad]
    if not indices:
        raise ValueError("check_grads: no input is differentiable: give float64 arrays, or tensors that require a gradient")
    check = _Check(function, tensors, indices, np.random.default_rng(seed), eps)
    worst = max(check.error([i], f"input {i}, shape {tensors[i].shape}", tolerance) for i in indices)
    if len(indices) > 1:
        worst = max(worst, check.error(indices, "all inputs jointly", tolerance))
    return worst


def _leaf(value: Any, backend: Backend) -> Any:
    if isinstance(value, Tensor):
        return value
    if isinstance(value, np.ndarray) and value.dtype == np.float64:
        return tensor(value, requires_grad=True, backend=backend)
    return tensor(value, backend=backend) if isinstance(value, np.ndarray) else value


class _Check:
    """A function, its inputs and its gradient by backward, to be compared with slopes along directions."""

    def __init__(self, function: Callable[..., Any], tensors: list[Any], indices: list[int], rng: np.random.Generator, eps: float) -> None:
        self.function, self.tensors, self.rng, self.eps = function, tensors, rng, eps
        leaves = {i: tensors[i] for i in indices}
        kept = {i: leaf.grad for i, leaf in leaves.items()}
        for leaf in leaves.values():
            leaf.grad = None
        outputs = _outputs(function(*tensors))
        self.weights = [rng.standard_normal(output.shape) for output in outputs]
        self.size = sum(float(np.sum(np.abs(w * output.numpy()))) for w, output in zip(self.weights, outputs, strict=True))
        pairs = [(output, w) for output, w in zip(outputs, self.weights, strict=True) if output.requires_grad]
        if not pairs:
            raise AssertionError("check_grads: nothing that the function returns depends on its inputs")
        backward([output for output, _ in pairs], [output.backend.from_host(w) for output, w in pairs])
        self.gradients = {i: _host_gradient(leaf) for i, leaf in leaves.items()}
        for i, leaf in leaves.items():
            leaf.grad = kept[i]

    def error(self, indices: list[int], what: str, tolerance: float) -> float:
        """Return the relative error of the slope along a random direction of these inputs."""
        directions = {i: self.rng.standard_normal(self.tensors[i].shape) for i in indices}
        claimed = float(sum(np.sum(self.gradients[i] * v) for i, v in directions.items()))
        coarse, fine = self.slope(directions, self.eps), self.slope(directions, self.eps / 2)
        measured = (4.0 * fine - coarse) / 3.0
        length = float(np.sqrt(sum(np.sum(self.gradients[i] ** 2) for i in indices)))
        # differences cannot resolve rounding in L, nor the slope along a direction that happens to be level
        scale = max(abs(claimed), abs(measured), 1e-2 * length, 1e-6 * self.size, 1e-30)
        error = abs(claimed - measured) / scale
        if not error <= tolerance:
            slopes = f"backward gives the slope {claimed:.12g}, differences give {measured:.12g}"
            raise AssertionError(f"check_grads: {what}: {slopes} (relative error {error:.3g}, allowed {tolerance:.3g})")
        return error

    def slope(self, directions: dict[int, Floats], step: float) -> float:
        return (self.value(directions, step) - self.value(directions, -step)) / (2.0 * step)

    def value(self, directions: dict[int, Floats], step: float) -> float:
        """Return L with the inputs moved by `step` along the directions."""
        kept = {i: self.tensors[i].data for i in directions}
        try:
            for i, v in directions.items():
                leaf = self.tensors[i]
                leaf.data = leaf.data + leaf.backend.from_host(step * v)
            with no_grad():
                outputs = _outputs(self.function(*self.tensors))
        finally:
            for i, data in kept.items():
                self.tensors[i].data = data
        return float(sum(np.sum(w * output.numpy()) for w, output in zip(self.weights, outputs, strict=True)))


def _outputs(result: Any) -> list[Tensor]:
    results = result if isinstance(result, tuple) else (result,)
    return [output for output in results if isinstance(output, Tensor)]


def _host_gradient(leaf: Tensor) -> Floats:
    if leaf.grad is None:
        return np.zeros(leaf.shape)
    return np.asarray(leaf.backend.to_host(leaf.grad), dtype=np.float64)
