"""Configurations as a user meets them: every mistake is one line that names its key, and what is written reads back."""

import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minimoe.config import (
    Config,
    DataConfig,
    ModelConfig,
    MoEConfig,
    SourceConfig,
    TrainConfig,
    load_config,
    preset_names,
    preset_text,
    to_toml,
)
from minimoe.errors import ConfigError

PRESETS = [
    "bert-base", "bert-tiny", "bert-tiny-moe", "bert-tiny-post", "collapse", "gpt2", "mixtral-8x7b", "shakespeare-dense", "shakespeare-moe",
    "tiny-dense", "tiny-moe", "vit-b16", "vit-folder", "vit-tiny", "vit-tiny-moe",
]  # fmt: skip


def complaint(*overrides: str, source: str | Path = "tiny-moe") -> str:
    """The error of loading, which must be one line."""
    with pytest.raises(ConfigError) as caught:
        load_config(source, overrides)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


# ---- presets -----------------------------------------------------------------------------------------------------------------


def test_the_presets_are_those_that_the_documents_name() -> None:
    assert preset_names() == PRESETS


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_loads_under_its_name_and_its_text_opens_by_saying_what_it_is(preset: str) -> None:
    assert load_config(preset).name == preset
    assert preset_text(preset).startswith(f"# {preset}: ")


@pytest.mark.parametrize("preset", ["tiny-moe", "tiny-dense", "shakespeare-dense", "shakespeare-moe", "collapse", "gpt2", "mixtral-8x7b"])
def test_a_causal_language_model_among_the_presets_can_be_trained(preset: str) -> None:
    load_config(preset, ["train.seq_len=64"]).check_trainable()


@pytest.mark.parametrize("preset", [preset for preset in PRESETS if preset.startswith(("bert", "vit"))])
def test_an_encoder_among_the_presets_has_a_task(preset: str) -> None:
    load_config(preset).check_trainable()


def test_the_default_preset_is_the_default_configuration_with_experts() -> None:
    config = load_config("tiny-moe")
    assert (config.train, config.data) == (TrainConfig(), DataConfig())
    assert config.model == ModelConfig(n_kv_heads=2, head_dim=32, moe=MoEConfig(d_hidden=256))


def test_collapse_has_every_remedy_off() -> None:
    moe = load_config("collapse").model.moe
    assert moe is not None
    assert (moe.aux_loss_coef, moe.z_loss_coef, moe.capacity_factor, moe.jitter, moe.noise_std) == (0, 0, 0, 0, 0)
    assert moe.router_bias and moe.router_bias_std > 0


def test_an_unknown_preset_names_the_nearest() -> None:
    assert complaint(source="tiny-mo") == "no preset and no file 'tiny-mo' (did you mean 'tiny-moe'?)"
    with pytest.raises(ConfigError, match=r"no preset 'mixtral' \(did you mean 'mixtral-8x7b'\?\)"):
        preset_text("mixtral")


# ---- what cannot be ----------------------------------------------------------------------------------------------------------

