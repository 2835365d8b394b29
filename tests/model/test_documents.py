"""Documents that share a row: attention stays within them, positions count from their beginnings, and a recorded step does the same."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import minimoe as mm
from minimoe.backend import load
from minimoe.config import LatentConfig, ModelConfig, MoEConfig, TrainConfig
from minimoe.engine.recording import Recorded
from minimoe.model.transformer import Transformer
from minimoe.reference.loss import IGNORE
from minimoe.training.optim import make_optimizer
from minimoe.training.step import Step

LENGTHS = ((3, 1, 6, 2), (12,), (5, 7))  # of the documents in each row of 12
SHAPE = {"d_model": 16, "n_layers": 2, "n_heads": 2, "d_hidden": 12, "max_seq_len": 12, "vocab_size": 11}
ROUTED = MoEConfig(n_experts=4, top_k=2, aux_loss_coef=0.0, z_loss_coef=0.0)
MODELS: dict[str, dict[str, Any]] = {
    "rotary": {}, "learned positions": {"position": "learned"}, "a window": {"sliding_window": 3, "layer_types": ("full", "sliding")},
    "a window wider than a row": {"sliding_window": 1_000_000_000}, "experts": {"moe": ROUTED}, "no positions": {"position": "none"},
    "latent heads": {"mla": LatentConfig(kv_rank=6, nope_dim=4, rope_dim=4, v_dim=4)},
    "both sides": {"causal": False, "head": "mlm", "norm_position": "post", "type_vocab_size": 1, "position": "learned"},
}  # fmt: skip

Ints = npt.NDArray[np.int32]


def rows() -> tuple[Ints, Ints, Ints]:
    """Return tokens, targets and starts [3,12]; each document has a target of its own at every position but the last."""
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, 11, (len(LENGTHS), 12)).astype(np.int32)
    targets, starts = np.full_like(tokens, IGNORE), np.zeros_like(tokens)
    for row, lengths in enumerate(LENGTHS):
        first = 0
        for n in lengths:
            starts[row, first : first + n] = first
            targets[row, first : first + n - 1] = tokens[row, first + 1 : first + n]
            first += n
    return tokens, targets, starts


def summed(model: Transformer, tokens: Ints, targets: Ints, starts: Ints | None = None) -> float:
    """Add the gradient of the summed cross-entropy to the parameters.   -> the sum"""
    count = int((targets != IGNORE).sum())
    if not count:
        return 0.0
    loss = model.loss(tokens, targets, document_starts=starts).cross_entropy * float(count)
    loss.backward()
    return loss.item()


def gradients(model: Transformer) -> list[npt.NDArray[Any]]:
    return [model.backend.to_host(p.grad).copy() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("backend, dtype", [("numpy", "float64"), ("numba", "float64"), ("numba", "float32")])
@pytest.mark.parametrize("kind", MODELS)
def test_the_loss_and_gradients_of_packed_rows_are_those_of_their_documents_alone(kind: str, backend: str, dtype: str) -> None:
    close = 1e-10 if dtype == "float64" else 2e-5
    config = ModelConfig(**{**SHAPE, **MODELS[kind]})
    packed, alone = (Transformer(config, 1, dtype, load(backend)) for _ in range(2))
    tokens, targets, starts = rows()
    together = summed(packed, tokens, targets, starts)
    apart = 0.0
    for row, lengths in enumerate(LENGTHS):
        ends = np.cumsum(lengths)
        for first, last in zip(ends - lengths, ends, strict=True):
            apart += summed(alone, tokens[row : row + 1, first:last], targets[row : row + 1, first:last])
    assert together == pytest.approx(apart, rel=close)
    for one, other in zip(gradients(packed), gradients(alone), strict=True):
        np.testing.assert_allclose(one, other, rtol=close, atol=close)
    assert abs(summed(packed, tokens, targets) - apart) > 1e-4  # without `document_starts` they see each other


def test_a_row_of_one_document_is_computed_as_without_starts() -> None:
    model = Transformer(ModelConfig(**SHAPE), 1)
    tokens = rows()[0]
    plain, one = model(tokens), model.hidden(tokens, document_starts=np.zeros_like(tokens))[0]
    assert np.array_equal(plain.numpy(), model.logits(one).numpy())


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_a_recorded_step_with_documents_gives_the_same_bits_as_a_plain_one(backend: str) -> None:
    weights, figures = [], []
    for records in (False, True):
        config, settings = ModelConfig(**SHAPE, moe=MoEConfig(n_experts=4)), TrainConfig(steps=6, seed=1)
        model = Transformer(config, 1, backend=load(backend))
        step = Step(model, make_optimizer(model.parameters(), settings), seed=1)
        call: Any = Recorded(step, model.backend, pytest.fail, step.state) if records and backend == "numba" else step
        for number in range(6):
            tokens, targets, starts = (np.roll(part, number, axis=0)[None] for part in rows())  # documents lie elsewhere at each step
            packed = call(*step.arrays(number, 1e-2, tokens, targets, starts))
        weights.append([model.backend.to_host(p.data).tobytes() for p in model.parameters()])
        figures.append(model.backend.to_host(packed).tobytes())
    assert weights[0] == weights[1] and figures[0] == figures[1]


def test_starts_that_do_not_fit_are_refused() -> None:
    model, tokens = Transformer(ModelConfig(**SHAPE)), rows()[0]
    with pytest.raises(ValueError, match=r"document_starts run from 12 to 12, the row has 12"):
        model.hidden(tokens, document_starts=np.full_like(tokens, 12))
    with pytest.raises(ValueError, match="go with neither positions nor a cache"):
        model.hidden(tokens, positions=np.arange(12)[None], document_starts=np.zeros_like(tokens))
    with pytest.raises(ValueError, match="go with neither positions nor a cache"):
        model.hidden(tokens[:1], cache=mm.Cache(model), document_starts=np.zeros_like(tokens[:1]))
