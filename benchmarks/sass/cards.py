"""What a card can hold and do, as published, and two sums with it: occupancy and the roofline.

Limits per multiprocessor: NVIDIA, CUDA C++ Programming Guide, "Compute Capabilities", 8.0 and 9.0; how registers and shared memory are
handed out: the occupancy calculator of the CUDA Toolkit. Peaks: the data sheets of the A100 80 GB SXM, the H100 SXM and the H200 SXM,
without sparsity. The clock is the one to which the published rate of float32 belongs.
"""

from dataclasses import dataclass

WARP = 32
SCHEDULERS = 4  # of a multiprocessor: each issues one instruction of one warp per cycle
WARP_REGISTERS = 256  # a warp's registers are handed out in units of so many
SHARED_UNIT = 128  # bytes
SYSTEM_SHARED = 1024  # bytes of shared memory that CUDA takes in each block


@dataclass(frozen=True)
class Card:
    """One model of card."""

    name: str
    architecture: str
    processors: int
    warps: int  # per multiprocessor, and so on
    blocks: int
    registers: int
    shared: int  # bytes
    clock: float  # Hz
    bandwidth: float  # bytes per second
    tensor: float  # FLOPs per second in bf16 on the tensor cores
    fma: float  # in float32

    @property
    def issue(self) -> float:
        """Warp instructions per second, of the whole card."""
        return self.processors * SCHEDULERS * self.clock


A100 = Card("A100", "sm_80", 108, 64, 32, 65_536, 164 * 1024, 1.41e9, 2.039e12, 312e12, 19.5e12)
H100 = Card("H100", "sm_90a", 132, 64, 32, 65_536, 228 * 1024, 1.98e9, 3.35e12, 989.4e12, 66.9e12)
H200 = Card("H200", "sm_90a", 132, 64, 32, 65_536, 228 * 1024, 1.98e9, 4.8e12, 989.4e12, 66.9e12)
CARDS = (A100, H100, H200)


@dataclass(frozen=True)
class Occupancy:
    """How many blocks a multiprocessor holds at once, and what keeps it from holding more."""

    blocks: int
    warps: int
    limit: str


def occupancy(card: Card, threads: int, registers: int, shared: int) -> Occupancy:
    """The blocks of `threads` threads, with `shared` bytes each, that a multiprocessor holds."""
    warps = up(threads, WARP) // WARP
    units = up(registers * WARP, WARP_REGISTERS)
    most = {
        "warps": card.warps // warps,
        "blocks": card.blocks,
        "registers": card.registers // units // SCHEDULERS * SCHEDULERS // warps,  # a scheduler's warps share its quarter of them
        "shared memory": card.shared // up(shared + SYSTEM_SHARED, SHARED_UNIT),
    }
    limit = min(most, key=lambda name: most[name])
    return Occupancy(most[limit], most[limit] * warps, limit)


@dataclass(frozen=True)
class Prediction:
    """The least time that a card needs, and for what."""

    seconds: float
    bound: str


def roofline(card: Card, moved: float, tensor_flops: float, fma_flops: float, instructions: float) -> Prediction:
    """The longest of the times that a card needs for so many bytes, FLOPs and instructions of warps, each at its peak rate."""
    needs = {
        "memory": moved / card.bandwidth,
        "tensor cores": tensor_flops / card.tensor,
        "multipliers": fma_flops / card.fma,
        "issue": instructions / card.issue,
    }
    bound = max(needs, key=lambda name: needs[name])
    return Prediction(needs[bound], bound)


def up(number: int, unit: int) -> int:
    """The next multiple of a unit."""
    return -(-number // unit) * unit