REFUSED = [
    # unknown keys and words, with the nearest known
    ("train.learning_rat=1e-3", "train.learning_rat: unknown key (minimoe config tiny-moe explains the keys)"),
    ("train.warmup=5", "train.warmup: unknown key (did you mean 'warmup_steps'?)"),
    ("moe.topk=1", "moe.topk: unknown key (did you mean 'top_k'?)"),
    ("model.moe.top_k=1", "model.moe: unknown key"),
    ("modl.d_model=64", "modl: unknown table or key (did you mean 'model'?)"),
    ("zzz=1", "zzz: unknown table or key (known: data, lora, model, moe, train)"),
    # the full key of a short one
    ("lr=1e-3", "lr: unknown table or key (did you mean 'train.lr'?)"),
    ("top_k=1", "top_k: unknown table or key (did you mean 'moe.top_k'?)"),
    ("top-k=1", "top-k: unknown table or key (did you mean 'moe.top_k'?)"),
    ("batch=8", "batch: unknown table or key (did you mean 'train.batch_size'?)"),
    ("d_hidden=8", "d_hidden: unknown table or key (did you mean 'model.d_hidden' or 'moe.d_hidden'?)"),
    ("model.lr=1", "model.lr: unknown key (did you mean 'train.lr'?)"),
    ("model.factor=2", "model.factor: unknown key (did you mean 'model.rope.factor'?)"),
    ("model.rope.fctor=2", "model.rope.fctor: unknown key (did you mean 'factor'?)"),
    ("rope.factor=2", "rope: unknown table or key (did you mean 'model.rope'?)"),
    ("train.optimizer=adam", "train.optimizer = 'adam' is not one of its values (did you mean 'adamw'?)"),
    ("moe.router=swich", "moe.router = 'swich' is not one of its values (did you mean 'switch'?)"),
    # wrong types
    ("model.d_model=wide", "model.d_model: expected int, got str"),
    ("model.d_model=64.5", "model.d_model: expected int, got float"),
    ("train.steps=1.5e0", "train.steps: expected int, got float"),
    ("train.steps=inf", "train.steps: expected int, got float"),
    ("train.steps=none", "train.steps: expected int, got str"),
    ("model.bias=1", "model.bias: expected bool, got int"),
    ("train.keep=true", "train.keep: expected int, got bool"),
    ("moe.top_k=two", "moe.top_k: expected int, got str"),
    ("moe.layers=3", "moe.layers: expected array, got int"),
    ('moe.layers=[1, "a"]', "moe.layers[1]: expected int, got str"),
    ("data.source=5", "data.source: expected str, got int"),
    ("train=3", "train: expected a table, got 3"),
    ("moe=some", "moe: expected a table, got 'some'"),
    ("name=5", "name: expected str, got 5"),
    # numbers out of range
    ("model.n_layers=-4", "model.n_layers (-4) must not be negative"),
    ("model.d_model=0", "model.d_model must be above 0"),
    ("train.batch_size=0", "train.batch_size must be above 0"),
    ("train.lr=nan", "train.lr (nan) must be a finite number"),
    ("train.lr=inf", "train.lr (inf) must be a finite number"),
    ("train.lr=-0.1", "train.lr (-0.1) must not be negative"),
    ("train.lr=0", "train.lr must be above 0"),
    ("train.beta2=1.0", "train.beta2 (1.0) must be below 1"),
    ("train.seed=18446744073709551616", "train.seed must be below 2**64"),
    ("model.dropout=1.0", "model.dropout (1.0) must be below 1"),
    ("data.val_fraction=0", "data.val_fraction (0.0) must lie between 0 and 1"),
    ("data.val_fraction=1", "data.val_fraction (1.0) must lie between 0 and 1"),
    # experts
    ("moe.top_k=9", "moe.top_k (9) must not exceed moe.n_experts (8)"),
    ("moe.top_k=0", "moe.top_k must be above 0"),
    ("moe.router=switch; moe.top_k=2", "moe.router = 'switch' sends each token to one expert: moe.top_k must be 1, not 2"),
    ("moe.router=expert_choice; moe.aux_loss_coef=0.01", "moe.router = 'expert_choice' is balanced by construction"),
    ("moe.router=expert_choice; moe.capacity_factor=1.25", "moe.router = 'expert_choice' sets each expert's rows by top_k"),
    ("moe.router=noisy_topk; moe.aux_convention=mixtral", "moe.aux_convention = 'mixtral' pools f and P over layers"),
    ("moe.jitter=1.0", "moe.jitter (1.0) must be below 1"),
    ("moe.layers=[4]", "moe.layers: 4 is not a layer of this model (0 to 3)"),
    ("moe.layers=[1]; moe.every=2", "moe.every and moe.layers both say which layers route: keep one"),
    ("moe.n_groups=2", "moe.n_groups and moe.top_groups belong to moe.router = 'sigmoid_bias'"),
    ("moe.router=sigmoid_bias; moe.n_groups=3", "moe.n_groups (3) must divide moe.n_experts (8)"),
    ("moe.router=sigmoid_bias; moe.n_groups=8", "moe.n_groups (8) must divide moe.n_experts (8) into groups of two or more"),
    ("moe.router=sigmoid_bias; moe.n_groups=2; moe.top_groups=3", "moe.top_groups (3) must not exceed moe.n_groups (2)"),
    ("moe.router=sigmoid_bias; moe.n_groups=4; moe.top_k=3", "moe.top_k (3) must not exceed the experts of moe.top_groups (1) groups"),
    # attention, heads, vision
    ("model.n_heads=4; model.n_kv_heads=3", "model.n_heads (4) must be a multiple of model.n_kv_heads (3)"),
    ("model.head_dim=7", "model.position = 'rope' rotates pairs: the head width (7) must be even"),
    ('model.layer_types=["full"]', "model.layer_types names 1 layers, model.n_layers is 4"),
    ('model.n_layers=1; model.layer_types=["sliding"]', "model.layer_types has 'sliding' layers: set model.sliding_window"),
    ("model.head=none; model.tie_embeddings=true", "model.tie_embeddings needs a head over the vocabulary: model.head is 'none'"),
    ("model.head=classifier", "model.head = 'classifier' needs model.n_classes"),
    ("model.vocab_size=5; model.pad_token_id=5", "model.pad_token_id (5) must be below model.vocab_size (5)"),
    ("model.image_size=30; model.head=none", "model.image_size (30) must be a multiple of model.patch_size (16)"),
    ("model.image_size=32", "model.image_size > 0 reads images: model.head must be 'classifier' or 'none', not 'lm'"),
    # the form of --set
    ("train.lr", "--set train.lr: expected KEY=VALUE, as in --set train.lr=3e-4"),
    ("=3", "--set =3: expected KEY=VALUE"),
]


