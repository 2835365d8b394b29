"""Puts together what is known of each kernel: its machine code, its launch at the typical size, and what executing it counted."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from typing import Any, NamedTuple

from benchmarks.gpu.data import Data
from benchmarks.sass import ptx
from benchmarks.sass.built import Built, assemble, build, numba_ptx
from benchmarks.sass.cards import CARDS, Card, occupancy, roofline
from benchmarks.sass.executed import Machine
from benchmarks.sass.flow import loops_of, main_loop
from benchmarks.sass.launches import Blank, Cupy, Launch, NumbaCuda, Operation, numba_operations, operations
from benchmarks.sass.listing import Counted, counted
from minimoe_cupy.loader import Source

Row = dict[str, Any]
ARCHITECTURES = ("sm_80", "sm_90a")
HMMA_FLOPS = 2 * 16 * 8 * 16  # of mma.sync.m16n8k16, the only shape that kernels use


class Pair(NamedTuple):
    """A launch at the typical size, and the same launch at the small size, executed."""

    operation: Operation
    typical: Launch
    small: Launch


# ---- launches ----------------------------------------------------------------------------------------------------------------------------


def typical_launches(operation: Operation) -> tuple[list[Launch], list[Any]]:
    """The launches at the typical size, of which nothing runs, and the tiles that grouped products chose."""
    notes: list[Launch] = []

    def note(launch: Launch) -> None:
        notes.append(launch.forget())

    backend = Cupy(note, False, operation.wgmma) if operation.backend == "cupy" else NumbaCuda(note, False)
    call = operation.typical(backend, Blank(backend))
    notes.clear()
    if isinstance(backend, Cupy):
        backend.chosen.clear()
    call()
    return notes, backend.chosen if isinstance(backend, Cupy) else []


def small_launches(operation: Operation, tilings: Sequence[Any], machine: Machine) -> list[Launch]:
    """The launches at the small size, executed."""
    notes: list[Launch] = []

    def note(launch: Launch) -> None:
        machine.run(launch)
        notes.append(launch.forget())

    backend = Cupy(note, True, operation.wgmma, tilings) if operation.backend == "cupy" else NumbaCuda(note, True)
    call = operation.small(backend, Data(backend))
    notes.clear()
    call()
    return notes


def pairs(chosen: Iterable[Operation], machine: Machine) -> Iterator[Pair]:
    """Every kernel of these operations, once for each set of optional arguments."""
    seen: set[str] = set()
    for operation in chosen:
        typical, tilings = typical_launches(operation)
        if {launch.key for launch in typical} <= seen:
            continue
        small = small_launches(operation, tilings, machine)
        assert [launch.key for launch in typical] == [launch.key for launch in small], operation.name
        for large, executed in zip(typical, small, strict=True):
            if large.key not in seen:
                seen.add(large.key)
                yield Pair(operation, large, executed)


# ---- machine code ------------------------------------------------------------------------------------------------------------------------


class Wanted(NamedTuple):
    """A source that is to be compiled for an architecture, with all of its kernels as the backend does: each one's code depends on them."""

    source: Source
    architecture: str


def wanted_of(launches: Iterable[Launch]) -> list[Wanted]:
    """What is to be compiled for launches of CUDA C."""
    sources = dict.fromkeys(launch.source for launch in launches if launch.source is not None)
    return [Wanted(source, each) for source in sources for each in ARCHITECTURES if source.architecture in (None, each)]


def compiled(wanted: Wanted) -> dict[tuple[str, str], tuple[Built, Counted, float]]:
    """-> by kernel and architecture: the machine code, its counts, its instructions over those of its PTX"""
    made = build(wanted.source, wanted.source.names, wanted.architecture)
    return {(name, wanted.architecture): described(built) for name, built in made.items()}


def described(built: Built) -> tuple[Built, Counted, float]:
    counts = counted(built.code)
    return built, counts, expansion(built, counts)


