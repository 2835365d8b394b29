"""What a resumed run says: edits of its configuration, another machine, damaged metrics, a learning rate that the number of steps moves."""

import json
import warnings
from pathlib import Path

import pytest
from msgspec.structs import replace
from tiny_runs import tiny, train, with_train, write_text

import minimoe as mm
from minimoe.config import Config, MoEConfig
from minimoe.errors import CheckpointError
from minimoe.runs.run import Run
from minimoe.training.differences import configuration_differences, machine_differences, rate_line
from minimoe.training.listener import Listener
from minimoe.training.trained_run import TrainedRun


class Heard(Listener):
    """Keeps what is said, and apart from it what is a warning."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.warnings: list[str] = []

    def said(self, text: str) -> None:
        self.lines.append(text)

    def warned(self, text: str) -> None:
        self.warnings.append(text)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return tiny(write_text(tmp_path), steps=6, checkpoint_every=3)


@pytest.fixture
def done(config: Config, tmp_path: Path) -> TrainedRun:
    return train(config, tmp_path / "runs")


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1, (old, text)
    path.write_text(text.replace(old, new))


def resumed(run: Path, steps: int | None = 8) -> Heard:
    heard = Heard()
    mm.resume(run, steps=steps, listener=heard)
    return heard


# ---- the configuration ---------------------------------------------------------------------------------------------------------


def test_an_unchanged_run_says_nothing(done: TrainedRun) -> None:
    heard = resumed(done.path / "checkpoints" / "step-000003", steps=None)
    assert heard.warnings == [] and heard.lines == []


def test_each_edited_key_is_said_before_training_goes_on(done: TrainedRun) -> None:
    edit(done.path / "config.toml", "\nlr = 0.01\n", "\nlr = 0.002\n")
    edit(done.path / "config.toml", "\ngrad_clip = 1.0\n", "\ngrad_clip = 0.5\n")
    heard = resumed(done.path / "checkpoints" / "step-000003", steps=None)
    assert heard.warnings[:2] == ["train.lr 0.01 -> 0.002", "train.grad_clip 1.0 -> 0.5"]


def test_steps_that_the_command_asks_for_are_said_and_are_no_warning(done: TrainedRun) -> None:
    heard = resumed(done.path, steps=8)
    assert heard.warnings == [] and heard.lines[0] == "train.steps 6 -> 8"
    assert heard.lines[1].endswith("the cosine now ends at step 8")


def test_steps_edited_in_the_file_are_a_warning(done: TrainedRun) -> None:
    edit(done.path / "config.toml", "\nsteps = 6\n", "\nsteps = 7\n")
    assert resumed(done.path, steps=None).warnings[0] == "train.steps 6 -> 7"


@pytest.mark.parametrize(("old", "new"), [("sgd", "lion"), ("lion", "sgd")])
def test_an_optimizer_that_takes_over_the_state_of_another_is_said(config: Config, tmp_path: Path, old: str, new: str) -> None:
    run = train(with_train(config, optimizer=old), tmp_path / "runs")
    edit(run.path / "config.toml", f'optimizer = "{old}"', f'optimizer = "{new}"')
    heard = resumed(run.path / "checkpoints" / "step-000003", steps=None)
    assert heard.warnings[0] == f"train.optimizer {old} -> {new}: the optimizer's state was made by {old}"


def test_another_model_is_refused_by_the_key_that_differs(done: TrainedRun) -> None:
    edit(done.path / "config.toml", "\ntop_k = 2\n", "\ntop_k = 3\n")
    with pytest.raises(CheckpointError, match=r"its model differs from .*config\.toml \(moe\.top_k 2 -> 3\)"):
        mm.resume(done.path, steps=8)


def test_nested_keys_and_options_have_their_whole_names_and_unset_ones_say_so() -> None:
    routed = Config(model=replace(Config().model, moe=MoEConfig(n_experts=8)))
    fewer = Config(model=replace(Config().model, moe=MoEConfig(n_experts=8, layers=(1, 3), norm_topk_prob=False)))
    assert list(configuration_differences(routed, fewer).values()) == [
        "moe.every 1 -> unset", "moe.norm_topk_prob true -> false", "moe.layers unset -> [1, 3]",
    ]  # fmt: skip
    assert configuration_differences(routed, routed) == {}
    assert list(configuration_differences(Config(name="a"), Config(name="b\n")).values()) == ['name a -> "b\\n"']


# ---- the learning rate ---------------------------------------------------------------------------------------------------------


def test_more_steps_stretch_a_cosine_and_the_rate_jumps() -> None:
    before = replace(Config().train, steps=100, warmup_steps=0, lr=1e-3, min_lr=0.0)
    after = replace(before, steps=200)
    # (1 + cos(pi * 99/100)) / 2 = 0.000247 of lr for the 100th step; (1 + cos(pi / 2)) / 2 = 0.5 of lr for the 101st
    assert rate_line(before, after, 100) == "learning rate: 2.467e-07 at step 100, 0.0005 at step 101; the cosine now ends at step 200"


def test_a_constant_rate_and_one_step_more_than_all_say_nothing() -> None:
    before = replace(Config().train, steps=100, schedule="constant")
    assert rate_line(before, replace(before, steps=200), 100) is None
    cosine = replace(before, schedule="cosine")
    assert rate_line(cosine, replace(cosine, steps=100), 50) is None and rate_line(cosine, replace(cosine, steps=50), 50) is None
    assert rate_line(cosine, replace(cosine, steps=200), 0) is None


def test_another_schedule_says_the_rate_too() -> None:
    before = replace(Config().train, steps=100, warmup_steps=0, lr=1e-3, min_lr=0.0)
    after = replace(before, schedule="constant")
    assert rate_line(before, after, 50) == "learning rate: 0.0005157 at step 50, 0.001 at step 51"


# ---- the machine ---------------------------------------------------------------------------------------------------------------

HERE = {
    "minimoe": "0.1.0", "python": "3.13.1", "numpy": "2.3.1", "numba": "0.61.0", "libc": "glibc 2.36", "processor": "AMD EPYC",
    "backend": "numba", "threads": 2, "blas": [{"name": "openblas", "version": "0.3.29", "threads": 2}],
}  # fmt: skip


def test_each_version_and_the_processor_are_compared() -> None:
    assert machine_differences(HERE, HERE) == []
    bits = "from here on the numbers may differ in the last bits"
    assert machine_differences({**HERE, "numpy": "2.1.0", "processor": "Intel Xeon"}, HERE) == [
        f"numpy 2.1.0 -> 2.3.1: {bits}", f"processor Intel Xeon -> AMD EPYC: {bits}",
    ]  # fmt: skip
    blas = [{"name": "openblas", "version": "0.3.27", "threads": 2}]
    assert machine_differences({**HERE, "blas": blas}, HERE) == [f"blas openblas 0.3.27 -> openblas 0.3.29: {bits}"]


def test_what_the_backend_does_not_use_is_not_compared() -> None:
    """Kernels of Numba give equal bits with any number of threads; NumPy's BLAS may not, and needs no Numba."""
    other = {**HERE, "numba": "0.60.0", "threads": 8}
    assert [line.partition(":")[0] for line in machine_differences(other, HERE)] == ["numba 0.60.0 -> 0.61.0"]
    on_numpy = [line.partition(":")[0] for line in machine_differences({**other, "backend": "numpy"}, {**HERE, "backend": "numpy"})]
    assert on_numpy == ["threads 8 -> 2"]


