"""Which kernels a routed model launches, at one size: every operation of its step, its arrays, and what each launch must move and compute.

The operations run through the backend's own host code. At the typical size only the launches are noted, with arrays that nobody fills. At a
small size of the same tiles the kernels are executed (executed.py).
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu import dense, routed
from benchmarks.gpu.clocks import Call
from benchmarks.gpu.data import Data
from minimoe.backend import Array
from minimoe.reference.gating import Rule
from minimoe_cupy import CudaKernels
from minimoe_cupy.grouped import BACKWARD, TILINGS, WGMMA
from minimoe_cupy.launch import BFLOAT16, parameters
from minimoe_cupy.loader import KERNELS, Source
from minimoe_numba_cuda.kernels import NumbaCudaKernels
from tests.ptx_machine.arrays import HostArrays, Namespace

TEXT = (
    "4,096 tokens (4 sequences of 1,024) of width 1,024; 8 experts of hidden width 2,048, 2 per token; 8 query heads of 128, 4 heads of "
    "keys and values; a vocabulary of 32,768; 2^26 parameters in the optimizer's buffer"
)
READ_TOO = {"adamw": ("param", "w", "m", "v"), "add_into": ("y",)}  # outputs that a kernel also reads; others are named inout
NAMED_ROWS = {  # of which array only some rows are used, and the array that has as many entries as there are such rows, at most
    "embedding": ("weight", "ids"), "sum_pieces": ("target", "keys"), "join_pieces": ("target", "partial"),
    "add_rows": ("inout_target", "ids"),
}  # fmt: skip
PARTS = {  # products of queries and keys in each kernel
    "attention": 2, "attention_dq": 3, "attention_dkv": 4, "attention_tiled": 2, "queries_tiled": 3, "keys_tiled": 4,
}  # fmt: skip


@dataclass(frozen=True)
class Operation:
    """An operation of the contract: how it is prepared at the typical size, and at the small one."""

    name: str
    dtype: str
    typical: Callable[[Any, Data], Call]
    small: Callable[[Any, Data], Call]
    backend: str = "cupy"
    wgmma: bool = False  # grouped products in bfloat16 by Hopper's wgmma, which MINIMOE_WGMMA=1 asks for


@dataclass
class Launch:
    """One launch of a kernel: what it got. `forget` keeps what is known of its arguments, and gives up the arrays."""

    kernel: str  # its name as the backend knows it
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int  # bytes that the launch asks for
    args: Sequence[Any]
    source: Source | None = None  # of a kernel in CUDA C
    function: Any = None  # a kernel in Numba-CUDA
    counters: dict[str, int] = field(default_factory=dict)  # of the machine that executed it
    known: dict[str, Any] = field(default_factory=dict)  # bytes, flops, absent, kinds: see `forget`

    @property
    def threads(self) -> int:
        return prod(self.block)

    @property
    def names(self) -> list[str]:
        """Its parameters."""
        if self.source is None:
            return list(self.function.py_func.__code__.co_varnames[: len(self.args)])
        return [parameter.name for parameter in parameters(self.source, self.kernel)]

    @property
    def given(self) -> dict[str, Any]:
        """Its arguments by the names of its parameters."""
        return dict(zip(self.names, self.args, strict=True))

    def forget(self) -> "Launch":
        """Counts its bytes and FLOPs, notes the types of its arguments, and gives up its arrays."""
        self.known = {
            "bytes": self._bytes(), "flops": flops_of(plain(self.kernel), self.kernel, self.given),
            "absent": [name for name, value in self.given.items() if is_absent(value)],
            "kinds": None if self.function is None else types_of(self.args),
        }  # fmt: skip
        self.args = ()
        return self

    @property
    def bytes(self) -> int:
        """The bytes of all arrays: each read or written once, and those that are changed in place twice."""
        return int(self.known["bytes"])

    @property
    def flops(self) -> int:
        """The FLOPs of the products that a kernel is for, two for each multiply-add; 0 for all other kernels."""
        return int(self.known["flops"])

    @property
    def key(self) -> str:
        """Launches of one kernel with the same optional arguments have one key."""
        without = f" without {', '.join(self.known['absent'])}" if self.known["absent"] else ""
        return f"{'cupy' if self.function is None else 'numba-cuda'}: {self.kernel}{without}"

    def _bytes(self) -> int:
        arrays = {name: value for name, value in self.given.items() if isinstance(value, np.ndarray)}
        table, ids = NAMED_ROWS.get(plain(self.kernel), ("", ""))
        sizes = {name: value.nbytes for name, value in arrays.items()}
        if table:
            sizes[table] = min(sizes[table], arrays[ids].shape[0] * arrays[table].nbytes // arrays[table].shape[0])
        once = {value.ctypes.data: sizes[name] for name, value in arrays.items()}  # an array may be given twice
        twice = READ_TOO.get(plain(self.kernel), ())
        return sum(once.values()) + sum(size for name, size in sizes.items() if name in twice or name.startswith("inout"))


def is_absent(value: Any) -> bool:
    """Whether an optional array was not given: CUDA C gets a null pointer, Numba-CUDA an array of size 0."""
    return (isinstance(value, np.uintp) and value == 0) or (isinstance(value, np.ndarray) and not value.size)


def types_of(args: Sequence[Any]) -> tuple[Any, ...]:
    """Numba's types of a kernel's arguments."""
    from numba.cuda.typing.typeof import typeof

    return tuple(typeof(argument) for argument in args)


def plain(kernel: str) -> str:
    """attention_dq_bf16<128> -> attention_dq"""
    return re.sub(r"_(bf16|float|wgmma)$", "", kernel.partition("<")[0])


def flops_of(kind: str, kernel: str, given: dict[str, Any]) -> int:
    """The FLOPs of a product; causal attention sees half of its keys."""
    if kind == "grouped_rows":
        backward = kernel.rstrip(">").endswith(f" {BACKWARD}")
        columns = given["width"] if backward else given["y"].shape[1]
        return int(2 * given["y"].shape[0] * int(given["depth"]) * int(columns))
    if kind == "grouped_dw":
        order = given["order"]
        rows = order.shape[0] if isinstance(order, np.ndarray) else given["left"].shape[0]
        return int(2 * rows * int(given["height"]) * int(given["width"]))
    if kind == "grouped_registers":
        return int(2 * given["x"].shape[0] * given["x"].shape[1] * given["y"].shape[1])
    if kind == "grouped_weight_gradient":
        return int(2 * given["x"].shape[0] * given["x"].shape[1] * given["dy"].shape[1])
    if kind in PARTS:
        b, t, heads, c = given["q"].shape
        return int(PARTS[kind] * b * heads * t * given["k"].shape[1] * c)
    return 0


# ---- operations --------------------------------------------------------------------------------------------------------------------------


def operations() -> Iterator[Operation]:
    """All operations of a training step of the routed model that launch kernels, in bfloat16 and in float32."""
    yield from chosen("cupy")
    for dtype in ("bfloat16", "float32"):
        yield from computed(dtype, "cupy")
    yield from (replace(each, wgmma=True) for each in computed("bfloat16", "cupy") if each.name.startswith("moe_ffn"))


def numba_operations() -> Iterator[Operation]:
    """The same for Numba-CUDA, which has float32 only."""
    yield from chosen("numba-cuda")
    yield from computed("float32", "numba-cuda")


def chosen(backend: str) -> Iterator[Operation]:
    """The router's operations and the optimizer's, which are float32 in every model."""
    rule = Rule("softmax_topk", 2, norm=True)
    for name, backwards in (("gate", False), ("gate_backward", True)):
        yield at(name, "float32", backend, routed.gate, (4096, 8, rule, backwards), (4096, 8, rule, backwards))
    yield at("route", "float32", backend, routed.route, (4096, 8, 2, "balanced"), (4096, 8, 2, "balanced"))
    yield at("adamw", "float32", backend, dense.adamw, (2**26,), (2**18,))
    yield at("sum_of_squares", "float32", backend, dense.sum_of_squares, (2**26,), (2**21,))


def computed(dtype: str, backend: str) -> Iterator[Operation]:
    """The operations that compute in the model's dtype."""
    rows, some = dense.Rows(4096, 1024, dtype), dense.Rows(2048, 1024, dtype)
    for name in ("rms_norm", "rms_norm_backward", "add_rms_norm", "add_rms_norm_backward"):
        yield at(name, dtype, backend, dense.norm, (name, rows), (name, some))
    heads = dense.Heads(4, 1024, 8, 4, 128, dtype)
    fewer = dense.Heads(1, 1024 if dtype == "bfloat16" else 512, 2, 1, 128, dtype)
    for name in ("split_heads", "split_heads_backward"):
        yield at(name, dtype, backend, dense.turned, (name, heads), (name, heads._replace(b=1)))
    for name, backwards in (("attention", False), ("attention_backward", True)):
        yield at(name, dtype, backend, dense.attention, (heads, backwards), (fewer, backwards))
    moved, fewer_moved = (routed.Move(n, 1024, 8, 2, "balanced", dtype) for n in (4096, 512))
    for name in ("combine", "combine_backward", "dispatch_backward"):
        yield at(name, dtype, backend, routed.MAKE_MOVE[name], (moved,), (fewer_moved,))
    layer, smaller = (4096, 1024, 2048, 8, 2, dtype, True), (256, 512, 256, 2, 2, dtype, True)
    yield at("moe_ffn and its backward", dtype, backend, routed.moe_ffn, layer, smaller)
    hidden, part = dense.Rows(4096, 2048, dtype), dense.Rows(512, 2048, dtype)
    for name in ("swiglu", "swiglu_backward"):
        yield at(name, dtype, backend, dense.activation, (name, hidden), (name, part))
    head, short = dense.Head(4096, 1024, 32_768, dtype), dense.Head(64, 128, 32_768, dtype)
    yield at("linear_cross_entropy and its backward", dtype, backend, dense.head_loss, (head, True), (short, True))
    yield at("linear_dx", dtype, backend, second_gradient, (rows,), (some._replace(n=64),))
    yield at("embedding", dtype, backend, embedding, (head,), (head._replace(n=1024, v=4096),))
    if dtype == "float32":  # gradients of the table are summed in float32
        yield at("embedding_backward", dtype, backend, dense.embedding_backward, (head,), (head._replace(n=1024, v=4096),))


