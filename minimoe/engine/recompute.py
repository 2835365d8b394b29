"""Recomputation: runs a function again in backward instead of keeping its intermediate results (Chen et al. 2016)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from minimoe.backend import Array
from minimoe.engine.backward import backward
from minimoe.engine.grad_mode import grad_enabled, grad_mode, no_grad
from minimoe.engine.tensor import Tensor


def recompute(function: Callable[..., tuple[Any, ...]], *inputs: Tensor) -> tuple[Any, ...]:
    """Return function(*inputs) and keep no intermediate result: backward runs the function again (gradient checkpointing).

    The function must draw the same random numbers each time, as counter-based ones do. Tensors in the tuple that it returns are
    differentiable, and everything else passes through. Parameters that it uses get their gradients as usual.
    """
    if not grad_enabled():
        return function(*inputs)
    backend = inputs[0].backend
    arrays = [tensor.data for tensor in inputs]
    with no_grad():
        results = function(*inputs)
    indices = [i for i, result in enumerate(results) if isinstance(result, Tensor)]

    def backward_again(*gradients: Array | None) -> tuple[Array | None, ...]:
        again = [Tensor(array, backend, requires_grad=True) for array in arrays]
        with grad_mode(True):
            outputs = function(*again)
        pairs = [(outputs[i], g) for i, g in zip(indices, gradients, strict=True) if g is not None and outputs[i].requires_grad]
        backward([output for output, _ in pairs], [gradient for _, gradient in pairs])
        return tuple(tensor.grad for tensor in again)

    anchors = [tensor if tensor.requires_grad else Tensor(tensor.data, backend, requires_grad=True) for tensor in inputs]
    outputs = Tensor.from_op(tuple(results[i].data for i in indices), anchors, backward_again)
    recorded = list(results)
    for i, output in zip(indices, outputs, strict=True):
        recorded[i] = output
    return tuple(recorded)
