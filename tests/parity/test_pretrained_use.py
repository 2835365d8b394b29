"""Opened models in use: padding, other positions, greedy text; and models that minimoe made, in transformers."""

import numpy as np
import pytest
import torch
import transformers
from msgspec.structs import replace
from parity.peers import NUMPY, close
from parity.pretrained_models import CASES, CAUSAL, LENGTH, MASKS, VOCAB, YARN, build, inputs_of, make, opened, their_logits

import minimoe as mm
from minimoe.config import load_config
from minimoe.errors import ConfigError
from minimoe.generation.generation import Sampling, generate_ids
from minimoe.pretrained.families.table import family_for
from minimoe.pretrained.loading import open_model
from minimoe.pretrained.opening import open_folder
from minimoe.pretrained.saving import save_pretrained
from minimoe.study.convert import convert

pytestmark = pytest.mark.parity
LOGITS = 1e-4

# ---- padding and positions -------------------------------------------------------------------------------------------------------------

TEXTS = tuple(name for name in CASES if not name.startswith("vit"))


def where_seen(logits, mask):
    """Outputs at padding are arbitrary: keep the others."""
    return np.where(mask[:, :, None] == 1, np.asarray(logits), 0.0)


@pytest.mark.parametrize("side", MASKS)
@pytest.mark.parametrize("name", TEXTS)
def test_padding_changes_no_logits_of_the_text_beside_it(name, side):
    tokens, mask = inputs_of(name), MASKS[side]
    ours, theirs = opened(name)(tokens, attention_mask=mask), their_logits(build(name), tokens, attention_mask=mask)
    close(where_seen(ours, mask), where_seen(theirs, mask), LOGITS, "logits")


@pytest.mark.parametrize("name", TEXTS)
def test_positions_that_begin_after_the_padding_are_those_of_transformers(name):
    tokens, mask = inputs_of(name), MASKS["left"]
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    ours = opened(name)(tokens, attention_mask=mask, positions=positions)
    theirs = their_logits(build(name), tokens, attention_mask=mask, position_ids=positions)
    close(where_seen(ours, mask), where_seen(theirs, mask), LOGITS, "logits")


@pytest.mark.parametrize("name", ["bert", "bert, untied, three types, another padding"])
def test_token_types_are_those_of_bert(name):
    tokens = inputs_of(name)
    types = np.random.default_rng(2).integers(0, build(name).config.type_vocab_size, tokens.shape)
    close(opened(name)(tokens, token_types=types), their_logits(build(name), tokens, token_type_ids=types), LOGITS, "logits")


# ---- greedy text -----------------------------------------------------------------------------------------------------------------------

PROMPT, NEW = np.random.default_rng(5).integers(1, VOCAB, 5), 12


def their_greedy(model):
    """The new tokens; no token ends a text."""
    model.generation_config.eos_token_id = None
    cached = getattr(model.config, "sliding_window", None) != 1  # in 5.24 their cache keeps every key where the window is one
    with torch.no_grad():
        found = model.generate(torch.tensor(PROMPT)[None], max_new_tokens=NEW, do_sample=False, use_cache=cached, pad_token_id=0)
    return found[0, len(PROMPT) :].tolist()


def our_greedy(model):
    return list(generate_ids(model, PROMPT, NEW, Sampling(temperature=0.0)))


@pytest.mark.parametrize("name", CAUSAL)
def test_greedy_text_is_that_of_transformers(name):
    ours = opened(name)
    ours.end_tokens = ()
    assert our_greedy(ours) == their_greedy(build(name))


@pytest.mark.parametrize("where", ["config", "generation config"])
def test_a_text_ends_at_the_end_tokens_of_the_folder(where, tmp_path):
    end = their_greedy(build("llama"))[4]
    theirs = make("llama", eos_token_id=end if where == "config" else None)
    if where == "generation config":
        theirs.generation_config.eos_token_id = [end, 60]
    theirs.save_pretrained(tmp_path)
    if where == "config":
        (tmp_path / "generation_config.json").unlink()
    expected = their_greedy(build("llama"))
    assert our_greedy(open_folder(tmp_path, backend=NUMPY)) == expected[: expected.index(end)]


