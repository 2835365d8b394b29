"""Several sources: the syntax, shares of the windows, splits of each source, and what is refused."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from minimoe.config import DataConfig, SourceConfig, load_config, to_toml
from minimoe.config.data_names import split_column, split_weight, with_absolute_path
from minimoe.config.given import with_sources
from minimoe.data.batches import Part, mixed_starts
from minimoe.data.mixture import Joined, load_data, shares, short_names
from minimoe.errors import ConfigError, UserError


def write(folder: Path, **texts: str) -> list[str]:
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)
    return [str(folder / f"{name}.txt") for name in texts]


def several(*sources: str, weights: tuple[float | None, ...] = (), **keys: object) -> DataConfig:
    given = weights or (None,) * len(sources)
    parts = tuple(SourceConfig(source=source, weight=weight) for source, weight in zip(sources, given, strict=True))
    return DataConfig(sources=parts, **keys)  # type: ignore[arg-type]


# ---- how sources are given ---------------------------------------------------------------------------------------------------------


def test_a_source_may_have_a_column_and_a_weight_but_a_file_of_that_name_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert split_weight("a.jsonl:text=0.3") == ("a.jsonl:text", 0.3)
    assert [split_weight(name) for name in ("a=b.txt", "a.txt", "x=1e-2")] == [("a=b.txt", None), ("a.txt", None), ("x", 0.01)]
    assert split_column("a.jsonl:text") == ("a.jsonl", "text")
    assert [split_column(name)[1] for name in ("a.txt", "C:x.csv", "C:\\x", "a:b/c")] == [None] * 4
    for name in ("b=0.3", "c.csv:x"):
        Path(name).touch()
        assert (split_weight(name), split_column(name)) == ((name, None), (name, None))
    assert with_absolute_path("c.csv:x:y") == f"{tmp_path}/c.csv:x:y"
    assert with_absolute_path("*.txt:y") == f"{tmp_path}/*.txt:y" and with_absolute_path("python-docs") == "python-docs"


def test_sources_on_the_command_line_take_the_place_of_the_configured_ones() -> None:
    data = several("a", "b", text_key="t")
    assert with_sources(data, ["c.jsonl:x=0.3", "d"]) == several("c.jsonl:x", "d", weights=(0.3, None), text_key="t")
    assert with_sources(data, "c") == DataConfig(source="c", text_key="t")
    for given in ("b.txt=0", "b.txt=-1"):
        with pytest.raises(ConfigError, match="a weight must be above 0: it is the share of windows drawn from the source"):
            with_sources(data, ["a.txt", given])
    with pytest.raises(ConfigError, match=r"a single source needs no weight: leave out =0\.3, or give a second --data"):
        with_sources(data, "b.txt=0.3")


def test_sources_in_a_file_have_paths_beside_it_and_read_back(tmp_path: Path) -> None:
    write(tmp_path, a="a")
    (tmp_path / "x.jsonl").touch()
    path = tmp_path / "mine.toml"
    tables = [f'[[data.sources]]\nsource = "{name}"\n' for name in ("a.txt", "x.jsonl:body", "*.txt:t", "python-code")]
    path.write_text('extends = "tiny-moe"\n' + "".join(tables) + "weight = 0.5\n")
    config = load_config(path)
    names = [f"{tmp_path}/a.txt", f"{tmp_path}/x.jsonl:body", f"{tmp_path}/*.txt:t", "python-code"]
    assert [part.source for part in config.data.sources] == names and config.data.sources[3].weight == 0.5
    assert config.data.name == " + ".join(names)
    path.write_text(to_toml(config))
    assert load_config(path) == config
    assert load_config(path, ["data.source=b.txt"]).data.parts == (SourceConfig(source="b.txt"),)
    path.write_text('[data]\nsource = "a.txt"\n' + tables[0])
    with pytest.raises(ConfigError, match=r"data\.source and data\.sources both say what is read: keep one"):
        load_config(path)
    path.write_text(tables[0] + "wieght = 1.0\n")
    with pytest.raises(ConfigError, match=r"data\.sources\.wieght: unknown key \(did you mean 'weight'\?\)"):
        load_config(path)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_that_is_not_positive_is_refused(weight: float) -> None:
    with pytest.raises(ConfigError, match=r"data\.sources"):
        SourceConfig(source="a", weight=weight)


# ---- shares ------------------------------------------------------------------------------------------------------------------------


def test_weights_are_shares_and_what_they_leave_is_shared_by_size() -> None:
    assert shares([None, None], [30, 10]) == [0.75, 0.25]
    assert shares([3.0, 1.0], [1, 1]) == [0.75, 0.25]
    assert shares([0.5, None, None], [1, 30, 10]) == [0.5, 0.375, 0.125]
    with pytest.raises(ConfigError, match=r"the weights \(1\) leave nothing for 'b', which has none"):
        several("a", "b", weights=(1.0, None))


def test_windows_are_drawn_by_the_shares_within_each_part_and_depend_on_seed_step_and_micro_alone() -> None:
    parts = (Part(0, 100, 0.7), Part(100, 140, 0.2), Part(140, 1000, 0.1))
    starts = np.concatenate([mixed_starts(parts, 5, step, 0, 64, 10) for step in range(60)])
    found = Counter(np.searchsorted([100, 140], starts, side="right").tolist())
    assert [found[part] / len(starts) for part in range(3)] == pytest.approx([0.7, 0.2, 0.1], abs=0.03)
    for part in parts:
        inside = starts[(starts >= part.start) & (starts < part.stop)]
        assert inside.max() + 10 < part.stop
    assert np.array_equal(mixed_starts(parts, 5, 3, 1, 8, 10), mixed_starts(parts, 5, 3, 1, 8, 10))
    assert not np.array_equal(mixed_starts(parts, 5, 3, 1, 8, 10), mixed_starts(parts, 5, 3, 0, 8, 10))


# ---- the corpus --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", ["byte", "char"])
def test_each_source_has_its_own_splits_and_is_a_domain(tokenizer: str, tmp_path: Path) -> None:
    a, b = write(tmp_path, a="abcde" * 20, b="vwxyz" * 10)
    corpus = load_data(several(a, b, weights=(0.2, 0.8), val_fraction=0.2, tokenizer=tokenizer), seq_len=4)
    text = [corpus.tokenizer.decode(np.asarray(split)) for split in (corpus.train, corpus.val)]
    assert text == ["abcde" * 16 + "vwxyz" * 8, "abcde" * 4 + "vwxyz" * 2]
    assert np.asarray(corpus.val_domains).tolist() == [0] * 20 + [1] * 10 and corpus.domains == ("a.txt", "b.txt")
    assert corpus.parts == (Part(0, 80, 0.2), Part(80, 120, 0.8))
    assert corpus.summary == (f"{a}: 20.0% of the windows, 100 tokens", f"{b}: 80.0% of the windows, 50 tokens")
    other = load_data(several(b, a, weights=(0.8, 0.2), tokenizer=tokenizer), seq_len=1)
    assert other.sha256 != corpus.sha256


def test_domains_are_called_by_their_files_unless_two_are_called_the_same() -> None:
    assert short_names(["/x/a.jsonl:t", "/y/*.txt", "python-docs"]) == ("a.jsonl:t", "*.txt", "python-docs")
    assert short_names(["/x/a.txt", "/y/a.txt"]) == ("/x/a.txt", "/y/a.txt")


def test_arrays_that_are_joined_are_cut_and_drawn_from_like_one() -> None:
    parts = [np.arange(3, dtype=np.uint8), np.arange(3, 4, dtype=np.int32), np.arange(4, 9, dtype=np.int32)]
    joined, whole = Joined(parts), np.arange(9)
    assert len(joined) == 9 and np.array_equal(np.asarray(joined), whole)
    for start in range(10):
        for stop in range(start, 11):
            assert np.array_equal(joined[start:stop], whole[start:stop])
    places = np.array([[0, 8, 3], [2, 4, 3]])
    assert np.array_equal(joined[places], whole[places])


def test_sources_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    a, b = write(tmp_path, a="abcde" * 20, b="v")
    with pytest.raises(UserError, match=r"a\.txt' is given twice: give it once, with the sum of the weights"):
        load_data(several(a, a))
    with pytest.raises(UserError, match=r"b\.txt: too short"):
        load_data(several(a, b), seq_len=4)
    with pytest.raises(UserError, match="128 sources, of at most 127"):
        load_data(several(*map(str, range(128))))