@pytest.mark.parametrize("overrides, message", REFUSED, ids=[case[0] for case in REFUSED])
def test_what_cannot_be_is_refused_in_one_line_that_names_the_key(overrides: str, message: str) -> None:
    assert complaint(*overrides.split("; ")).startswith(message)


def test_heads_must_divide_the_width_unless_their_own_width_is_given(tmp_path: Path) -> None:
    path = write(tmp_path, "odd.toml", "[model]\nd_model = 10\nn_heads = 4\n")
    assert complaint(source=path) == "model.d_model (10) must be a multiple of model.n_heads (4), or set model.head_dim"
    assert load_config(path, ["model.head_dim=6"]).model.head_width == 6


def test_a_zero_that_turns_something_off_may_be_written_as_an_integer() -> None:
    assert MoEConfig(aux_loss_coef=0, jitter=0).aux_loss_coef == 0
    assert ModelConfig(dropout=0).dropout == 0
    assert load_config("tiny-moe", ["moe.aux_loss_coef=0", "train.grad_clip=0"]).train.grad_clip == 0


# ---- what can be built but not trained ---------------------------------------------------------------------------------------

UNTRAINABLE = [
    ("tiny-moe", ["moe.top_k=1"], "moe.top_k = 1 with moe.norm_topk_prob = true gives the router no gradient"),
    ("tiny-moe", ["moe.top_k=1", "moe.router=sigmoid_bias"], "moe.top_k = 1 with moe.norm_topk_prob = true gives the router no gradient"),
    ("tiny-moe", ["moe.top_k=1", "moe.router=topk_softmax"], "moe.router = 'topk_softmax' with moe.top_k = 1 gives the router no gradient"),
    ("tiny-moe", ["moe.top_k=1", "moe.router=noisy_topk"], "moe.router = 'noisy_topk' with moe.top_k = 1 gives the router no gradient"),
    ("tiny-moe", ["train.seq_len=129"], "train.seq_len (129) must not exceed model.max_seq_len (128)"),
    ("tiny-moe", ["model.causal=false"], "model.head = 'lm' learns to predict the next token: set model.causal = true, or"),
    ("bert-base", ["model.causal=true"], "model.head = 'mlm' fills in blanks from both sides: set model.causal = false"),
    ("vit-b16", ["model.causal=true"], "model.head = 'classifier' reads an image's class where its first token is: set"),
    ("vit-b16", ["model.head=none"], "there is no task for model.head = 'none': set 'lm' or 'mlm', or 'classifier' with model.image_size"),
    ("tiny-dense", ["model.head=classifier", "model.n_classes=2"], "there is no task for model.head = 'classifier' over tokens: set"),
]


