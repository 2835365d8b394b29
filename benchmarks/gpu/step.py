"""A whole training step of a small Mixture of Experts: forward, backward, clipping, AdamW; its loss stays on the device.

minimoe's is the trainer's (`minimoe/training/step.py`), recorded once as a CUDA graph and repeated: in bfloat16 beside float32 weights
with `cupy`, in float32 with `numba-cuda`, which has no other kernels. All sides train on the same tokens.
"""

from functools import partial
from typing import Any

from benchmarks.gpu.lab import BACKENDS, COMPUTES, Lab
from benchmarks.gpu.models import FilledTransformer
from benchmarks.gpu.sides import Made, Side
from benchmarks.gpu.torch_sides import mixtral_step, torch_step
from benchmarks.models import BYTES, Case
from minimoe.backend import Array, use_backend
from minimoe.config import ModelConfig, MoEConfig
from minimoe.engine.recording import Recorded
from minimoe.optim import AdamW
from minimoe.training.metrics import LOSS
from minimoe.training.step import Step

COMPILED, GRAPHS = "default", "reduce-overhead"  # torch.compile's modes: the second also makes CUDA graphs


def small(d: int, layers: int, heads: int, kv: int, hidden: int, e: int, k: int, seq: int, batch: int) -> Case:
    """A model over bytes that transformers' Mixtral has too."""
    moe = MoEConfig(n_experts=e, top_k=k, d_hidden=hidden, aux_loss_coef=0.01, z_loss_coef=0.0)
    shape: dict[str, Any] = {"d_model": d, "n_layers": layers, "n_heads": heads, "n_kv_heads": kv, "d_hidden": hidden, "max_seq_len": seq}
    return Case("small MoE", ModelConfig(**shape, vocab_size=BYTES, moe=moe), seq, batch)


TARGET = small(512, 8, 8, 4, 1024, 8, 2, 512, 16)
CASES = {"full": [TARGET], "quick": [TARGET], "tiny": [small(16, 1, 2, 1, 16, 4, 2, 6, 2)]}


def sizes_of(case: Case) -> dict[str, int]:
    """The sizes of a model, for its rows."""
    m, moe = case.model, case.model.moe
    assert moe is not None
    sizes = {"D": m.d_model, "L": m.n_layers, "Q": m.n_heads, "G": m.kv_heads, "H": m.expert_hidden, "E": moe.n_experts, "K": moe.k}
    return {**sizes, "V": BYTES, "T": case.seq_len, "B": case.batch}


def step_sides(case: Case) -> list[Side]:
    """minimoe's backends, each in the narrowest dtype of its kernels; peers in bfloat16, and an eager one in float32 for numba-cuda.

    The most important come first.
    """
    first, other = (
        Side(f"minimoe, {backend}", "minimoe", COMPUTES[backend][0], partial(minimoe_step, case, backend, COMPUTES[backend][0]))
        for backend in BACKENDS
    )
    peers = []
    for kind, style, dtype, mode in (
        ("compiled", "grouped", "bfloat16", COMPILED),
        ("compiled", "grouped", "bfloat16", GRAPHS),
        ("eager", "loop", "bfloat16", ""),
        ("eager", "grouped", "bfloat16", ""),
        ("eager", "sorted", "float32", ""),
        ("compiled", "sorted", "bfloat16", COMPILED),
    ):
        name = f"PyTorch {kind}, {style}" + (", CUDA graphs" if mode == GRAPHS else "")
        peers.append(Side(name, kind, dtype, partial(torch_step, case, style, dtype, mode), ("torch",)))
    for implementation in ("grouped_mm", "eager"):
        make = partial(mixtral_step, case, implementation, "bfloat16")
        peers.append(Side(f"transformers Mixtral, {implementation}", "eager", "bfloat16", make, ("torch", "transformers")))
    return [first, *peers[:4], other, *peers[4:]]


def minimoe_step(case: Case, name: str, dtype: str, lab: Lab) -> Made:
    """The step of `minimoe/training/step.py`; its arguments stay on the device."""
    backend = lab.backend(name)
    model = FilledTransformer(case.model, dtype=dtype, backend=backend)
    whole = Step(model, AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1), grad_clip=1.0)
    notes: list[str] = []
    recorded = Recorded(whole, backend, notes.append, whole.state)
    number, lr, tokens, targets = whole.arrays(0, 1e-3, *(part[None] for part in case.random_batch()))  # [], [], [1,B,T], [1,B,T]

    def call() -> Array:
        with use_backend(backend):
            number[...] += 1
            return recorded(number, lr, tokens, targets)[LOSS]

    return Made(call, notes)
