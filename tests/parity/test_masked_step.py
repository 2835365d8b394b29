"""A step of masked language modelling in several micro-batches, beside PyTorch's gradient of one batch of all their sequences."""

import numpy as np
import pytest
import torch
from parity.peers import NUMPY, close
from parity.pretrained_models import VOCAB, make

from minimoe.config import TrainConfig
from minimoe.optim import make_optimizer
from minimoe.pretrained.opening import open_folder
from minimoe.pretrained.saving import FamilyTensors
from minimoe.training.metrics import unpack
from minimoe.training.step import Step

pytestmark = pytest.mark.parity
BATCH, LENGTH = 8, 16
COUNTS = (5, 0, 1, 3, 2, 9, 1, 16)  # targets of each sequence


def hidden_batch():
    """Token ids and targets [8,16]; those that are no targets are -100."""
    rng = np.random.default_rng(3)
    tokens, targets = rng.integers(1, VOCAB, (2, BATCH, LENGTH)).astype(np.int32)
    for row, count in enumerate(COUNTS):
        targets[row, rng.permutation(LENGTH)[count:]] = -100
    return tokens, targets


def their_step(tokens, targets, folder):
    """The loss of BertForMaskedLM over all sequences at once, and its gradients by name; the model is saved as a folder."""
    model = make("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model.save_pretrained(folder)
    loss = model(torch.tensor(tokens).long(), labels=torch.tensor(targets).long()).loss
    loss.backward()
    return loss.item(), {name: parameter.grad.numpy().copy() for name, parameter in model.named_parameters() if parameter.grad is not None}


def our_step(tokens, targets, folder, accumulate):
    """The loss that a step reports and the gradients that it leaves, under BERT's names."""
    model = open_folder(folder, backend=NUMPY)
    settings = TrainConfig(batch_size=BATCH // accumulate, seq_len=LENGTH, accumulate=accumulate, warmup_steps=0, grad_clip=0.0)
    step = Step(model, make_optimizer(model.parameters(), settings), seed=0, grad_clip=0.0, recompute=False)
    shape = (accumulate, BATCH // accumulate, LENGTH)
    packed = step(*step.arrays(0, 0.0, tokens.reshape(shape), targets.reshape(shape)))
    for _, parameter in model.named_parameters():
        parameter.source, parameter.data = None, parameter.grad
    tensors = FamilyTensors(model, model.provenance.family, "float32")
    return unpack(packed.tolist(), 0, 0), {name: tensors.produce(name) for name in tensors.specs}


@pytest.mark.parametrize("accumulate", [1, 2, 4, 8])
def test_micro_batches_with_unequal_targets_have_the_loss_and_gradient_of_one_batch_in_pytorch(accumulate, tmp_path):
    tokens, targets = hidden_batch()
    loss, theirs = their_step(tokens, targets, tmp_path / "bert")
    figures, ours = our_step(tokens, targets, tmp_path / "bert", accumulate)
    assert figures["loss"] == pytest.approx(loss, rel=1e-5)
    compared = theirs.keys() & ours.keys()
    assert len(compared) > 30, "of every layer"
    for name in sorted(compared):
        close(ours[name], theirs[name], 1e-4, name, floor=1e-3)  # a key bias changes no attention: its gradient is rounding
    norm = np.sqrt(sum(float((gradient.astype(np.float64) ** 2).sum()) for gradient in theirs.values()))
    assert figures["grad_norm"] == pytest.approx(norm, rel=1e-4)
