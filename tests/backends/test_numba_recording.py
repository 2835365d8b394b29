"""Steps that the backend `numba` plays from a tape: they have the same bits as plain steps, and a message says if there can be no tape."""

import copy
import pickle
import re
import time

import numpy as np
import pytest
from tiny_runs import tiny, train, untimed, weights_of, write_text

import minimoe as mm
from minimoe.engine.recording import Recorded
from minimoe_numba import NumbaBackend
from minimoe_numba.machine import machine
from minimoe_numba.tape import size_class, written
from minimoe_numba.traced import Traced, plain, recorder

STEPS = 10


class Plain(NumbaBackend):
    """Records nothing."""

    def record(self, work, say):
        work()


class Counts(NumbaBackend):
    """Counts what it records, and what is played."""

    def __init__(self):
        super().__init__()
        self.played, self.said = 0, []

    def record(self, work, say):
        again = super().record(work, lambda why: (self.said.append(why), say(why)))

        def counted():
            self.played += 1
            again()

        return again and counted


RUNS = {
    "default": {},
    "accumulation and dropout": {"accumulate": 2, "model": {"dropout": 0.1}},
    "sigmoid_bias": {"moe": {"router": "sigmoid_bias", "bias_rate": 0.05, "n_shared_experts": 1}},
    "capacity, jitter and noise": {"moe": {"capacity_factor": 1.0, "jitter": 0.1, "noise_std": 0.5}},
    "noisy_topk": {"moe": {"router": "noisy_topk"}},
    "expert_choice": {"moe": {"router": "expert_choice", "aux_loss_coef": 0.0}},
    "recomputed": {"recompute": True},
    "lion": {"optimizer": "lion"},
    "sgd": {"optimizer": "sgd"},
    "muon": {"optimizer": "muon"},
    "layer norm, gelu, learned positions, biases": {
        "model": {
            "norm": "layer",
            "activation": "gelu",
            "position": "learned",
            "bias": True,
            "attention_bias": True,
            "tie_embeddings": True,
        }
    },
    "dense": {"dense": True},
    "windows, normalised heads": {"model": {"sliding_window": 4, "qk_norm": "head"}},
}


@pytest.mark.parametrize("keys", RUNS.values(), ids=RUNS)
def test_a_played_run_ends_with_the_same_bytes(keys, tmp_path, monkeypatch):
    runs, text = [], write_text(tmp_path)
    for backend in (Plain(), counts := Counts()):
        monkeypatch.setattr("minimoe.training.trainer.load", lambda name, backend=backend: backend)
        runs.append(train(tiny(text, steps=STEPS, checkpoint_every=5, **keys), tmp_path))
    plain_run, played = runs
    assert weights_of(plain_run.path, STEPS) == weights_of(played.path, STEPS)
    assert untimed(plain_run.metrics) == untimed(played.metrics)
    assert counts.said == [] and counts.played == STEPS - NumbaBackend.warm_up - 1


@pytest.mark.parametrize(
    "dense, why", [(False, "an array was copied to the host"), (True, "the shape of the result of unique depends on numbers")]
)
def test_references_that_read_on_the_host_train_as_they_come(tmp_path, monkeypatch, dense, why):
    """In float64 experts are the reference's, which loops over them, and the embedding's gradient sorts its ids."""
    backend = Counts()
    monkeypatch.setattr("minimoe.training.trainer.load", lambda name: backend)
    run = train(tiny(write_text(tmp_path), steps=4, dtype="float64", dense=dense), tmp_path)
    assert backend.said == [why] and backend.played == 0
    assert len(run.metrics) == 4


# ---- what cannot be on a tape ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function, words",
    [
        (lambda x: x * float(x[0]), r"a number was read on the host \(float\)"),
        (lambda x: x if x[0] > 0 else -x, r"a number was read on the host \(bool\)"),
        (lambda x: x[x > 1.0], "the shape of the result of __getitem__ depends on numbers"),
        (lambda x: x[np.nonzero(x > 1.0)], "the shape of the result of nonzero depends on numbers"),
        (lambda x: x[np.unique(x, return_index=True)[1]], "the shape of the result of unique depends on numbers"),
        (lambda x: x * np.array_equal(x, x * 1.0), "array_equal returned a number on the host"),
        (lambda x: x + np.ones(3, np.float32), "add was handed an array that is not traced"),
        (lambda x: x + NUMBA.xp.asarray(np.ones(3, np.float32)), "asarray was handed an array that is not traced"),
        (lambda x: x + len(x.tobytes()), r"a number was read on the host \(tobytes\)"),
        (lambda x: INNER(x) + 1.0, "a recorded step is part of it"),
        (lambda x: NUMBA.softmax(np.ones((2, 3), np.float32)) + x[0], r"a kernel was handed an array that is not traced, float32\[2, 3\]"),
        (lambda x: x + NUMBA.from_host(np.ones(3, np.float32)), "an array came from the host"),
        (lambda x: x * NUMBA.to_host(x), "an array was copied to the host"),
    ],
)
def test_what_cannot_be_repeated_is_said_and_computed(function, words):
    said, backend = [], NUMBA
    recorded = Recorded(function, backend, said.append)
    for i in range(1, 5):
        x = np.arange(i, i + 3, dtype=np.float32)
        assert np.array_equal(recorded(backend.from_host(x)), plain(function(backend.from_host(x))))
    assert len(said) == 1 and re.search(words, said[0])
    assert recorder.tape is None


