"""What others wrote into a run's JSON files: whatever it is, it is one line or a state, and other runs are listed all the same."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import call, one_line
from tiny_runs import tiny, train, write_text

from minimoe.errors import CheckpointError
from minimoe.pretrained.loading import open_model
from minimoe.runs import checkpoint, records
from minimoe.runs.folders import has_begun
from minimoe.runs.listing import list_runs
from minimoe.runs.metrics_file import MetricsFile
from minimoe.runs.run import Run

DEEP = b'{"step": 1, "state": ' + b"[" * 100_000
NUMBERS: list[Any] = [1e20, -1, 2**64, True, "1", [1], {"a": 1}, 0.5]


def set_field(path: Path, field: str, value: object) -> None:
    """Put a value into a JSON file, or into the last line of metrics."""
    lines = path.read_text().splitlines()
    whole = path.suffix == ".json"
    fields = json.loads(path.read_text() if whole else lines[-1])
    fields[field] = value
    path.write_text(json.dumps(fields) + "\n" if whole else "\n".join([*lines[:-1], json.dumps(fields)]) + "\n")


def forge_state(run: Path, field: str, value: object) -> None:
    """Change the newest checkpoint's state.json and the digest that vouches for it, as a person can."""
    folder = checkpoint.checkpoints(run / "checkpoints")[-1]
    set_field(folder / "state.json", field, value)
    digests = {
        line.partition("  ")[2]: checkpoint.sha256((folder / line.partition("  ")[2]).read_bytes())
        for line in (folder / "MANIFEST.sha256").read_text().splitlines()
    }
    (folder / "MANIFEST.sha256").write_text(checkpoint._manifest_text(digests))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run in runs/."""
    place = tmp_path_factory.mktemp("trained")
    train(tiny(write_text(place), steps=4, checkpoint_every=2, keep=2), place / "runs")
    return place


@pytest.fixture
def run(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run, beside another copy."""
    shutil.copytree(trained / "runs", tmp_path / "runs")
    shutil.copytree(trained / "runs/tiny-001", tmp_path / "runs/other-001")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs/tiny-001"


def without_a_traceback(capsys: pytest.CaptureFixture[str], *arguments: str) -> int:
    code, _, err = call(capsys, *arguments)
    assert code in (0, 2), err
    if code == 2:
        one_line(err)
    return code


def check_all(run: Path, capsys: pytest.CaptureFixture[str], state: str) -> None:
    """Every command that reads a run ends with a result or one line, and the list shows this run so and the other as it is."""
    assert {row["name"]: row["state"] for row in list_runs()} == {"tiny-001": state, "other-001": "finished"}
    for arguments in (["runs"], ["runs", "--json"]):
        assert without_a_traceback(capsys, *arguments) == 0
    for arguments in (["inspect"], ["inspect", "--json"], ["compare", "other-001"], ["eval"], ["generate", "--tokens", "2"]):
        without_a_traceback(capsys, arguments[0], str(run), *arguments[1:])
    without_a_traceback(capsys, "resume", str(run), "--steps", "5", "--quiet")


def write(name: str, data: bytes) -> Callable[[Path], object]:
    return lambda run: (run / name).write_bytes(data)


def field(name: str, key: str, value: object) -> Callable[[Path], object]:
    return lambda run: set_field(run / name, key, value)


def pipe(name: str) -> Callable[[Path], object]:
    return lambda run: ((run / name).unlink(), os.mkfifo(run / name))


def endless(name: str) -> Callable[[Path], object]:
    return lambda run: ((run / name).unlink(), (run / name).symlink_to("/dev/zero"))


def sparse(name: str) -> Callable[[Path], object]:
    return lambda run: os.truncate(run / name, 2**42)


STATUS = {
    "deep": write("status.json", DEEP),
    "digits": write("status.json", b'{"state": "running", "step": ' + b"9" * 5000 + b"}"),
    "a surrogate": write("status.json", b'{"state": "\\ud800"}'),
    "markup": field("status.json", "state", "[/bold]"),
    "escapes": field("status.json", "state", "\x1b[31mred"),
    "a state that is a list": field("status.json", "state", ["running"]),
    "a pipe": pipe("status.json"),
    "endless": endless("status.json"),
    "sparse": sparse("status.json"),
    **{f"pid {value}": field("status.json", "pid", value) for value in NUMBERS},
    **{f"step {value}": field("status.json", "step", value) for value in NUMBERS},
    **{f"{key} {value}": field("status.json", key, value) for key in ("parameters", "steps", "begun") for value in ("x", 1e20)},
    "process": field("status.json", "process", 7),
}


@pytest.mark.parametrize("damage", STATUS.values(), ids=STATUS)
def test_a_status_that_is_not_one_is_unknown(run: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], object]) -> None:
    damage(run)
    check_all(run, capsys, "unknown")


