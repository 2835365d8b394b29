"""A run's folder: made, found again, measured, resumed, listed; by one process at a time."""

import errno
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from command_line import contents

from minimoe.config import Config, DataConfig, ModelConfig, MoEConfig, TrainConfig
from minimoe.errors import CheckpointError, ConfigError
from minimoe.runs.environment import environment, process_identity
from minimoe.runs.listing import list_runs
from minimoe.runs.run import Run

TINY = Config(name="tiny", train=TrainConfig(steps=40, keep=2))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "runs"


def save(run: Run, step: int, best: bool = False) -> Path:
    return run.save(step, model={"a": np.full(3, float(step))}, optimizer={"m": np.zeros(2)}, state={"lr": 0.5}, best=best)


# ---- making ------------------------------------------------------------------------------------------------------------------


def test_runs_count_up_and_last_names_the_newest(root: Path) -> None:
    names = [Run.create(TINY, root=root).name for _ in range(2)]
    (root / "tiny-041").mkdir()
    names.append(Run.create(TINY, root=root).name)
    assert names == ["tiny-001", "tiny-002", "tiny-042"]
    assert (root / "last").read_text() == "tiny-042\n"


def test_runs_that_start_at_once_get_folders_of_their_own(root: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        names = list(pool.map(lambda _: Run.create(TINY, root=root).name, range(24)))
    assert len(set(names)) == 24
    assert (root / "last").read_text().strip() in names


@pytest.mark.parametrize(("name", "folder"), [("a/b c", "a-b-c-001"), ("..", "model-001"), ("ü.1", "ü.1-001")])
def test_a_name_with_odd_characters_still_makes_one_folder(root: Path, name: str, folder: str) -> None:
    run = Run.create(Config(name=name), root=root)
    assert run.path == root / folder and run.config.name == name


@pytest.mark.parametrize(
    "config",
    [
        Config(),
        TINY,
        Config(
            name='quo"te', model=ModelConfig(moe=MoEConfig(layers=(1, 3), top_k=1, norm_topk_prob=False)), data=DataConfig(source="a b.txt")
        ),
        Config(
            model=ModelConfig(n_layers=2, sliding_window=8, layer_types=("full", "sliding"), vocab_size=77), train=TrainConfig(lr=1 / 3)
        ),
    ],
)
def test_the_configuration_reads_back_as_it_was(root: Path, config: Config) -> None:
    run = Run.create(config, root=root)
    again = Run.open(run.path, root=root).config
    assert again.model == config.model and again.train == config.train and again.data == config.data and again.name == config.name


def test_the_environment_is_recorded_with_what_the_caller_adds(root: Path) -> None:
    run = Run.create(TINY, root=root, extra={"backend": "numpy", "command": ["minimoe", "train"]})
    env = json.loads((run.path / "env.json").read_text())
    assert env["backend"] == "numpy" and env["command"] == ["minimoe", "train"]
    assert env["numpy"] == np.__version__ and env["cpu_count"] == os.cpu_count()
    assert set(environment()) <= set(env)


def test_a_folder_of_ones_own_may_be_new_or_empty_but_not_full(tmp_path: Path, root: Path) -> None:
    run = Run.create(TINY, out=tmp_path / "mine" / "deep", root=root)
    assert run.path == tmp_path / "mine" / "deep" and not (root / "last").exists(), "last names runs under the root alone"
    (tmp_path / "empty").mkdir()
    assert Run.create(TINY, out=tmp_path / "empty", root=root).name == "empty"
    save(run, 0)
    with pytest.raises(ConfigError, match=r"deep: is not empty: a run needs a new or empty folder"):
        Run.create(TINY, out=tmp_path / "mine" / "deep", root=root)
    Run.create(TINY, out=root / "named", root=root)
    assert (root / "last").read_text() == "named\n"


ENV = {"env.json": json.dumps({"created": "2026-01-01T00:00:00Z", "weights": "seed"})}
RUNNING = {"status.json": json.dumps({"state": "running", "pid": 2**22 + 1, "process": "gone", "step": 0, "begun": False})}
A_START = {**ENV, **RUNNING, "config.toml": "name = 'a'\n"}
TORN = {".config.toml.tmp-0123abcd": "name ="}
LEFT_BY_A_START = {
    "nothing whole": TORN,
    "a lock without its text": {"training.lock": ""},
    "a lock whose text is torn": {"training.lock": '{"pid":12'},
    "env.json": ENV,
    "a torn config.toml": {**ENV, **TORN},
    "a run without a checkpoint": A_START,
    "a torn first checkpoint": {**A_START, "checkpoints/.step-000000.tmp-0123abcd/state.json": "{"},
    "an upcycled model that is no run yet": {**ENV, **RUNNING, "checkpoints/step-000000/state.json": "{}"},
}
KEPT = {
    "a configuration of the user's": {"config.toml": "name = 'a'\n"},
    "a lock of something else": {"training.lock": "mine"},
    "something else": {**A_START, "notes.txt": ""},
    "an env.json of something else": {"env.json": "{}"},
    "a run with its first checkpoint": {**A_START, "checkpoints/step-000000/state.json": "{}"},
    "a run with a checkpoint moved aside": {**A_START, "checkpoints/.step-000000.old-0123abcd/state.json": "{}"},
    "a run whose checkpoints are gone": {**A_START, "status.json": json.dumps({"state": "running", "begun": True})},
    "a run of an earlier version that was stopped": {**A_START, "status.json": json.dumps({"state": "interrupted", "step": 0})},
    "a run with steps": {**A_START, "metrics.jsonl": '{"step": 1}\n'},
    "a run that lost config.toml": {**ENV, "checkpoints/step-000010/state.json": "{}"},
    "a file instead of checkpoints": {**A_START, "checkpoints": ""},
}


def lay_out(folder: Path, parts: dict[str, str]) -> Path:
    for name, text in parts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize("left", LEFT_BY_A_START.values(), ids=LEFT_BY_A_START)
def test_what_a_killed_start_left_is_replaced_and_said(tmp_path: Path, root: Path, left: dict[str, str]) -> None:
    out, heard = lay_out(tmp_path / "mine", left), []
    run = Run.create(TINY, out=out, root=root, say=heard.append)
    run.release()
    assert {path.name for path in out.iterdir()} == {"env.json", "config.toml"} and run.config.name == "tiny"
    said = [f"{out}: held only what a start that was killed left there: it is replaced"]
    assert heard == ([] if set(left) == {"training.lock"} else said), "a free lock is no content"


@pytest.mark.parametrize("kept", KEPT.values(), ids=KEPT)
def test_a_folder_with_anything_else_is_refused_and_untouched(tmp_path: Path, root: Path, kept: dict[str, str]) -> None:
    out = lay_out(tmp_path / "mine", kept)
    before = contents(out)
    with pytest.raises(ConfigError, match="mine: is not empty: a run needs a new or empty folder"):
        Run.create(TINY, out=out, root=root)
    assert contents(out) == before


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out, root in ((tmp_path / "file" / "x", tmp_path / "runs"), (None, tmp_path / "file"), (tmp_path / "file", tmp_path / "runs")):
        with pytest.raises(ConfigError, match=r"file.*(cannot be written|is a file)") as caught:
            Run.create(TINY, out=out, root=root)
        assert "\n" not in str(caught.value)


# ---- finding -----------------------------------------------------------------------------------------------------------------


def test_a_run_is_found_by_folder_name_checkpoint_and_pointer(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = Run.create(TINY, root=root), Run.create(TINY, root=root)
    step = save(first, 10, best=True)
    monkeypatch.chdir(root.parent)
    for given in (
        first.path,
        "tiny-001",
        "runs/tiny-001",
        str(first.path) + "/",
        first.checkpoint_folder,
        step,
        "tiny-001/checkpoints/best",
    ):
        run = Run.open(given, root=root)
        assert run.path.resolve() == first.path.resolve() and run.name == "tiny-001", given
    assert Run.open(step, root=root).checkpoint == step
    assert Run.open("runs/tiny-001/checkpoints/best", root=root).checkpoint == step
    assert Run.open(first.path, root=root).checkpoint is None
    monkeypatch.chdir(step)
    assert Run.open(".", root=root).load()[0].step == 10
    monkeypatch.chdir(root.parent)
    for newest in (None, "last", "runs/last", root / "last"):
        assert Run.open(newest, root=root).name == second.name


def test_what_does_not_exist_names_the_nearest_that_does(root: Path) -> None:
    with pytest.raises(CheckpointError, match="no run here yet"):
        Run.open(root=root)
    with pytest.raises(CheckpointError, match=r"tiny-1: no such run .*and no run under"):
        Run.open("tiny-1", root=root)
    run = Run.create(TINY, root=root)
    with pytest.raises(CheckpointError, match=r"tny-001: no such run \(did you mean 'tiny-001'\?\)"):
        Run.open("tny-001", root=root)
    (root / "other").mkdir()
    with pytest.raises(CheckpointError, match=r"other: is not a run's folder: it has no config\.toml \(known: tiny-001\)"):
        Run.open(root / "other", root=root)
    run.path.rename(root / "tiny-002")
    with pytest.raises(CheckpointError, match=r"tiny-001: no such run \(did you mean 'tiny-002'"):
        Run.open(root=root)
    (root / "last").unlink()
    with pytest.raises(CheckpointError, match=r"last: is missing: name the run, such as .*tiny-002 \(minimoe runs lists them\)"):
        Run.open(root=root)


def test_a_start_that_ended_before_the_weights_were_written_says_what_to_do(root: Path) -> None:
    Run.prepare(TINY, root / "upcycled", extra={"weights": "of another model"}).release()
    with pytest.raises(CheckpointError, match=r"upcycled: the start of this run ended before its weights .*give its command again"):
        Run.open(root / "upcycled", root=root)
    (root / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"empty: is not a run's folder"):
        Run.open(root / "empty", root=root)


# ---- checkpoints -------------------------------------------------------------------------------------------------------------


def test_saving_prunes_to_the_newest_and_the_best(root: Path) -> None:
    run = Run.create(TINY, root=root)
    for step in (10, 20, 30, 40):
        save(run, step, best=step == 10)
    assert sorted(path.name for path in run.checkpoint_folder.iterdir()) == ["best", "step-000010", "step-000030", "step-000040"]
    found, problems = run.load()
    assert (found.step, problems, found.state) == (40, [], {"lr": 0.5, "step": 40})
    assert found.config["train"]["steps"] == 40 and found.config["name"] == "tiny"
    assert Run.open(run.checkpoint_folder / "best", root=root).load(optimizer=False)[0].step == 10


# ---- metrics -----------------------------------------------------------------------------------------------------------------


def test_metrics_come_back_and_what_is_no_number_is_null(root: Path) -> None:
    run = Run.create(TINY, root=root)
    assert run.metrics() == []
    run.metrics_file.append([{"step": 1, "loss": 1 / 3, "expert_load": [[0.5, math.nan]]}, {"step": 2, "loss": math.inf}])
    run.metrics_file.append([{"step": np.int64(3), "loss": np.float32(0.5), "expert_load": np.array([[1.0, -np.inf]])}])
    assert run.metrics() == [
        {"step": 1, "loss": 1 / 3, "expert_load": [[0.5, None]]},
        {"step": 2, "loss": None},
        {"step": 3, "loss": 0.5, "expert_load": [[1.0, None]]},
    ]
    for line in run.metrics_file.path.read_text().splitlines():
        json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


def test_cutting_metrics_drops_later_and_torn_lines_and_keeps_the_rest_to_the_byte(root: Path) -> None:
    run = Run.create(TINY, root=root)
    run.metrics_file.cut(5)
    assert not run.metrics_file.path.exists()
    run.metrics_file.append([{"step": step, "loss": step / 7} for step in range(1, 6)])
    kept = b"".join(run.metrics_file.path.read_bytes().splitlines(keepends=True)[:3])
    with open(run.metrics_file.path, "ab") as file:
        file.write(b'{"step": 2, "lo')
    assert [row["step"] for row in run.metrics()] == [1, 2, 3, 4, 5]
    run.metrics_file.cut(3)
    assert run.metrics_file.path.read_bytes() == kept
    run.metrics_file.append([{"step": 4}])
    assert [row["step"] for row in run.metrics()] == [1, 2, 3, 4]
    run.metrics_file.cut(0)
    assert run.metrics() == []


def test_a_damaged_line_is_named(root: Path) -> None:
    run = Run.create(TINY, root=root)
    run.metrics_file.path.write_bytes(b'{"step": 1}\n\xff\xfe\n{"step": 3}\n')
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl: line 2 is not a JSON object \(damaged\)"):
        run.metrics()
    run.metrics_file.cut(3)
    assert run.metrics() == [{"step": 1}, {"step": 3}]


# ---- status ------------------------------------------------------------------------------------------------------------------


def test_status_keeps_its_fields_and_reads_unknown_where_there_is_none(root: Path) -> None:
    run = Run.create(TINY, root=root)
    assert run.status()["state"] == "unknown"
    run.start(parameters=1234)
    run.write_status("finished", loss=math.nan, step=40)
    status = run.status()
    assert (status["state"], status["parameters"], status["step"], status["loss"], status["pid"]) == (
        "finished",
        1234,
        40,
        None,
        os.getpid(),
    )
    (run.path / "status.json").write_bytes(b"\xff{")
    assert run.status()["state"] == "unknown"


def test_a_run_that_is_still_running_is_refused_and_a_killed_one_is_not(root: Path) -> None:
    run = Run.create(TINY, root=root)
    run.release()
    script = (
        "import sys, time; from pathlib import Path; from minimoe.runs.run import Run\n"
        "run = Run(Path(sys.argv[1])); run.start(); print('ready', flush=True); time.sleep(60)"
    )
    path = os.pathsep.join(entry for entry in sys.path if entry)
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(run.path)], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    try:
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
        assert run.status()["state"] == "running"
        with pytest.raises(CheckpointError, match=rf"process {child.pid} is still training this run: wait for it or stop it, then resume"):
            run.start()
    finally:
        child.kill()
        child.communicate()
    assert run.status()["state"] == "killed"
    run.start()
    assert run.status()["state"] == "running" and run.status()["pid"] == os.getpid()
    run.start()


def test_a_run_of_an_earlier_version_that_still_trains_is_known_by_its_process(root: Path) -> None:
    """minimoe 0.1 took no lock; its status.json has a process, and no `begun`."""
    run = Run.create(TINY, root=root)
    run.release()
    status = run.path / "status.json"
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        status.write_text(json.dumps({"state": "running", "pid": other.pid, "process": process_identity(other.pid)}))
        assert run.status()["state"] == "running"
        with pytest.raises(CheckpointError, match=rf"process {other.pid} is still training this run: wait for it or stop it, then resume"):
            run.start()
        assert not run.lock.held and not run.lock.path.exists()
        status.write_text(json.dumps({"state": "running", "pid": other.pid, "process": "another boot:1"}))
        assert run.status()["state"] == "killed", "a later process of the same number is not the run's"
        other.communicate(b"\n")
    run.start()
    assert process_identity(os.getpid()) is not None and process_identity(2**22 + 1) is None


# ---- the list ----------------------------------------------------------------------------------------------------------------


def test_runs_are_listed_with_their_losses_and_damaged_ones_do_not_hinder(root: Path) -> None:
    assert list_runs(root) == []
    good, fresh = Run.create(TINY, root=root), Run.create(TINY, root=root)
    good.metrics_file.append(
        [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0, "val_loss": 2.1}, {"step": 3, "loss": math.nan, "val_loss": 2.4}]
    )
    good.write_status("diverged", parameters=99)
    for name, text in (("broken-001", b"not = = toml"), ("broken-002", b"\xff\xff")):
        (root / name).mkdir()
        (root / name / "config.toml").write_bytes(text)
        (root / name / "metrics.jsonl").write_bytes(b'\xff\n{"step": "x"}\n{"step": 7, "loss": 1.0}\n{"st')
        (root / name / "status.json").write_bytes(b"[]")
        (root / name / "env.json").write_bytes(b'{"created": 3}')
    (root / "not-a-run").mkdir()
    (root / "broken-003" / "metrics.jsonl").mkdir(parents=True)
    rows = {row["name"]: row for row in list_runs(root)}
    assert set(rows) == {"tiny-001", "tiny-002", "broken-001", "broken-002", "broken-003"}
    row = rows["tiny-001"]
    assert (row["state"], row["step"], row["steps"], row["loss"], row["val_loss"], row["best_val_loss"], row["parameters"]) == (
        "diverged", 3, 40, None, 2.4, 2.1, 99,
    )  # fmt: skip
    assert (rows[fresh.name]["state"], rows[fresh.name]["step"], rows[fresh.name]["loss"]) == ("unknown", 0, None)
    assert (rows["broken-001"]["state"], rows["broken-001"]["loss"], rows["broken-001"]["steps"]) == ("damaged", 1.0, None)
    assert rows["broken-003"]["state"] == "damaged"


def test_listing_and_finding_runs_needs_no_numpy(root: Path) -> None:
    Run.create(TINY, root=root)
    script = (
        "import sys; from pathlib import Path; from minimoe.runs.listing import list_runs; from minimoe.runs.run import Run\n"
        "root = Path(sys.argv[1]); list_runs(root); Run.open(root=root).config; print('numpy' in sys.modules)"
    )
    path = os.pathsep.join(entry for entry in sys.path if entry)
    done = subprocess.run([sys.executable, "-c", script, str(root)], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert done.stdout == "False\n", done.stderr


def test_a_status_that_cannot_be_read_now_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its fields, such as that the run has begun, would be lost."""
    run = Run.create(TINY, tmp_path / "run")
    run.write_status("running", step=3, steps=10, begun=True)
    before = (run.path / "status.json").read_bytes()

    def fail(path: Path) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patched:
        patched.setattr("minimoe.runs.records.read_regular", fail)
        with pytest.raises(CheckpointError, match=r"status\.json: cannot be written: Input/output error"):
            run.write_status("finished", step=4)
    assert (run.path / "status.json").read_bytes() == before