@pytest.mark.parametrize("preset, overrides, message", UNTRAINABLE)
def test_what_cannot_be_trained_loads_and_training_says_why(preset: str, overrides: list[str], message: str) -> None:
    config = load_config(preset, overrides)
    with pytest.raises(ConfigError) as caught:
        config.check_trainable()
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["moe.top_k=1", "moe.norm_topk_prob=false"],
        ["moe.router=switch"],
        ["moe.n_experts=1"],
        ["moe.top_k=1", "moe=none"],
        ["moe.top_k=1", "moe.layers=[]"],
        ["moe.top_k=1", "moe.router=expert_choice"],
    ],
)
def test_one_expert_a_token_is_trainable_where_its_weight_can_move_or_nothing_is_chosen(overrides: list[str]) -> None:
    load_config("tiny-moe", overrides).check_trainable()


def test_what_sees_the_future_is_warned_of_in_a_causal_model_alone() -> None:
    by_expert = MoEConfig(router="expert_choice")
    by_probability = MoEConfig(capacity_factor=1.25, drop_priority="probability")
    assert len(by_expert.warnings(causal=True)) == len(by_probability.warnings(causal=True)) == 1
    assert by_expert.warnings(causal=False) == by_probability.warnings(causal=False) == MoEConfig().warnings(causal=True) == []


# ---- defaults that depend on another key -------------------------------------------------------------------------------------


@pytest.mark.parametrize("overrides, k, coefficient", [
    ([], 2, 0.01),
    (["moe.router=switch"], 1, 0.01),
    (["moe.n_experts=1"], 1, 0.01),
    (["moe.router=expert_choice"], 2, 0.0),
])  # fmt: skip
def test_the_preset_leaves_to_the_router_what_depends_on_it(overrides: list[str], k: int, coefficient: float) -> None:
    moe = load_config("tiny-moe", overrides).model.moe
    assert moe is not None
    assert (moe.k, moe.aux_loss_coef) == (k, coefficient)


@pytest.mark.parametrize("override, routed", [
    ("moe.every=1", (0, 1, 2, 3)), ("moe.every=2", (1, 3)), ("moe.every=5", ()), ("moe.layers=[3, 0]", (0, 3)), ("moe.layers=[]", ()),
])  # fmt: skip
def test_layers_route_by_every_or_by_list(override: str, routed: tuple[int, ...]) -> None:
    assert load_config("tiny-moe", [override]).model.moe_layers() == routed


# ---- files, extends, --set ---------------------------------------------------------------------------------------------------


def test_broken_toml_is_told_with_its_line(tmp_path: Path) -> None:
    path = write(tmp_path, "broken.toml", "[model]\nd_model = \n")
    assert complaint(source=path) == f"{path}: not valid TOML: Invalid value (at line 2, column 11)"


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    assert complaint(source=tmp_path / "none.toml") == f"no configuration file {tmp_path / 'none.toml'}"
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe\x00")
    assert complaint(source=binary) == f"{binary}: not UTF-16 text (byte 0x00 at 2)"
    assert complaint(source=f"{tmp_path}/").startswith(f"{tmp_path}: cannot be read: ")


def test_a_file_lays_its_keys_over_what_it_extends(tmp_path: Path) -> None:
    base = write(tmp_path, "base.toml", 'extends = "tiny-moe"\n[moe]\nn_experts = 4\n[train]\nsteps = 7\n')
    top = write(tmp_path, "top.toml", f'extends = "{base}"\n[train]\nsteps = 9\n')
    config = load_config(top)
    assert config.model.moe is not None
    assert (config.name, config.model.n_kv_heads, config.model.moe.n_experts, config.train.steps) == ("top", 2, 4, 9)


