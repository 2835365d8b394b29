"""`minimoe verify` names every kind of damage in a run and in a model folder, calls whole what is whole, and changes nothing."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import call, contents, one_line
from model_folders import small, tensors, write
from safetensors.numpy import load_file, save_file
from tiny_runs import tiny, train, with_train, write_text

import minimoe as mm
from minimoe.cli import verifying
from minimoe.data.tokenizer import ByteTokenizer, CharTokenizer
from minimoe.runs.run import Run
from minimoe.study.verify import verify


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with three checkpoints, one of them the best."""
    folder = tmp_path_factory.mktemp("verify")
    config = tiny(write_text(folder), steps=6, checkpoint_every=2, eval_every=2, eval_batches=1, keep=3)
    return train(config, folder / "runs").path


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def problems(path: Path) -> list[tuple[str, str]]:
    """What is wrong, as pairs of a thing and a text; verifying must change nothing."""
    before = {**contents(path), **{str(entry): b"" for entry in path.rglob("*")}}
    checks = list(verify(path).checks)
    assert before == {**contents(path), **{str(entry): b"" for entry in path.rglob("*")}}, "verify changed something"
    assert {check.state for check in checks} <= {"ok", "problem", "skipped"}
    return [(check.what, check.text) for check in checks if check.state == "problem"]


def test_a_run_that_keeps_its_text_is_whole_wherever_its_folder_lies(run: Path, tmp_path: Path) -> None:
    text = Path(Run(run).config.data.source).read_bytes()
    folder = Run.create(Run(run).config, tmp_path / "kept", kept=text)
    folder.release()
    mm.resume(folder.path)
    assert Run(folder.path).config.data.source == str(folder.path / "data.txt")
    assert problems(folder.path) == []
    assert problems(folder.path.rename(tmp_path / "moved")) == []


def test_a_lock_that_is_no_file_is_a_problem_since_no_process_can_train_there(run: Path) -> None:
    (run / "training.lock").mkdir()
    assert problems(run) == [("training.lock", "is not a file that minimoe wrote: remove it, else no process can train here")]


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1, (old, text)
    path.write_text(text.replace(old, new))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def rewrite(checkpoint: Path, file: str, data: bytes) -> None:
    """Change a file of a checkpoint and its manifest, as someone would who forges it or a writer with a fault."""
    (checkpoint / file).write_bytes(data)
    lines = [line for line in (checkpoint / "MANIFEST.sha256").read_text().splitlines() if not line.endswith(f"  {file}")]
    lines.append(f"{hashlib.sha256(data).hexdigest()}  {file}")
    (checkpoint / "MANIFEST.sha256").write_text("".join(f"{line}\n" for line in sorted(lines, key=lambda line: line[66:])))


# ---- a run ---------------------------------------------------------------------------------------------------------------------


def test_a_finished_run_is_whole_and_each_part_has_a_line(run: Path) -> None:
    assert problems(run) == []
    found = {check.what: check.text for check in verify(run).checks}
    steps = ["checkpoints/step-000002", "checkpoints/step-000004", "checkpoints/step-000006"]
    assert list(found) == ["status.json", "env.json", *steps, "config.toml", "metrics.jsonl", "checkpoints/best"]
    assert found["status.json"] == "finished at step 6" and found["config.toml"] == "is the configuration of step-000006"
    assert found["metrics.jsonl"] == "6 lines; 3 of 3 checkpoints confirm them"


