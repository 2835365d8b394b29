"""Comparing at equal cost: who is trained for how long, what is read from finished runs, what is said of them, and what is refused."""

import io
import json
import math
import re
from pathlib import Path

import pytest
from msgspec.structs import replace
from rich.console import Console
from tiny_runs import tiny, train, write_text

from minimoe.config import Config, to_toml
from minimoe.config.cost import cost
from minimoe.errors import UserError
from minimoe.runs.run import Run
from minimoe.study.compare import Comparison, Row, Spread, compare
from minimoe.study.compare.measure import least_entropy, run_cost, tokens_per_step
from minimoe.study.compare.race import chance_note
from minimoe.training.listener import Listener


def as_file(folder: Path, name: str, config: Config) -> str:
    path = folder / f"{name}.toml"
    path.write_text(to_toml(replace(config, name=name)))
    return str(path)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two configurations and, under runs/, a finished run of each; no test may write into it."""
    folder = tmp_path_factory.mktemp("compare")
    text = write_text(folder)
    for name, config in (("moe", tiny(text)), ("dense", tiny(text, dense=True, steps=4))):
        as_file(folder, name, config)
        train(replace(config, name=name), folder / "runs")
    return folder


@pytest.fixture
def moe(place: Path) -> str:
    return str(place / "moe.toml")


@pytest.fixture
def dense(place: Path) -> str:
    return str(place / "dense.toml")


def printed(comparison: Comparison, width: int = 100) -> str:
    console = Console(width=width, file=io.StringIO())
    console.print(comparison.table())
    return console.file.getvalue()


# ---- budgets -----------------------------------------------------------------------------------------------------------------------------


def test_equal_steps_are_those_of_the_first(moe: str, dense: str, tmp_path: Path) -> None:
    rows = compare([moe, dense], root=tmp_path).rows
    assert [row.steps for row in rows] == [10, 10] and [row.name for row in rows] == ["moe", "dense"]
    assert [row.steps for row in compare([moe, dense], steps=3, root=tmp_path).rows] == [3, 3]


def test_equal_tokens_count_batch_and_length(place: Path, moe: str, tmp_path: Path) -> None:
    other = as_file(tmp_path, "wide", tiny(place / "text.txt", batch_size=5, accumulate=2, seq_len=8))
    rows = compare([moe, other], budget="tokens", root=tmp_path).rows
    assert [row.tokens for row in rows] == [640, 640] and rows[1].steps == 8


def test_equal_flops_are_those_that_cost_counts(place: Path, moe: str, tmp_path: Path) -> None:
    other = as_file(tmp_path, "small", tiny(place / "text.txt", dense=True, recompute=True, batch_size=1))
    first, second = compare([moe, other], budget="flops", root=tmp_path).rows
    config = Run.open(second.runs[0]).config
    each = cost(config.model, 16, recompute=True).training_flops_per_token * 16
    assert each == run_cost(config).training_flops_per_token * tokens_per_step(config)
    assert second.steps == round(first.training_flops / each)
    assert second.training_flops == second.steps * each


def test_equal_seconds_come_from_a_measured_trial(moe: str, dense: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def steps_of(config: Config, backend: str, steps: int) -> list[float]:
        asked.append((config.name, backend, steps))
        return [9.0, 0.01, 0.02]

    monkeypatch.setattr("minimoe.study.bench.step_seconds", steps_of)
    first, second = compare([moe, dense], budget="seconds", steps=2, root=tmp_path).rows
    assert asked == [("dense", "numpy", 3)] and second.steps == max(1, round(first.seconds / 0.02))
    assert len(list(tmp_path.glob("*-*"))) == 2  # the trial leaves no run behind


def test_each_seed_is_a_run_of_its_own_with_a_watcher_of_its_own(moe: str, dense: str, tmp_path: Path) -> None:
    labels: list[str] = []

    def listener_for(label: str) -> Listener:
        labels.append(label)
        return Listener()

    found = compare([moe, dense], seeds=2, steps=2, root=tmp_path, listener_for=listener_for)
    assert labels == [f"{name}, seed {seed}, 2 steps" for name in ("moe", "dense") for seed in (0, 1)]
    losses = [Run.open(run).metrics()[-1]["val_loss"] for run in found.rows[0].runs]
    assert losses[0] != losses[1]
    assert found.rows[0].val_loss == Spread(pytest.approx(sum(losses) / 2), min(losses), max(losses))
    assert "lowest to highest seed" in printed(found) and "2 seeds each" in found.title


def test_a_validation_that_was_capped_is_noted(moe: str, place: Path, tmp_path: Path) -> None:
    capped = as_file(tmp_path, "capped", tiny(place / "text.txt", dense=True, final_eval_batches=1))
    found = compare([moe, capped], steps=2, root=tmp_path)
    (note,) = [note for note in found.notes if "batches" in note]
    batches = Run.open(found.rows[1].runs[0]).metrics()[-1]["val_batches"]
    assert batches[0] == 1 and batches[1] > 1
    assert note == f"capped-001: its validation loss is over 1 of {batches[1]} batches (train.final_eval_batches)."


def test_overrides_reach_all_that_are_trained(moe: str, dense: str, tmp_path: Path) -> None:
    found = compare([moe, dense], overrides=["model.d_model=8", "train.steps=1"], root=tmp_path)
    assert {Run.open(row.runs[0]).config.model.d_model for row in found.rows} == {8}


# ---- finished runs -----------------------------------------------------------------------------------------------------------------------


def test_finished_runs_are_read_and_nothing_is_trained(place: Path) -> None:
    root = place / "runs"
    before = sorted(root.rglob("*"))
    found = compare(["moe-001", str(root / "dense-001")], root=root)
    metrics = Run.open("moe-001", root).metrics()
    row = found.rows[0]
    assert sorted(root.rglob("*")) == before and not row.trained
    assert row.val_loss.mean == metrics[-1]["val_loss"] and row.seconds == metrics[-1]["elapsed_s"]
    assert row.loss.mean == pytest.approx(sum(line["loss"] for line in metrics) / 10)
    assert row.parameters > row.active and row.experts == 4 and row.dead_experts == 0
    assert 0.5 < row.load_entropy <= 1.0 and row.dropped == 0.0
    assert found.rows[1].load_entropy is None and found.rows[1].experts == 0


def test_a_finished_run_that_breaks_the_budget_is_named(place: Path, moe: str, tmp_path: Path) -> None:
    found = compare([moe, str(place / "runs" / "dense-001")], steps=2, root=tmp_path)
    assert any("dense-001, a finished run, has 4 steps, moe 2" in note for note in found.notes)
    assert [row.trained for row in found.rows] == [True, False]


def test_unlike_texts_are_named(place: Path, tmp_path: Path) -> None:
    train(replace(tiny(write_text(tmp_path, lines=150), steps=2), name="other"), tmp_path / "runs")
    found = compare([str(place / "runs" / "moe-001"), "other-001"], root=tmp_path / "runs")
    assert any("do not compare" in note for note in found.notes)


# ---- what is measured -------------------------------------------------------------------------------------------------------------------


def test_an_even_load_has_entropy_one_and_the_worst_layer_counts() -> None:
    import numpy as np

    assert least_entropy(np.full((2, 4), 0.25)) == pytest.approx(1.0)
    assert least_entropy(np.array([[0.25] * 4, [1.0, 0.0, 0.0, 0.0]])) == 0.0
    assert least_entropy(np.array([[0.5, 0.5, 0.0, 0.0]])) == pytest.approx(0.5)
    assert least_entropy(np.ones((1, 1))) == 1.0


def test_experts_below_a_twentieth_of_the_even_share_are_dead(place: Path, tmp_path: Path) -> None:
    copy_run(place / "runs" / "moe-001", tmp_path / "moe-001", expert_load=[[0.5, 0.4, 0.09, 0.01]])
    row = compare(["moe-001", str(place / "runs" / "moe-001")], root=tmp_path).rows[0]
    assert row.dead_experts == 1  # 1 / (20 x 4) = 0.0125


def row(name: str, losses: list[float]) -> Row:
    return Row(
        name, name, ["r"] * len(losses), True, "numpy", 2_000_000, 10, 5, 3, 48, 720, 1.0, 48.0, Spread.of(losses), Spread.of(losses),
        None, None, None, 0,
    )  # fmt: skip


def test_the_note_tells_a_difference_from_chance() -> None:
    assert "overlap" in chance_note([row("a", [1.0, 1.2]), row("b", [1.1, 1.3])])[0]
    assert "Every seed of b is below every seed of a" in chance_note([row("a", [2.0, 2.1]), row("b", [1.1, 1.3])])[0]
    assert "With one seed" in chance_note([row("a", [2.0]), row("b", [1.1])])[0]


def test_a_loss_that_is_not_finite_is_never_the_best_and_becomes_null() -> None:
    found = Comparison("steps", 1, [row("a", [math.nan]), row("b", [1.5])])
    assert found.best is found.rows[1] and found.to_dict()["rows"][0]["val_loss"]["mean"] is None
    assert chance_note(found.rows) and Comparison("steps", 1, [row("a", [math.nan])] * 2).best is None


# ---- what is shown ----------------------------------------------------------------------------------------------------------------------


def test_the_best_is_marked_on_the_terminal_and_in_the_document() -> None:
    found = Comparison("flops", 1, [row("a", [2.5]), row("b", [1.25]), row("c", [3.0])], ["Mind the gap."])
    text, document = printed(found), found.markdown()
    assert "* 1.2500" in text and "* 2.5" not in text and "Mind the gap." in text and "equal FLOPs" in text
    assert "**1.2500**" in document and document.count("**") == 2 and "- Mind the gap." in document
    assert "| parameters | 2.00 M | 2.00 M | 2.00 M |" in document
    assert max(len(line) for line in text.splitlines()) <= 100


def test_saving_counts_up(tmp_path: Path) -> None:
    found = Comparison("steps", 1, [row("a", [2.5]), row("b", [1.25])])
    assert [found.save(tmp_path / "runs").name for _ in range(2)] == ["compare-001.md", "compare-002.md"]
    saved = json.loads((tmp_path / "runs" / "compare-002.json").read_text())
    assert saved == found.to_dict() and saved["best"] == "b"
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        found.save(tmp_path / "file")


# ---- what is refused --------------------------------------------------------------------------------------------------------------------


def copy_run(source: Path, target: Path, **changes: object) -> Path:
    """A run without its checkpoints; `changes` for every line of metrics."""
    target.mkdir(parents=True)
    for name in ("config.toml", "env.json", "status.json"):
        (target / name).write_text((source / name).read_text())
    lines = [{**json.loads(line), **changes} for line in (source / "metrics.jsonl").read_text().splitlines()]
    (target / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return target


@pytest.mark.parametrize(
    ("sources", "options", "message"),
    [
        (["{moe}"], {}, "two sources at least"),
        ([], {}, "two sources at least"),
        (["{moe}", "{moe}"], {}, "given twice"),
        (["{moe}", "{dense}"], {"budget": "flop"}, "no budget 'flop' (did you mean 'flops'?)"),
        (["{moe}", "{dense}"], {"seeds": 0}, "must be 1 or more"),
        (["{moe}", "tiny-dens"], {}, "tiny-dens: no preset, TOML file or run of that name (did you mean 'tiny-dense'?)"),
        (["{moe}", "moe-002"], {}, "(did you mean 'moe-001'?)"),
        (["{moe}", "no/such.toml"], {}, "no configuration file no/such.toml"),
        (["{moe}", "vit-b16"], {}, "'vit-b16' classifies images: give digits"),
        (["{moe}", "{dense}"], {"data": "nowhere.txt"}, "nowhere.txt"),
        (["{moe}", "{dense}"], {"backend": "nump"}, "no backend 'nump'"),
        (["moe-001", "dense-001"], {"seeds": 3}, "nothing is trained"),
        (["moe-001", "dense-001"], {"overrides": ["train.lr=1"]}, "nothing is trained"),
        (["moe-001", "{dense}"], {"steps": 3}, "put it second"),
        (["moe-001", "moe-001/checkpoints/step-000010"], {}, "compare reads whole runs"),
    ],
)
def test_what_cannot_be_compared_is_one_clear_line_before_any_training(
    place: Path, moe: str, dense: str, sources: list[str], options: dict[str, object], message: str
) -> None:
    before = sorted((place / "runs").iterdir())
    with pytest.raises(UserError, match=re.escape(message)) as error:
        compare([source.format(moe=moe, dense=dense) for source in sources], root=place / "runs", **options)  # type: ignore[arg-type]
    assert "\n" not in str(error.value) and sorted((place / "runs").iterdir()) == before


def cut_status(run: Path) -> None:
    (run / "status.json").unlink()


def interrupt(run: Path) -> None:
    (run / "status.json").write_text('{"state": "interrupted", "step": 7}')


def diverge(run: Path) -> None:
    (run / "status.json").write_text('{"state": "diverged", "step": 7}')


def cut_metrics(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:-1]))


def garble_metrics(run: Path) -> None:
    (run / "metrics.jsonl").write_text("{}\n" * 10)


def reshape_load(run: Path) -> None:
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(re.sub(r'"expert_load": \[\[[^\]]*\]\]', '"expert_load": [[1.0]]', text, count=1))


def break_config(run: Path) -> None:
    (run / "config.toml").write_text("[model\n")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_status, "status.json is missing"),
        (interrupt, "not finished (interrupted at step 7 of 10): `minimoe resume"),
        (diverge, "lower train.lr"),
        (cut_metrics, "damaged: 9 lines, expected one for each of 10 steps"),
        (garble_metrics, "metrics.jsonl: line 1 has a wrong value (damaged)"),
        (reshape_load, "expert_load"),
        (break_config, "not valid TOML"),
    ],
)
def test_a_run_that_is_not_finished_or_damaged_is_refused(place: Path, moe: str, tmp_path: Path, damage, message: str) -> None:  # type: ignore[no-untyped-def]
    damage(copy_run(place / "runs" / "moe-001", tmp_path / "broken-001"))
    with pytest.raises(UserError, match=re.escape(message)) as error:
        compare([moe, "broken-001"], root=tmp_path)
    assert "\n" not in str(error.value) and not list(tmp_path.glob("moe-*"))