def test_extends_that_goes_round_is_told_and_not_followed(tmp_path: Path) -> None:
    one, two = tmp_path / "one.toml", tmp_path / "two.toml"
    write(tmp_path, "one.toml", f'extends = "{two}"\n')
    write(tmp_path, "two.toml", f'extends = "{one}"\n')
    assert complaint(source=one) == f"extends forms a circle: {one} -> {two} -> {one}"


@pytest.mark.parametrize("extends, message", [
    ('"tiny-mo"', "extends = 'tiny-mo': no preset and no file of that name (did you mean 'tiny-moe'?)"),
    ("3", "extends: expected a preset or file, got 3"),
])  # fmt: skip
def test_extends_names_a_preset_or_a_file(tmp_path: Path, extends: str, message: str) -> None:
    path = write(tmp_path, "odd.toml", f"extends = {extends}\n")
    assert complaint(source=path) == f"{path}: {message}"


def test_at_most_20_files_extend_each_other(tmp_path: Path) -> None:
    names = [str(tmp_path / f"{number}.toml") for number in range(1200)]
    for number, below in enumerate(names[1:]):
        write(tmp_path, f"{number}.toml", f'extends = "{below}"\n')
    write(tmp_path, "1199.toml", "")
    assert complaint(source=names[0]) == f"more than 20 files extend each other: {' -> '.join(names[:3])} -> ... -> {names[20]}"
    assert load_config(names[1180]).name == "1180"


def test_what_a_file_extends_must_be_a_file(tmp_path: Path) -> None:
    path = write(tmp_path, "endless.toml", 'extends = "/dev/zero"\n')
    began = time.process_time()
    assert complaint(source=path) == f"{path}: extends '/dev/zero', which is not a file"
    assert complaint(source="/dev/zero") == "/dev/zero: has more than 1,000,000 bytes: too large to be what it should be"
    assert complaint(source="\0/x") == "no configuration file '\\x00/x'"
    assert complaint(source="a" * 300) == f"no preset and no file {'a' * 300!r} (minimoe config lists the presets)"
    assert time.process_time() - began < 1


DEEP = "[" * 100_000


@pytest.mark.parametrize("text, message", [
    (f"a = {DEEP}", "nested more than 100 deep"), (f"a = {'9' * 5000}", "not valid TOML: it has a number or a date that cannot be read"),
    (".".join(["a"] * 20_000) + " = 1", "has a dotted key of more than 100 parts"),
    ("".join(f"k{i} = 1\n" for i in range(1_000_000)), "has more than 1,000,000 bytes: too large to be what it should be"),
])  # fmt: skip
def test_a_file_that_costs_more_than_it_says_is_refused_within_a_second(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, "costly.toml", text)
    began = time.process_time()
    assert complaint(source=path) == f"{path}: {message}"
    assert time.process_time() - began < 1


@pytest.mark.parametrize("override, message", [
    (f"data.source={DEEP}", "--set data.source: nested more than 100 deep"),
    (f"train.steps={'9' * 5000}", "--set train.steps: not valid TOML: it has a number or a date that cannot be read"),
    (f"{'a.' * 20_000}a=1", f"--set {'a.' * 20}...: has a dotted key of more than 100 parts"),
])  # fmt: skip
def test_set_that_costs_more_than_it_says_is_refused_within_a_second(override: str, message: str) -> None:
    began = time.process_time()
    assert complaint(override) == message
    assert time.process_time() - began < 1


def test_a_billion_layers_are_refused_within_a_second() -> None:
    began = time.process_time()
    assert complaint("model.n_layers=1000000000") == "model.n_layers (1000000000) must be at most 10000"
    assert time.process_time() - began < 1
    assert load_config("tiny-moe", ["model.n_layers=10000"]).model.n_layers == 10_000


def test_text_that_is_not_unicode_is_refused_by_its_key() -> None:
    assert complaint("train.lr=3e-\udcb4") == "train: has text that is not valid Unicode"
    assert complaint("moe.router=\udcff") == "moe.router: has text that is not valid Unicode"
    with pytest.raises(ConfigError, match=r"data\.source: has text that is not valid Unicode"):
        DataConfig(source="\udcff.txt")


