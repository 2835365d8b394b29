"""Counts what each rung of the ladder in CUDA C executes, without a card: `python -m benchmarks.cuda_ladder [--write]`.

The rungs are the kernels of `ladder_product.cu` and `ladder_attention.cu` in `backends/minimoe_cupy/kernels/`, and above them those that
the backend `cupy` launches. The PTX that NVRTC makes of them is executed on the processor (`tests/ptx_machine`), which counts instructions,
accesses to memory and products of the tensor cores. `--write` puts the tables into docs/gpu.md, which says what the columns mean.
"""

import argparse
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import ml_dtypes
import numpy as np

from minimoe_cupy import CudaKernels
from minimoe_cupy.constants import constant
from minimoe_cupy.grouped import TILINGS, WGMMA, Tiling
from minimoe_cupy.ladder import ATTENTION, PRODUCT
from minimoe_cupy.launch import BFLOAT16, ceil_div
from minimoe_cupy.loader import Launch

Array: TypeAlias = Any
Backend: TypeAlias = Any  # CudaKernels over some array layer and loader
ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "gpu.md"

# ---- the rungs ---------------------------------------------------------------------------------------------------------------------------


class Rung(NamedTuple):
    """One way to compute a product, or attention."""

    title: str
    run: Callable[..., None]  # (backend, inputs.., y): writes y


def product(kernel: str, height: int, width: int, block: tuple[int, ...]) -> Callable[..., None]:
    """A rung of ladder_product.cu, whose blocks have height x width results."""

    def run(backend: Backend, x: Array, weight: Array, offsets: Array, y: Array) -> None:
        experts, columns, depth = weight.shape
        grid = ceil_div(len(x), height), ceil_div(columns, width), experts
        backend._launch(PRODUCT, kernel, grid, block, x, weight, offsets, y, depth, columns)

    return run


def fast_product(tiling: Tiling) -> Callable[..., None]:
    """The backend's product, in these tiles whatever its size."""

    def run(backend: Backend, x: Array, weight: Array, offsets: Array, y: Array) -> None:
        backend._tiling = lambda *_: tiling
        backend.grouped_matmul(x, weight, offsets, out=y)

    return run


PRODUCTS = {
    "product_naive": Rung("naive", product("product_naive", 8, 32, (32, 8))),
    "product_shared": Rung("shared memory", product("product_shared", 32, 32, (32, 32))),
    "product_mma": Rung("tensor cores, 64 x 64", product("product_mma", 64, 64, (128,))),
    "grouped_rows_bf16": Rung("the fast one, 128 x 256", fast_product(TILINGS[BFLOAT16][0])),
    "grouped_rows_wgmma": Rung("the same for Hopper", fast_product(WGMMA[0])),
}


def attention_naive(backend: Backend, q: Array, k: Array, v: Array, y: Array, scale: float, causal: bool) -> None:
    """Three kernels, with the matrix of the scores in global memory."""
    (sequences, tokens, heads, width), groups = q.shape, k.shape[2]
    scores = backend.xp.empty((sequences, heads, tokens, tokens), dtype=np.float32)
    units, down, block = sequences * heads, ceil_div(tokens, 8), (32, 8)
    sizes = tokens, heads, groups, width
    backend._launch(ATTENTION, "attention_scores", (ceil_div(tokens, 32), down, units), block, q, k, scores, *sizes, scale, causal)
    backend._launch(ATTENTION, "attention_softmax", (tokens, units), 32, scores, tokens)
    backend._launch(ATTENTION, "attention_values", (ceil_div(width, 32), down, units), block, scores, v, y, *sizes, causal)


def attention_online(backend: Backend, q: Array, k: Array, v: Array, y: Array, scale: float, causal: bool) -> None:
    """One kernel, a warp per query."""
    (sequences, tokens, heads, width), groups = q.shape, k.shape[2]
    warps, kernel = constant(ATTENTION.file, "WARPS"), f"attention_online<{ceil_div(width, 32)}>"
    grid, sizes = ceil_div(sequences * tokens * heads, warps), (sequences, tokens, heads, groups, width)
    backend._launch(ATTENTION, kernel, grid, 32 * warps, q, k, v, y, *sizes, scale, causal)


