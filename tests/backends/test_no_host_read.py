"""A training step reads nothing on the host but, in the references, the row offsets of experts."""

from contextlib import contextmanager

import numpy as np
import pytest
from cuda_on_cpu.cupy_on_cpu import CpuLoader, CupyOnCpu
from cuda_on_cpu.numba_cpu import NumbaOnCpu
from cuda_on_cpu.numba_cuda_on_cpu import NumbaCudaOnCpu
from strict_backend import StrictBackend

from minimoe import optim
from minimoe.config import ModelConfig, MoEConfig
from minimoe.engine.random import Rng
from minimoe.model.transformer import Transformer
from minimoe.testing.training import batch, tiny_model
from minimoe.training.step import Step
from minimoe_numba.creation import Namespace
from minimoe_numba.tape import written
from minimoe_numba.traced import plain, recorder, traced

READS = ("__bool__", "__int__", "__float__", "__index__", "__complex__", "__array__", "__iter__", "__buffer__", "__dlpack__")


class Watched(StrictBackend):
    """Counts what it was asked to read for offsets, and refuses to read anything else while `closed`."""

    closed = False
    offsets_read = 0

    def to_host(self, array):
        assert not self.closed, "a training step copied an array to the host"
        return super().to_host(array)

    def offsets_on_host(self, offsets):
        self.offsets_read += 1
        return [int(value) for value in super().to_host(offsets)]


@contextmanager
def no_host_reads(backend, monkeypatch):
    kind = type(backend.xp.zeros(()))

    def refuse(name):
        def read(self, *args, **options):
            raise AssertionError(f"a training step read an array on the host through {name}")

        return read

    with monkeypatch.context() as patch:
        for name in READS:
            if hasattr(kind, name):
                patch.setattr(kind, name, refuse(name))
        backend.closed = True
        yield
        backend.closed = False


def train_step(backend, model, optimizer, monkeypatch, rng=None):
    tokens = batch(0)
    inputs, targets = (backend.from_host(np.ascontiguousarray(part)) for part in (tokens[:, :-1], tokens[:, 1:]))
    with no_host_reads(backend, monkeypatch):
        parts = model.loss(inputs, targets, rng=rng)
        parts.total.backward()
        optimizer.step()
        optimizer.zero_grad()
    return parts.total.item()


def test_a_training_step_reads_only_expert_offsets(monkeypatch):
    backend = Watched()
    model = tiny_model(backend, "float64")
    optimizer = optim.AdamW(model.parameters(), lr=1e-2)
    losses = [train_step(backend, model, optimizer, monkeypatch) for _ in range(3)]
    assert losses[2] < losses[0]
    assert backend.offsets_read > 0


@pytest.mark.parametrize("router", ["softmax_topk", "topk_softmax", "switch", "noisy_topk", "sigmoid_bias", "expert_choice"])
def test_no_router_and_no_remedy_reads_the_host(router, monkeypatch):
    backend = Watched()
    remedies = {} if router == "expert_choice" else {"capacity_factor": 1.1, "drop_priority": "probability"}
    moe = MoEConfig(n_experts=4, router=router, jitter=0.1, noise_std=0.1, n_shared_experts=1, d_hidden=8, **remedies)
    sizes = {"d_model": 16, "n_layers": 1, "n_heads": 2, "d_hidden": 8, "max_seq_len": 12, "vocab_size": 19}
    config = ModelConfig(**sizes, dropout=0.1, attention_dropout=0.1, sliding_window=4, moe=moe)
    model = Transformer(config, seed=0, dtype="float32", backend=backend)
    optimizer = optim.AdamW(model.parameters(), lr=1e-2)
    step = backend.from_host(np.array(3, dtype=np.int64))
    assert np.isfinite(train_step(backend, model, optimizer, monkeypatch, rng=Rng(seed=0, step=step)))


def test_micro_batches_with_unequal_numbers_of_targets_are_weighed_without_a_read(monkeypatch):
    backend = Watched()
    model = tiny_model(backend, "float64")
    step = Step(model, optim.AdamW(model.parameters(), lr=1e-2))
    tokens = np.stack([batch(0), batch(1)])
    inputs, targets = tokens[..., :-1], tokens[..., 1:].copy()  # [A,B,T]
    targets[0, :3] = -100
    arrays = step.arrays(0, 1e-2, np.ascontiguousarray(inputs), targets)
    with no_host_reads(backend, monkeypatch):
        weights = step.weights(arrays[3])
        packed = step(*arrays)
    assert backend.to_host(weights).tolist() == [24 / 60, 96 / 60] and np.isfinite(backend.to_host(packed)).all()


def test_the_watch_finds_a_read(monkeypatch):
    backend = Watched()
    x = backend.from_host(np.ones(()))
    with pytest.raises(AssertionError, match="__float__"), no_host_reads(backend, monkeypatch):
        float(x)
    with pytest.raises(AssertionError, match="copied"), no_host_reads(backend, monkeypatch):
        backend.to_host(x)


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
    """The harness's launchers, on NumPy's own arrays: it copies them."""
    made = CpuLoader()(path, names)
    return lambda name: lambda grid, block, args, shared_mem=0: made(name)(grid, block, plain(list(args)), shared_mem=shared_mem)


class RunNumba:
    """The same for Numba-CUDA kernels."""

    def __init__(self, kernel):
        self.launcher = NumbaOnCpu()(kernel)

    def __getitem__(self, sizes):
        return lambda *args: self.launcher[sizes](*plain(args))


@pytest.mark.parametrize("router", ["softmax_topk", "topk_softmax", "switch", "noisy_topk", "sigmoid_bias", "expert_choice"])
@pytest.mark.parametrize("kind", [CupyOnCpu, NumbaCudaOnCpu], ids=["cupy", "numba-cuda"])
def test_no_override_of_a_gpu_backend_reads_the_host(kind, router):
    backend = on_traced_arrays(kind)
    remedies = {} if router == "expert_choice" else {"capacity_factor": 1.1, "drop_priority": "probability"}
    moe = MoEConfig(n_experts=4, router=router, jitter=0.1, noise_std=0.1, n_shared_experts=1, d_hidden=8, **remedies)
    config = ModelConfig(d_model=16, n_layers=1, n_heads=2, d_hidden=8, max_seq_len=12, vocab_size=19, dropout=0.1, moe=moe)
    model = Transformer(config, seed=0, dtype="float32", backend=backend)
    optimizer = optim.AdamW(model.parameters(), lr=1e-2)
    tokens, step = backend.from_host(batch(0)), backend.from_host(np.array(3, dtype=np.int32))
    with written(lambda: None) as tape:
        parts = model.loss(tokens[:, :-1].copy(), tokens[:, 1:].copy(), rng=Rng(seed=0, step=step))
        parts.total.backward()
        optimizer.step(scale=optimizer.clip_scale(optimizer.grad_norm(), 1.0))
    assert tape.why_not == "" and np.isfinite(parts.total.item())
