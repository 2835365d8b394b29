"""Training on the card: a recorded step is the plain one, nothing is copied to the host within it, runs repeat to the bit, and memory that
does not suffice is one line."""

import numpy as np
import pytest
from tiny_runs import tiny, train, untimed, weights_of, write_text

import minimoe as mm
from benchmarks.gpu.lab import COMPUTES
from minimoe.engine.recording import Recorded
from minimoe.errors import UserError
from minimoe.training.listener import Listener
from minimoe.training.surroundings import explain_memory_errors

ROUTERS = ("softmax_topk", "topk_softmax", "switch", "noisy_topk", "sigmoid_bias", "expert_choice")
READS = ("get", "item", "tolist", "__int__", "__float__", "__bool__", "__complex__", "__index__")


class Ears(Listener):
    """Records the messages."""

    def __init__(self):
        self.words = []

    def said(self, text):
        self.words.append(text)


# ---- recorded steps ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keys",
    [
        {"model": {"dropout": 0.1, "attention_dropout": 0.1}},
        {"accumulate": 2, "moe": {"router": "sigmoid_bias", "bias_rate": 0.05}},
        {"moe": {"capacity_factor": 1.0, "jitter": 0.1, "noise_std": 0.1}, "recompute": True},
    ],
    ids=["dropout", "accumulation and sigmoid_bias", "capacity, jitter, noise, recomputed"],
)
def test_a_run_of_recorded_steps_ends_with_the_bytes_of_a_plain_one(backend, keys, tmp_path, monkeypatch):
    text = write_text(tmp_path)
    for dtype in COMPUTES[backend.name]:
        config, found = tiny(text, checkpoint_every=5, backend=backend.name, dtype=dtype, **keys), []
        for recorded in (True, False):
            with monkeypatch.context() as patch:
                if not recorded:
                    patch.setattr("minimoe.training.trainer.Recorded", lambda function, backend, say: function)
                ears = Ears()
                run = train(config, tmp_path, listener=ears)
            assert not [words for words in ears.words if "not repeated" in words]
            found.append((weights_of(run.path, 10), untimed(run.metrics)))
        assert found[0] == found[1]


def routed_model(backend, router, dtype):
    """Return a layer with every remedy that draws random numbers or drops tokens."""
    remedies = {} if router == "expert_choice" else {"capacity_factor": 1.1, "drop_priority": "probability"}
    moe = mm.MoEConfig(n_experts=4, router=router, jitter=0.1, noise_std=0.1, n_shared_experts=1, d_hidden=8, **remedies)
    sizes = {"d_model": 16, "n_layers": 1, "n_heads": 2, "d_hidden": 8, "max_seq_len": 12, "vocab_size": 19}
    config = mm.ModelConfig(**sizes, dropout=0.1, attention_dropout=0.1, sliding_window=4, moe=moe)
    return mm.Transformer(config, seed=0, dtype=dtype, backend=backend)


def step_of(backend, model):
    """Return the trainer's work on the device, from arrays to the loss, and its inputs."""
    xp, optimizer = backend.xp, mm.optim.AdamW(model.parameters(), lr=1e-2)

    def work(step, tokens, targets):
        parts = model.loss(tokens, targets, rng=mm.Rng(0, step))
        parts.total.backward(xp.ones_like(parts.total.data))
        norm = optimizer.grad_norm()
        optimizer.step(scale=optimizer.clip_scale(norm, 1.0), lr=xp.full((), 1e-2, dtype=norm.dtype), ok=xp.isfinite(norm))
        optimizer.zero_grad()
        return parts.total.data

    rows = np.random.default_rng(0).integers(0, 19, (4, 13)).astype(np.int32)
    return work, [backend.from_host(array) for array in (np.zeros((), np.int32), rows[:, :-1].copy(), rows[:, 1:].copy())]


@pytest.mark.parametrize("router", ROUTERS)
def test_a_step_with_any_router_is_recorded_and_gives_what_the_plain_one_gives(backend, router):
    for dtype in COMPUTES[backend.name]:
        losses = []
        for recorded in (True, False):
            work, (step, *inputs) = step_of(backend, routed_model(backend, router, dtype))
            said = []
            call = Recorded(work, backend, said.append) if recorded else work
            found = []
            for _ in range(backend.warm_up + 4):
                found.append(float(backend.to_host(call(step, *inputs))))
                step += 1
            assert said == [] and (not recorded or call.again is not None)
            losses.append(found)
        assert losses[0] == losses[1] and np.isfinite(losses[0]).all()


@pytest.mark.parametrize("router", ROUTERS)
def test_a_step_copies_nothing_to_the_host_and_waits_for_nothing(backend, router, monkeypatch):
    import cupy

    def refuse(*_, **__):
        raise AssertionError("a step read an array on the host, or waited for the device")

    for dtype in COMPUTES[backend.name]:
        work, inputs = step_of(backend, routed_model(backend, router, dtype))
        work(*inputs)  # compiling a kernel, or a library's first call, does not belong to a step
        with monkeypatch.context() as patch:
            for name in READS:
                if hasattr(cupy.ndarray, name):
                    patch.setattr(cupy.ndarray, name, refuse)
            patch.setattr(cupy, "asnumpy", refuse)
            for waiting in (cupy.cuda.Stream, cupy.cuda.ExternalStream, cupy.cuda.Event):  # Device is compiled, and cannot be patched
                patch.setattr(waiting, "synchronize", refuse)
            with pytest.raises(AssertionError, match="read an array"):
                float(inputs[0])
            loss = work(*inputs)
        assert np.isfinite(float(backend.to_host(loss)))


# ---- repeatability, memory ---------------------------------------------------------------------------------------------------------------


def test_training_twice_gives_equal_bytes(backend):
    moe = mm.MoEConfig(n_experts=16, top_k=4, d_hidden=96)
    config = mm.ModelConfig(d_model=256, n_layers=2, n_heads=8, n_kv_heads=4, d_hidden=256, max_seq_len=129, vocab_size=256, moe=moe)
    rows = np.random.default_rng(0).integers(0, 256, (8, 130)).astype(np.int32)
    for dtype in COMPUTES[backend.name]:
        found = []
        for _ in range(2):
            model = mm.Transformer(config, seed=0, dtype=dtype, backend=backend)
            optimizer = mm.optim.AdamW(model.parameters(), lr=1e-3)
            tokens, targets = (backend.from_host(np.ascontiguousarray(part)) for part in (rows[:, :-1], rows[:, 1:]))
            for step in range(5):
                model.loss(tokens, targets, rng=mm.Rng(0, step)).total.backward()
                optimizer.step()
                optimizer.zero_grad()
            found.append({name: backend.to_host(array).tobytes() for name, array in model.state_dict().items()})
        assert [name for name in found[0] if found[0][name] != found[1][name]] == []


def test_memory_that_does_not_suffice_is_one_line_with_what_was_asked_for_and_what_needs_less(backend):
    words = rf"^backend {backend.name}: out of memory: 17,592,186 MB asked for, [\d,]+ MB free; .*train\.batch_size"
    with pytest.raises(UserError, match=words), explain_memory_errors(backend):
        backend.xp.empty(2**44, dtype=backend.xp.int8)
