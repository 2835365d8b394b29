"""Keys by their names, and the two spellings of values that TOML does not have: 1e3 for an integer, none for what is not set."""

from pathlib import Path

import pytest

from minimoe.config import ModelConfig, MoEConfig, load_config
from minimoe.config.keys import TABLES, choices, full_keys, meant


def test_every_key_has_its_full_name() -> None:
    keys = full_keys()
    assert {"train.lr", "moe.top_k", "data.source", "model.rope", "model.rope.factor", "model.mla.kv_rank"} <= set(keys)
    assert "model.moe" not in keys and len(keys) > 80


@pytest.mark.parametrize("key", full_keys())
def test_the_last_part_of_a_key_leads_to_it(key: str) -> None:
    assert repr(key) in meant(key.rpartition(".")[2], TABLES)


def test_a_whole_number_may_be_written_with_an_exponent(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("extends = 'tiny-moe'\n[train]\nsteps = 2e3\n[model.rope]\noriginal_max_seq_len = 1e3\n")
    config = load_config(tmp_path / "mine.toml", ["train.batch_size=1e1", "moe.top_k=1e0", "moe.router=switch"])
    assert config.model.rope is not None and config.model.moe is not None
    found = (config.train.steps, config.train.batch_size, config.model.moe.top_k, config.model.rope.original_max_seq_len)
    assert found == (2000, 10, 1, 1000) and [type(number) for number in found] == [int] * 4
    assert type(load_config("tiny-moe", ["train.lr=1e0"]).train.lr) is float


UNSET = ["model.n_kv_heads=none", "model.head_dim=none", "model.layer_types=none", "model.rope=none", "moe.layers=none", "moe.top_k=none"]


def test_none_unsets_what_a_preset_sets(tmp_path: Path) -> None:
    lines = ["extends = 'tiny-moe'", "[model]", "head_dim = 'none'", "[model.rope]", "factor = 2.0", "[moe]", "layers = [1]"]
    (tmp_path / "mine.toml").write_text("\n".join(lines))
    set_here = load_config(tmp_path / "mine.toml")
    assert set_here.model.head_dim is None and set_here.model.rope is not None and set_here.model.moe_layers() == (1,)
    config = load_config(tmp_path / "mine.toml", [*UNSET, "train.options=none"])
    assert config.model == ModelConfig(moe=MoEConfig(d_hidden=256))
    assert load_config("mixtral-8x7b", ["moe=none"]).model.moe is None


def test_none_stays_a_value_where_it_is_one() -> None:
    assert load_config("tiny-moe", ["model.position=none", "model.qk_norm=none"]).model.position == "none"
    assert load_config("tiny-moe", ["data.source=none"]).data.source == "none"


def test_a_key_with_few_values_has_them() -> None:
    assert choices("train.schedule") == ["cosine", "linear", "constant"]
    assert choices("model.bias") == ["true", "false"] and choices("moe.layers") == ["none"] and choices("train.lr") == []
