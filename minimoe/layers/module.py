"""Modules: parameters with names.

A Parameter is declared with its shape and its initial distribution, and is filled when `init(seed)` is called on the whole model. Its
numbers are drawn on the host from the seed and its path, so they are the same on every backend and in any order of declaration.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, Protocol, Self, TypeAlias

import numpy as np

from minimoe.backend import Array, Backend, current_backend
from minimoe.engine import ops
from minimoe.engine.creation import tensor
from minimoe.engine.random import host_normal
from minimoe.engine.tensor import Tensor
from minimoe.errors import CheckpointError, ConfigError

COMPUTED = ("float32", "float64", "bfloat16")  # float16 would need a scaled loss

Role: TypeAlias = Literal["matrix", "embedding", "head", "vector"]


class Unfilled:
    """Takes the place of a parameter's numbers until `init` has drawn them; using it raises an error."""

    def __getattr__(self, name: str) -> Any:
        raise ConfigError("this parameter has no numbers yet: call .init(seed) on its module first")


class Source(Protocol):
    """Supplies the numbers of a parameter when they are first used, from a file (`pretrained/on_demand.py`)."""

    def get(self) -> Array:
        """Return the parameter as the backend's array. While experts run, only the slices of those with rows need hold numbers."""


class Parameter(Tensor):
    """A trainable leaf: declared now, filled by `Module.init`, or read from its source when `data` is first used.

    Its role decides its weight decay and its optimizer.
    """

    __slots__ = ("declared", "frozen", "held", "padding", "role", "source", "start", "std")
    source: Source | None

    def __init__(
        self, *shape: int, std: float = 0.0, start: float = 0.0, role: Role = "matrix", trainable: bool = True,
        padding: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(Unfilled(), None, requires_grad=trainable)  # type: ignore[arg-type]
        self.declared = shape
        self.std, self.start, self.role, self.padding = std, start, role, padding
        self.frozen = False

    @property
    def shape(self) -> tuple[int, ...]:
        return self.declared

    @property
    def data(self) -> Array:
        return self.held if self.source is None else self.source.get()

    @data.setter
    def data(self, array: Array) -> None:
        self.held, self.source = array, None

    def freeze(self) -> None:
        """Keep the numbers as they are: no gradient is computed, no optimizer takes the parameter, and no load moves it."""
        self.frozen, self.requires_grad = True, False

    def read_from(self, source: Source, backend: Backend) -> None:
        """Read the numbers from this source when they are needed."""
        self.backend, self.source, self.held, self.grad = backend, source, None, None

    def own(self) -> Array:
        """Return the numbers in an array that may be changed in place; from now on they no longer come from a source."""
        if self.source is not None:
            self.data = self.backend.xp.asarray(self.source.get(), copy=True)
        return self.data

    def fill(self, name: str, seed: int, dtype: str, backend: Backend) -> None:
        """Draw the initial numbers, as the parameter of this name."""
        values = np.full(self.declared, self.start, dtype=np.float64)
        if self.std:
            values += self.std * host_normal(values.size, seed, f"{name}.init").reshape(self.declared)
        if self.padding is not None:
            values[self.padding] = 0.0
        self.backend, self.grad = backend, None
        self.data = backend.from_host(values.astype(np.float64 if dtype == "float64" else np.float32))


class Module:
    """Parameters and modules as attributes (or in lists), found by name."""

    path = ""

    def children(self) -> Iterator[tuple[str, Module]]:
        """Return the modules directly below, by attribute name; those of a list as name.0, name.1, ...

        A child named "" has its parent's path.
        """
        for name, value in vars(self).items():
            if isinstance(value, Module):
                yield name, value
            elif isinstance(value, list) and value and isinstance(value[0], Module):
                yield from ((f"{name}.{i}", module) for i, module in enumerate(value))

    def named_modules(self, prefix: str = "") -> Iterator[tuple[str, Module]]:
        """Return this module and all below, by path."""
        yield prefix, self
        for name, module in self.children():
            yield from module.named_modules(f"{prefix}.{name}" if prefix and name else prefix or name)

    def named_state(self) -> Iterator[tuple[str, Parameter]]:
        """Return parameters and buffers by name; a tied one is listed once, under its first name."""
        seen: set[int] = set()
        for path, module in self.named_modules():
            for name, value in vars(module).items():
                if isinstance(value, Parameter) and id(value) not in seen:
                    seen.add(id(value))
                    yield (f"{path}.{name}" if path else name), value

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """Return trainable parameters by name."""
        return ((name, p) for name, p in self.named_state() if p.requires_grad)

    def parameters(self) -> list[Parameter]:
        """Return trainable parameters, in the order of declaration."""
        return [p for _, p in self.named_parameters()]

    def init(self, seed: int = 0, dtype: str = "float32", backend: Backend | None = None) -> Self:
        """Fill every parameter below, each drawn from the seed and its path, and return the module itself.

        With bfloat16 parameters, gradients and moments are float32, and each layer rounds its weights to the dtype it computes in.
        """
        backend = self.prepare(dtype, backend)
        for name, parameter in self.named_state():
            parameter.fill(name, seed, dtype, backend)
        return self

    def prepare(self, dtype: str, backend: Backend | None) -> Backend:
        """Do all that `init` does except for drawing numbers, and return the backend."""
        backend = backend or current_backend()
        if dtype not in COMPUTED:
            raise ConfigError(f"dtype {dtype!r}: models compute in {', '.join(COMPUTED)}")
        if dtype not in backend.dtypes:
            raise ConfigError(f"backend {backend.name} has no {dtype}: it has {', '.join(backend.dtypes)}")
        for path, module in self.named_modules():
            module.path = path
            module.setup(backend, dtype)
        return backend

    def setup(self, backend: Backend, dtype: str) -> None:
        """Make constants that are not parameters; called by `prepare`."""

    def state_dict(self) -> dict[str, Array]:
        """Return every parameter and buffer as the backend's array, by name."""
        return {name: parameter.data for name, parameter in self.named_state()}

    def load_state_dict(self, arrays: Mapping[str, Any]) -> None:
        """Copy arrays of any library, by name, into the parameters. Raises CheckpointError that names what is missing or does not fit."""
        self.check_state(arrays)
        for name, parameter in self.named_state():
            value = arrays[name]
            if not isinstance(value, type(parameter.data)):
                value = tensor(value, backend=parameter.backend).data
            parameter.own()[...] = parameter.backend.xp.astype(value, parameter.data.dtype)

    def check_state(self, arrays: Mapping[str, Any]) -> None:
        """Compare names and shapes of arrays with those of the parameters, which need not be filled yet. Raises CheckpointError."""
        state = dict(self.named_state())
        missing, unexpected = sorted(set(state) - set(arrays)), sorted(set(arrays) - set(state))
        if missing or unexpected:
            raise CheckpointError(
                f"state does not fit the model: missing {missing[:5] or 'nothing'}, unexpected {unexpected[:5] or 'nothing'}"
            )
        for name, parameter in state.items():
            if tuple(arrays[name].shape) != parameter.shape:
                raise CheckpointError(f"{name}: shape {tuple(arrays[name].shape)}, the model has {parameter.shape}")


def cast_like(parameter: Tensor, x: Tensor) -> Tensor:
    """Cast a parameter to the dtype of x."""
    return parameter if parameter.dtype == x.dtype else ops.astype(parameter, x.dtype)


def cast_like_or_none(parameter: Tensor | None, x: Tensor) -> Tensor | None:
    """Cast a parameter that a layer may lack."""
    return None if parameter is None else cast_like(parameter, x)
