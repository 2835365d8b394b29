"""Mixtral, GPT-2, BERT and ViT as transformers has them, small and random, with their weights under minimoe's names: equal logits."""

import numpy as np
import pytest
import torch
import transformers
from parity import peers
from parity.peers import NUMPY, close, random_state
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

import minimoe as mm

pytestmark = pytest.mark.parity
TOLERANCE = {"float64": 1e-10, "float32": 1e-4}
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE)


def pair(theirs, config, mapping, dtype, seed=0):
    """A random transformers model in `dtype`, and a minimoe model with its weights."""
    theirs = theirs.to(getattr(torch, dtype)).eval()
    state = mapping(random_state(theirs, seed), config.n_layers)
    ours = mm.Transformer(config, dtype=dtype, backend=NUMPY)
    ours.load_state_dict(state)
    return theirs, ours


def tokens_of(vocab, shape, seed=0):
    return np.random.default_rng(seed).integers(1, vocab, shape)


# ---- Mixtral ---------------------------------------------------------------------------------------------------------------------------

MIXTRAL_TOLERANCE = {"float64": 1e-5, "float32": 1e-4}  # its norms, rotary angles and router work in float32 even in a float64 model


def mixtral(dtype, window=None):
    sizes = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    theirs = transformers.MixtralForCausalLM(transformers.MixtralConfig(
        **sizes, vocab_size=61, num_local_experts=5, num_experts_per_tok=2, sliding_window=window, rms_norm_eps=1e-5,
        rope_parameters={"rope_theta": 1e6, "rope_type": "default"}, max_position_embeddings=32,
    ))  # fmt: skip
    theirs.set_experts_implementation("eager")  # PyTorch's grouped product has no float64
    config = mm.ModelConfig(
        d_model=32, n_layers=3, n_heads=4, n_kv_heads=2, d_hidden=24, max_seq_len=32, vocab_size=61, rope_theta=1e6,
        sliding_window=window or 0, moe=mm.MoEConfig(n_experts=5, top_k=2, aux_convention="mixtral"),
    )  # fmt: skip
    return pair(theirs, config, peers.mixtral, dtype)


@each_dtype
@pytest.mark.parametrize("window", [None, 5])
def test_mixtral_has_the_same_logits(window, dtype):
    theirs, ours = mixtral(dtype, window)
    tokens = tokens_of(61, (3, 17))
    with torch.no_grad():
        close(ours(tokens), theirs(torch.tensor(tokens)).logits, MIXTRAL_TOLERANCE[dtype], "logits")


@each_dtype
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_mixtral_has_the_same_balance_loss_and_gradients(padded, dtype):
    theirs, ours = mixtral(dtype)
    tokens = tokens_of(61, (3, 17))
    mask = (np.arange(17) < np.array([[17], [11], [5]])).astype(np.int64) if padded else np.ones((3, 17), dtype=np.int64)
    targets = np.where(mask, np.roll(tokens, -1, axis=1), -100)
    targets[:, -1] = -100
    targets[:, :-1] = np.where(mask[:, 1:], targets[:, :-1], -100)
    out = theirs(torch.tensor(tokens), attention_mask=torch.tensor(mask) if padded else None, output_router_logits=True)
    given = torch.tensor(mask) if padded else None
    aux = load_balancing_loss_func(out.router_logits, 5, 2, given)
    parts = ours.loss(tokens, targets, attention_mask=mask if padded else None)
    close(parts.aux_loss, aux, MIXTRAL_TOLERANCE[dtype], "balance loss")
    cross_entropy = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), torch.tensor(targets).flatten())
    close(parts.cross_entropy, cross_entropy, MIXTRAL_TOLERANCE[dtype], "cross-entropy")
    (cross_entropy + 0.3 * aux).backward()
    (parts.cross_entropy + parts.aux_loss * 0.3).backward()
    gradients = {name: p.grad.numpy() for name, p in theirs.named_parameters()}
    expected = peers.mixtral(gradients, 3)
    for name, p in ours.named_parameters():
        close(p.grad, expected[name], MIXTRAL_TOLERANCE[dtype], name)


# ---- GPT-2, BERT, ViT ------------------------------------------------------------------------------------------------------------------


@each_dtype
def test_gpt2_has_the_same_logits(dtype):
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=20, vocab_size=61))
    config = mm.ModelConfig(
        d_model=32, n_layers=3, n_heads=4, d_hidden=128, max_seq_len=20, vocab_size=61, norm="layer", position="learned",
        activation="gelu_tanh", bias=True, attention_bias=True, tie_embeddings=True,
    )  # fmt: skip
    theirs, ours = pair(theirs, config, peers.gpt2, dtype)
    tokens = tokens_of(61, (3, 20))
    with torch.no_grad():
        close(ours(tokens), theirs(torch.tensor(tokens)).logits, TOLERANCE[dtype], "logits")


@each_dtype
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_bert_has_the_same_logits_with_padding_and_token_types(tied, dtype):
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 40}
    theirs = transformers.BertForMaskedLM(
        transformers.BertConfig(**sizes, vocab_size=61, max_position_embeddings=20, tie_word_embeddings=tied)
    )
    config = mm.ModelConfig(
        d_model=32, n_layers=3, n_heads=4, d_hidden=40, max_seq_len=20, vocab_size=61, causal=False, norm="layer", norm_position="post",
        norm_eps=1e-12, position="learned", activation="gelu", bias=True, attention_bias=True, tie_embeddings=tied, head="mlm",
        type_vocab_size=2, pad_token_id=0,
    )  # fmt: skip

    def mapping(state, n_layers):
        return peers.bert(state, n_layers) | ({} if tied else {"head.weight": state["cls.predictions.decoder.weight"]})

    theirs, ours = pair(theirs, config, mapping, dtype)
    with torch.no_grad():
        theirs.cls.predictions.decoder.bias.copy_(theirs.cls.predictions.bias)
    mask = (np.arange(18) < np.array([[18], [11], [1]])).astype(np.int64)
    tokens = tokens_of(61, (3, 18)) * mask
    types = (np.arange(18) >= np.array([[7], [3], [0]])).astype(np.int64)
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens), attention_mask=torch.tensor(mask), token_type_ids=torch.tensor(types)).logits
        plain = theirs(torch.tensor(tokens)).logits
    close(ours(tokens, attention_mask=mask, token_types=types), expected, TOLERANCE[dtype], "logits")
    close(ours(tokens), plain, TOLERANCE[dtype], "logits without mask and types")


@each_dtype
def test_vit_has_the_same_logits(dtype):
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 40}
    theirs = transformers.ViTForImageClassification(
        transformers.ViTConfig(**sizes, image_size=12, patch_size=4, num_channels=3, num_labels=7)
    )
    config = mm.ModelConfig(
        d_model=32, n_layers=3, n_heads=4, d_hidden=40, causal=False, norm="layer", norm_eps=1e-12, position="learned", activation="gelu",
        bias=True, attention_bias=True, head="classifier", image_size=12, patch_size=4, n_channels=3, n_classes=7,
    )  # fmt: skip
    theirs, ours = pair(theirs, config, peers.vit, dtype)
    images = np.random.default_rng(0).standard_normal((3, 3, 12, 12)).astype(dtype)
    with torch.no_grad():
        close(ours(images), theirs(torch.tensor(images)).logits, TOLERANCE[dtype], "logits")
