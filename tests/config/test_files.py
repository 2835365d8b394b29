"""TOML files as they lie on disks: files that extend each other, paths relative to them, encodings, and values of --set."""

import codecs
import warnings
from pathlib import Path

import pytest
from command_line import TINY, call, sets
from tiny_runs import tiny, write_text

import minimoe as mm
from minimoe.config import Config, load_config, preset_text
from minimoe.errors import ConfigError, Notice
from minimoe.training.listener import Listener


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding=encoding)
    return path


def complaint(source: str | Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(source, overrides)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


@pytest.fixture
def above(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with `conf/exp.toml`, which extends `base.toml` beside it, which extends a preset."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "conf" / "base.toml", 'extends = "tiny-moe"\n[train]\nsteps = 7\n')
    write(tmp_path / "conf" / "exp.toml", 'extends = "base.toml"\n[train]\nlr = 2e-3\n')
    return tmp_path


# ---- extends ---------------------------------------------------------------------------------------------------------------------


def test_what_a_file_extends_lies_beside_it(above: Path) -> None:
    for source in ("conf/exp.toml", above / "conf" / "exp.toml"):
        config = load_config(source)
        assert (config.train.steps, config.train.lr, config.model.n_kv_heads) == (7, 2e-3, 2)


def test_each_file_of_a_chain_looks_beside_itself(above: Path) -> None:
    write(above / "other" / "top.toml", 'extends = "../conf/exp.toml"\n[train]\nseed = 3\n')
    config = load_config("other/top.toml")
    assert (config.train.steps, config.train.lr, config.train.seed) == (7, 2e-3, 3)


def test_what_is_not_beside_the_file_is_still_found_in_the_working_folder(above: Path) -> None:
    write(above / "common.toml", "[train]\nsteps = 8\n")
    write(above / "conf" / "exp.toml", 'extends = "common.toml"\n')
    assert load_config("conf/exp.toml").train.steps == 8


def test_the_file_beside_goes_before_the_working_folders_and_that_is_said(above: Path) -> None:
    write(above / "base.toml", "[train]\nsteps = 8\n")
    with pytest.warns(Notice, match=r"conf/exp\.toml: extends = 'base\.toml' means .*base\.toml, beside it, not"):
        assert load_config("conf/exp.toml").train.steps == 7
    said: list[str] = []
    load_config("conf/exp.toml", say=said.append)
    assert len(said) == 1


def test_the_same_file_by_both_ways_is_nothing_to_say(above: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(above / "conf")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_config("exp.toml").train.steps == 7


def test_a_presets_name_stays_the_preset(above: Path) -> None:
    write(above / "conf" / "tiny-moe", "[train]\nsteps = 9\n")
    assert load_config("conf/exp.toml").train.steps == 7


def test_what_cannot_be_found_is_named_with_the_file_that_asked(above: Path) -> None:
    write(above / "conf" / "base.toml", 'extends = "nothing.toml"\n')
    asked = Path("conf", "base.toml")
    assert complaint("conf/exp.toml") == f"{asked}: extends = 'nothing.toml': no such file beside it or in the working folder"
    write(above / "conf" / "base.toml", 'extends = "tiny-mo"\n')
    assert complaint("conf/exp.toml") == f"{asked}: extends = 'tiny-mo': no preset and no file of that name (did you mean 'tiny-moe'?)"
    write(above / "conf" / "base.toml", "extends = 3\n")
    assert complaint("conf/exp.toml") == f"{asked}: extends: expected a preset or file, got 3"
    write(above / "conf" / "base.toml", 'extends = "../conf"\n')
    assert complaint("conf/exp.toml").startswith(f"{asked}: extends = '../conf': cannot be read: ")


def test_a_circle_is_seen_whatever_its_files_are_called(above: Path) -> None:
    write(above / "conf" / "base.toml", 'extends = "../conf/exp.toml"\n')
    exp, base = Path("conf", "exp.toml"), Path("conf", "base.toml")
    again = Path("conf", "..", "conf", "exp.toml")
    assert complaint("conf/exp.toml") == f"extends forms a circle: {exp} -> {base} -> {again}"


def test_a_long_chain_is_refused(above: Path) -> None:
    for number in range(40):
        write(above / f"{number}.toml", f'extends = "{number + 1}.toml"\n')
    write(above / "40.toml", "")
    assert complaint("0.toml").startswith("more than 20 files extend each other: 0.toml -> 1.toml -> 2.toml -> ... -> ")
    assert load_config("25.toml") == Config(name="25")


# ---- paths of the data -----------------------------------------------------------------------------------------------------------


def test_data_and_tokenizer_of_a_file_lie_beside_it_or_in_the_working_folder(above: Path) -> None:
    write(above / "conf" / "text.txt", "beside")
    write(above / "tokens.json", "{}")
    write(above / "conf" / "base.toml", '[data]\nsource = "text.txt"\ntokenizer = "tokens.json"\n')
    data = load_config("conf/exp.toml").data
    assert (Path(data.source), data.tokenizer) == (Path("conf", "text.txt"), "tokens.json")
    assert load_config("conf/exp.toml", ["data.source=text.txt"]).data.source == "text.txt"  # typed here, so relative to here


def test_built_in_data_are_not_looked_for_beside_a_file(above: Path) -> None:
    for name in ("python-docs", "digits", "byte"):
        write(above / "conf" / name, "a file of this name")
    write(above / "conf" / "base.toml", '[data]\nsource = "python-docs"\ntokenizer = "byte"\n')
    assert load_config("conf/exp.toml").data == Config().data


def test_data_beside_a_file_go_before_the_working_folders_and_that_is_said(above: Path) -> None:
    write(above / "conf" / "text.txt", "beside")
    write(above / "text.txt", "here")
    write(above / "conf" / "base.toml", '[data]\nsource = "text.txt"\n')
    said: list[str] = []
    assert Path(load_config("conf/exp.toml", say=said.append).data.source) == Path("conf", "text.txt")
    assert len(said) == 1 and "data.source = 'text.txt' means" in said[0]


# ---- encodings -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_file_may_begin_with_a_byte_order_mark(encoding: str, tmp_path: Path) -> None:
    """`minimoe config tiny-moe > mine.toml` in PowerShell writes UTF-16, and Notepad a mark before UTF-8."""
    path = write(tmp_path / "mine.toml", preset_text("tiny-moe"), encoding)
    assert load_config(path, ["name=tiny-moe"]) == load_config("tiny-moe")


def test_utf_16_of_either_byte_order_is_read(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(codecs.BOM_UTF16_BE + "[train]\nsteps = 5\n".encode("utf-16-be"))
    assert load_config(path).train.steps == 5


def test_what_is_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "binary.toml"
    path.write_bytes(b"\xff\xfe\x00")
    assert complaint(path).startswith(f"{path}: not UTF-16 text")
    path.write_bytes(b"a = 1\n\xe9")
    assert complaint(path) == f"{path}: not UTF-8 text (byte 0xe9 at 6)"


@pytest.mark.parametrize("value", [r'"C:\Users\me\text.txt"', r'"D:\mine.txt"', r'"..\data.txt"'])
def test_a_backslash_in_a_path_gets_a_hint(value: str, tmp_path: Path) -> None:
    path = write(tmp_path / "win.toml", f"[data]\nsource = {value}\n")
    message = complaint(path)
    assert message.startswith(f"{path}: not valid TOML: ")
    single = "'" + value[1:-1] + "'"
    assert message.endswith(f"a backslash begins an escape between double quotes: write {single}")


def test_a_fault_that_is_no_backslash_gets_no_such_hint(tmp_path: Path) -> None:
    path = write(tmp_path / "odd.toml", "[data]\nsource = 'C:\\text.txt'\nsteps =\n")
    assert "backslash" not in complaint(path)


# ---- --set -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("override, message", [
    ("train.lr=.001", "train.lr: expected float, got '.001': write 0.001"),
    ("train.lr=1.", "train.lr: expected float, got '1.': write 1.0"),
    ("train.lr=1.e-3", "train.lr: expected float, got '1.e-3': write 0.001"),
    ("train.lr=0,5", "train.lr: expected float, got '0,5': write 0.5"),
    ('train.lr="1e-3"', "train.lr: expected float, got '1e-3': write 0.001"),
    ("train.steps=5.", "train.steps: expected int, got '5.': write 5"),
    ("train.steps=007", "train.steps: expected int, got '007': write 7"),
    ("moe.top_k=+1.", "moe.top_k: expected int, got '+1.': write 1"),
    ("model.bias=True", "model.bias: expected bool, got 'True': write true"),
    ("model.bias=FALSE", "model.bias: expected bool, got 'FALSE': write false"),
    ("model.bias=yes", "model.bias: expected bool, got 'yes': write true"),
    ("moe.layers=[1, .5]", "moe.layers: expected array, got str"),
    ("train.steps=many", "train.steps: expected int, got str"),
])  # fmt: skip
def test_a_value_that_is_almost_toml_is_refused_with_what_to_write(override: str, message: str) -> None:
    assert complaint("tiny-moe", override) == message


def test_a_text_that_looks_like_a_number_stays_a_text_where_text_is_wanted() -> None:
    config = load_config("tiny-moe", ["name=1.", "data.source=.001"])
    assert (config.name, config.data.source) == ("1.", ".001")


@pytest.mark.parametrize("value", ["1e-3\nsteps = 5", "1e-3\n[moe]\ntop_k = 1", "1e-3\nx.y = 1"])
def test_what_follows_a_line_end_is_not_dropped(value: str) -> None:
    assert complaint("tiny-moe", f"train.lr={value}") == "--set train.lr: more than one value: give each key its own --set"


def test_a_value_of_several_lines_is_one_value() -> None:
    moe = load_config("tiny-moe", ["moe.layers=[\n1,\n3,\n]\n"]).model.moe
    assert moe is not None and moe.layers == (1, 3)


# ---- a warm-up that does not end -------------------------------------------------------------------------------------------------


def test_a_warm_up_longer_than_the_run_is_a_warning() -> None:
    config = load_config("tiny-dense", ["train.steps=20"])
    assert config.warnings() == ["train.warmup_steps (50) is more than train.steps (20): the rate ends at 0.0004, below train.lr (0.001)"]
    assert load_config("tiny-dense", ["train.steps=50"]).warnings() == []


class Heard(Listener):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def said(self, text: str) -> None:
        self.texts.append(text)


def test_the_warning_is_said_before_training_and_by_the_dry_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text, heard = write_text(tmp_path), Heard()
    mm.train(tiny(text, steps=3, warmup_steps=30), listener=heard)
    expected = "warning: train.warmup_steps (30) is more than train.steps (3): the rate ends at 0.001, below train.lr (0.01)"
    assert expected in heard.texts
    code, _, err = call(capsys, "train", *TINY, "--data", str(text), "--steps", "3", *sets("train.warmup_steps=30"), "--dry-run")
    expected = expected.removeprefix("warning: ").replace("0.001", "0.0001").replace("(0.01)", "(0.001)")
    assert (code, err.strip()) == (0, f"minimoe: {expected}")


def test_a_file_in_another_folder_is_trained_as_it_is_planned(above: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = write_text(above / "conf")
    write(above / "conf" / "base.toml", f'extends = "tiny-moe"\n[data]\nsource = "{text.name}"\n')
    code, out, _ = call(capsys, "train", "conf/exp.toml", *TINY, "--dry-run")
    assert code == 0 and f'source = "{text.resolve()}"' in out
    code, _, _ = call(capsys, "train", "conf/exp.toml", *TINY, "--steps", "2", "--quiet")
    assert code == 0 and load_config("runs/exp-001/config.toml").data.source == str(text.resolve())


def test_a_pattern_means_the_files_beside_a_configuration_and_says_so_where_others_match_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "a.toml").write_text('[data]\nsource = "*.txt:t"\n')
    said: list[str] = []
    assert load_config("conf/a.toml", say=said.append).data.source == "*.txt:t"  # it matches nothing anywhere
    (tmp_path / "here.txt").touch()
    assert load_config("conf/a.toml", say=said.append).data.source == "*.txt:t" and not said
    (tmp_path / "conf" / "beside.txt").touch()
    assert load_config("conf/a.toml", say=said.append).data.source == "conf/*.txt:t"
    assert said == ["conf/a.toml: data.source = '*.txt:t' means the files beside it, conf/*.txt, not those in the working folder"]