def attention_fast(backend: Backend, q: Array, k: Array, v: Array, y: Array, scale: float, causal: bool) -> None:
    """The backend's attention."""
    positions = np.arange(q.shape[1], dtype=np.int32)[None]
    backend.attention(q, k, v, scale=scale, causal=causal, q_pos=positions, k_pos=positions, out=y)


ATTENTIONS = {
    "attention_naive": Rung("naive, three kernels", attention_naive),
    "attention_online": Rung("online softmax", attention_online),
    "attention_bf16": Rung("FlashAttention", attention_fast),
}

# ---- counting ----------------------------------------------------------------------------------------------------------------------------

ROWS, EXPERTS, DEPTH, WIDTH = 256, 2, 512, 256  # R, E, K, N of the product that is counted; each expert has half of the rows
TOKENS, HEADS, GROUPS, HEAD_WIDTH = 256, 2, 1, 64  # T, Q, G, C of one sequence, causal
SCALE = HEAD_WIDTH**-0.5
SECTOR = 32  # bytes
WGMMA_FLOPS = 2 * 16 * 16 * WGMMA[0].width  # of one warp's part of an instruction: 16 of the 64 rows, 16 of the summed index


class Counts(NamedTuple):
    """What a rung executes, for each multiply-add where nothing else is said."""

    instructions: float  # of threads
    tensor_cores: float  # the share of instructions that are products of the tensor cores
    asked: float  # bytes of global memory that threads read and write
    moved: float  # bytes of the sectors that these are in
    sectors: float  # for each request
    waves: float  # of shared memory, for each 1,000 multiply-adds
    conflicts: float  # the share of these that bank conflicts cause

    def shown(self) -> tuple[str, ...]:
        """The cells of the table's row, as in COLUMNS."""
        return (
            digits(self.instructions), percent(self.tensor_cores), digits(self.asked), digits(self.moved), digits(self.sectors),
            digits(self.waves), percent(self.conflicts),
        )  # fmt: skip


COLUMNS = ("instructions", "tensor cores", "bytes asked for", "bytes moved", "sectors per request", "waves", "conflicts")


def of_tests(module: str) -> Any:
    """A module of the folder tests/, whose code is not typed as strictly."""
    return import_module(f"tests.{module}")


class Counting:
    """Loads kernels for the PTX machine and adds up what they execute."""

    def __init__(self) -> None:
        self.totals: Counter[str] = Counter()

    def __call__(self, path: Path, names: Sequence[str], architecture: str | None = None) -> Callable[[str], Launch]:
        ptx, lowered = of_tests("ptx_machine.nvrtc").compile_ptx(path, names, architecture or "sm_80", lineinfo=False)
        module = of_tests("ptx_machine.machine").Module(ptx)

        def launcher(name: str) -> Launch:
            def launch(grid: tuple[int, ...], block: tuple[int, ...], args: Sequence[Any], shared_mem: int = 0) -> None:
                self.totals.update(module.launch(lowered[name], grid, block, args, shared=shared_mem, count=True))

            return launch

        return launcher


def counted(rung: Rung, multiply_adds: int, *given: Any, loader: Counting | None = None) -> Counts:
    """Runs a rung on the PTX machine."""
    loader = loader or Counting()
    on_machine = type("CupyOnMachine", (CudaKernels, of_tests("ptx_machine.arrays").HostArrays), {})
    rung.run(on_machine(loader), *given)
    n = loader.totals
    requests = n["global_loads"] + n["global_stores"]
    sectors = n["global_load_sectors"] + n["global_store_sectors"]
    waves, ideal = n["shared_waves"] + n["matrix_load_waves"], n["shared_ideal_waves"] + n["matrix_loads"]
    return Counts(
        instructions=n["thread_instructions"] / multiply_adds,
        tensor_cores=(n["products"] + n["async_product_flops"] / WGMMA_FLOPS) / n["warp_instructions"],
        asked=(n["global_load_bytes"] + n["global_store_bytes"]) / multiply_adds,
        moved=sectors * SECTOR / multiply_adds,
        sectors=sectors / requests,
        waves=1000 * waves / multiply_adds,
        conflicts=(waves - ideal) / waves if waves else 0.0,
    )


