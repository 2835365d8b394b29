"""Messages of errors: what others wrote cannot command the reader's terminal, or fill it."""

import pytest

from minimoe.errors import CheckpointError, ConfigError, UserError, near, nearest


@pytest.mark.parametrize("kind", [UserError, ConfigError, CheckpointError])
def test_a_message_shows_what_a_terminal_would_obey_as_escapes(kind: type[UserError]) -> None:
    assert str(kind("model.\x1b[31m: unknown key")) == r"model.\x1b[31m: unknown key"
    assert str(kind("\u202e\ud800\0 \xe9 \U0001f600")) == "\\u202e\\ud800\\x00 \xe9 \U0001f600"
    assert str(kind("two\nlines")) == "two\nlines"


def test_the_middle_of_a_long_message_is_left_out() -> None:
    message = str(UserError("begin" + "x" * 10_000 + "end"))
    assert message.startswith("beginxxx") and message.endswith("xxxend") and " ... " in message and len(message) < 2000
    assert str(UserError("x" * 2000)) == "x" * 2000


def test_a_name_of_a_megabyte_is_near_to_none() -> None:
    assert nearest("adam" + "x" * 10**6, ["adamw", "sgd"]) == " (known: adamw, sgd)"


COMMANDS = ["backends", "bench", "compare", "config", "convert", "eval", "generate", "inspect", "resume", "runs", "train", "verify"]
PRESETS = ["bert-base", "bert-tiny", "bert-tiny-moe", "collapse", "gpt2", "mixtral-8x7b", "tiny-dense", "tiny-moe", "vit-tiny"]
KEYS = ["batch_size", "d_model", "dropout", "lr", "min_lr", "n_experts", "n_heads", "n_kv_heads", "seq_len", "top_k", "warmup_steps"]
RUNS = [f"tiny-moe-{number:03}" for number in range(1, 40)]


@pytest.mark.parametrize(
    ("name", "known", "meant"),
    [
        ("trian", COMMANDS, ["train"]), ("eavl", COMMANDS, ["eval"]), ("run", COMMANDS, ["runs"]), ("Train", COMMANDS, ["train"]),
        ("gen", COMMANDS, ["generate"]), ("infer", COMMANDS, []), ("serve", COMMANDS, []), ("export", COMMANDS, []), ("ls", COMMANDS, []),
        ("delete", COMMANDS, []), ("finetune", COMMANDS, []), ("con", COMMANDS, ["config", "convert"]),
        ("gpt", PRESETS, ["gpt2"]), ("mixtral", PRESETS, ["mixtral-8x7b"]), ("tiny_moe", PRESETS, ["tiny-moe"]),
        ("bert", PRESETS, ["bert-base", "bert-tiny", "bert-tiny-moe"]), ("tiny", PRESETS, ["tiny-dense", "tiny-moe"]),
        ("llama", PRESETS, []), ("olmoe", PRESETS, []), ("moe", PRESETS, []), ("runs/last", PRESETS, []),
        ("topk", KEYS, ["top_k"]), ("top-k", KEYS, ["top_k"]), ("experts", KEYS, ["n_experts"]), ("batch", KEYS, ["batch_size"]),
        ("learning_rat", KEYS, []), ("hidden_size", KEYS, []), ("warmup", KEYS, ["warmup_steps"]), ("rl", KEYS, ["lr"]),
        ("sdg", ["adamw", "lion", "muon", "sgd"], ["sgd"]), ("rmsprop", ["adamw", "lion", "muon", "sgd"], []),
        ("fp16", ["bfloat16", "float32", "float64"], []), ("float16", ["bfloat16", "float32", "float64"], ["bfloat16"]),
        ("tiny-moe-0001", RUNS, ["tiny-moe-001"]), ("other", RUNS, []), ("", COMMANDS, []), ("adamw", ["adamw"], ["adamw"]),
    ],
)  # fmt: skip
def test_a_name_is_suggested_only_where_it_is_near(name: str, known: list[str], meant: list[str]) -> None:
    assert near(name, known) == meant


def test_a_hint_names_all_that_are_meant_or_points_to_a_long_list() -> None:
    assert nearest("bert", PRESETS) == " (did you mean 'bert-base', 'bert-tiny' or 'bert-tiny-moe'?)"
    assert nearest("x", RUNS, "minimoe runs lists them") == " (minimoe runs lists them)"
    assert nearest("x", RUNS).endswith("tiny-moe-012, and 27 more)")
    assert nearest("x", ["a", "b"], "minimoe runs lists them") == " (known: a, b)"