DAMAGE: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "a flipped digit of the configuration": (
        lambda run: edit(run / "config.toml", "\nlr = 0.01\n", "\nlr = 0.03\n"), "config.toml",
        "since step-000006: train.lr 0.01 -> 0.03",
    ),
    "a configuration that is no TOML": (lambda run: (run / "config.toml").write_text("= ="), "config.toml", "not valid TOML"),
    "no configuration": (lambda run: (run / "config.toml").unlink(), "config.toml", "no configuration file"),
    "no environment": (lambda run: (run / "env.json").unlink(), "env.json", "is missing"),
    "an environment that is a list": (lambda run: (run / "env.json").write_text("[]"), "env.json", "expected a JSON object"),
    "no status": (lambda run: (run / "status.json").unlink(), "status.json", "is missing"),
    "a status nested too deep": (lambda run: (run / "status.json").write_text("[" * 10**5), "status.json", "nested more than"),
    "a status of another kind": (lambda run: (run / "status.json").write_text('{"state": "frozen"}'), "status.json", "is not known"),
    "lost checkpoints": (
        lambda run: shutil.rmtree(run / "checkpoints"), "status.json", "finished, and no checkpoint is left: the weights are lost",
    ),
    "a lost newest checkpoint": (
        lambda run: shutil.rmtree(run / "checkpoints" / "step-000006"), "status.json",
        "finished at step 6, and the newest checkpoint is step-000004",
    ),
    "a flipped bit of the weights": (
        lambda run: flip(run / "checkpoints" / "step-000004" / "model.safetensors"), "checkpoints/step-000004",
        "model.safetensors: its SHA-256 does not match the manifest (damaged)",
    ),
    "a lost file of a checkpoint": (
        lambda run: (run / "checkpoints" / "step-000002" / "state.json").unlink(), "checkpoints/step-000002", "state.json: is missing",
    ),
    "a checkpoint under another name": (
        lambda run: (run / "checkpoints" / "step-000002").rename(run / "checkpoints" / "step-000003"), "checkpoints/step-000003",
        "state.json: is of step 2",
    ),
    "a damaged line of metrics": (
        lambda run: edit(run / "metrics.jsonl", '{"step": 3, ', '{"step": 3! '), "metrics.jsonl", "line 3 cannot be read (damaged)",
    ),
    "a lost line of metrics": (
        lambda run: (run / "metrics.jsonl").write_bytes(b"".join((run / "metrics.jsonl").read_bytes().splitlines(keepends=True)[1:])),
        "metrics.jsonl", "step 1 has no line",
    ),
    "a line of metrics twice": (
        lambda run: (run / "metrics.jsonl").write_bytes(
            (run / "metrics.jsonl").read_bytes() + (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)[1]
        ),
        "metrics.jsonl", "step 2 has 2 lines",
    ),
    "a changed number of metrics": (
        lambda run: edit(run / "metrics.jsonl", '{"step": 3, "loss": ', '{"step": 3, "loss": 1'), "metrics.jsonl",
        "the lines of steps 1 to 4 are not those that step-000004 was written with",
    ),
    "no metrics": (lambda run: (run / "metrics.jsonl").unlink(), "metrics.jsonl", "ends at step 0, before step-000002"),
    "another best": (
        lambda run: (run / "checkpoints" / "best").write_text("step-000002\n"), "checkpoints/best",
        "names step-000002: the best is step-000006",
    ),
    "a best that is not here": (
        lambda run: (run / "checkpoints" / "best").write_text("step-000099\n"), "checkpoints/best", "names no checkpoint that is here",
    ),
    "no best": (lambda run: (run / "checkpoints" / "best").unlink(), "checkpoints/best", "is missing: the best is step-000006"),
}  # fmt: skip


def test_a_run_that_was_killed_is_whole_while_its_weights_can_be_had(run: Path) -> None:
    """Without a lock that is held, `running` is a run that was killed."""
    Run(run).write_status("running")
    assert next(check.text for check in verify(run).checks if check.what == "status.json") == "killed: resume continues from a checkpoint"
    shutil.rmtree(run / "checkpoints")
    assert ("status.json", "killed, and no checkpoint is left: the weights are lost") in problems(run)
    (run / "metrics.jsonl").unlink()
    Run(run).write_status("running", begun=False, step=0)
    assert next(check.text for check in verify(run).checks if check.what == "status.json") == "killed: resume starts anew"


@pytest.mark.parametrize(("spoil", "what", "text"), DAMAGE.values(), ids=DAMAGE)
def test_each_kind_of_damage_to_a_run_is_named(run: Path, spoil: Callable[[Path], Any], what: str, text: str) -> None:
    spoil(run)
    found = problems(run)
    assert any(name == what and text in sentence for name, sentence in found), found


