"""The tables of a configuration: model, experts, training, data. An impossible value is refused with the full path of its key."""

import sys
from typing import Literal, get_args

from msgspec import Struct, ValidationError, convert
from msgspec.structs import FieldInfo, fields, force_setattr

from minimoe.errors import ConfigError, nearest
from minimoe.reference import optimizers, routers
from minimoe.reference.extensions import UnknownName, Value, resolve_options
from minimoe.reference.optimizers import Optimizer
from minimoe.reference.routers import Router, Rule

Activation = Literal["swiglu", "gelu", "gelu_tanh", "relu"]
Dtype = Literal["float32", "float64", "bfloat16"]
LORA_TARGETS = ("attention", "dense", "experts")  # of the blocks: attention's products, dense and shared feed-forward layers, experts
MOST_WITHIN = 32_768  # positions of documents in a row go up to its square, as int32
MOST_LAYERS = 10_000  # a layer costs time even where nothing is allocated


def check_choice(key: str, value: object, field: FieldInfo) -> None:
    """Refuse a value that is not among the field's choices, naming the nearest one."""
    choices = [choice for choice in get_args(field.type) if isinstance(choice, str)]
    if choices and isinstance(value, str) and value not in choices:
        raise ConfigError(f"{key} = {value!r} is not one of its values{nearest(value, choices)}")


def unknown_choice(key: str, error: UnknownName) -> ConfigError:
    """Return the same error with a message that names the key."""
    found = UnknownName(error.kind, error.name, error.known)
    found.args = (f"{key} = {error.name!r} is not one of its values{nearest(error.name, error.known)}",)
    return found


def check_type(key: str, value: object, field: FieldInfo) -> object:
    """Return the value as its field's type. Values given in Python follow the same rules as those of a TOML file."""
    check_choice(key, value, field)
    try:
        if isinstance(value, str):
            value.encode()
        return convert(value, field.type)
    except ValidationError as error:
        raise ConfigError(f"{key}: {str(error)[0].lower()}{str(error)[1:].replace('`', '')}") from None
    except UnicodeEncodeError:  # the command line was not UTF-8
        raise ConfigError(f"{key}: has text that is not valid Unicode") from None


def check_table(table: Struct, path: str, zero_ok: set[str]) -> None:
    """Check that values have their key's type, that numbers are finite and not negative, and that sizes are above zero unless `zero_ok`."""
    for field in fields(table):
        value = check_type(f"{path}.{field.name}", getattr(table, field.name), field)
        force_setattr(table, field.name, value)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        key = f"{path}.{field.name}"
        if not abs(value) <= sys.float_info.max:  # NaN, infinity, and an integer too large for a float
            raise ConfigError(f"{key} ({str(value)[:40]}) must be a finite number")
        if value < 0:
            raise ConfigError(f"{key} ({value}) must not be negative")
        is_size = field.type is not float and float not in get_args(field.type)
        if value == 0 and is_size and field.name not in zero_ok:
            raise ConfigError(f"{key} must be above 0")