def test_a_process_number_beyond_the_systems_is_no_fault(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "status.json").write_text(json.dumps({"state": "running", "pid": 2**31 - 1, "process": ""}))
    check_all(run, capsys, "killed")


ENV = {
    "deep": write("env.json", DEEP),
    "not an object": write("env.json", b"[]"),
    "digits": write("env.json", b'{"created": ' + b"9" * 5000 + b"}"),
    "a date that is a number": field("env.json", "created", 3),
    "data that are a list": field("env.json", "data", []),
    "a digest that is a number": field("env.json", "data", {"sha256": 1}),
    "weights that are a list": field("env.json", "weights", []),
    "a pipe": pipe("env.json"),
    "endless": endless("env.json"),
}


@pytest.mark.parametrize("damage", ENV.values(), ids=ENV)
def test_an_environment_that_is_not_one_counts_as_missing(
    run: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], object]
) -> None:
    damage(run)
    check_all(run, capsys, "finished")


LINES = {
    "deep": write("metrics.jsonl", DEEP + b"\n"),
    "digits": write("metrics.jsonl", b'{"step": ' + b"9" * 5000 + b"}\n"),
    "not an object": write("metrics.jsonl", b"[1]\n"),
    **{f"step {value}": field("metrics.jsonl", "step", value) for value in NUMBERS if value != 2**64},
    **{f"{key} {value}": field("metrics.jsonl", key, value) for key in ("loss", "val_loss", "lr") for value in ("x", [1], True)},
    **{f"val_batches {value}": field("metrics.jsonl", "val_batches", value) for value in (3, [3], [3, -1], ["x", 9])},
    "val_loss_sampled x": field("metrics.jsonl", "val_loss_sampled", "x"),
    "a load of text": field("metrics.jsonl", "expert_load", ["a"]),
    "a load beyond all": field("metrics.jsonl", "expert_load", [[1e300, 0.5]]),
    "a flag that is a number": field("metrics.jsonl", "skipped", 3),
    "losses of layers": field("metrics.jsonl", "aux_loss_layers", 3),
}


@pytest.mark.parametrize("damage", LINES.values(), ids=LINES)
def test_a_line_of_metrics_that_is_not_one_is_named(
    run: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], object]
) -> None:
    damage(run)
    last = len((run / "metrics.jsonl").read_bytes().splitlines())
    with pytest.raises(
        CheckpointError, match=rf"metrics\.jsonl: line {last} (is not a JSON object|has a wrong value) \(damaged\): "
    ) as caught:
        Run.open(run).metrics()
    assert "\n" not in str(caught.value)
    check_all(run, capsys, "finished")


UNREADABLE = {"a pipe": pipe("metrics.jsonl"), "endless": endless("metrics.jsonl"), "sparse": sparse("metrics.jsonl")}


@pytest.mark.parametrize("damage", UNREADABLE.values(), ids=UNREADABLE)
def test_metrics_that_are_no_file_of_lines_are_damaged(
    run: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], object]
) -> None:
    damage(run)
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl: (is not a file|line \d+ is longer than)"):
        Run.open(run).metrics()
    check_all(run, capsys, "damaged")


NUMBERS_THAT_ARE_NONE = {"nulls": [[None, None]], "ragged": [[0.5], [0.25, 0.75]], "empty": [[]], "none": []}


@pytest.mark.parametrize("block", [4, 5, 7, 100])
def test_lines_are_the_same_wherever_a_block_of_the_file_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"abc\n\nde\nfgh\nij")
    monkeypatch.setattr(records, "MOST_LINE", block)
    assert records.whole_lines(path) == [b"abc", b"", b"de", b"fgh"]
    path.write_bytes(b"abc\n\n" + b"x" * 2 * block + b"\nij\n")
    with pytest.raises(CheckpointError, match="line 3 is longer than"):
        records.whole_lines(path)


@pytest.mark.parametrize("load", NUMBERS_THAT_ARE_NONE.values(), ids=NUMBERS_THAT_ARE_NONE)
def test_a_load_that_is_incomplete_is_shown_as_far_as_it_goes(run: Path, capsys: pytest.CaptureFixture[str], load: Any) -> None:
    set_field(run / "metrics.jsonl", "expert_load", load)
    check_all(run, capsys, "finished")