def test_weights_that_are_not_finite_or_do_not_fit_are_named_though_their_digests_match(run: Path, tmp_path: Path) -> None:
    checkpoint = run / "checkpoints" / "step-000004"
    arrays = load_file(checkpoint / "model.safetensors")
    name = next(name for name in sorted(arrays) if arrays[name].ndim == 2)
    other = tmp_path / "other.safetensors"
    save_file({**arrays, name: np.full_like(arrays[name], np.nan)}, other)
    rewrite(checkpoint, "model.safetensors", other.read_bytes())
    size = arrays[name].size
    expected = f"model.safetensors: numbers that are not finite in {name} ({size:,})"
    assert problems(run) == [("checkpoints/step-000004", expected)]
    save_file({**arrays, name: np.ascontiguousarray(arrays[name][:-1]), "extra": np.zeros(2, np.float32)}, other)
    rewrite(checkpoint, "model.safetensors", other.read_bytes())
    rows, columns = arrays[name].shape
    assert [text for _, text in problems(run)] == [
        "model.safetensors: has extra, which the configuration does not",
        f"model.safetensors: {name} has shape [{rows - 1}, {columns}], the configuration says [{rows}, {columns}]",
    ]


def test_moments_that_are_missing_or_infinite_are_named(run: Path, tmp_path: Path) -> None:
    checkpoint = run / "checkpoints" / "step-000006"
    arrays = load_file(checkpoint / "optimizer.safetensors")
    arrays["group0.m"][0] = np.inf
    del arrays["group1.v"]
    save_file(arrays, tmp_path / "other.safetensors")
    rewrite(checkpoint, "optimizer.safetensors", (tmp_path / "other.safetensors").read_bytes())
    assert [text for _, text in problems(run)] == [
        "optimizer.safetensors: lacks group1.v", "optimizer.safetensors: numbers that are not finite in group0.m (1)",
    ]  # fmt: skip


@pytest.mark.parametrize("optimizer", ["sgd", "lion", "muon"])
def test_the_state_of_every_optimizer_is_known(tmp_path: Path, optimizer: str) -> None:
    config = with_train(tiny(write_text(tmp_path), steps=1), optimizer=optimizer, decay_embeddings=True)
    assert problems(train(config, tmp_path / "runs").path) == []


def test_a_forged_state_is_named(run: Path) -> None:
    checkpoint = run / "checkpoints" / "step-000006"
    state = json.loads((checkpoint / "state.json").read_text())
    rewrite(checkpoint, "state.json", json.dumps({**state, "elapsed_s": "long"}).encode())
    assert ("checkpoints/step-000006", "state.json: Expected float, got str - at $.elapsed_s (damaged)") in problems(run)


def test_a_checkpoint_that_claims_more_layers_than_it_has_tensors_is_named(run: Path) -> None:
    checkpoint = run / "checkpoints" / "step-000006"
    config = json.loads((checkpoint / "config.json").read_text())
    config["model"]["n_layers"] = 5000
    rewrite(checkpoint, "config.json", json.dumps(config).encode())
    assert any("config.json: says 5000 layers, and there are" in text for _, text in problems(run))


def test_what_a_kill_leaves_is_no_problem_and_is_told(run: Path) -> None:
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 7, "lo')
    (run / "checkpoints" / ".step-000008.tmp-0123abcd").mkdir()
    edit(run / "status.json", '"state": "finished"', '"state": "running"')
    edit(run / "status.json", f'"pid": {os.getpid()}', '"pid": 4194305')
    assert problems(run) == []
    found = {check.what: check.text for check in verify(run).checks}
    assert found["status.json"].startswith("killed: resume continues")
    assert found["metrics.jsonl"].endswith("the last is incomplete after a kill: resume removes it")
    assert found["leftovers"].startswith(".step-000008.tmp-0123abcd: after a kill")


class Killed(BaseException):
    """Ends a process at once: no later call changes the disk either."""


def test_after_a_kill_at_any_moment_nothing_is_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(write_text(tmp_path), steps=3, checkpoint_every=1, eval_every=1, eval_batches=1, keep=1, log_every=1)
    calls = 0

    def dying(real: Callable[..., Any], last: int) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > last:
                raise Killed
            return real(*args, **kwargs)

        return call

    ended = False
    for moment in range(0, 1000, 7):
        calls = 0
        with monkeypatch.context() as patch:
            for name in ("replace", "fsync", "mkdir", "unlink", "rmdir"):
                patch.setattr(os, name, dying(getattr(os, name), moment))
            try:
                train(config, tmp_path / "runs", out=tmp_path / str(moment))
                ended = True
            except Killed:
                pass
        if (tmp_path / str(moment) / "config.toml").exists():
            assert problems(tmp_path / str(moment)) == [], moment
        if ended:
            return
    pytest.fail("the run never came to its end")


