"""Shapes, checked before a launch: kernels trust them."""

from minimoe.backend import Array


def expect(kernel: str, name: str, array: Array, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless the array has that shape."""
    if tuple(array.shape) != shape:
        raise ValueError(f"{kernel}: {name} is {list(array.shape)}: wanted {list(shape)}")
