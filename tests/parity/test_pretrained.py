"""Folders of transformers' families, written by transformers: the opened model has its logits, its gradients and its balance loss."""

import copy

import numpy as np
import pytest
import torch
from parity.peers import close
from parity.pretrained_models import CASES, FIRST, VOCAB, build, inputs_of, make, opened, our_tensors, outputs, saved, their_logits, their_tensors

from minimoe.backend import load

pytestmark = pytest.mark.parity
LOGITS, GRADIENTS, BALANCE = 1e-4, 1e-3, 1e-6


@pytest.mark.parametrize("name", CASES)
def test_an_opened_folder_has_the_logits_that_transformers_has(name):
    inputs = inputs_of(name)
    close(opened(name)(inputs), their_logits(build(name), inputs), LOGITS, "logits")


@pytest.mark.parametrize("name", FIRST.values())
def test_the_compiled_kernels_have_them_too(name):
    inputs = inputs_of(name)
    close(opened(name, backend=load("numba"))(inputs), their_logits(build(name), inputs), LOGITS, "logits")


# ---- gradients -------------------------------------------------------------------------------------------------------------------------


def targets_of(name, inputs):
    """A class for each image, or for most tokens one that is not -100; of a bare model, a coordinate of its hidden states."""
    rng = np.random.default_rng(1)
    config = build(name).config
    if inputs.ndim == 4:
        return rng.integers(0, config.num_labels, len(inputs))
    classes = config.hidden_size if "bare" in name else VOCAB
    return np.where(rng.random(inputs.shape) < 0.2, -100, rng.integers(0, classes, inputs.shape))


def their_gradients(name, inputs, targets, folder):
    """Cross-entropy, and its gradients as transformers names and lays out weights: it saves them in the weights' place."""
    model = copy.deepcopy(build(name))
    logits = outputs(model, torch.tensor(inputs))
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, -2), torch.tensor(targets).flatten())
    loss.backward()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.zeros_like(p) if p.grad is None else p.grad)
        for p in model.buffers():
            p.zero_()
    model.save_pretrained(folder)
    return loss, their_tensors(folder)


@pytest.mark.parametrize("name", CASES)
def test_every_weight_has_the_gradient_that_transformers_gives_it(name, tmp_path):
    inputs = inputs_of(name)
    targets = targets_of(name, inputs)
    loss, theirs = their_gradients(name, inputs, targets, tmp_path)
    ours = opened(name)
    cross_entropy = ours.loss(inputs, targets).cross_entropy
    close(cross_entropy, loss, LOGITS, "cross-entropy")
    cross_entropy.backward()
    for _, p in ours.named_state():
        p.data = p.grad if p.requires_grad else np.zeros_like(p.data)
    gradients = our_tensors(ours)
    theirs = {("bert." + key if "bare" in name else key): array for key, array in theirs.items()}
    assert theirs.keys() == gradients.keys() | ours.origin.kept.keys()
    largest = max(float(gradient.abs().max()) for gradient in theirs.values())
    for key, array in gradients.items():
        close(array, theirs[key], GRADIENTS, key, floor=1e-3 * largest)


# ---- balance losses --------------------------------------------------------------------------------------------------------------------

BALANCED = [name for name in CASES if name.startswith(("mixtral", "olmoe", "qwen3_moe", "gpt_oss")) and "all layers dense" not in name]


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("name", BALANCED)
def test_the_balance_loss_is_that_of_transformers(name, padded):
    tokens = inputs_of(name)
    mask = (np.arange(tokens.shape[1]) < np.array([[17], [11], [5]])).astype(np.int64) if padded else None
    given = {} if mask is None else {"attention_mask": torch.tensor(mask)}
    with torch.no_grad():
        expected = build(name)(torch.tensor(tokens), output_router_logits=True, **given).aux_loss
    close(opened(name).loss(tokens, tokens, attention_mask=mask).aux_loss, expected, BALANCE, "balance loss")