def test_the_error_that_ended_a_run_is_told(run: Path) -> None:
    Run(run).write_status("failed", step=6, error="No space left on device")
    assert problems(run) == []
    assert next(iter(verify(run).checks)).text == "failed: No space left on device; resume continues from a checkpoint"


def test_a_run_that_trains_now_is_said(run: Path) -> None:
    found = Run(run)
    with found.claimed():
        found.start()
        assert problems(run) == []
        status = next(check for check in verify(run).checks if check.what == "status.json")
        assert status.text == f"this process ({os.getpid()}) trains it now"


def test_an_old_run_without_digests_is_whole() -> None:
    old = Path(__file__).parents[1] / "golden" / "run-0.1" / "run"
    assert problems(old) == []
    metrics = next(check for check in verify(old).checks if check.what == "metrics.jsonl")
    assert metrics.text == "4 lines; 0 of 1 checkpoints confirm them"
    assert problems(old.parent / "exported") == []


def test_one_checkpoint_can_be_verified_alone(run: Path, tmp_path: Path) -> None:
    alone = Path(shutil.copytree(run / "checkpoints" / "step-000004", tmp_path / "alone"))
    assert verify(alone).kind == "checkpoint" and problems(alone) == []
    flip(alone / "optimizer.safetensors")
    assert problems(alone) == [("alone", "optimizer.safetensors: its SHA-256 does not match the manifest (damaged)")]


# ---- a model folder ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A mixture of experts in three shards or more, with a byte tokenizer that its embedding is too small for."""
    return write(tmp_path / "m", small("mixtral", vocab_size=300), shard_bytes=20_000)


@pytest.mark.parametrize("family", ["gpt2", "bert", "vit", "llama", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_a_folder_of_each_family_is_whole(tmp_path: Path, family: str) -> None:
    assert problems(write(tmp_path / "m", small(family))) == []


def test_a_folder_in_shards_has_a_line_for_each_and_for_the_index(folder: Path) -> None:
    (folder / "tokenizer.json").write_text(ByteTokenizer().to_json())
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 299]}')
    assert problems(folder) == []
    found = {check.what: check.text for check in verify(folder).checks}
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(shards) > 2
    assert list(found) == ["config.json", "model.safetensors.index.json", *shards, "tensors", "tokenizer.json", "generation_config.json"]
    assert found["tokenizer.json"] == "256 ids, and 300 rows in the embedding"
    assert found["tensors"] == "as config.json says, 2 layers"


def shard(folder: Path, number: int) -> Path:
    return sorted(folder.glob("*.safetensors"))[number]


FOLDER_DAMAGE: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "no configuration": (lambda m: (m / "config.json").unlink(), "config.json", "no config.json there"),
    "a configuration that is no JSON": (lambda m: (m / "config.json").write_text("{"), "config.json", "JSON"),
    "an empty configuration": (lambda m: (m / "config.json").write_text("{}"), "tensors", "model_type = None is not known"),
    "an unknown family": (lambda m: edit(m / "config.json", '"mixtral"', '"mamba"'), "tensors", "'mamba' is not known"),
    "another width": (lambda m: edit(m / "config.json", '"hidden_size": 24', '"hidden_size": 32'), "tensors", "config.json says"),
    "a lost shard": (
        lambda m: shard(m, 0).unlink(), "model.safetensors.index.json", "model-00001-of",
    ),
    "a shard that is cut short": (
        lambda m: os.truncate(shard(m, 1), shard(m, 1).stat().st_size - 8), "model-00002-of", "truncated",
    ),
    "an index that names another file": (
        lambda m: (m / "model.safetensors.index.json").write_text(
            (m / "model.safetensors.index.json").read_text().replace("model-00001", "model-00002", 1)
        ),
        "model.safetensors.index.json", "",
    ),
    "an id without a row": (
        lambda m: (m / "tokenizer.json").write_text(CharTokenizer([chr(200 + i) for i in range(301)]).to_json()), "tokenizer.json",
        "has ids up to 300, and the embedding has 300 rows",
    ),
    "a tokenizer that is none": (lambda m: (m / "tokenizer.json").write_text("[1]"), "tokenizer.json", "not a tokenizer.json"),
    "an end of text beyond the vocabulary": (
        lambda m: (m / "generation_config.json").write_text('{"eos_token_id": 300}'), "generation_config.json", "ends a text with id 300",
    ),
    "generation settings that are no JSON": (
        lambda m: (m / "generation_config.json").write_text("x"), "generation_config.json", "not JSON",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "what", "text"), FOLDER_DAMAGE.values(), ids=FOLDER_DAMAGE)