def expansion(built: Built, counts: Counted) -> float:
    """Instructions of machine code for each of PTX: per mma.sync in the main loop if it has any, else in the whole kernel.

    (A loop with wgmma is that of the warps that multiply; most instructions are those of the warps that copy.)
    """
    code = ptx.kernel(built.ptx, built.lowered)
    products = {i for i, each in enumerate(code) if each.opcode.startswith("mma.sync")}
    loop = main_loop(loops_of(code), products)
    if loop is not None and counts.loop_tensor:
        return counts.loop / counts.loop_tensor / (len(loop.body) / len(products.intersection(loop.body)))
    return len(built.code) / len(code)


def all_compiled(launches: Sequence[Launch], processes: int) -> dict[tuple[Any, str], tuple[Built, Counted, float]]:
    """Machine code of all kernels, by kernel (its C++ name, or Numba's function with its argument types) and architecture."""
    found: dict[tuple[Any, str], tuple[Built, Counted, float]] = {}
    with ProcessPoolExecutor(processes) as pool:
        for made in pool.map(compiled, wanted_of(launches)):
            found |= made
    for launch in launches:
        if launch.source is None:
            for architecture in ARCHITECTURES:
                key = code_key(launch), architecture
                if key not in found:
                    found[key] = described(assemble(numba_ptx(launch.function, launch.known["kinds"], architecture), architecture))
    return found


def code_key(launch: Launch) -> Any:
    return launch.kernel if launch.source is not None else (launch.kernel, launch.known["kinds"])


# ---- rows --------------------------------------------------------------------------------------------------------------------------------


def rows(processes: int, chosen: Iterable[Operation] | None = None) -> list[Row]:
    """A row for each kernel of the operations, by default of all of both backends."""
    found = list(pairs(chosen or (*operations(), *numba_operations()), Machine(processes)))
    code = all_compiled([pair.typical for pair in found], processes)
    return [
        row_of(pair, {a: code[code_key(pair.typical), a] for a in ARCHITECTURES if (code_key(pair.typical), a) in code}) for pair in found
    ]


def row_of(pair: Pair, code: dict[str, tuple[Built, Counted, float]]) -> Row:
    """Everything about one kernel, as JSON."""
    operation, launch, small = pair
    scale = scale_of(launch, small)
    row: Row = {
        "key": launch.key, "backend": operation.backend, "operation": operation.name, "dtype": operation.dtype,
        "kernel": launch.kernel, "grid": list(launch.grid), "threads": launch.threads, "shared_asked": launch.shared,
        "bytes": launch.bytes, "flops": launch.flops, "scale": scale, "counted": small.counters,
        "code": {
            architecture: {
                "registers": built.registers, "shared": built.shared, "stack": built.stack, "spilled": built.spilled,
                "per_ptx": round(per_ptx, 4), **counts.as_dict(),
            }
            for architecture, (built, counts, per_ptx) in code.items()
        },
        "occupancy": {}, "prediction": {},
    }  # fmt: skip
    for card in CARDS:
        if card.architecture in code:
            built, _, _ = code[card.architecture]
            row["occupancy"][card.name] = asdict(occupancy(card, launch.threads, built.registers, built.shared + launch.shared))
            row["prediction"][card.name] = predicted(row, card, launch.bytes, launch.flops, scale)
    return row


def scale_of(launch: Launch, small: Launch) -> float:
    """How many times the work of the small launch a launch is: by its FLOPs, or without products by its bytes."""
    return launch.flops / small.flops if launch.flops else launch.bytes / small.bytes


def predicted(row: Row, card: Card, moved: float, flops: float, scale: float) -> Row:
    """The least time of a launch on a card, in microseconds."""
    counters, code = row["counted"], row["code"][card.architecture]
    tensor = (counters["products"] * HMMA_FLOPS + counters["async_product_flops"]) * scale
    instructions = counters["warp_instructions"] * code["per_ptx"] * scale
    found = roofline(card, moved, tensor, 0.0 if tensor else flops, instructions)
    return {"us": round(found.seconds * 1e6, 3), "bound": found.bound}
