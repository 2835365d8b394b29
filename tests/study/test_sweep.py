"""A sweep: every combination of values with an equal budget, found again by a second call, and what is refused."""

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from command_line import call, sets
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from tiny_runs import tiny, train, weights_of, with_train, write_text

from minimoe.config import to_toml
from minimoe.errors import Diverged, Interrupted, UserError
from minimoe.runs.run import Run
from minimoe.study.compare import sweep
from minimoe.study.compare.sweep import split_values
from minimoe.training.listener import Listener

VARY = ["train.lr=1e-2,1e-3", "moe.top_k=1,2"]
KEYS = ["moe.norm_topk_prob=false"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text and a configuration."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "tiny.toml").write_text(to_toml(tiny(write_text(folder), steps=4)))
    return folder


@pytest.fixture
def source(place: Path) -> str:
    return str(place / "tiny.toml")


class Stops(Listener):
    """Sends a signal after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def stepped(self, step: int) -> None:
        if step == self.step:
            signal.raise_signal(signal.SIGINT)


def test_every_combination_is_a_run_with_the_same_steps(source: str, tmp_path: Path) -> None:
    found = sweep(source, VARY, overrides=KEYS, root=tmp_path)
    wanted = [{"train.lr": lr, "moe.top_k": k} for lr in (1e-2, 1e-3) for k in (1, 2)]
    assert [row.varied for row in found.rows] == wanted and {row.steps for row in found.rows} == {4}
    for row in found.rows:
        (run,) = map(Run.open, row.runs)
        assert run.path.parent == tmp_path and run.status()["state"] == "finished"
        assert row.varied == {"train.lr": run.config.train.lr, "moe.top_k": run.config.model.moe and run.config.model.moe.top_k}
        assert row.val_loss.mean == run.metrics()[-1]["val_loss"]
    best = min(found.rows, key=lambda row: row.val_loss.mean)
    assert found.best is best and found.best_text.startswith(f"best: train.lr={best.varied and best.varied['train.lr']} moe.top_k=")
    alone = train(replace(Run.open(found.rows[1].runs[0]).config, name="alone"), tmp_path)
    assert weights_of(alone.path, 4) == weights_of(Path(found.rows[1].runs[0]), 4)


def test_a_budget_of_flops_gives_cheaper_combinations_more_steps(source: str, tmp_path: Path) -> None:
    rows = sweep(source, ["model.d_hidden=32,16"], budget="flops", root=tmp_path).rows
    assert rows[0].steps == 4 and rows[1].steps > 4
    assert rows[1].training_flops == pytest.approx(rows[0].training_flops, rel=0.1)


def test_a_second_call_trains_nothing_again(source: str, tmp_path: Path) -> None:
    first, said = sweep(source, VARY, overrides=KEYS, seeds=2, root=tmp_path), list[str]()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    again = sweep(source, VARY, overrides=KEYS, seeds=2, root=tmp_path, say=said.append, listener_for=lambda label: pytest.fail(label))
    assert again == first and len(said) == 8 and "finished before" in said[0]
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    more = sweep(source, ["train.lr=1e-2,1e-3,1e-4", "moe.top_k=1,2"], overrides=KEYS, seeds=2, root=tmp_path)
    assert len(list(tmp_path.glob("tiny-*"))) == 12 and [row.runs for row in more.rows[:4]] == [row.runs for row in first.rows]


def test_a_sweep_that_was_stopped_goes_on_and_ends_with_the_same_bytes(source: str, tmp_path: Path) -> None:
    whole = sweep(source, VARY, overrides=KEYS, root=tmp_path / "whole")
    count = 0

    def listener_for(label: str) -> Listener:
        nonlocal count
        count += 1
        return Stops(2) if count == 3 else Listener()

    with pytest.raises(Interrupted, match="the same command goes on") as error:
        sweep(source, VARY, overrides=KEYS, root=tmp_path / "stopped", listener_for=listener_for)
    assert error.value.exit_code == 130 and len(list((tmp_path / "stopped").glob("tiny-*"))) == 3
    again = sweep(source, VARY, overrides=KEYS, root=tmp_path / "stopped", listener_for=listener_for)
    assert count == 5, "one was resumed, one trained"
    for ours, theirs in zip(again.rows, whole.rows, strict=True):
        assert weights_of(Path(ours.runs[0]), 4) == weights_of(Path(theirs.runs[0]), 4)


def test_other_data_of_the_same_name_are_trained_on(source: str, tmp_path: Path) -> None:
    text = write_text(tmp_path)
    sweep(source, ["train.lr=1e-2,1e-3"], data=str(text), root=tmp_path / "runs")
    text.write_text(text.read_text() + "and more\n")
    sweep(source, ["train.lr=1e-2,1e-3"], data=str(text), root=tmp_path / "runs")
    assert len(list((tmp_path / "runs").glob("tiny-*"))) == 4


@pytest.mark.parametrize("key", ["data.source", "data.within_documents"])
def test_none_is_the_best_of_losses_that_do_not_compare(source: str, tmp_path: Path, key: str) -> None:
    (tmp_path / "other.txt").write_text("another text, with other words\n" * 200)
    values = f"{write_text(tmp_path)},{tmp_path / 'other.txt'}" if key == "data.source" else "true,false"
    found = sweep(source, [f"{key}={values}"], root=tmp_path / "runs")
    assert found.best is None and "do not compare" in found.best_text and "*" not in "".join(found.columns()["validation"])
    assert [note for note in found.notes if "losses do not compare" in note] and not any("chance" in note for note in found.notes)



def test_a_combination_that_diverges_is_never_the_best_and_is_not_trained_again(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from minimoe.training.trainer import Trainer

    plain, tried = Trainer._fetch, list[float]()

    def fetch(self: Trainer) -> Any:
        rows = plain(self)
        if self.config.train.lr == 1.0:
            tried.append(1.0)
            self._write(rows)
            self._diverged(self.step, "made to")
        return rows

    monkeypatch.setattr(Trainer, "_fetch", fetch)
    for _ in range(2):
        found = sweep(source, ["train.lr=1.0,1e-2"], root=tmp_path)
        assert found.best is found.rows[1] and found.to_dict()["rows"][0]["val_loss"]["mean"] is None
    assert len(tried) == 1 and len(list(tmp_path.glob("tiny-*"))) == 2
    with pytest.raises(Diverged):
        train(with_train(tiny(Path(source).parent / "text.txt"), lr=1.0), tmp_path)


def test_tokenizers_are_compared_by_bits_per_byte(source: str, tmp_path: Path) -> None:
    found = sweep(source, ["data.tokenizer=byte,char"], root=tmp_path)
    bits = {row.name: row.bits_per_byte.mean for row in found.rows if row.bits_per_byte is not None}
    assert found.by_bytes and found.best is not None and found.best.name == min(bits, key=bits.__getitem__)
    marked = [name for name, cells in found.columns().items() if any(cell.startswith("* ") for cell in cells)]
    assert marked == ["bits per byte"] and found.columns()["tokenizer"] == ("byte", "char")


@given(st.lists(st.sampled_from(["1", "1e-3", "[1, 2]", '"a,b"', "'c,d'", "adamw", "[[1],[2, 3]]"]), min_size=1))
def test_values_are_split_at_the_commas_between_them(values: list[str]) -> None:
    assert split_values(",".join(values)) == values


@pytest.mark.parametrize(
    ("vary", "options", "message"),
    [
        (["train.lrr=1,2"], {}, "train.lrr: unknown key (did you mean 'lr'?)"),
        (["train.lr=1e-3"], {}, "needs two values or more, separated by commas; --set train.lr=1e-3 gives one"),
        (["train.lr=1e-3,0.001"], {}, "0.001 is given twice"),
        (["train.lr"], {}, "expected KEY=A,B,..."),
        (["train.lr=1e-3,1e-4", "train.lr=1e-5,1e-6"], {}, "--vary train.lr is given twice"),
        (["train.lr=1e-3,1e-4"], {"overrides": ["train.lr=1"]}, "both give its value"),
        (["train.steps=10,20"], {}, "every run gets the same budget: give --steps"),
        (["train.seed=1,2"], {}, "give --seeds"),
        (["train.lr=1,2,3,4,5", "train.beta1=0.1,0.2,0.3,0.4", "train.beta2=0.1,0.2,0.3,0.4"], {}, "asks for 5 x 4 x 4 = 80 runs: at most"),
        (["train.lr=1,2,3,4,5"], {"seeds": 20}, "asks for 5 combinations x 20 seeds = 100 runs: at most 64"),
        (["train.lr=1e-3,fast"], {}, "lr=fast: train.lr: expected float, got str"),
        (["moe.top_k=2,9"], {}, "top_k=9: moe.top_k (9) must not exceed moe.n_experts (4)"),
        (["train.lr=1,2"], {"budget": "flop"}, "no budget 'flop'"),
    ],
)
def test_what_cannot_be_swept_is_one_line_before_any_training(
    source: str, tmp_path: Path, vary: list[str], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as error:
        sweep(source, vary, root=tmp_path / "runs", **options)
    assert "\n" not in str(error.value) and not (tmp_path / "runs").exists()


def test_the_command_shows_a_table_that_fits_and_its_json(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["compare", str(place / "tiny.toml"), *sets(*KEYS), *(part for text in VARY for part in ("--vary", text))]
    code, out, err = call(capsys, *command)
    assert code == 0 and "best: train.lr=" in out and "== 4 of 4: lr=0.001 top_k=2, seed 0, 4 steps" in err
    assert max(len(line) for line in out.splitlines() if line.startswith(" ")) <= 80
    assert sum("* " in line for line in out.splitlines() if re.match(r"^ +0\.0", line)) == 1
    code, out, err = call(capsys, *command, "--json")
    found = json.loads(out)
    assert code == 0 and [row["varied"] for row in found["rows"]][3] == {"train.lr": 0.001, "moe.top_k": 2}
    assert found["best"] in [row["name"] for row in found["rows"]] and err.count("finished before") == 4
    document = Path(found["saved"]).read_text()
    assert document.count("| runs |") == 1 and "- best: train.lr=" in document and document.count("`runs/tiny-") == 4


def test_a_comparison_of_runs_has_json_too(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    runs = [row.runs[0] for row in sweep(source, ["train.lr=1e-2,1e-3"], root=tmp_path / "runs").rows]
    code, out, _ = call(capsys, "compare", *runs, "--json")
    found = json.loads(out)
    assert code == 0 and found["saved"] == "runs/compare-001.md" and len(found["rows"]) == 2 and found["rows"][0]["varied"] is None


def test_two_sources_cannot_be_varied(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, "compare", "tiny-moe", "tiny-dense", "--vary", "train.lr=1,2")
    assert code == 2 and "--vary is for one configuration, got 2" in err


def test_adapters_of_several_ranks_start_from_the_same_weights(source: str, tmp_path: Path) -> None:
    base = train(replace(tiny(Path(source).parent / "text.txt", steps=2), name="base"), tmp_path)
    vary, said = ["lora.rank=1,2"], list[str]()
    found = sweep(source, vary, init=str(base.path), root=tmp_path)
    assert [row.varied for row in found.rows] == [{"lora.rank": 1}, {"lora.rank": 2}]
    assert found.notes[0] == f"All start from the weights of {base.path / 'checkpoints' / 'step-000002'}."
    assert all((Path(row.runs[0]) / "base.safetensors").is_file() for row in found.rows)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    again = sweep(source, vary, init=str(base.path), root=tmp_path, say=said.append, listener_for=lambda label: pytest.fail(label))
    assert again.rows == found.rows and len(said) == 2
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("tokenizer", ["byte", "char"])
def test_a_run_from_other_weights_is_no_run_of_the_sweep(tokenizer: str, place: Path, tmp_path: Path) -> None:
    config = tiny(place / "text.txt", steps=1, model={"vocab_size": None})
    config = replace(config, data=replace(config.data, tokenizer=tokenizer))
    base = train(replace(config, name="base"), tmp_path)
    (tmp_path / "t.toml").write_text(to_toml(replace(config, name="t")))
    source, vary = str(tmp_path / "t.toml"), ["train.lr=1e-2,1e-3"]
    starts = (None, str(base.path), None, str(base.path))
    runs = [{row.runs[0] for row in sweep(source, vary, init=init, root=tmp_path).rows} for init in starts]
    assert runs[0] == runs[2] and runs[1] == runs[3] and not runs[0] & runs[1]


def test_what_does_not_go_with_init_is_one_line(source: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--init goes with --vary" in call(capsys, "compare", source, "tiny-moe", "--init", "x")[2]
    words = ["compare", source, "--init", "x", "--budget", "seconds", "--vary", "train.lr=1,2"]
    assert "--init and --budget seconds do not go together" in call(capsys, *words)[2]


def test_an_error_names_the_whole_key(source: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, "compare", source, "--vary", "train.lr=1e-3,-1", "--vary", "moe.top_k=1,2", "--set", *KEYS)
    assert code == 2 and "--vary train.lr=-1 moe.top_k=1: train.lr (-1.0) must not be negative" in err
