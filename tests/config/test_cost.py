"""Cost against published parameter counts, against the live model, and against sums done by hand."""

import pytest

from minimoe.backend import load
from minimoe.config import ModelConfig, MoEConfig, TrainConfig, load_config
from minimoe.config.cost import Cost, Part, cost, parameter_shapes, parts
from minimoe.errors import ConfigError
from minimoe.model.transformer import Transformer
from minimoe.optim import make_optimizer
from minimoe.reference.optimizers import OPTIMIZERS

PUBLISHED = {
    "gpt2": (124_439_808, 124_439_808),
    "bert-base": (109_514_298, 109_514_298),
    "vit-b16": (86_567_656, 86_567_656),
    "mixtral-8x7b": (46_702_792_704, 12_879_925_248),
}

SMALL = ModelConfig(d_model=8, n_layers=2, n_heads=2, d_hidden=12, max_seq_len=6, vocab_size=11)

# Between them, every parameter that a configuration can ask for.
VARIANTS = {
    "dense": SMALL,
    "gpt2-like": ModelConfig(
        d_model=8, n_layers=2, n_heads=2, d_hidden=12, max_seq_len=6, vocab_size=11,
        norm="layer", position="learned", activation="gelu_tanh", bias=True, attention_bias=True, tie_embeddings=True,
    ),
    "layer-norm-without-bias": ModelConfig(
        d_model=8, n_layers=1, n_heads=2, d_hidden=12, max_seq_len=6, vocab_size=11, norm="layer", position="learned", activation="gelu",
    ),
    "bert-like": ModelConfig(
        d_model=8, n_layers=2, n_heads=2, d_hidden=12, max_seq_len=6, vocab_size=11, type_vocab_size=2, pad_token_id=0, causal=False,
        norm="layer", norm_position="post", position="learned", activation="gelu", bias=True, attention_bias=True, head="mlm",
    ),
    "bert-like-tied": ModelConfig(
        d_model=8, n_layers=1, n_heads=2, d_hidden=12, max_seq_len=6, vocab_size=11, causal=False, norm="layer", norm_position="post",
        position="learned", activation="gelu", bias=True, attention_bias=True, head="mlm", tie_embeddings=True,
    ),
    "vit-like": ModelConfig(
        d_model=8, n_layers=1, n_heads=2, d_hidden=12, image_size=6, patch_size=3, n_channels=2, n_classes=5, causal=False,
        norm="layer", position="learned", activation="gelu", bias=True, attention_bias=True, head="classifier",
    ),
    "encoder-without-head": ModelConfig(
        d_model=8, n_layers=1, n_heads=2, d_hidden=12, max_seq_len=6, vocab_size=11, causal=False, position="none", head="none",
    ),
    "grouped-heads-qk-norm": ModelConfig(
        d_model=8, n_layers=1, n_heads=4, n_kv_heads=2, head_dim=6, d_hidden=12, max_seq_len=6, vocab_size=11, qk_norm="head",
    ),
    "qk-norm-full": ModelConfig(
        d_model=8, n_layers=1, n_heads=4, n_kv_heads=2, d_hidden=12, max_seq_len=6, vocab_size=11, qk_norm="full",
    ),
    "moe": ModelConfig(
        d_model=8, n_layers=2, n_heads=2, d_hidden=12, max_seq_len=6, vocab_size=11, moe=MoEConfig(n_experts=4, d_hidden=5),
    ),
    "moe-every-second-layer-shared": ModelConfig(
        d_model=8, n_layers=3, n_heads=2, d_hidden=12, max_seq_len=6, vocab_size=11,
        moe=MoEConfig(n_experts=4, d_hidden=5, every=2, n_shared_experts=2, router="sigmoid_bias"),
    ),
    "moe-with-biases": ModelConfig(
        d_model=8, n_layers=2, n_heads=2, d_hidden=12, max_seq_len=6, vocab_size=11, activation="relu", bias=True,
        moe=MoEConfig(n_experts=3, layers=(1,), router="noisy_topk", router_bias=True, n_shared_experts=1),
    ),
    "moe-with-biases-swiglu": ModelConfig(
        d_model=8, n_layers=1, n_heads=2, d_hidden=12, max_seq_len=6, vocab_size=11, bias=True, moe=MoEConfig(n_experts=3),
    ),
}  # fmt: skip


