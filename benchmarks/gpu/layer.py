"""The MoE layer, forward and backward, with router and balance loss: minimoe's beside PyTorch's styles and transformers' Mixtral.

Every side begins with float32 weights, computes in the row's dtype, and ends with float32 gradients of the weights and that of x.
minimoe's is measured recorded, as in training (`minimoe.engine.recording`), and without; PyTorch's grouped style can be recorded too.
"""

from functools import partial

from benchmarks.gpu.data import Data
from benchmarks.gpu.lab import BACKENDS, COMPUTES, Lab
from benchmarks.gpu.models import FilledMoE
from benchmarks.gpu.problems import Row
from benchmarks.gpu.sides import Made, Side
from benchmarks.gpu.torch_sides import How, Layer, Style, mixtral_layer, torch_layer
from minimoe.backend import Array, use_backend
from minimoe.engine.backward import backward
from minimoe.engine.recording import Recorded
from minimoe.engine.tensor import Tensor

CASES = {
    "full": [
        Layer(16_384, 2048, 2048, 8, 2, "bfloat16"),
        Layer(8192, 2048, 1024, 64, 8, "bfloat16"),
        Layer(4096, 1024, 1024, 8, 2, "float32"),
    ],
    "quick": [Layer(16_384, 2048, 2048, 8, 2, "bfloat16")],
    "tiny": [Layer(13, 16, 24, 4, 2, "bfloat16"), Layer(13, 16, 24, 4, 2, "float32")],
}
STYLES: list[tuple[str, Style, How]] = [
    ("compiled", "grouped", "compiled"), ("eager", "loop", "eager"), ("CUDA graph", "grouped", "graph"), ("eager", "grouped", "eager"),
    ("eager", "sorted", "eager"),
]  # fmt: skip


def layer_sides(layer: Layer) -> list[Side]:
    """All sides that can compute it, the most important first: minimoe's backends with kernels for the dtype, and the peers."""
    dtype, memory = layer.dtype, layer.memory
    found, plain = [], []
    for backend in BACKENDS:
        if dtype in COMPUTES[backend]:
            recorded, as_it_comes = (partial(minimoe_layer, layer, backend, repeated) for repeated in (True, False))
            found.append(Side(f"minimoe, {backend}", "minimoe", dtype, recorded, memory=memory))
            plain.append(Side(f"minimoe, {backend}, not recorded", "minimoe", dtype, as_it_comes, memory=memory))
    for name, style, how in STYLES:
        kind = "compiled" if how == "compiled" else "eager"
        found.append(Side(f"PyTorch {name}, {style}", kind, dtype, partial(torch_layer, layer, style, how), ("torch",), memory))
    for implementation in ("grouped_mm", "eager"):
        make = partial(mixtral_layer, layer, implementation)
        found.append(Side(f"transformers Mixtral, {implementation}", "eager", dtype, make, ("torch", "transformers"), memory))
    return found + plain


def goal_of(layer: Layer) -> Row:
    """The target of a case, as fields of its rows; empty if it has none."""
    return {"goal": f"layer, E {layer.e}"} if layer.dtype == "bfloat16" else {}


def minimoe_layer(layer: Layer, name: str, recorded: bool, lab: Lab) -> Made:
    """Forward and backward of minimoe.MoE."""
    backend = lab.backend(name)
    data = Data(backend)
    module = FilledMoE(layer.d, layer.h, moe=layer.moe, dtype=layer.dtype, backend=backend)
    x, dy = (data.normal(1, layer.n, layer.d, dtype=layer.dtype) for _ in range(2))
    parameters = module.parameters()

    def work() -> Array:
        y, stats = module(Tensor(x, backend, requires_grad=True))
        loss = stats.loss
        backward([y, loss], [dy, backend.xp.ones_like(loss.data)])
        for parameter in parameters:  # the next gradient overwrites this one
            parameter.grad_is_zero = True
        return backend.xp.asarray(loss.data)

    notes: list[str] = []
    function = Recorded(work, backend, notes.append) if recorded else work

    def call() -> Array:
        with use_backend(backend):
            return function()

    return Made(call, notes)