def test_a_line_with_a_step_alone_is_read(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fields may be missing: an earlier version wrote fewer."""
    (run / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "expert_load": [[0.5, 0.5]]}\n')
    assert len(Run.open(run).metrics()) == 2
    check_all(run, capsys, "finished")


STATES = [("step", 1e20), ("step", -4), ("step", "4"), ("elapsed_s", "x"), ("best", [1]), ("best_step", 0.5), ("bad", 2**40), ("bad", "x"),
          ("data", []), ("data", {"sha256": 5})]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), STATES)
def test_a_forged_state_is_damage_and_the_checkpoint_before_is_used(
    run: Path, capsys: pytest.CaptureFixture[str], key: str, value: object
) -> None:
    forge_state(run, key, value)
    saved, problems = Run.open(run).load()
    assert saved.step == 2 and len(problems) == 1 and problems[0].startswith("step-000004/state.json: ") and f"$.{key}" in problems[0]
    check_all(run, capsys, "finished")


@pytest.mark.parametrize("key", ["step", "best_step", "data", "metrics_sha256"])
def test_a_null_in_a_state_says_no_more_than_an_absent_field(run: Path, capsys: pytest.CaptureFixture[str], key: str) -> None:
    forge_state(run, key, None)
    loaded = open_model(run)
    assert loaded.step == 4 and not loaded.problems
    check_all(run, capsys, "finished")


@pytest.mark.parametrize("key", ["step", "steps", "parameters", "begun", "process", "pid"])
def test_a_null_in_a_status_says_no_more_than_an_absent_field(run: Path, capsys: pytest.CaptureFixture[str], key: str) -> None:
    set_field(run / "status.json", key, None)
    listed = next(row for row in list_runs() if row["name"] == run.name)
    assert (listed["step"], listed["steps"], listed["state"]) == (4, 4, "finished")
    check_all(run, capsys, "finished")


@pytest.mark.parametrize("key", ["created", "weights", "data"])
def test_a_null_in_an_environment_says_no_more_than_an_absent_field(run: Path, capsys: pytest.CaptureFixture[str], key: str) -> None:
    set_field(run / "env.json", key, None)
    (run / "metrics.jsonl").unlink()
    (run / "status.json").unlink()
    assert not has_begun(run)
    code, out, _ = call(capsys, "verify", str(run))
    assert code == 1 and "None" not in out


@pytest.mark.parametrize("key", ["elapsed_s", "best", "best_step", "bad", "data"])
def test_a_state_without_what_training_needs_is_refused(run: Path, capsys: pytest.CaptureFixture[str], key: str) -> None:
    folder = run / "checkpoints/step-000004"
    state = json.loads((folder / "state.json").read_text())
    del state[key]
    (folder / "state.json").write_text(json.dumps(state))
    forge_state(run, "step", 4)
    code, _, err = call(capsys, "resume", str(run), "--steps", "5", "--quiet")
    assert code == 2 and "step-000004/state.json" in one_line(err) and key in err


@pytest.mark.parametrize("name", ["state.json", "config.json"])
@pytest.mark.parametrize("data", [DEEP, b'{"step": ' + b"9" * 5000 + b"}", b'{"name": "\\ud800"}'], ids=["deep", "digits", "surrogate"])
def test_json_of_a_checkpoint_is_bounded(run: Path, name: str, data: bytes) -> None:
    (run / "checkpoints/step-000004" / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"^step-000004/{name}: ") as caught:
        checkpoint.load_checkpoint(run / "checkpoints/step-000004", verify=False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["state.json", "config.json", "MANIFEST.sha256", "model.safetensors", "tokenizer.json"])
def test_a_pipe_in_a_checkpoint_is_not_waited_for(run: Path, name: str) -> None:
    pipe(name)(run / "checkpoints/step-000004")
    saved, problems = Run.open(run).load()
    assert saved.step == 2 and problems == [f"step-000004/{name}: is not a file"]


@pytest.mark.parametrize("text", ["\0", "x" * 5000, "a\nb", "../" * 2000], ids=["a null", "long", "lines", "climbing"])
def test_a_pointer_that_names_no_run_is_one_line(run: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    (run.parent / "last").write_text(text)
    (run / "checkpoints/best").write_text(text)
    assert without_a_traceback(capsys, "generate", "--tokens", "2") == 2
    assert without_a_traceback(capsys, "generate", str(run / "checkpoints/best"), "--tokens", "2") == 2
    assert without_a_traceback(capsys, "resume", str(run), "--steps", "5", "--quiet") == 0


def test_a_folder_whose_name_is_markup_is_listed_by_its_name(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(run, run.parent / "[bold]x")
    shutil.copytree(run, run.parent / "a[" / "b]", dirs_exist_ok=True)
    shutil.copytree(run, run.parent / "[")
    code, out, _ = call(capsys, "runs")
    assert code == 0 and "[bold]x" in out and "finished" in out


def test_the_losses_of_a_run_are_read_without_the_rest_of_its_lines(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path)
    assert file.losses() == []
    file.append([{"step": 1, "loss": 5.5, "expert_load": [[0.5, 0.5]]}, {"step": 2, "loss": float("nan")}])
    with open(tmp_path / "metrics.jsonl", "a") as lines:
        lines.write('{"step": 3}\n{damaged\n[4]\n{"loss": "5"}\n{"step": 7, "loss": 4.5}\n{"step": 8, "lo')
    assert file.losses() == [5.5, None, None, None, None, None, 4.5]