def test_set_takes_toml_values_and_bare_strings() -> None:
    config = load_config("tiny-moe", [
        "train.lr=3e-4", "train.steps = 1_000", "train.backend=numpy", 'train.optimizer="lion"', "data.source=my texts/a.txt",
        "model.bias=true", "moe.layers=[1, 3]", "name=mine",
    ])  # fmt: skip
    assert config.model.moe is not None
    assert (config.train.lr, config.train.steps, config.train.backend, config.train.optimizer) == (3e-4, 1000, "numpy", "lion")
    assert (config.data.source, config.model.bias, config.model.moe.layers, config.name) == ("my texts/a.txt", True, (1, 3), "mine")


@pytest.mark.parametrize("moe", ["moe=none", 'moe="none"'])
def test_set_moe_none_makes_every_layer_dense(moe: str) -> None:
    assert load_config("tiny-moe", [moe]).model == load_config("tiny-dense", ["model.d_hidden=256"]).model


def test_set_can_add_experts_to_a_dense_preset_and_the_last_word_counts() -> None:
    config = load_config("tiny-dense", ["moe.n_experts=4", "moe.n_experts=6"])
    assert config.model.moe is not None
    assert (config.model.moe.n_experts, config.model.expert_hidden) == (6, 512)


# ---- writing -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_what_is_written_reads_back_to_the_same_configuration(preset: str, tmp_path: Path) -> None:
    config = load_config(preset)
    assert load_config(write(tmp_path, "written.toml", to_toml(config))) == config


@pytest.mark.parametrize("overrides", [["moe.layers=[0, 3]"], ["moe.every=2"], ["moe=none"], ["moe.router=expert_choice"], ["name=mine"]])
def test_a_changed_preset_reads_back_too(overrides: list[str], tmp_path: Path) -> None:
    config = load_config("tiny-moe", overrides)
    assert load_config(write(tmp_path, "written.toml", to_toml(config))) == config


positive = st.floats(min_value=1e-300, max_value=1e300)
fraction = st.floats(min_value=0.0, max_value=1.0, exclude_max=True)
moes = st.builds(
    MoEConfig,
    n_experts=st.integers(2, 64),
    top_k=st.none() | st.integers(1, 2),
    d_hidden=st.none() | st.integers(1, 4096),
    layers=st.none() | st.lists(st.integers(0, 3), max_size=4).map(tuple),
    router=st.sampled_from(["softmax_topk", "topk_softmax", "noisy_topk", "sigmoid_bias"]),
    norm_topk_prob=st.booleans(),
    jitter=fraction,
    aux_loss_coef=st.none() | positive,
    router_bias=st.booleans(),
)
names = st.text(st.characters(exclude_characters="*?[", exclude_categories=["Cs"]), min_size=1)  # a pattern is completed where it matches
parts = st.builds(SourceConfig, source=names, weight=st.floats(min_value=0.01, max_value=0.3))
configs = st.builds(
    Config,
    model=st.builds(
        ModelConfig,
        head_dim=st.none() | st.integers(1, 64).map(lambda half: 2 * half),
        vocab_size=st.none() | st.integers(1, 100_000),
        norm_eps=positive,
        dropout=fraction,
        activation=st.sampled_from(["swiglu", "gelu", "gelu_tanh", "relu"]),
        layer_types=st.none() | st.lists(st.sampled_from(["full", "sliding"]), min_size=4, max_size=4).map(tuple),
        sliding_window=st.integers(1, 99),
        moe=st.none() | moes,
    ),
    train=st.builds(TrainConfig, lr=positive, beta2=fraction, seed=st.integers(0, 2**64 - 1), recompute=st.booleans()),
    data=st.builds(DataConfig, source=names, text_key=st.none() | st.text(), within_documents=st.booleans())
    | st.builds(DataConfig, sources=st.lists(parts, max_size=3).map(tuple)),
    name=st.text(),
)


@given(configs)
def test_any_configuration_reads_back_as_it_was_written(tmp_path_factory: pytest.TempPathFactory, config: Config) -> None:
    path = write(tmp_path_factory.mktemp("round"), "written.toml", to_toml(config))
    assert load_config(path) == config