# ---- models that minimoe made ----------------------------------------------------------------------------------------------------------

SIZES = {"d_model": 30, "n_layers": 2, "n_heads": 3, "n_kv_heads": 1, "d_hidden": 23, "max_seq_len": 40, "vocab_size": VOCAB}
LEARNED = {"n_kv_heads": None, "norm": "layer", "position": "learned", "bias": True, "attention_bias": True}
BERT = {"causal": False, "norm_position": "post", "norm_eps": 1e-12, "type_vocab_size": 2, "head": "mlm", "activation": "gelu"}
VIT = {"causal": False, "image_size": 12, "patch_size": 4, "head": "classifier", "n_classes": 5, "activation": "gelu"}
YARNED = {
    key: {"original_max_position_embeddings": "original_max_seq_len", "rope_type": "type"}.get(key, key)
    for key in ("rope_type", "factor", "beta_fast", "beta_slow", "original_max_position_embeddings")
}
ROPE = mm.config.RopeConfig(**{ours: YARN[theirs] for theirs, ours in YARNED.items()})
LATENT = mm.config.LatentConfig(kv_rank=11, q_rank=12, nope_dim=7, rope_dim=6, v_dim=9)
SIGMOID = {"router": "sigmoid_bias", "n_experts": 8, "top_k": 3, "n_groups": 4, "top_groups": 2, "route_scale": 2.5, "d_hidden": 13}

# what it is: the family that it is written as, its configuration, and its experts
MADE = {
    "gpt2": ("gpt2", {**LEARNED, "activation": "gelu_tanh", "tie_embeddings": True}, None),
    "gpt2, untied, relu": ("gpt2", {**LEARNED, "activation": "relu"}, None),
    "bert": ("bert", {**LEARNED, **BERT, "tie_embeddings": True, "pad_token_id": 0}, None),
    "bert, relu": ("bert", {**LEARNED, **BERT, "tie_embeddings": True, "activation": "relu"}, None),
    "vit": ("vit", {**LEARNED, **VIT, "vocab_size": None}, None),
    "llama": ("llama", {}, None),
    "llama, tied, biases, wide heads, yarn": (
        "llama",
        {"tie_embeddings": True, "attention_bias": True, "bias": True, "head_dim": 14, "rope": ROPE},
        None,
    ),
    "a window": ("mistral", {"sliding_window": 5}, None),
    "mixtral": ("mixtral", {}, {"n_experts": 5, "top_k": 2}),
    "mixtral, window, softmax after the choice": ("mixtral", {"sliding_window": 5}, {"n_experts": 5, "top_k": 3, "router": "topk_softmax"}),
    "olmoe": ("olmoe", {"qk_norm": "full"}, {"n_experts": 7, "top_k": 3, "norm_topk_prob": False, "d_hidden": 11}),
    "olmoe, switch": ("olmoe", {"qk_norm": "full", "attention_bias": True}, {"n_experts": 4, "router": "switch"}),
    "norms of heads, every other layer routed": ("qwen3_moe", {"qk_norm": "head", "n_layers": 4}, {"n_experts": 5, "every": 2}),
    "sinks, clipped experts with biases": (
        "gpt_oss",
        {
            "attention": mm.config.AttentionConfig(sinks=True), "bias": True, "attention_bias": True, "activation_limit": 0.5,
            "sliding_window": 4, "layer_types": ("full", "sliding"),
        },
        {"n_experts": 5, "router": "topk_softmax", "router_bias": True},
    ),
    "latent attention, groups of experts": (
        "deepseek_v3",
        {"mla": LATENT, "n_kv_heads": None, "rope": ROPE},
        {**SIGMOID, "n_shared_experts": 2, "layers": (1,)},
    ),
}  # fmt: skip
AUTO = {"lm": transformers.AutoModelForCausalLM, "mlm": transformers.AutoModelForMaskedLM,
        "classifier": transformers.AutoModelForImageClassification}  # fmt: skip