NUMBA = NumbaBackend()
INNER = Recorded(lambda x: x * 2.0, NUMBA, print)


def test_a_function_that_raises_while_it_is_recorded_can_be_called_again():
    fails = [True]

    def function(x):
        if fails and x[0].dtype and recorder.tape is not None:
            fails.clear()
            raise KeyboardInterrupt
        return x + 1.0

    recorded = Recorded(function, NUMBA, pytest.fail)
    x = NUMBA.from_host(np.ones(3, np.float32))
    recorded(x)
    with pytest.raises(KeyboardInterrupt):
        recorded(x)
    assert recorder.tape is None
    assert [float(recorded(x)[0]) for _ in range(3)] == [2.0, 2.0, 2.0] and recorded.again is not None


def test_threads_that_fell_asleep_are_woken_by_a_played_step():
    pool = machine().pool
    recorded = Recorded(lambda x: NUMBA.softmax(x), NUMBA, pytest.fail)
    x = NUMBA.from_host(np.random.default_rng(0).standard_normal((4096, 64)).astype(np.float32))
    first = recorded(x)
    recorded(x)
    for _ in range(100):
        if all(worker.asleep for worker in pool.workers):
            break
        time.sleep(0.05)
    assert all(worker.asleep for worker in pool.workers)
    assert np.array_equal(recorded(x), first) and not any(worker.asleep for worker in pool.workers)


def test_state_is_numpys_own_array_elsewhere():
    """Pickled, saved and copied."""
    x = NUMBA.from_host(np.arange(6, dtype=np.float32))
    assert type(pickle.loads(pickle.dumps(x))) is np.ndarray
    assert copy.deepcopy(x[2:]).owner is None and np.array_equal(copy.deepcopy(x), x)


def test_ids_and_targets_out_of_range_are_refused_or_harmless():
    model = mm.Transformer(mm.ModelConfig(d_model=16, n_layers=1, n_heads=2, d_hidden=8, max_seq_len=8, vocab_size=19), backend=NUMBA)
    good, bad = (NUMBA.from_host(np.full((1, 8), value, np.int32)) for value in (1, 10**7))
    with pytest.raises(ValueError, match="targets run from 10000000 to 10000000, the classes are 19"):
        model.loss(good, bad)
    with pytest.raises(ValueError, match="token ids run from"):
        model.loss(bad, good)
    logits, targets = np.ones((3, 5), np.float32), np.array([1, 10**6, -(10**6)], np.int32)
    total, _, lse = NUMBA.cross_entropy(logits, targets)
    gradient = NUMBA.cross_entropy_backward(np.float32(1.0), logits, targets, lse)
    assert np.isnan(total) and gradient[0, 1] < 0 and (gradient[1:] > 0).all()


# ---- parts -------------------------------------------------------------------------------------------------------------------------------


def step_of_numpy(x, y):
    """Views, copies, functions with several results, in place and of lists, methods, reductions to a number."""
    xp = NUMBA.xp
    total = xp.zeros((3, 4), dtype=xp.float32)
    total += x
    total[1] = y[:4]
    left, right = xp.split(total, 2, axis=1)
    turned = xp.permute_dims(total, (1, 0)).reshape(-1)
    parts = xp.stack([left, right * 2.0], axis=0)
    order = xp.argsort(y)
    best = xp.take(y, order[-2:])
    total.T[...] = total.T + 1.0
    low = np.sum(parts) / xp.max(turned)
    count = xp.astype(xp.arange(4), xp.float32) + xp.full((), 2.0, dtype=xp.float32)
    fresh = xp.where(y > low, y, xp.ones_like(y)).copy()
    fresh.fill(3.0)
    return xp.concat([turned, xp.reshape(parts, (-1,)), best, count * xp.mean(total), fresh, xp.reshape(low, (1,)), xp.cumulative_sum(y)])


def test_what_numpy_computes_of_traced_arrays_is_played_again():
    recorded = Recorded(step_of_numpy, NUMBA, pytest.fail)
    draw = np.random.default_rng(0)
    for _ in range(6):
        x, y = draw.standard_normal((3, 4)).astype(np.float32), draw.standard_normal(5).astype(np.float32)
        x, y = NUMBA.from_host(x), NUMBA.from_host(y)
        assert np.array_equal(recorded(x, y), step_of_numpy(x, y))
    assert recorded.again is not None


def test_memory_is_used_again_when_no_view_of_it_is_left():
    with written(lambda: None) as tape:
        memory = tape.memory
        first = memory.array((4, 5), np.float32)
        view = first[1:].T
        place = first.ctypes.data
        del first
        assert memory.array((20,), np.float32).ctypes.data != place and len(memory.blocks) == 2
        del view
        assert memory.array((19,), np.float32).ctypes.data == place and len(memory.blocks) == 2
    assert place % 64 == 0


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 10_000, 2**20 + 1, 10**9])
def test_a_block_is_at_most_an_eighth_larger_than_what_was_asked_for(size):
    assert size <= size_class(size) <= max(512, size * 9 / 8)


def test_a_tape_needs_about_the_memory_of_its_step():
    """Ten temporaries one after another are one block, or two."""
    with written(lambda: None) as tape:
        x = NUMBA.xp.ones((100, 100), dtype=np.float32)
        for _ in range(10):
            x = x + 1.0
    assert sum(block.nbytes for block in tape.memory.blocks) < 3 * x.nbytes and isinstance(x, Traced)