def at(name: str, dtype: str, backend: str, make: Callable[..., Call], typical: tuple[Any, ...], small: tuple[Any, ...]) -> Operation:
    return Operation(name, dtype, partial(make, *typical), partial(make, *small), backend)


def second_gradient(p: dense.Rows, backend: Any, data: Data) -> Call:
    """The gradient of an input that two products use, added to the first one's; the product itself is the library's."""
    dy, dx = data.normal(p.n, p.width, dtype=p.dtype), data.normal(p.n, p.width, dtype=p.dtype)
    weight = data.normal(p.width, p.width, dtype=p.dtype)
    return lambda: backend.linear_dx(dy, weight, dx, True)


def embedding(p: dense.Head, backend: Any, data: Data) -> Call:
    """Rows of the table, which is float32 whatever the dtype of computation."""
    table, ids = data.normal(p.v, p.d, dtype=p.dtype), data.integers(p.v, p.n)
    return lambda: backend.embedding(ids, table)


# ---- backends that note their launches ---------------------------------------------------------------------------------------------------


class Blank(Data):
    """Arrays that nobody fills: they take no memory until they are used."""

    def normal(self, *shape: int, dtype: str = "float32", scale: float = 1.0) -> Array:
        return np.empty(shape, dtype=self.backend.dtype(dtype))


