"""Folders of transformers' families, written by transformers: the opened model has its logits, its gradients and its balance loss."""

import copy

import numpy as np
import pytest
import torch
from parity.peers import close
from parity.pretrained_models import (
    CASES,
    FIRST,
    MASKS,
    VOCAB,
    YARN,
    build,
    inputs_of,
    make,
    opened,
    our_tensors,
    outputs,
    rope,
    their_logits,
    their_tensors,
)

from minimoe.backend import load
from minimoe.pretrained.families.table import family

pytestmark = pytest.mark.parity
LOGITS, GRADIENTS, BALANCE = 1e-4, 1e-3, 1e-6


@pytest.mark.parametrize("name", CASES)
def test_an_opened_folder_has_the_logits_that_transformers_has(name):
    inputs = inputs_of(name)
    close(opened(name)(inputs), their_logits(build(name), inputs), LOGITS, "logits")


@pytest.mark.parametrize("name", FIRST.values())
def test_compiled_kernels_have_the_same_logits(name):
    inputs = inputs_of(name)
    close(opened(name, backend=load("numba"))(inputs), their_logits(build(name), inputs), LOGITS, "logits")


# What the cases are there for changes what is computed: a key that changed nothing would be compared with nothing.
MATTERS = [
    ("gpt2, large eps", {"layer_norm_epsilon": 1e-5}), ("bert, relu, large eps", {"hidden_act": "gelu"}), ("vit", {"hidden_act": "relu"}),
    ("llama, tied, linear rope", {"rope_parameters": rope("default")}),
    ("llama, biases, own head width, llama3 rope", {"rope_parameters": rope("default")}),
    ("llama, attention's biases, yarn", {"rope_parameters": YARN | {"truncate": False}}),
    ("llama, yarn with mscale", {"rope_parameters": YARN}), ("llama, yarn with a factor of its own", {"rope_parameters": YARN}),
    ("llama, yarn over the whole length", {"rope_parameters": YARN}), ("mistral, window, tied", {"sliding_window": 6}),
    ("mixtral, one expert per token, window", {"sliding_window": None}), ("olmoe", {"norm_topk_prob": True}),
    ("qwen3_moe, normalised, a dense layer", {"norm_topk_prob": False}),
    ("qwen3_moe, every other layer, window", {"use_sliding_window": False}),
    ("gpt_oss", {"swiglu_limit": 7.0}), ("gpt_oss", {"sliding_window": 17}),
    ("gpt_oss, one expert per token, own kinds of layers", {"layer_types": ["full_attention"] * 3}),
    ("deepseek_v3", {"topk_group": 4}), ("deepseek_v3", {"routed_scaling_factor": 1.0}), ("deepseek_v3", {"rope_interleave": False}),
    ("deepseek_v3, halves turned, biases, all layers routed, not normalised", {"norm_topk_prob": True}),
    ("deepseek_v3, plain queries, two shared experts, yarn with mscale", {"rope_parameters": YARN}),
]  # fmt: skip


@pytest.mark.parametrize("name, changes", MATTERS)
def test_the_key_that_a_case_is_about_changes_the_logits(name, changes):
    inputs = inputs_of(name)
    before, after = their_logits(build(name), inputs), their_logits(make(name, **changes), inputs)
    assert np.abs(before - after).max() > 20 * LOGITS * np.abs(before).max()


@pytest.mark.parametrize("family_name", ["bert", "llama", "mistral", "mixtral", "olmoe", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_the_padding_token_that_config_json_does_not_name_is_that_of_transformers(family_name):
    config = build(FIRST[family_name]).config
    given = {key: value for key, value in config.to_dict().items() if key != "pad_token_id"}
    assert family(family_name).model_config(given).pad_token_id == type(config)().pad_token_id


# ---- gradients -------------------------------------------------------------------------------------------------------------------------


def targets_of(name, inputs, mask=None):
    """A class for each image, or for most tokens one that is not -100; of a bare model, a coordinate of its hidden states."""
    rng = np.random.default_rng(1)
    config = build(name).config
    if inputs.ndim == 4:
        return rng.integers(0, config.num_labels, len(inputs))
    classes = config.hidden_size if "bare" in name else VOCAB
    left_out = (rng.random(inputs.shape) < 0.2) | (False if mask is None else mask == 0)
    return np.where(left_out, -100, rng.integers(0, classes, inputs.shape))


def their_gradients(name, inputs, targets, folder, **options):
    """Cross-entropy, and its gradients in the names and layouts of transformers, which saves them as if they were weights."""
    model = copy.deepcopy(build(name))
    logits = outputs(model, torch.tensor(inputs), **options)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, -2), torch.tensor(targets).flatten())
    loss.backward()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.zeros_like(p) if p.grad is None else p.grad)
        for p in model.buffers():
            p.zero_()
    model.save_pretrained(folder)
    return loss, their_tensors(folder)


def compare_gradients(name, folder, mask=None):
    inputs = inputs_of(name)
    targets = targets_of(name, inputs, mask)
    loss, theirs = their_gradients(name, inputs, targets, folder, **({} if mask is None else {"attention_mask": torch.tensor(mask)}))
    ours = opened(name)
    cross_entropy = ours.loss(inputs, targets, attention_mask=mask).cross_entropy
    close(cross_entropy, loss, LOGITS, "cross-entropy")
    cross_entropy.backward()
    for _, p in ours.named_state():
        p.data = p.grad if p.requires_grad else np.zeros_like(p.data)
    gradients = our_tensors(ours)
    theirs = {("bert." + key if "bare" in name else key): array for key, array in theirs.items()}
    assert theirs.keys() == gradients.keys() | ours.provenance.kept.keys()
    largest = max(float(gradient.abs().max()) for gradient in theirs.values())
    for key, array in gradients.items():
        close(array, theirs[key], GRADIENTS, key, floor=1e-3 * largest)  # a softmax's keys have biases that change nothing


@pytest.mark.parametrize("name", CASES)
def test_every_weight_has_the_gradient_that_transformers_gives_it(name, tmp_path):
    compare_gradients(name, tmp_path)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", [name for family, name in FIRST.items() if family != "vit"])
def test_every_weight_has_that_gradient_beside_padding(name, side, tmp_path):
    compare_gradients(name, tmp_path, MASKS[side])


# ---- balance losses --------------------------------------------------------------------------------------------------------------------

BALANCED = [name for name in CASES if name.startswith(("mixtral", "olmoe", "qwen3_moe", "gpt_oss")) and "all layers dense" not in name]


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("name", BALANCED)
def test_the_balance_loss_is_that_of_transformers(name, padded):
    tokens = inputs_of(name)
    mask = MASKS["right"] if padded else None
    given = {} if mask is None else {"attention_mask": torch.tensor(mask)}
    with torch.no_grad():
        expected = build(name)(torch.tensor(tokens), output_router_logits=True, **given).aux_loss
    close(opened(name).loss(tokens, tokens, attention_mask=mask).aux_loss, expected, BALANCE, "balance loss")