def test_an_older_record_and_one_of_wrong_types_are_read() -> None:
    assert machine_differences({"created": "2026", "numpy": "2.3.1"}, HERE) == []
    assert machine_differences({"blas": 3, "numpy": ["x"], "threads": None}, HERE) == [
        'numpy ["x"] -> 2.3.1: from here on the numbers may differ in the last bits'
    ]


def test_a_run_is_resumed_with_a_word_about_another_numpy(done: TrainedRun) -> None:
    env = done.path / "env.json"
    recorded = json.loads(env.read_text())
    assert {"numba", "processor", "libc", "threads"} <= recorded.keys()
    env.write_text(json.dumps({**recorded, "numpy": "1.0"}))
    heard = resumed(done.path)
    assert [line for line in heard.warnings if line.startswith("numpy 1.0 -> ")], heard.warnings
    assert json.loads(env.read_text())["numpy"] == "1.0", "env.json stays the record of the start"


@pytest.mark.parametrize("text", [None, b"\xff{", b"[]", b"[" * 100_000])
def test_a_lost_env_json_is_said(done: TrainedRun, text: bytes | None) -> None:
    (done.path / "env.json").unlink()
    if text is not None:
        (done.path / "env.json").write_bytes(text)
    (line,) = resumed(done.path).warnings
    assert line.startswith(f"{done.path / 'env.json'}: ") and line.endswith("the machine of the run's start is not known")


# ---- metrics -------------------------------------------------------------------------------------------------------------------


def test_a_damaged_line_is_said_and_the_file_kept_aside(done: TrainedRun) -> None:
    path = done.path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1] = lines[1].replace(b'"loss": ', b'"loss": !', 1)
    path.write_bytes(b"".join(lines))
    heard = resumed(done.path)
    assert heard.warnings[0].startswith("metrics.jsonl: line 2 cannot be read (damaged): not JSON")
    assert heard.warnings[1] == "metrics.jsonl: step 2 has no line"
    assert heard.warnings[2] == f"the damaged file is kept as {done.path / 'metrics.damaged.jsonl'}"
    assert (done.path / "metrics.damaged.jsonl").read_bytes() == b"".join(lines)
    assert [row["step"] for row in Run.open(done.path).metrics()] == [1, 3, 4, 5, 6, 7, 8]