def part(found: list[Part], name: str) -> Part:
    return next(one for one in found if one.name == name)


@pytest.mark.parametrize("preset", PUBLISHED)
def test_a_published_model_has_its_published_number_of_parameters(preset: str) -> None:
    found = cost(load_config(preset).model)
    assert (found.total, found.active) == PUBLISHED[preset]


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_of_the_live_model_is_listed_with_its_shape(variant: str) -> None:
    from minimoe.model.transformer import Transformer

    live = {name: tuple(parameter.shape) for name, parameter in Transformer(VARIANTS[variant], seed=0).named_parameters()}
    assert dict(parameter_shapes(VARIANTS[variant])) == live


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_parameter_is_listed_twice_and_the_parts_add_up(variant: str) -> None:
    names = [name for name, _ in parameter_shapes(VARIANTS[variant])]
    found = cost(VARIANTS[variant])
    assert len(names) == len(set(names))
    assert found.total == sum(one.parameters for one in found.parts)
    assert found.flops_per_token == sum(one.flops_per_token for one in found.parts)


def test_flops_are_two_a_multiply_add_and_attention_is_counted_in_full() -> None:
    found = parts(SMALL, seq_len=5)
    d, h, v, layers = 8, 12, 11, 2
    assert part(found, "attention").flops_per_token == layers * (2 * (3 * d * d + d * d) + 4 * 5 * d)
    assert part(found, "dense ffn").flops_per_token == layers * 2 * 3 * d * h
    assert part(found, "head").flops_per_token == 2 * v * d
    assert part(found, "embedding").flops_per_token == part(found, "norms").flops_per_token == 0


def test_a_sliding_window_bounds_the_keys_of_its_layers() -> None:
    wide, narrow = (
        ModelConfig(d_model=8, n_layers=2, n_heads=2, max_seq_len=64, vocab_size=11, sliding_window=16, layer_types=types)
        for types in (("full", "full"), ("full", "sliding"))
    )
    assert cost(wide).flops_per_token - cost(narrow).flops_per_token == 4 * (64 - 16) * 8


def test_a_token_runs_through_k_experts_and_the_shared_ones() -> None:
    found = parts(VARIANTS["moe-every-second-layer-shared"])
    one_expert = 3 * 8 * 5
    assert part(found, "experts") == Part("experts", 4 * one_expert, 2 * one_expert, 2 * 2 * one_expert, count=1)
    assert part(found, "shared experts") == Part("shared experts", 2 * one_expert, 2 * one_expert, 2 * 2 * one_expert, count=1)
    assert part(found, "router") == Part("router", 4 * 8, 4 * 8, 2 * 4 * 8, count=1)
    assert part(found, "dense ffn").count == 2


@pytest.mark.parametrize("variant, noise", [("moe-with-biases", 3 * 8), ("moe-with-biases-swiglu", 0)])
def test_biases_are_parameters_and_no_matrix_products(variant: str, noise: int) -> None:
    model = VARIANTS[variant]
    with_bias = part(parts(model), "experts")
    rows = 24 if model.activation == "swiglu" else 12
    assert with_bias.parameters == 3 * (rows * 8 + 8 * 12 + rows + 8)
    assert with_bias.flops_per_token == 2 * 2 * (rows * 8 + 8 * 12)
    assert part(parts(model), "router").flops_per_token == 2 * (3 * 8 + noise)


def test_where_every_expert_is_chosen_every_parameter_is_active() -> None:
    found = cost(ModelConfig(vocab_size=11, moe=MoEConfig(n_experts=4, top_k=4)))
    assert found.active == found.total


