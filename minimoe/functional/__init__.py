"""Backends over libraries whose arrays cannot be written, such as JAX, MLX and tinygrad.

minimoe writes into arrays: parameters lie in flat buffers, and gradients are added where they lie. A `Holder` is an array that can be
written; it holds an immutable one, and a write replaces what it holds. A port subclasses `FunctionalBackend` and supplies the library's
namespace with about eight functions of the library's own arrays. A training step becomes one pure function, which the library may compile.
"""

from minimoe.functional.backend import FunctionalBackend, on_library_arrays
from minimoe.functional.holder import Holder, values_of
from minimoe.functional.namespace import HolderNamespace

__all__ = ["FunctionalBackend", "Holder", "HolderNamespace", "on_library_arrays", "values_of"]
