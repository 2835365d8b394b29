"""The errors of the engine. Each names the operation that it is about, by the name of its closure."""

from __future__ import annotations

from typing import Any


def operation(name: str) -> str:
    """Return the function that made a closure: "softmax" for the closure "softmax.<locals>.<lambda>"."""
    return name.split(".<locals>.")[-2:][0] or "an operation"


def mixed_backends(name: str, one: Any, other: Any) -> ValueError:
    """Return the error of an operation on tensors of two backends."""
    backends = f"{one.backend.name} and {other.backend.name}"
    return ValueError(f"{operation(name)}: the operands are on two backends, {backends}: convert one of them first")


def no_gradient() -> ValueError:
    """Return the error of backward from a tensor that has no graph."""
    return ValueError("backward: this tensor depends on nothing that requires a gradient")


def not_a_scalar(name: str, shape: Any) -> ValueError:
    """Return the error of backward from a tensor of several elements without a gradient."""
    return ValueError(f"The loss is not a scalar ({operation(name)} has shape {tuple(shape)}): pass a gradient to backward()")


def wrong_root_gradient(name: str, given: Any, shape: Any) -> ValueError:
    """Return the error of a gradient that does not fit the tensor that backward starts from."""
    return ValueError(f"backward: the gradient has shape {tuple(given)}, {operation(name)} has {tuple(shape)}")


def freed(name: str) -> ValueError:
    """Return the error of a second walk."""
    already = f"{operation(name)} was already walked and freed"
    return ValueError(f"backward: {already}; run the forward pass again (there is no double backward)")


def raised_in(name: str) -> str:
    """Return the note for an exception that a closure raised."""
    return f"This was raised in the backward of {operation(name)}."


def wrong_count(name: str, given: int, inputs: int) -> ValueError:
    """Return the error of a closure that returned too many or too few gradients."""
    return ValueError(f"backward: {operation(name)} returned {given} gradients for {inputs} inputs")


def wrong_shape(name: str, given: Any, shape: Any) -> ValueError:
    """Return the error of a closure that returned a gradient that does not fit its input."""
    returned = f"{operation(name)} returned a gradient of shape {tuple(given)}"
    return ValueError(f"backward: {returned} for an input of shape {tuple(shape)}")
