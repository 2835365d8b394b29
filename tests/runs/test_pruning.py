"""Checkpoints without optimizer state: the best, once newer ones exist, and all of a run that was pruned."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from command_line import contents
from killed_calls import Killed, die_at
from tiny_runs import tiny, train, with_train, write_text

import minimoe as mm
from minimoe.errors import CheckpointError
from minimoe.runs import checkpoint as cp
from minimoe.runs.managing import prune
from minimoe.runs.run import Run
from minimoe.runs.sizes import folder_bytes, optimizer_bytes
from minimoe.study.verify import verify


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose best step, 4, is not among its two newest checkpoints, 6 and 8: its learning rate explodes."""
    folder = tmp_path_factory.mktemp("pruning")
    config = tiny(
        write_text(folder), steps=8, checkpoint_every=2, eval_every=2, eval_batches=1, keep=2, lr=0.05, schedule="constant", warmup_steps=0
    )
    run = train(with_train(config, steps=4, lr=1e-2), folder / "runs")
    Run(run.path).replace_config(with_train(run.config, lr=3.0, steps=8))
    return mm.resume(run.path).path


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def steps_with_optimizer(run: Path) -> dict[int | None, bool]:
    return {cp.step_of(folder): (folder / cp.OPTIMIZER).is_file() for folder in cp.checkpoints(run / "checkpoints")}


def test_the_best_keeps_weights_alone_once_newer_checkpoints_exist(run: Path) -> None:
    assert steps_with_optimizer(run) == {4: False, 6: True, 8: True}
    best = run / "checkpoints" / "step-000004"
    assert cp.is_pruned(best) and not cp.is_pruned(run / "checkpoints" / "step-000008")
    assert mm.load(run / "checkpoints" / "best") is not None
    done = subprocess.run(["sha256sum", "-c", "--quiet", cp.MANIFEST], cwd=best, capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    with pytest.raises(CheckpointError, match=r"^step-000004: its optimizer state was removed, so training cannot go on from it; generate"):
        mm.resume(run / "checkpoints" / "best", steps=10)
    assert mm.resume(run, steps=10).metrics[-1]["step"] == 10
    assert steps_with_optimizer(run) == {4: False, 8: True, 10: True}


def test_a_damaged_newest_checkpoint_is_passed_over_as_before(run: Path) -> None:
    (run / "checkpoints" / "step-000008" / "model.safetensors").write_bytes(b"")
    found, problems = Run(run).load()
    assert found.step == 6 and len(problems) == 1
    (run / "checkpoints" / "step-000006" / cp.OPTIMIZER).unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint is whole: step-000008.*step-000006.*is missing; step-000004: its optimizer"):
        Run(run).load()
    assert Run(run).load(optimizer=False)[0].step == 6


def test_a_pruned_run_serves_but_is_not_resumed(run: Path, tmp_path: Path) -> None:
    tokens = np.arange(8, dtype=np.int32)[None]
    before, size, found = mm.load(run)(tokens).numpy(), folder_bytes(run), optimizer_bytes(run)
    assert prune(run) == found > 0 and prune(run) == 0
    assert steps_with_optimizer(run) == {4: False, 6: False, 8: False}
    assert size - folder_bytes(run) == pytest.approx(found, abs=600), "but for three lines of manifests"
    assert np.array_equal(mm.load(run)(tokens).numpy(), before)
    assert mm.evaluate(run)["loss"] > 0 and mm.inspect(run).run is not None
    kept = contents(run)
    with pytest.raises(CheckpointError, match=r"run: step-000008: its optimizer state was removed, so training cannot go on") as caught:
        mm.resume(run, steps=10)
    assert "\n" not in str(caught.value) and contents(run) == kept
    checks = list(verify(run).checks)
    assert {check.state for check in checks} == {"ok"}
    assert sum("pruned: no optimizer state" in check.text for check in checks) == 3


@pytest.mark.parametrize("state", ["interrupted", "diverged", "failed"])
def test_a_run_that_is_not_finished_is_not_pruned(run: Path, state: str) -> None:
    Run(run).write_status(state)
    before = contents(run)
    with pytest.raises(CheckpointError, match=rf"run: is not pruned: it is not finished \({state}\), and resume needs its optimizer state"):
        prune(run)
    assert contents(run) == before


def test_a_run_that_is_being_trained_is_not_pruned(run: Path) -> None:
    with Run(run).claimed(), pytest.raises(CheckpointError, match=r"is being trained, .*, so it is not pruned: wait for it"):
        prune(run)


def damage_the_manifest(checkpoint: Path) -> None:
    (checkpoint / cp.MANIFEST).write_text("nothing\n")


def lose_the_weights(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()


@pytest.mark.parametrize("damage", [damage_the_manifest, lose_the_weights])
def test_a_damaged_checkpoint_stays_as_it_is(run: Path, damage: Callable[[Path], None]) -> None:
    damage(run / "checkpoints" / "step-000006")
    before = contents(run / "checkpoints" / "step-000006")
    assert prune(run) > 0
    assert contents(run / "checkpoints" / "step-000006") == before and steps_with_optimizer(run) == {4: False, 6: True, 8: False}


def test_optimizer_state_that_the_manifest_does_not_list_is_damage(run: Path) -> None:
    kept = (run / "checkpoints" / "step-000008" / cp.OPTIMIZER).read_bytes()
    prune(run)
    (run / "checkpoints" / "step-000008" / cp.OPTIMIZER).write_bytes(kept)
    with pytest.raises(CheckpointError, match=r"MANIFEST\.sha256: does not list optimizer\.safetensors \(damaged\)"):
        cp.load_checkpoint(run / "checkpoints" / "step-000008")


def test_a_kill_while_a_run_is_pruned_leaves_every_checkpoint_whole(run: Path, tmp_path: Path) -> None:
    for moment in range(100):
        copy = Path(shutil.copytree(run, tmp_path / str(moment)))
        finished = True
        with pytest.MonkeyPatch.context() as monkeypatch:
            die_at(monkeypatch, moment)
            try:
                prune(copy)
            except Killed:
                finished = False
        found = cp.checkpoints(copy / "checkpoints")
        assert [cp.load_checkpoint(folder, optimizer=False).step for folder in found] == [4, 6, 8]
        assert prune(copy) >= 0 and steps_with_optimizer(copy) == {4: False, 6: False, 8: False}
        assert not [path for path in (copy / "checkpoints").iterdir() if path.name.startswith(".")], moment
        if finished:
            break
    assert moment > 9


def test_a_run_that_diverges_goes_back_to_a_checkpoint_with_its_optimizer_state(run: Path) -> None:
    good = Run(run).drop_bad(before=9)
    assert good is not None and good.name == "step-000008" and not cp.is_pruned(good)
    assert Run(run).drop_bad(before=5) == run / "checkpoints" / "step-000004", "weights alone, where nothing else is left"
