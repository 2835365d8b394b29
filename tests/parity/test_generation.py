"""Greedy text of transformers' Mixtral, GPT-2 and Llama, small and random: the same tokens, also in batches of unequal prompts."""

import numpy as np
import pytest
import torch
import transformers
from parity import peers
from parity.peers import random_state

import minimoe as mm
from minimoe.backend import load
from minimoe.generation.generation import Sampling, generate_batch

pytestmark = pytest.mark.parity
VOCAB, NEW, PAD = 61, 25, 0
SIZES = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
OURS = {"d_model": 32, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "d_hidden": 24, "max_seq_len": 64, "vocab_size": VOCAB}
LENGTHS = {"one": [7], "equal": [5, 5, 5], "unequal": [11, 1, 4, 11]}


def mixtral(window=None):
    theirs = transformers.MixtralForCausalLM(transformers.MixtralConfig(
        **SIZES, vocab_size=VOCAB, num_local_experts=5, num_experts_per_tok=2, sliding_window=window, rms_norm_eps=1e-5,
        rope_parameters={"rope_theta": 1e4, "rope_type": "default"}, max_position_embeddings=64,
    ))  # fmt: skip
    return theirs, mm.ModelConfig(**OURS, sliding_window=window or 0, moe=mm.MoEConfig(n_experts=5, top_k=2)), peers.mixtral


def gpt2():
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=64, vocab_size=VOCAB))
    config = mm.ModelConfig(
        **{**OURS, "n_kv_heads": 4, "d_hidden": 128}, norm="layer", position="learned", activation="gelu_tanh", bias=True,
        attention_bias=True, tie_embeddings=True,
    )  # fmt: skip
    return theirs, config, peers.gpt2


def llama():
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        **SIZES, vocab_size=VOCAB, rms_norm_eps=1e-5, rope_parameters={"rope_theta": 1e4, "rope_type": "default"},
        max_position_embeddings=64,
    ))  # fmt: skip
    return theirs, mm.ModelConfig(**OURS), llama_state


def llama_state(s, n_layers):
    """LlamaForCausalLM -> minimoe."""
    state = {"embed.weight": s["model.embed_tokens.weight"], "norm.weight": s["model.norm.weight"], "head.weight": s["lm_head.weight"]}
    for i in range(n_layers):
        a, b = f"model.layers.{i}.", f"blocks.{i}."
        state |= {
            b + "attention_norm.weight": s[a + "input_layernorm.weight"], b + "ffn_norm.weight": s[a + "post_attention_layernorm.weight"],
            b + "attention.qkv_proj.weight": np.concatenate([s[f"{a}self_attn.{x}_proj.weight"] for x in "qkv"]),
            b + "attention.o_proj.weight": s[a + "self_attn.o_proj.weight"], b + "ffn.down_proj.weight": s[a + "mlp.down_proj.weight"],
            b + "ffn.gate_up_proj.weight": np.concatenate([s[f"{a}mlp.{x}_proj.weight"] for x in ("gate", "up")]),
        }  # fmt: skip
    return state


MODELS = {
    "mixtral": mixtral, "mixtral, window": lambda: mixtral(window=6), "mixtral, window of two": lambda: mixtral(window=2), "gpt2": gpt2,
    "llama": llama,
}  # fmt: skip


@pytest.fixture(scope="module", params=MODELS, ids=[name.replace(", ", "-") for name in MODELS])
def pair(request):
    """A transformers model, and minimoe models with its weights on both CPU backends."""
    theirs, config, mapping = MODELS[request.param]()
    theirs.generation_config.eos_token_id = None  # theirs would end at token 2
    state = mapping(random_state(theirs.eval()), config.n_layers)
    ours = {name: mm.Transformer(config, backend=load(name)) for name in ("numpy", "numba")}
    for model in ours.values():
        model.load_state_dict(state)
    return theirs, ours


def prompts_of(lengths):
    draw = np.random.default_rng(0)
    return [draw.integers(1, VOCAB, length) for length in lengths]


def their_rows(theirs, prompts, **options):
    """The new tokens of each prompt; prompts are padded on the left."""
    width = max(map(len, prompts))
    tokens, mask = torch.full((len(prompts), width), PAD), torch.zeros((len(prompts), width), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = torch.from_numpy(prompt)
        mask[row, width - len(prompt) :] = 1
    with torch.no_grad():
        found = theirs.generate(
            tokens, attention_mask=mask, max_new_tokens=NEW, do_sample=False, use_cache=True, pad_token_id=PAD, **options
        )  # fmt: skip
    return found[:, width:].tolist()


def our_rows(model, prompts, how):
    return [list(row) for row in zip(*generate_batch(model, prompts, NEW, how), strict=True)]


@pytest.mark.parametrize("backend", ["numpy", "numba"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_greedy_tokens_equal_those_of_transformers(pair, backend, lengths):
    theirs, ours = pair
    prompts = prompts_of(lengths)
    assert our_rows(ours[backend], prompts, Sampling(temperature=0.0)) == their_rows(theirs, prompts)


@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_tokens_with_a_repetition_penalty_equal_those_of_transformers(pair, penalty):
    theirs, ours = pair
    prompts = prompts_of([6, 6])  # they would count padding as said before
    how = Sampling(temperature=0.0, repetition_penalty=penalty)
    assert our_rows(ours["numba"], prompts, how) == their_rows(theirs, prompts, repetition_penalty=penalty)


def test_rows_end_where_those_of_transformers_do(pair):
    theirs, ours = pair
    prompts = prompts_of([3, 8, 5])
    end = their_rows(theirs, prompts)[0][4]
    expected = [row[: row.index(end)] if end in row else row for row in their_rows(theirs, prompts, eos_token_id=end)]
    assert len(expected[0]) <= 4
    rows = our_rows(ours["numba"], prompts, Sampling(temperature=0.0, end=(end,)))
    assert [[token for token in row if token is not None] for row in rows] == expected


@pytest.mark.parametrize("how", [{"top_k": 5}, {"top_p": 0.6}, {"top_k": 7, "top_p": 0.5}, {"temperature": 0.4, "top_p": 0.8}])
def test_tokens_that_may_be_drawn_are_those_that_transformers_leaves(how):
    """Penalty, temperature, top-k and top-p in this order, on the same logits."""
    from minimoe.generation.sampling import draw

    logits = np.random.default_rng(1).standard_normal(40).astype(np.float32) * 2
    options = {"temperature": 1.5, "repetition_penalty": 1.2, **how}
    said = [3, 8, int(logits.argmax())]
    scores, ids = torch.tensor(logits)[None], torch.tensor([said])
    processors = transformers.generation.logits_process
    chain = [processors.RepetitionPenaltyLogitsProcessor(1.2), processors.TemperatureLogitsWarper(options["temperature"])]
    chain += [processors.TopKLogitsWarper(how["top_k"])] if "top_k" in how else []
    chain += [processors.TopPLogitsWarper(how["top_p"])] if "top_p" in how else []
    for processor in chain:
        scores = processor(ids, scores)
    probabilities = torch.softmax(scores[0], dim=0).numpy()
    seen = np.isin(np.arange(40), said)
    found = np.bincount([draw(logits, Sampling(**options), position, 0, seen) for position in range(2000)], minlength=40) / 2000
    assert set(np.flatnonzero(found)) <= set(np.flatnonzero(probabilities))
    assert np.abs(found - probabilities).max() < 0.05