def test_a_tied_head_has_no_parameter_and_costs_its_product() -> None:
    found = part(parts(load_config("gpt2").model), "head")
    assert (found.parameters, found.flops_per_token) == (0, 2 * 50257 * 768)


def test_a_classifier_runs_once_a_sequence_whose_length_is_the_images() -> None:
    model = VARIANTS["vit-like"]
    found = cost(model, seq_len=2)
    assert found.seq_len == 5
    assert part(list(found.parts), "head").flops_per_token == 2 * 5 * 8 // 5
    assert part(list(found.parts), "embedding").flops_per_token == 2 * 8 * (2 * 9) * 4 // 5


def test_training_costs_three_forwards_and_four_with_recomputation() -> None:
    forward = cost(SMALL).flops_per_token
    assert cost(SMALL).training_flops_per_token == 3 * forward
    assert cost(SMALL, recompute=True).training_flops_per_token == 4 * forward


def test_bytes_are_float32_masters_their_gradients_and_two_moments() -> None:
    found = cost(SMALL, dtype="bfloat16")
    assert (found.bytes.weights, found.bytes.gradients, found.bytes.optimizer) == (4 * found.total, 4 * found.total, 8 * found.total)
    assert cost(SMALL, dtype="float64").bytes.weights == 8 * found.total


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_optimizers_memory_is_that_of_the_optimizer_that_was_chosen(optimizer: str, variant: str) -> None:
    model = VARIANTS[variant]
    made = make_optimizer(Transformer(model, seed=0, backend=load("numpy")).parameters(), TrainConfig(optimizer=optimizer))
    states = [array for group in made.groups for array in group.states.values()]
    assert cost(model, optimizer=optimizer).bytes.optimizer == sum(array.nbytes for array in states)


def test_the_cache_holds_keys_and_values_of_every_layer_and_an_encoder_has_none() -> None:
    assert cost(load_config("mixtral-8x7b").model, dtype="bfloat16").bytes.kv_cache_per_token == 2 * 32 * 8 * 128 * 2
    assert cost(load_config("bert-base").model).bytes.kv_cache_per_token == 0


@pytest.mark.parametrize(
    "dense, routed", [("tiny-dense", "tiny-moe"), ("shakespeare-dense", "shakespeare-moe")]
)  # fmt: skip
def test_a_dense_preset_costs_what_its_routed_twin_costs_but_for_the_router(dense: str, routed: str) -> None:
    plain, moe = (cost(with_vocabulary(load_config(name).model)) for name in (dense, routed))
    router = part(list(moe.parts), "router")
    assert moe.flops_per_token == plain.flops_per_token + router.flops_per_token
    assert moe.active == plain.active + router.parameters
    assert moe.total > 2 * plain.total


def test_the_json_form_has_the_contracts_keys() -> None:
    found: Cost = cost(VARIANTS["moe"])
    tables = found.to_dict()
    assert tables["parameters"] == {"total": found.total, "active": found.active}
    assert tables["flops_per_token"] == found.flops_per_token
    assert tables["parts"][0] == {"name": "embedding", "parameters": 88, "active": 88, "flops_per_token": 0, "count": 1}


def test_a_model_without_a_vocabulary_says_so_unless_it_reads_images() -> None:
    with pytest.raises(ConfigError, match=r"model\.vocab_size is not set"):
        cost(ModelConfig())
    assert cost(load_config("vit-b16").model).total


@pytest.mark.parametrize("seq_len", [0, -1, 7])
def test_an_impossible_sequence_length_is_refused(seq_len: int) -> None:
    with pytest.raises(ConfigError, match=rf"seq_len \({seq_len}\) must lie between 1 and model.max_seq_len \(6\)"):
        cost(SMALL, seq_len)


def with_vocabulary(model: ModelConfig) -> ModelConfig:
    from msgspec.structs import replace

    return replace(model, vocab_size=model.vocab_size or 65)
