"""The card's own limits, with which kernels are compared: the best of CuPy and PyTorch at a large copy and at large products."""

from collections.abc import Iterator
from functools import partial

from benchmarks.gpu.clocks import Call
from benchmarks.gpu.data import Data
from benchmarks.gpu.problems import Peer, Problem, Row
from benchmarks.gpu.torch_kernels import copy, product
from minimoe.backend import Backend

COPIED = {"full": 2**29, "quick": 2**29, "tiny": 2**12}  # float32: 2 GiB read and 2 GiB written
WIDTH = {"full": 8192, "quick": 8192, "tiny": 32}  # of square matrices; random, since zeros draw less power and run faster


def ceiling_problems(scale: str) -> Iterator[Problem]:
    """The problems: a copy, and products in both dtypes."""
    n = COPIED[scale]
    yield Problem("copy", {"bytes": 8 * n}, "float32", partial(device_copy, n), 8 * n, peer=Peer("PyTorch", partial(copy, n)))
    for dtype, width in (("bfloat16", WIDTH[scale]), ("float32", WIDTH[scale] // 2)):
        size = {"bfloat16": 2, "float32": 4}[dtype]
        peer = Peer("PyTorch", partial(product, width, dtype))
        make = partial(square_product, width, dtype)
        sizes = {"M": width, "N": width, "K": width}
        yield Problem("product", sizes, dtype, make, 3 * size * width**2, 2 * width**3, peer=peer, watched="linear")


def device_copy(n: int, backend: Backend, data: Data) -> Call:
    source, target = data.normal(n), backend.xp.empty(n, dtype=backend.xp.float32)

    def call() -> None:
        target[...] = source

    return call


def square_product(n: int, dtype: str, backend: Backend, data: Data) -> Call:
    x, weight = data.normal(n, n, dtype=dtype), data.normal(n, n, dtype=dtype)
    return lambda: backend.linear(x, weight, None)


def ceilings_of(rows: list[Row]) -> dict[str, float]:
    """The best rates: of the copy in bytes per second, of products by dtype in FLOPs per second."""
    best: dict[str, float] = {}
    for row in rows:
        if "ms" in row:
            name = "copy" if row["kernel"] == "copy" else row["dtype"]
            rate = row.get("flops", row["bytes"]) / row["ms"] * 1e3
            best[name] = max(rate, best.get(name, 0.0))
    return best
