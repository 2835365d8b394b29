"""What the level "host reads" does not see: unequal micro-batches, and the overrides of the GPU backends, run on the processor."""

import numpy as np
import pytest
from ptx_machine.cupy_on_ptx import CupyOnPtx, PtxLoader
from ptx_machine.numba_on_ptx import NumbaCudaOnPtx, NumbaOnPtx
from strict_backend import StrictBackend

from minimoe import optim
from minimoe.config import ModelConfig, MoEConfig
from minimoe.engine.random import Rng
from minimoe.model.transformer import Transformer
from minimoe.reference import routers
from minimoe.reference.loss import IGNORE
from minimoe.testing.host_reads import note_reads
from minimoe.testing.small_models import micro_batches, small_step
from minimoe_numba.creation import Namespace
from minimoe_numba.tape import written
from minimoe_numba.traced import plain, recorder, traced


def test_micro_batches_with_unequal_numbers_of_targets_are_weighed_without_a_read():
    backend = StrictBackend()
    step = small_step(backend, "float64")
    inputs, targets = micro_batches(0)  # [A,B,T]
    targets[0, :2] = IGNORE
    arrays = step.arrays(0, 1e-2, inputs, targets)
    with note_reads(backend) as reads:
        weights = step.weights(arrays[3])
        packed = step(*arrays)
    assert backend.to_host(weights).tolist() == [8 / 16, 24 / 16] and np.isfinite(backend.to_host(packed)).all()
    assert reads.found == []


# ---- the overrides of the GPU backends, executed on the processor -----------------------------------------------------------------------


def on_traced_arrays(kind):
    """A backend on arrays that report when a number in them is read (minimoe_numba/traced.py)."""

    class OnTraced(kind):
        xp = Namespace()

        def from_host(self, array):
            return traced(np.array(array))

        def to_host(self, array):
            if recorder.tape is not None:
                recorder.tape.refuse("an array was copied to the host")
            return plain(array)

        def contiguous(self, x):
            return x if x.flags.c_contiguous else x.copy()

        def host_view(self, array):
            return None

    backend = OnTraced()
    backend.loader, backend._run = launch_cuda, RunNumba
    return backend


def launch_cuda(path, names, architecture=None):
    """The machine's launchers, on NumPy's own arrays."""
    made = PtxLoader()(path, names)
    return lambda name: lambda grid, block, args, shared_mem=0: made(name)(grid, block, plain(list(args)), shared_mem=shared_mem)


class RunNumba:
    """The same for Numba-CUDA kernels."""

    def __init__(self, kernel):
        self.launcher = NumbaOnPtx()(kernel)

    def __getitem__(self, sizes):
        return lambda *args: self.launcher[sizes](*plain(args))


@pytest.mark.parametrize("router", routers.ROUTERS)
@pytest.mark.parametrize("kind", [CupyOnPtx, NumbaCudaOnPtx], ids=["cupy", "numba-cuda"])
def test_no_override_of_a_gpu_backend_reads_the_host(kind, router):
    backend = on_traced_arrays(kind)
    remedies = {} if router == "expert_choice" else {"capacity_factor": 1.1, "drop_priority": "probability"}
    moe = MoEConfig(n_experts=4, router=router, jitter=0.1, noise_std=0.1, n_shared_experts=1, d_hidden=8, **remedies)
    config = ModelConfig(d_model=16, n_layers=1, n_heads=2, d_hidden=8, max_seq_len=12, vocab_size=19, dropout=0.1, moe=moe)
    model = Transformer(config, seed=0, dtype="float32", backend=backend)
    optimizer = optim.AdamW(model.parameters(), lr=1e-2)
    tokens, step = backend.from_host(micro_batches(0)[0][0]), backend.from_host(np.array(3, dtype=np.int32))
    with written(lambda: None) as tape:
        parts = model.loss(tokens[:, :-1].copy(), tokens[:, 1:].copy(), rng=Rng(seed=0, step=step))
        parts.total.backward()
        optimizer.step(scale=optimizer.clip_scale(optimizer.grad_norm(), 1.0))
    assert tape.why_not == "" and np.isfinite(parts.total.item())