def test_a_loss_is_said_once(done: TrainedRun) -> None:
    path = done.path / "metrics.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[1:]))
    assert len(resumed(done.path, steps=8).warnings) == 2
    assert resumed(done.path, steps=9).warnings == []
    assert [entry.name for entry in done.path.glob("metrics.damaged*")] == ["metrics.damaged.jsonl"]


def test_damage_that_is_found_later_does_not_replace_what_was_kept(done: TrainedRun) -> None:
    path = done.path / "metrics.jsonl"
    for steps, name in ((8, "metrics.damaged.jsonl"), (9, "metrics.damaged-2.jsonl")):
        path.write_bytes(b"\x00\n" + path.read_bytes())
        resumed(done.path, steps=steps)
        assert (done.path / name).read_bytes().startswith(b"\x00\n")


def test_of_many_damaged_lines_the_first_are_said_and_all_are_counted(done: TrainedRun) -> None:
    path = done.path / "metrics.jsonl"
    path.write_bytes(b"x\n" * 400 + path.read_bytes())
    heard = resumed(done.path).warnings
    assert [line.split()[2] for line in heard[:5]] == ["1", "2", "3", "4", "5"]
    assert heard[5] == "metrics.jsonl: 395 more lines cannot be read" and len(heard) == 7


def test_a_flipped_digit_that_still_parses_is_noticed(done: TrainedRun) -> None:
    row = json.loads((done.path / "metrics.jsonl").read_text().splitlines()[2])
    digits = f'"loss": {row["loss"]}'
    edit(done.path / "metrics.jsonl", digits, digits[:-1] + str((int(digits[-1]) + 1) % 10))
    assert resumed(done.path).warnings[0] == (
        "metrics.jsonl: the lines of steps 1 to 6 are not those that were written (their SHA-256 is not the checkpoint's)"
    )


def test_lost_lines_are_noticed_without_any_damage(done: TrainedRun) -> None:
    path = done.path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:1] + lines[3:]))
    assert resumed(done.path).warnings[0] == "metrics.jsonl: steps 2 to 3 have no line"
    path.unlink()
    assert resumed(done.path, 9).warnings == ["metrics.jsonl: steps 1 to 8 have no line"]


def test_a_torn_last_line_is_what_a_kill_leaves_and_is_not_said(done: TrainedRun) -> None:
    with open(done.path / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 7, "lo')
    assert resumed(done.path).warnings == []
    assert not (done.path / "metrics.damaged.jsonl").exists()


def test_a_checkpoint_without_a_digest_is_resumed_without_the_check(done: TrainedRun) -> None:
    import hashlib

    step = done.path / "checkpoints" / "step-000006"
    state = json.loads((step / "state.json").read_text())
    assert len(state.pop("metrics_sha256")) == 64
    (step / "state.json").write_text(json.dumps(state))
    manifest = (step / "MANIFEST.sha256").read_text().splitlines()
    digest = hashlib.sha256((step / "state.json").read_bytes()).hexdigest()
    lines = [f"{digest}  state.json" if line.endswith("state.json") else line for line in manifest]
    (step / "MANIFEST.sha256").write_text("\n".join(lines) + "\n")
    assert resumed(done.path).warnings == []


def test_equal_runs_have_equal_digests_and_a_resumed_one_has_them_too(config: Config, tmp_path: Path) -> None:
    def digest(run: TrainedRun, step: int) -> str:
        found: str = json.loads((run.path / "checkpoints" / f"step-{step:06d}" / "state.json").read_text())["metrics_sha256"]
        return found

    first, second = train(config, tmp_path / "one"), train(config, tmp_path / "two")
    assert digest(first, 6) == digest(second, 6) != digest(first, 3) == digest(second, 3)
    again = mm.resume(second.path / "checkpoints" / "step-000003")
    assert digest(again, 6) == digest(first, 6)


# ---- in Python -----------------------------------------------------------------------------------------------------------------


def test_without_a_listener_warnings_are_pythons(done: TrainedRun) -> None:
    edit(done.path / "config.toml", "\ngrad_clip = 1.0\n", "\ngrad_clip = 0.5\n")
    with pytest.warns(UserWarning, match=r"train\.grad_clip 1\.0 -> 0\.5"):
        mm.resume(done.path, steps=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mm.resume(done.path, steps=9)
