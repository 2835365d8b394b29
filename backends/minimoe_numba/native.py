"""Operations that Numba lacks: atomic counters, a call through an address, arrays at an address, the bits of a number.

Each is one or two LLVM instructions. Addresses are int64 arguments, not constants, so that kernels that use them can be cached on disk.
"""

import os
import platform
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic

INT32, INT64, FLOAT, DOUBLE = ir.IntType(32), ir.IntType(64), ir.FloatType(), ir.DoubleType()
PLAIN, TRANSPOSED = 111, 112  # cblas's numbers for them
X86 = platform.machine().lower() in ("x86_64", "amd64")


@intrinsic
def fetch_add(typing: Any, address: Any, value: Any) -> Any:
    """Add to the int64 at an address, in an order on which all threads agree.   -> the previous value"""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", builder.inttoptr(args[0], INT64.as_pointer()), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), generate


@intrinsic
def load(typing: Any, address: Any) -> Any:
    """The int64 at an address, as other threads last wrote it."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(builder.inttoptr(args[0], INT64.as_pointer()), "seq_cst", 8)

    return types.int64(types.int64), generate


@intrinsic
def store(typing: Any, address: Any, value: Any) -> Any:
    """Write the int64 at an address. A thread that sees it also sees everything written before."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store_atomic(args[1], builder.inttoptr(args[0], INT64.as_pointer()), "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


def declared(builder: Any, name: str, result: Any) -> Any:
    """Declare a function without arguments that LLVM or the system provides."""
    known = builder.module.globals.get(name)
    return known if known is not None else ir.Function(builder.module, ir.FunctionType(result, []), name)


@intrinsic
def pause(typing: Any) -> Any:
    """Leave the core to its other hyperthread for a moment, if the processor has an instruction for that."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if X86:
            builder.call(declared(builder, "llvm.x86.sse2.pause", ir.VoidType()), [])
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def yield_core(typing: Any) -> Any:
    """Leave the core to another thread that waits for it, if the system has a call for that."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if hasattr(os, "sched_yield"):
            builder.call(declared(builder, "sched_yield", INT32), [])
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def call_job(typing: Any, function: Any, start: Any, stop: Any, arguments: Any) -> Any:
    """Call function(start, stop, arguments), a C function of three int64, by its address."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [INT64] * 3).as_pointer()
        builder.call(builder.inttoptr(args[0], kind), args[1:])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), generate


@intrinsic
def pointer(typing: Any, address: Any, kind: Any) -> Any:
    """Return an address as a pointer to numbers of a NumPy type, for numba.carray."""
    target = types.CPointer(kind.dtype)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(target))

    return target(types.int64, kind), generate


@intrinsic
def int_as_float(typing: Any, bits: Any) -> Any:
    """Return the float32 whose bits an int32 holds."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], FLOAT)

    return types.float32(types.int32), generate


@intrinsic
def float_as_int(typing: Any, value: Any) -> Any:
    """Return the bits of a float32 as an int32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], INT32)

    return types.int32(types.float32), generate


@intrinsic
def int_as_double(typing: Any, bits: Any) -> Any:
    """Return the float64 whose bits an int64 holds."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], DOUBLE)

    return types.float64(types.int64), generate


@intrinsic
def call_sgemm(
    typing: Any, function: Any, trans_a: Any, trans_b: Any, m: Any, n: Any, k: Any, a: Any, lda: Any, b: Any, ldb: Any, beta: Any, c: Any,
    ldc: Any,
) -> Any:  # fmt: skip
    """C = op(A) op(B) + beta C, by the cblas_sgemm at the address `function`. Arguments are int64, but beta is a float32.

    A library of 32-bit integers reads the lower half of each argument.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        function, trans_a, trans_b, m, n, k, a, lda, b, ldb, beta, c, ldc = args
        one, row_major = ir.Constant(FLOAT, 1.0), ir.Constant(INT32, 101)
        wanted = [row_major, builder.trunc(trans_a, INT32), builder.trunc(trans_b, INT32), m, n, k, one, a, lda, b, ldb, beta, c, ldc]
        kind = ir.FunctionType(ir.VoidType(), [value.type for value in wanted]).as_pointer()
        builder.call(builder.inttoptr(function, kind), wanted)
        return context.get_dummy_value()

    whole = types.int64
    return types.void(*[whole] * 10, types.float32, whole, whole), generate


@njit(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True, forceinline=True)
def floats_at(address, count):  # type: ignore[no-untyped-def]
    """Return `count` float32 at an address as an array."""
    return carray(pointer(address, np.float32), (count,))