class MoEConfig(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """The routed layer: its experts, its router, and what keeps the load even. `None` means the default that the comment names."""

    n_experts: int = 8
    top_k: int | None = None  # experts per token; default 2, for switch 1
    d_hidden: int | None = None  # hidden width of one expert; default: the model's d_hidden
    every: int = 1  # every n-th layer routes (the n-th, the 2n-th, ...)
    layers: tuple[int, ...] | None = None  # or: exactly these layers, counted from 0
    router: str = "softmax_topk"  # a name in minimoe/reference/routers.py, or one from an installed package
    norm_topk_prob: bool = True
    n_shared_experts: int = 0
    capacity_factor: float = 0.0  # 0: dropless
    drop_priority: Literal["position", "probability"] = "position"
    jitter: float = 0.0
    jitter_experts: bool = False
    noise_std: float = 0.0
    aux_loss_coef: float | None = None  # default 0.01; expert choice is balanced by construction: 0
    aux_convention: Literal["switch", "megablocks", "mixtral"] = "switch"
    z_loss_coef: float = 0.001
    bias_rate: float = 0.001  # sigmoid_bias
    n_groups: int = 1
    top_groups: int = 1
    route_scale: float = 1.0
    router_bias: bool = False  # a learned constant on the logits of each expert
    router_bias_std: float = 0.0  # its initial standard deviation: above 0 the router starts unbalanced, see docs/losses-and-collapse.md
    options: dict[str, Value] = {}  # settings of a router from another package: the table [moe.options]

    def __post_init__(self) -> None:
        check_table(self, "moe", {"n_shared_experts"})
        router = self.router_facts
        force_setattr(self, "options", resolve_options(router.options, self.options, "moe.options", f"moe.router = {self.router!r}"))
        if self.top_k is None:
            force_setattr(self, "top_k", min(router.top_k, self.n_experts))
        if self.aux_loss_coef is None:
            force_setattr(self, "aux_loss_coef", router.aux_loss_coef)
        if self.k > self.n_experts:
            raise ConfigError(f"moe.top_k ({self.k}) must not exceed moe.n_experts ({self.n_experts})")
        problem = router.refuses(self)
        if problem is not None:
            raise ConfigError(problem)
        if self.jitter >= 1.0:
            raise ConfigError(f"moe.jitter ({self.jitter}) must be below 1: the input is scaled by a factor in [1 - jitter, 1 + jitter]")
        self._check_groups()

    def _check_groups(self) -> None:
        if self.n_groups == 1 and self.top_groups == 1:
            return
        if not self.router_facts.groups:
            raise ConfigError(f"moe.n_groups and moe.top_groups belong to moe.router = 'sigmoid_bias', not {self.router!r}")
        if self.n_experts % self.n_groups or self.n_experts // self.n_groups < 2:
            raise ConfigError(f"moe.n_groups ({self.n_groups}) must divide moe.n_experts ({self.n_experts}) into groups of two or more")
        if self.top_groups > self.n_groups:
            raise ConfigError(f"moe.top_groups ({self.top_groups}) must not exceed moe.n_groups ({self.n_groups})")
        if self.k > self.top_groups * (self.n_experts // self.n_groups):
            raise ConfigError(f"moe.top_k ({self.k}) must not exceed the experts of moe.top_groups ({self.top_groups}) groups")

    @property
    def k(self) -> int:
        """Experts per token (K), resolved."""
        assert self.top_k is not None
        return self.top_k

    @property
    def router_facts(self) -> Router:
        """The router's entry in the table of routers."""
        try:
            return routers.find(self.router)
        except UnknownName as error:
            raise unknown_choice("moe.router", error) from None

    @property
    def rule(self) -> Rule:
        """How the router chooses, as the kernel `gate` takes it."""
        options = tuple(self.options.items())
        return Rule(self.router, self.k, self.norm_topk_prob, self.n_groups, self.top_groups, self.route_scale, options)

    def check_trainable(self) -> None:
        """Raise ConfigError if the task's loss cannot train the router, as its only combine weight is always 1. Inference is possible."""
        problem = self.router_facts.constant_weight(self)
        if problem is not None:
            raise ConfigError(problem)

    def warnings(self, causal: bool) -> list[str]:
        """Return a line for each setting that works but may surprise."""
        if not causal:
            return []
        found = [self.router_facts.warns] if self.router_facts.warns else []
        if self.capacity_factor and self.drop_priority == "probability":
            found.append("drop_priority = 'probability' lets later tokens push out earlier ones: in a causal model that sees the future")
        return found


class RopeConfig(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """How rotary frequencies are stretched beyond the length of pretraining; formulas in minimoe/layers/rotary.py."""

    type: Literal["linear", "llama3", "yarn"] = "linear"
    factor: float = 1.0
    original_max_seq_len: int | None = None  # in pretraining (llama3, yarn); default: the model's max_seq_len
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: bounds of the ramp are whole numbers
    attention_factor: float | None = None  # yarn; default: by its formula, from factor, mscale and mscale_all_dim
    mscale: float = 0.0  # yarn, 0: not given
    mscale_all_dim: float = 0.0  # yarn, 0: not given

    def __post_init__(self) -> None:
        check_table(self, "model.rope", {"attention_factor"})
        if self.type == "yarn" and not self.beta_fast > self.beta_slow > 0.0:
            raise ConfigError(f"model.rope.beta_fast ({self.beta_fast}) must exceed model.rope.beta_slow ({self.beta_slow}), both above 0")
        if self.factor < 1.0:
            raise ConfigError(f"model.rope.factor ({self.factor}) must be 1 or more")
        if self.type == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ConfigError(
                f"model.rope.high_freq_factor ({self.high_freq_factor}) must exceed model.rope.low_freq_factor ({self.low_freq_factor})"
            )


class AttentionConfig(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Properties of attention that only some families have."""

    sinks: bool = False  # a learned score per head that takes weight but has no value (gpt-oss)
    interleaved: bool = False  # rotary pairs are (2i, 2i + 1), not (i, i + C/2)

    def __post_init__(self) -> None:
        check_table(self, "model.attention", set())


class LatentConfig(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Multi-head latent attention: keys and values are made from one narrow vector per token (DeepSeek-V2, 2024)."""

    kv_rank: int = 512  # width of that vector
    q_rank: int = 0  # width of the vector that queries are made from; 0: they are made from the input
    nope_dim: int = 128  # the part of a head's query and key without positions
    rope_dim: int = 64  # the part with rotary positions; its key is shared by all heads
    v_dim: int = 128  # width of a head's value
    norm_eps: float = 1e-6  # in the norms of the narrow vectors

    def __post_init__(self) -> None:
        check_table(self, "model.mla", {"q_rank"})
        if self.rope_dim % 2:
            raise ConfigError(f"model.mla.rope_dim ({self.rope_dim}) must be even: positions rotate pairs")


class ModelConfig(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """One Transformer: decoder, encoder or vision encoder, dense or routed. `None` means the default that the comment names."""

    d_model: int = 128
    n_layers: int = 4
    n_heads: int = 4
    n_kv_heads: int | None = None  # default: n_heads
    head_dim: int | None = None  # default: d_model / n_heads
    d_hidden: int = 256
    max_seq_len: int = 128
    vocab_size: int | None = None  # default: the tokenizer's
    causal: bool = True
    norm: Literal["rms", "layer"] = "rms"
    norm_position: Literal["pre", "post"] = "pre"
    norm_eps: float = 1e-5
    qk_norm: Literal["none", "head", "full"] = "none"
    position: Literal["rope", "learned", "none"] = "rope"
    rope_theta: float = 10000.0
    sliding_window: int = 0
    layer_types: tuple[Literal["full", "sliding"], ...] | None = None  # default: every layer slides if sliding_window > 0
    activation: Activation = "swiglu"
    activation_limit: float = 0.0  # > 0: experts use swiglu in its clipped form (gpt-oss)
    bias: bool = False  # in dense layers, experts and layer norms
    attention_bias: bool = False  # in the attention's projections
    tie_embeddings: bool = False
    dropout: float = 0.0
    attention_dropout: float = 0.0
    init_std: float = 0.02
    head: Literal["lm", "mlm", "classifier", "none"] = "lm"
    type_vocab_size: int = 0
    pad_token_id: int | None = None  # its embedding starts at zero and stays there
    image_size: int = 0  # > 0: the input is images, cut into patches
    patch_size: int = 16
    n_channels: int = 3
    n_classes: int = 0
    rope: RopeConfig | None = None  # default: frequencies as rope_theta says
    attention: AttentionConfig | None = None
    mla: LatentConfig | None = None  # latent attention in place of grouped heads
    moe: MoEConfig | None = None  # in TOML the table [moe], next to [model]

    def __post_init__(self) -> None:
        zero_ok = {"sliding_window", "type_vocab_size", "image_size", "n_classes", "pad_token_id"}
        check_table(self, "model", zero_ok)
        if self.n_layers > MOST_LAYERS:
            raise ConfigError(f"model.n_layers ({self.n_layers}) must be at most {MOST_LAYERS}")
        if self.head_dim is None and self.mla is None and self.d_model % self.n_heads:
            raise ConfigError(f"model.d_model ({self.d_model}) must be a multiple of model.n_heads ({self.n_heads}), or set model.head_dim")
        if self.n_heads % self.kv_heads:
            raise ConfigError(f"model.n_heads ({self.n_heads}) must be a multiple of model.n_kv_heads ({self.kv_heads})")
        if self.position == "rope" and self.mla is None and self.head_width % 2:
            raise ConfigError(f"model.position = 'rope' rotates pairs: the head width ({self.head_width}) must be even")
        for name in ("dropout", "attention_dropout"):
            if getattr(self, name) >= 1.0:
                raise ConfigError(f"model.{name} ({getattr(self, name)}) must be below 1")
        if self.layer_types is not None and len(self.layer_types) != self.n_layers:
            raise ConfigError(f"model.layer_types names {len(self.layer_types)} layers, model.n_layers is {self.n_layers}")
        if self.layer_types is not None and "sliding" in self.layer_types and not self.sliding_window:
            raise ConfigError("model.layer_types has 'sliding' layers: set model.sliding_window to their width")
        if self.tie_embeddings and self.head not in ("lm", "mlm"):
            raise ConfigError(f"model.tie_embeddings needs a head over the vocabulary: model.head is {self.head!r}")
        if self.pad_token_id is not None and self.vocab_size is not None and self.pad_token_id >= self.vocab_size:
            raise ConfigError(f"model.pad_token_id ({self.pad_token_id}) must be below model.vocab_size ({self.vocab_size})")
        self._check_vision()
        self._check_moe_layers()
        self._check_attention()

    def _check_attention(self) -> None:
        if self.position == "rope" and self.rope_theta <= 1.0:
            raise ConfigError(f"model.rope_theta ({self.rope_theta}) must exceed 1: each pair turns more slowly than the one before")
        if self.position != "rope" and (self.rope is not None or self.mla is not None):
            raise ConfigError(f"model.rope and model.mla rotate by position: model.position must be 'rope', not {self.position!r}")
        if self.mla is not None and (self.sinks or self.qk_norm != "none" or self.kv_heads != self.n_heads):
            raise ConfigError("model.mla has no sinks, no qk_norm and no groups of heads: remove these keys")
        if self.interleaved and self.mla is None:
            raise ConfigError("model.attention.interleaved goes with model.mla: other attention rotates pairs (i, i + C/2)")
        if self.activation_limit:
            dense = len(self.moe_layers()) < self.n_layers or (self.moe is not None and self.moe.n_shared_experts)
            if self.activation != "swiglu" or dense:
                raise ConfigError("model.activation_limit clips the swiglu of experts: every layer must route, without shared experts")

    def _check_vision(self) -> None:
        if self.image_size and self.image_size % self.patch_size:
            raise ConfigError(f"model.image_size ({self.image_size}) must be a multiple of model.patch_size ({self.patch_size})")
        if self.image_size and self.head not in ("classifier", "none"):
            raise ConfigError(f"model.image_size > 0 reads images: model.head must be 'classifier' or 'none', not {self.head!r}")
        if self.head == "classifier" and not self.n_classes:
            raise ConfigError("model.head = 'classifier' needs model.n_classes")

    def _check_moe_layers(self) -> None:
        if self.moe is not None and self.moe.layers is not None:
            bad = [layer for layer in self.moe.layers if not 0 <= layer < self.n_layers]
            if bad:
                raise ConfigError(f"moe.layers: {bad[0]} is not a layer of this model (0 to {self.n_layers - 1})")

    @property
    def sinks(self) -> bool:
        """True if the heads have sinks."""
        return self.attention is not None and self.attention.sinks

    @property
    def interleaved(self) -> bool:
        """True if rotary pairs are neighbours."""
        return self.attention is not None and self.attention.interleaved

    @property
    def kv_heads(self) -> int:
        """Key/value heads (G), resolved."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def head_width(self) -> int:
        """Width of one head (C), resolved."""
        return self.d_model // self.n_heads if self.head_dim is None else self.head_dim

    @property
    def expert_hidden(self) -> int:
        """Hidden width of one expert (H), resolved."""
        return self.d_hidden if self.moe is None or self.moe.d_hidden is None else self.moe.d_hidden

    @property
    def n_patches(self) -> int:
        """The number of patches of an image; 0 if the input is tokens."""
        return (self.image_size // self.patch_size) ** 2 if self.image_size else 0

    def moe_layers(self) -> tuple[int, ...]:
        """Return the numbers of the layers that route, counted from 0."""
        if self.moe is None:
            return ()
        if self.moe.layers is not None:
            return tuple(sorted(set(self.moe.layers)))
        return tuple(layer for layer in range(self.n_layers) if (layer + 1) % self.moe.every == 0)

    def window(self, layer: int) -> int:
        """Return the width of a layer's attention window; 0 means that it sees everything."""
        if self.layer_types is None:
            return self.sliding_window
        return self.sliding_window if self.layer_types[layer] == "sliding" else 0


class TrainConfig(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """How a model is trained."""

    steps: int = 300
    batch_size: int = 16
    seq_len: int = 128
    accumulate: int = 1
    optimizer: str = "adamw"  # a name in minimoe/reference/optimizers.py, or one from an installed package
    lr: float = 1e-3
    min_lr: float = 1e-4
    warmup_steps: int = 50
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-8
    momentum: float = 0.9
    weight_decay: float = 0.1
    decay_embeddings: bool = False
    grad_clip: float = 1.0  # 0: no clipping
    recompute: bool = False
    eval_every: int = 100  # 0: only at the end
    eval_batches: int = 20
    patience: int = 0  # evaluations without a better loss after which the run ends; 0: never
    final_eval_batches: int = 0  # 0: the last evaluation covers the whole split
    sample_every: int = 0  # 0: no samples while it trains
    checkpoint_every: int = 100  # 0: only at the end
    keep: int = 2
    log_every: int = 10
    seed: int = 0
    backend: str = "auto"
    dtype: Dtype = "float32"
    threads: int = 0
    freeze: tuple[str, ...] = ()  # patterns of parameters that keep their numbers, such as "embed*" or "blocks.0.*"
    options: dict[str, Value] = {}  # settings of an optimizer from another package: the table [train.options]

    def __post_init__(self) -> None:
        every = {"eval_every", "sample_every", "checkpoint_every"}
        check_table(self, "train", {*every, "warmup_steps", "patience", "final_eval_batches", "seed", "threads", "grad_clip"})
        for name in ("beta1", "beta2", "momentum"):
            if getattr(self, name) >= 1.0:
                raise ConfigError(f"train.{name} ({getattr(self, name)}) must be below 1")
        if self.patience and not self.eval_every:
            raise ConfigError(f"train.patience ({self.patience}) counts evaluations: train.eval_every must be above 0")
        if self.lr == 0.0:
            raise ConfigError("train.lr must be above 0")
        if self.seed >= 2**64:
            raise ConfigError("train.seed must be below 2**64")
        facts = self.optimizer_facts
        resolved = resolve_options(facts.options, self.options, "train.options", f"train.optimizer = {self.optimizer!r}")
        force_setattr(self, "options", resolved)
        problem = facts.refuses(self)
        if problem is not None:
            raise ConfigError(problem)

    def warnings(self) -> list[str]:
        """Return a line for each setting that works but may surprise."""
        if self.warmup_steps <= self.steps:
            return []
        reached = self.lr * self.steps / self.warmup_steps
        return [
            f"train.warmup_steps ({self.warmup_steps}) is more than train.steps ({self.steps}): the rate ends at {reached:.3g}, "
            f"below train.lr ({self.lr})"
        ]

    @property
    def optimizer_facts(self) -> Optimizer:
        """The optimizer's entry in the table of optimizers."""
        try:
            return optimizers.find(self.optimizer)
        except UnknownName as error:
            raise unknown_choice("train.optimizer", error) from None


NO_SOURCE = "data.source is empty: give python-docs, python-code, python-mix, digits, a text file or a folder of them, a folder of images"


class SourceConfig(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """One of several sources: the table [[data.sources]]."""

    source: str
    weight: float | None = None  # the share of windows drawn from it; default: what the others leave, by size

    def __post_init__(self) -> None:
        check_table(self, "data.sources", set())
        if not self.source:
            raise ConfigError(NO_SOURCE)
        if self.weight == 0.0:
            raise ConfigError(f"data.sources: the weight of {self.source!r} (0) must be above 0: leave the source out")


class DataConfig(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """The data that a model is trained on."""

    source: str = "python-docs"
    sources: tuple[SourceConfig, ...] = ()  # several, in place of `source`
    tokenizer: str = "byte"
    val_fraction: float = 0.1
    text_key: str | None = None  # the column of .jsonl, .json, .csv and .tsv that is text; default: see docs/data.md
    loss_on: Literal["answers", "all"] = "answers"  # of a chat; of text the loss counts everything
    within_documents: bool = False  # attention does not look beyond the document
    classes: tuple[str, ...] | None = None  # of images: the names of the folders, in the order of the classes; default: sorted

    def __post_init__(self) -> None:
        check_table(self, "data", set())
        if not self.source:
            raise ConfigError(NO_SOURCE)
        if self.classes is not None and len({*self.classes}) < max(2, len(self.classes)):
            raise ConfigError("data.classes needs two names or more, each once")
        if not self.tokenizer:
            raise ConfigError("data.tokenizer is empty: give byte, char or the path of a tokenizer.json")
        if not 0.0 < self.val_fraction < 1.0:
            raise ConfigError(f"data.val_fraction ({self.val_fraction}) must lie between 0 and 1")
        given = [part.weight for part in self.sources if part.weight is not None]
        if given and len(given) < len(self.sources) and sum(given) >= 1.0:
            without = next(part.source for part in self.sources if part.weight is None)
            weights = ", ".join(f"{weight:g}" for weight in given)
            raise ConfigError(
                f"data.sources: the weights ({weights}) leave nothing for {without!r}, which has none: "
                "give each a weight, or make their sum less than 1"
            )

    @property
    def parts(self) -> tuple[SourceConfig, ...]:
        """All sources: `sources`, or `source` alone."""
        return self.sources or (SourceConfig(source=self.source),)

    @property
    def name(self) -> str:
        """What messages call the data: "a.jsonl:text + b.txt"."""
        return " + ".join(part.source for part in self.parts)


class LoraConfig(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Low-rank adapters: W + (alpha / rank) B A in place of W, where only A and B train (Hu et al. 2021)."""

    rank: int = 4
    alpha: float | None = None  # default: twice the rank
    targets: tuple[str, ...] = LORA_TARGETS  # which products get adapters

    def __post_init__(self) -> None:
        check_table(self, "lora", set())
        if self.alpha is None:
            force_setattr(self, "alpha", 2.0 * self.rank)
        if self.alpha == 0.0:
            raise ConfigError("lora.alpha must be above 0: the adapters would change nothing")
        for target in self.targets:
            if target not in LORA_TARGETS:
                raise ConfigError(f"lora.targets: {target!r} is not one of its values{nearest(target, LORA_TARGETS)}")
        if not self.targets:
            raise ConfigError(f"lora.targets is empty: give one or more of {', '.join(LORA_TARGETS)}")

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        assert self.alpha is not None
        return self.alpha / self.rank


class Config(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """A whole run: the tables [model], [moe], [train], [data] and [lora] of a TOML file. `model.moe` is the table [moe]."""

    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    data: DataConfig = DataConfig()
    lora: LoraConfig | None = None  # None: all parameters train that are not frozen
    name: str = "model"

    def check_trainable(self) -> None:
        """Raise ConfigError for a model that can be built but not trained."""
        if self.model.moe is not None and self.model.moe_layers():
            self.model.moe.check_trainable()
        self.check_task()
        if not self.model.image_size and self.train.seq_len > self.model.max_seq_len:
            raise ConfigError(f"train.seq_len ({self.train.seq_len}) must not exceed model.max_seq_len ({self.model.max_seq_len})")
        if self.data.within_documents and self.train.seq_len > MOST_WITHIN:
            raise ConfigError(f"data.within_documents goes with a train.seq_len of at most {MOST_WITHIN:,}, not {self.train.seq_len:,}")

    def warnings(self) -> list[str]:
        """Return a line for each setting that works but may surprise."""
        moe = [] if self.model.moe is None else self.model.moe.warnings(self.model.causal)
        return [*moe, *self.train.warnings()]

    def check_task(self) -> None:
        """Raise ConfigError for a head without a task, or one that sees too much or too little; tasks are in minimoe/training/tasks."""
        head, causal = self.model.head, self.model.causal
        if head == "none" or (head == "classifier" and not self.model.image_size):
            what = f"{head!r} over tokens" if head == "classifier" else repr(head)
            raise ConfigError(f"there is no task for model.head = {what}: set 'lm' or 'mlm', or 'classifier' with model.image_size")
        if head == "lm" and not causal:
            raise ConfigError("model.head = 'lm' learns to predict the next token: set model.causal = true, or model.head = 'mlm'")
        if head != "lm" and causal:
            why = "fills in blanks from both sides" if head == "mlm" else "reads an image's class where its first token is"
            raise ConfigError(f"model.head = {head!r} {why}: set model.causal = false")