@cache
def product_counts() -> dict[str, Counts]:
    """The counts of each rung of products."""
    return {name: counted(rung, *product_problem()) for name, rung in PRODUCTS.items()}


def product_problem() -> tuple[Any, ...]:
    """The multiply-adds, x, weight, offsets, y."""
    offsets = np.linspace(0, ROWS, EXPERTS + 1).astype(np.int32)
    return ROWS * DEPTH * WIDTH, numbers(0, ROWS, DEPTH), numbers(1, EXPERTS, WIDTH, DEPTH), offsets, numbers(2, ROWS, WIDTH)


@cache
def attention_counts() -> dict[str, Counts]:
    """The counts of each rung of attention. A score is C multiply-adds, and so is its part of the result."""
    q, y = numbers(0, 1, TOKENS, HEADS, HEAD_WIDTH), numbers(1, 1, TOKENS, HEADS, HEAD_WIDTH)
    k, v = numbers(2, 1, TOKENS, GROUPS, HEAD_WIDTH), numbers(3, 1, TOKENS, GROUPS, HEAD_WIDTH)
    multiply_adds = 2 * HEAD_WIDTH * HEADS * TOKENS * (TOKENS + 1) // 2
    return {name: counted(rung, multiply_adds, q, k, v, y, SCALE, True) for name, rung in ATTENTIONS.items()}


def numbers(seed: int, *shape: int) -> Array:
    """Bfloat16 numbers."""
    return np.random.default_rng(seed).standard_normal(shape).astype(ml_dtypes.bfloat16)


# ---- the page ----------------------------------------------------------------------------------------------------------------------------


def digits(value: float) -> str:
    """Three significant digits."""
    return f"{value:.{max(0, 2 - int(np.floor(np.log10(value))))}f}" if value else "0"


def percent(value: float) -> str:
    return f"{100 * value:.1f} %" if value else "0"


def table(rungs: dict[str, Rung], counts: dict[str, Counts]) -> str:
    """The counts as Markdown, a row for each rung."""
    rows = [f"| {rung.title}: `{name}` | {' | '.join(counts[name].shown())} |" for name, rung in rungs.items()]
    return "\n".join([f"| rung | {' | '.join(COLUMNS)} |", "| --- |" + " ---: |" * len(COLUMNS), *rows])


def compiler() -> str:
    """The version of the compiler that makes the PTX."""
    nvrtc = of_tests("ptx_machine.nvrtc")
    return "NVRTC " + ".".join(map(str, nvrtc.loaded(nvrtc.installed()[0]).version))


def tables() -> dict[str, str]:
    """What the page has between its marks, by the marks' names."""
    made = f"(PTX of {compiler()}.)"
    return {
        "product": f"{table(PRODUCTS, product_counts())}\n\n{made}",
        "attention": f"{table(ATTENTIONS, attention_counts())}\n\n{made}",
    }


def between_marks(text: str, name: str) -> tuple[int, int]:
    """Where the table of that name is in the page's text."""
    begin, end = (f"<!-- cuda-ladder-{name}:{word} -->\n" for word in ("begin", "end"))
    return text.index(begin) + len(begin), text.index(end)


def write(page: Path) -> None:
    """Puts the tables between their marks."""
    text = page.read_text(encoding="utf-8")
    for name, made in tables().items():
        first, last = between_marks(text, name)
        text = f"{text[:first]}{made}\n{text[last:]}"
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the tables into docs/gpu.md")
    options = parser.parse_args()
    print("\n\n".join(tables().values()))
    if options.write:
        write(PAGE)
