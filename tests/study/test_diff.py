"""What differs between two runs or configurations, and the exit code that says so."""

import json
from pathlib import Path

import pytest
from command_line import call
from tiny_runs import tiny, train, with_train, write_text

import minimoe as mm
from minimoe.errors import ConfigError
from minimoe.study.diff import diff, shown


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder of runs: a and b are alike, c has another rate."""
    config = tiny(write_text(tmp_path), steps=2)
    for name, changed in (("a", config), ("b", config), ("c", with_train(config, lr=3e-3))):
        train(changed, tmp_path, out=tmp_path / name)
    return tmp_path


def test_equal_runs_have_the_same_configuration_and_data(root: Path) -> None:
    found = diff(root / "a", root / "b")
    assert found.same and not found.differences["configuration"] and not found.differences["data"] and not found.problems


def test_a_key_that_differs_is_named_with_both_values(root: Path) -> None:
    found = diff(root / "a", root / "c")
    assert not found.same and found.differences["configuration"] == {"train.lr": (0.01, 0.003)}
    assert diff(root / "c", root / "a").differences["configuration"] == {"train.lr": (0.003, 0.01)}


def test_presets_are_compared_by_their_keys() -> None:
    found = diff("tiny-moe", "tiny-dense")
    assert not found.same and any(key.startswith("moe.") for key in found.differences["configuration"])


def test_the_exit_code_says_whether_they_are_the_same(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "diff", str(root / "a"), str(root / "b"))
    assert code == 0 and out.endswith("the same: configuration, data, start\n")
    code, out, _ = call(capsys, "diff", str(root / "a"), str(root / "c"))
    assert code == 1 and "train.lr" in out and "0.003" in out and out.endswith("different: configuration\n")
    code, out, _ = call(capsys, "diff", str(root / "a"), str(root / "c"), "--json")
    assert code == 1 and json.loads(out)["differences"]["configuration"] == {"train.lr": [0.01, 0.003]}


def test_a_damaged_run_is_compared_as_far_as_it_can_be_read(root: Path) -> None:
    (root / "b" / "config.toml").write_text("nonsense")
    found = diff(root / "a", root / "b")
    assert found.problems and "results" in found.differences
    assert not found.same and found.verdict == "the configurations cannot be compared"


def test_runs_that_started_from_other_weights_are_not_the_same(root: Path) -> None:
    mm.train(init=root / "a", out=root / "d", overrides=[], backend="numpy")
    found = diff(root / "a", root / "d")
    assert not found.same and found.differences["configuration"] == {} and found.verdict == "different: start"
    assert found.differences["start"]["weights"] == ("seed", str((root / "a" / "checkpoints" / "step-000002").resolve()))


def test_a_start_that_was_not_recorded_is_not_compared(root: Path) -> None:
    file = root / "b" / "env.json"
    file.write_text(json.dumps({key: value for key, value in json.loads(file.read_text()).items() if key != "weights"}))
    found = diff(root / "a", root / "b")
    assert "start" not in found.differences and found.same and found.verdict == "the same: configuration, data"


@pytest.mark.parametrize("width", [40, 60, 80, 160])
def test_a_difference_divides_no_word(root: Path, width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    _, out, _ = call(capsys, "diff", "tiny-moe", "bert-tiny-moe")
    assert all(len(line) <= width for line in out.splitlines())
    for key, (one, other) in diff("tiny-moe", "bert-tiny-moe").differences["configuration"].items():
        assert all(word in out for word in (key, shown(key, one), shown(key, other))), key


def test_what_is_neither_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing-here"):
        diff("nothing-here", "tiny-moe")
