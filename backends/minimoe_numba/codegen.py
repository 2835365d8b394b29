"""Less work for LLVM per kernel: a function that is only inlined into kernels is not optimised twice and gets no machine code of its own.

By default Numba takes every function that a kernel calls through the whole of LLVM, down to machine code, before it links the function into
the kernel, where all of that happens again. Within `for_kernels()` the libraries that Numba makes

- are turned into machine code only when somebody asks for it: a caller from Python, a C callback, or the cache on disk;
- are optimised by themselves only where the result would round differently without it (`optimised_names`).

This uses parts of Numba that are not public, tested with the versions in TESTED; with any other version nothing is changed, and a
first start takes longer.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numba
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import cpu_target

TESTED = ("0.68.",)
KNOWN = numba.__version__.startswith(TESTED)
optimised_names: set[str] = set()  # qualified names of functions that are optimised by themselves


class KernelLibrary(JITCodeLibrary):  # type: ignore[misc]
    """The LLVM module of one function, turned into machine code on demand."""

    def __init__(self, codegen: Any, name: str) -> None:
        super().__init__(codegen, name)
        self.emitted = False

    def _optimize_functions(self, ll_module: Any) -> None:
        if self.name in optimised_names:
            super()._optimize_functions(ll_module)
        else:  # the kernel that inlines them is optimised as a whole
            ll_module.data_layout = self._codegen._data_layout

    def _optimize_final_module(self) -> None:
        if self.name in optimised_names:
            super()._optimize_final_module()

    def _finalize_final_module(self) -> None:
        self._finalize_dynamic_globals()
        self._finalized = True

    def emit(self) -> None:
        """Make machine code, once."""
        if not self.emitted:
            self.emitted = True
            super()._finalize_final_module()

    def get_pointer_to_function(self, name: str) -> int:
        self._ensure_finalized()
        if not self.emitted and all(function.name != name for function in self.get_defined_functions()):
            return 0
        self.emit()
        return int(super().get_pointer_to_function(name))

    def serialize_using_object_code(self) -> Any:
        self._ensure_finalized()
        self.emit()
        return super().serialize_using_object_code()

    @classmethod
    def _unserialize(cls, codegen: Any, state: Any) -> Any:
        library = super()._unserialize(codegen, state)
        library.emit()  # it comes with its machine code
        return library


@contextmanager
def for_kernels() -> Iterator[None]:
    """Compile with less work, as described above. Code that Numba compiles for others is not touched."""
    if not KNOWN:
        yield
        return
    with global_compiler_lock:
        codegen = cpu_target.target_context.codegen()
        set_env = codegen.set_env

        def set_env_if_emitted(name: str, env: Any) -> None:
            if codegen._engine.is_symbol_defined(name):
                set_env(name, env)

        codegen._library_class, codegen.set_env = KernelLibrary, set_env_if_emitted
        try:
            yield
        finally:
            del codegen._library_class, codegen.set_env  # the class's own again