def made(config, seed=3):
    """A minimoe model whose biases and norms are not at their initial values."""
    model, rng = mm.Transformer(config, seed=seed, backend=NUMPY), np.random.default_rng(seed)
    for _, p in model.named_state():
        p.data += 0.2 * rng.standard_normal(p.shape).astype(np.float32)
    return model


def in_transformers(model, folder, family):
    """The model as transformers opens it, with no weight missing or unexpected."""
    assert save_pretrained(model, folder).model_type == family
    theirs, report = AUTO[model.config.head].from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    if hasattr(theirs, "set_experts_implementation"):
        theirs.set_experts_implementation("eager")
    return theirs.eval()


def inputs_for(config):
    rng = np.random.default_rng(0)
    if config.image_size:
        return rng.standard_normal((3, config.n_channels, config.image_size, config.image_size)).astype(np.float32)
    return rng.integers(0, config.vocab_size, (3, LENGTH))


@pytest.mark.parametrize("what", MADE)
def test_a_model_that_minimoe_made_has_its_logits_in_transformers(what, tmp_path):
    family, options, moe = MADE[what]
    config = mm.ModelConfig(**{**SIZES, **options}, moe=moe and mm.MoEConfig(**moe))
    model, inputs = made(config), inputs_for(config)
    theirs = in_transformers(model, tmp_path / "model", family)
    close(model(inputs), their_logits(theirs, inputs), LOGITS, "logits")
    close(open_folder(tmp_path / "model", backend=NUMPY)(inputs), model(inputs).numpy(), 1e-6, "opened again")
    if config.head == "lm":
        assert our_greedy(model) == their_greedy(theirs)


def test_a_gpt_oss_whose_experts_do_not_clip_is_refused():
    _, options, moe = MADE["sinks, clipped experts with biases"]
    with pytest.raises(ConfigError, match="no family expresses this model"):
        family_for(mm.ModelConfig(**{**SIZES, **options, "activation_limit": 0.0}, moe=mm.MoEConfig(**moe)))


@pytest.mark.parametrize("preset, family", [("tiny-moe", "mixtral"), ("tiny-dense", "llama"), ("bert-tiny-post", "bert")])
def test_models_of_the_presets_are_opened_by_transformers(preset, family, tmp_path):
    config = replace(load_config(preset).model, vocab_size=VOCAB)
    model, tokens = made(config), inputs_for(config)
    theirs = in_transformers(model, tmp_path / "model", family)
    close(model(tokens), their_logits(theirs, tokens), LOGITS, "logits")
    close(open_folder(tmp_path / "model", backend=NUMPY)(tokens), model(tokens).numpy(), 1e-6, "opened again")
    assert theirs.config.eos_token_id is None  # the model has no end token
    assert config.head != "lm" or theirs.generation_config.eos_token_id is None


def test_a_run_of_berts_own_architecture_fills_in_blanks_in_transformers_as_here(tmp_path):
    (tmp_path / "text.txt").write_text("the router sends every token to two experts\n" * 60)
    config = load_config("bert-tiny-post", [
        f"data.source={tmp_path / 'text.txt'}", "model.d_model=32", "model.n_layers=2", "train.batch_size=4", "train.eval_every=0",
        "train.backend=numpy",
    ])  # fmt: skip
    run = mm.train(config, steps=3, root=tmp_path)
    convert(run.path, tmp_path / "bert")
    theirs, report = transformers.BertForMaskedLM.from_pretrained(tmp_path / "bert", output_loading_info=True)
    assert not any(report.values()), report
    tokens = run.task.batch(0, 0)[0]
    assert (tokens == run.task.mask_id).any()
    close(run.model(tokens), their_logits(theirs.eval(), tokens), LOGITS, "logits")
    again = open_model(tmp_path / "bert")
    close(again.model(tokens), run.model(tokens).numpy(), 1e-6, "opened again")
    assert again.text.vocab_size == run.task.mask_id