Notes = Callable[[Launch], None]


class Noting:
    """A loader of the backend `cupy` that gives each launch to `note`."""

    def __init__(self, note: Notes) -> None:
        self.note = note

    def __call__(self, path: Path, names: Sequence[str], architecture: str | None = None) -> Callable[[str], Callable[..., None]]:
        source = Source(str(path.relative_to(KERNELS)), tuple(names), architecture)

        def launcher(name: str) -> Callable[..., None]:
            def launch(grid: tuple[int, ...], block: tuple[int, ...], args: Sequence[Any], shared_mem: int = 0) -> None:
                self.note(Launch(name, grid, block, shared_mem, args, source))

            return launch

        return launcher


class Shapes(Namespace):  # type: ignore[misc]
    """NumPy's namespace for launches that are only noted: new memory is not touched, and the library's products are not computed."""

    def empty(self, shape: Any, dtype: Any = np.float64) -> Any:
        return np.empty(shape, dtype)

    zeros = empty

    def empty_like(self, x: Any, dtype: Any = None) -> Any:
        return np.empty(x.shape, dtype or x.dtype)

    def matmul(self, a: Any, b: Any, out: Any = None, accumulate: bool = False) -> Any:
        return np.empty((*a.shape[:-1], b.shape[-1]), dtype=a.dtype) if out is None else out


class Cupy(CudaKernels, HostArrays):  # type: ignore[misc]
    """The backend `cupy` on the host, whose launches go to `note`.

    `tilings`: those that grouped products chose. While it is given, the same are taken, in order: small products then have the tiles of
    large ones.
    """

    def __init__(self, note: Notes, computes: bool, wgmma: bool, tilings: Sequence[Any] | None = None) -> None:
        super().__init__(Noting(note))
        self.xp = Namespace() if computes else Shapes()
        self.wgmma, self.chosen = wgmma, list(tilings or [])
        self.follows = tilings is not None

    def _tiling(self, *args: Any, **options: Any) -> Any:
        if self.follows:
            return self.chosen.pop(0)
        tiling = super()._tiling(*args, **options)
        if self.wgmma and tiling == TILINGS[BFLOAT16][0]:  # wgmma's tiles in place of the large ones of mma.sync
            tiling = WGMMA[0]
        self.chosen.append(tiling)
        return tiling


class NumbaCuda(NumbaCudaKernels, HostArrays):  # type: ignore[misc]
    """The backend `numba-cuda` on the host, whose launches go to `note`."""

    def __init__(self, note: Notes, computes: bool) -> None:
        super().__init__(partial(Shaped, note))
        self.xp = Namespace() if computes else Shapes()


class Shaped:
    """A Numba-CUDA kernel that waits for its launch shape in brackets."""

    def __init__(self, note: Notes, function: Any) -> None:
        self.note, self.function = note, function

    def __getitem__(self, shape: tuple[Any, ...]) -> Callable[..., None]:
        grid, block = (tuple(np.atleast_1d(size).tolist()) for size in shape[:2])
        shared = int(shape[3]) if len(shape) > 3 else 0
        name = self.function.py_func.__name__
        return lambda *args: self.note(Launch(name, grid, block, shared, args, function=self.function))
