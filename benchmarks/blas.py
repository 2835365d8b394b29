"""minimoe's matrix product and those of the BLAS libraries that pip can install, at the shapes of the benchmark models.

`python -m benchmarks.blas [--rounds 9]`. A product runs on one thread, and as two at the same time, as minimoe's kernels call it. OpenBLAS
is NumPy's own; MKL (`pip install mkl`) and BLIS (`pip install blis`) are measured if they are installed. They take turns; figures are
medians.
"""

import argparse
import statistics
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.machine import machine

Product = Callable[[Any, Any, Any, bool, bool], None]  # c = op(a) op(b)
SHAPES = (  # name, a transposed, b transposed, rows, columns, depth
    ("square", False, False, 1024, 1024, 1024), ("tiny, experts up", False, True, 256, 512, 128),
    ("tiny, experts down", False, True, 256, 128, 256), ("tiny, dW", True, False, 256, 128, 512),
    ("small, experts up", False, True, 256, 1024, 256), ("small, dW", True, False, 512, 256, 512),
    ("many, experts up", False, True, 128, 512, 256), ("dense, FFN up", False, True, 512, 2048, 256),
    ("dense, dW", True, False, 512, 256, 2048),
)  # fmt: skip


def by_address(sgemm: int) -> Product:
    """A library's cblas_sgemm through ctypes, which releases the GIL."""
    import ctypes

    whole, single, address = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
    kinds = [whole] * 6 + [single, address, whole, address, whole, single, address, whole]
    function = ctypes.CFUNCTYPE(None, *kinds)(sgemm)

    def product(a: Any, b: Any, c: Any, trans_a: bool, trans_b: bool) -> None:
        (m, n), k = c.shape, a.shape[0 if trans_a else 1]
        at = [x.ctypes.data for x in (a, b, c)]
        function(101, 112 if trans_a else 111, 112 if trans_b else 111, m, n, k, 1.0, at[0], a.shape[1], at[1], b.shape[1], 0.0, at[2], n)

    return product


def libraries() -> dict[str, Product]:
    """The libraries that are installed, by name."""
    from minimoe_numba.blas import mkl, openblas, own_product

    found: dict[str, Product] = {}
    for library in (own_product(), openblas(), mkl()):
        if library is not None:
            if library.limit is not None:
                library.limit(1)
            found[library.name] = by_address(library.sgemm)
    try:
        from blis.py import gemm  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError:
        return found
    found["BLIS"] = lambda a, b, c, trans_a, trans_b: gemm(a, b, out=c, trans1=trans_a, trans2=trans_b)
    return found


def seconds(call: Callable[[], None], repeats: int) -> float:
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - began) / repeats


def side_by_side(calls: list[Callable[[], None]], repeats: int) -> float:
    """Seconds of one call of each product, all at the same time."""
    threads = [threading.Thread(target=seconds, args=(call, repeats)) for call in calls]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return (time.perf_counter() - began) / repeats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    console, found = Console(), libraries()
    console.print(machine(), list(found))
    columns = [f"{name.split()[0]}{how}" for name in found for how in ("", " x 2")]
    table = Table("product", *columns, title="GFLOP/s, float32; x 2: two at once")
    for name, trans_a, trans_b, m, n, k in SHAPES:
        sets = []
        for seed in range(2):
            draw = np.random.default_rng(seed)
            a = draw.random((k, m) if trans_a else (m, k), dtype=np.float32)
            b = draw.random((n, k) if trans_b else (k, n), dtype=np.float32)
            sets.append((a, b, np.empty((m, n), np.float32)))
        flops, times = 2 * m * n * k, {library: ([], []) for library in found}  # type: ignore[var-annotated]
        repeats = max(3, int(5e8 / flops))
        for _ in range(rounds):
            for library, product in found.items():
                calls: list[Callable[[], None]] = [partial(product, *one, trans_a, trans_b) for one in sets]
                times[library][0].append(seconds(calls[0], repeats))
                times[library][1].append(side_by_side(calls, repeats))
        cells = [f"{(i + 1) * flops / statistics.median(times[lib][i]) / 1e9:.0f}" for lib in found for i in range(2)]
        table.add_row(f"{name}, {m} x {n} x {k}", *cells)
    console.print(table)


if __name__ == "__main__":
    main()