def test_each_kind_of_damage_to_a_model_folder_is_named(folder: Path, spoil: Callable[[Path], Any], what: str, text: str) -> None:
    spoil(folder)
    found = problems(folder)
    assert any(name.startswith(what) and text in sentence for name, sentence in found), found


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_numbers_that_are_not_finite_are_named_in_every_dtype(tmp_path: Path, dtype: str, value: float) -> None:
    config = small("llama")
    arrays = tensors(config)
    arrays["model.layers.1.mlp.down_proj.weight"][3, 4:6] = value
    folder = write(tmp_path / "m", config, arrays, dtype=dtype)
    expected = "numbers that are not finite in model.layers.1.mlp.down_proj.weight (2)"
    assert problems(folder) == [("model.safetensors", expected)]


def test_large_tensors_are_searched_to_their_end(monkeypatch: pytest.MonkeyPatch) -> None:
    from minimoe.study.verify import checks

    monkeypatch.setattr(checks, "PIECE", 4)
    told: list[None] = []
    array = np.zeros((3, 5), np.float32)
    array[2, 4] = np.nan
    assert checks.count_not_finite(array, tell=lambda: told.append(None)) == 1 and len(told) == 4
    assert checks.count_not_finite(np.array([0x7F, 0xFF, 0x7E, 0], np.uint8), "F8_E4M3") == 2
    assert checks.count_not_finite(np.array([0x7C, 0xFD, 0x7B], np.uint8), "F8_E5M2") == 2
    assert checks.count_not_finite(np.array([0x80, 0x7F], np.uint8), "F8_E4M3FNUZ") == 1
    assert checks.count_not_finite(np.array([0xFF, 0xFE], np.uint8), "F8_E8M0") == 1
    assert checks.count_not_finite(np.array([0x7F80, 0xFFC0, 0x7F7F], np.uint16), "BF16") == 2


# ---- the command ---------------------------------------------------------------------------------------------------------------


def test_the_command_prints_aligned_lines_and_its_exit_code_says_the_verdict(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "verify", str(run))
    lines = out.splitlines()
    assert (code, err, lines[-1]) == (0, "", "whole")
    assert lines[0] == "status.json              ok       finished at step 6"
    assert all(line[25:32].strip() in ("ok", "") for line in lines[:-1]) and max(map(len, lines)) <= 80
    (run / "env.json").unlink()
    edit(run / "config.toml", "\nlr = 0.01\n", "\nlr = 0.03\n")
    code, out, _ = call(capsys, "verify", str(run))
    assert code == 1 and out.splitlines()[-1] == "2 problems"
    assert "config.toml              problem  since step-000006: train.lr 0.01 -> 0.03" in out


def test_json_holds_the_same(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "env.json").unlink()
    code, out, _ = call(capsys, "verify", str(run), "--json")
    found = json.loads(out)
    assert code == 1 and (found["kind"], found["whole"], found["problems"]) == ("run", False, 1)
    assert {"what": "env.json", "state": "problem", "text": "is missing"} in found["checks"]


def test_a_run_is_found_by_name_and_by_the_file_that_names_the_newest(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(trained.parent.parent)
    for name in (trained.name, "runs/last", str(trained / "checkpoints" / "best")):
        assert call(capsys, "verify", name)[1].endswith("whole\n")


def test_what_is_neither_is_refused_with_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    for path, expected in ((tmp_path / "empty", "is not a run's folder"), (tmp_path / "nothing", "no such run")):
        code, out, err = call(capsys, "verify", str(path))
        assert (code, out) == (2, "") and expected in one_line(err)


def test_what_is_read_is_said_only_when_it_takes_long(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(capsys, "verify", str(folder))[2] == ""
    clock = [0.0]

    def tick() -> float:
        clock[0] += 1.5
        return clock[0]

    monkeypatch.setattr(verifying, "now", tick)
    _, _, err = call(capsys, "verify", str(folder))
    assert err.startswith("reading model-0000") and "%" in err and "\x1b" not in err


def test_what_cannot_be_checked_is_no_problem_and_no_wholeness(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "verify", str(folder))
    assert code == 0 and out.splitlines()[-1] == "whole, but for 1 thing that could not be checked"
