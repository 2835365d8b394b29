"""Training on what a pipe delivers: it is read once, kept in the run's folder, and a resumed run ends with the same bytes."""

import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import TINY, contents, environment, minimoe, one_line, sets
from tiny_runs import tiny, train, write_text

import minimoe as mm
from minimoe.config import load_config

pytestmark = pytest.mark.skipif(shutil.which("bash") is None or os.name == "nt", reason="process substitution is bash's")
TEXT_ONLY = {"model.safetensors", "optimizer.safetensors", "state.json", "config.json", "tokenizer.json"}


def bash(folder: Path, command: str, code: int = 0) -> "subprocess.CompletedProcess[str]":
    """Run a command line of bash in which `minimoe` is this one, and `$tiny` its tiny model."""
    words = f'minimoe() {{ "{sys.executable}" -m minimoe "$@"; }}; tiny="{" ".join(TINY)}"; {command}'
    done = subprocess.run(["bash", "-c", words], cwd=folder, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr
    return done


def checkpoint(run: Path, step: int) -> dict[str, object]:
    """The files of a checkpoint; without what its state says of times and of metrics, where another last step was evaluated."""
    found: dict[str, object] = {
        name: data for name, data in contents(run / "checkpoints" / f"step-{step:06d}").items() if name in TEXT_ONLY
    }
    state = json.loads((run / "checkpoints" / f"step-{step:06d}" / "state.json").read_text())
    return {**found, "state.json": {key: value for key, value in state.items() if key not in ("elapsed_s", "metrics_sha256")}}


@pytest.mark.parametrize(
    "how", ["--data <(zcat text.gz)", "--data /dev/stdin < <(cat text.txt)", "--data <(cat text.gz)", "--data /dev/stdin < text.txt"]
)
def test_a_pipe_trains_like_the_file(how: str, tmp_path: Path) -> None:
    text = write_text(tmp_path)
    (tmp_path / "text.gz").write_bytes(gzip.compress(text.read_bytes()))
    minimoe(tmp_path, "train", *TINY, "--data", "text.txt", "--steps", "4", "--out", "file", "--quiet", check=True)
    bash(tmp_path, f"minimoe train $tiny --steps 4 --out pipe --quiet {how}")
    weights = [checkpoint(tmp_path / run, 4)["model.safetensors"] for run in ("file", "pipe")]
    assert weights[0] == weights[1]
    kept = tmp_path / "pipe" / "data.txt"
    if how.endswith("< text.txt"):  # a file, by another name
        assert not kept.exists() and load_config(tmp_path / "pipe" / "config.toml").data.source == str(text.resolve())
    else:
        assert kept.read_bytes() == text.read_bytes()


def test_a_run_from_a_pipe_is_resumed_also_where_its_folder_was_moved(tmp_path: Path) -> None:
    write_text(tmp_path)
    for run, steps in (("whole", 6), ("half", 3)):
        bash(tmp_path, f"minimoe train $tiny --set data.tokenizer=char --steps {steps} --out {run} --quiet --data <(cat text.txt)")
    (tmp_path / "text.txt").unlink()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "data.txt").write_text("another text of this name in the working folder")
    (tmp_path / "half").rename(tmp_path / "moved")
    done = minimoe(tmp_path / "elsewhere", "resume", "../moved", "--steps", "6", "--quiet")
    assert done.returncode == 0, done.stderr
    assert 'source = "data.txt"' in (tmp_path / "moved" / "config.toml").read_text()
    assert checkpoint(tmp_path / "moved", 6) == checkpoint(tmp_path / "whole", 6)
    results = []
    for run in ("moved", "whole"):
        done = minimoe(tmp_path / "elsewhere", "eval", f"../{run}", "--json")
        assert done.returncode == 0, done.stderr
        results.append(json.loads(done.stdout)["loss"])
    assert results[0] == results[1]


def test_eval_and_the_dry_run_read_a_pipe_and_keep_nothing(tmp_path: Path) -> None:
    text = write_text(tmp_path)
    bash(tmp_path, "minimoe train $tiny --data text.txt --steps 2 --out run --quiet")
    before = contents(tmp_path / "run")
    losses = [
        json.loads(bash(tmp_path, f"minimoe eval run --json --data {how}").stdout)["loss"] for how in (text.name, f"<(cat {text.name})")
    ]
    assert losses[0] == losses[1]
    plan = bash(tmp_path, "minimoe train $tiny --data <(cat text.txt) --dry-run")
    assert "tokens to train on" in plan.stdout
    assert contents(tmp_path / "run") == before and sorted(entry.name for entry in tmp_path.iterdir()) == ["run", "text.txt"]


def test_a_comparison_refuses_a_pipe_which_it_would_read_several_times(tmp_path: Path) -> None:
    write_text(tmp_path)
    done = bash(tmp_path, "minimoe compare tiny-moe tiny-dense --data <(cat text.txt)", code=2)
    assert "can be read only once" in one_line(done.stderr)


def test_what_a_folder_leaves_out_is_said_by_train_eval_and_the_dry_run(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    write_text(folder)
    (folder / "latin.txt").write_bytes(b"caf\xe9" * 10)
    says = "1 file (40 B) is left out, since it is not UTF-8: latin.txt"
    for command in (["train", *TINY, "--data", "texts", "--steps", "2", "--out", "run"], ["train", *TINY, "--data", "texts", "--dry-run"],
                    ["eval", "run"], ["eval", "run", "--data", "texts"]):  # fmt: skip
        done = minimoe(tmp_path, *command)
        assert done.returncode == 0 and done.stderr.count(says) == 1, (command, done.stderr)


# ---- runs that began before a byte order mark was left out -----------------------------------------------------------------------


def old_run(tmp_path: Path) -> Path:
    """A run of two steps as it was made when the mark was a character: of two marks one is left out, then one is taken away."""
    text = write_text(tmp_path)
    marked = tmp_path / "marked.txt"
    marked.write_text("\ufeff\ufeff" + text.read_text(), encoding="utf-8")
    run = train(tiny(marked, steps=2), tmp_path / "runs").path
    marked.write_text("\ufeff" + text.read_text(), encoding="utf-8")
    return run


def test_a_run_that_began_with_a_mark_in_its_text_goes_on_with_it(tmp_path: Path) -> None:
    run = old_run(tmp_path)
    before = mm.resume(run, steps=4)
    assert before.corpus.sha256 == json.loads((run / "env.json").read_text())["data"]["sha256"]
    assert before.corpus.tokenizer.decode(before.corpus.train[:3]) == "\ufeff"


def test_eval_of_such_a_run_reads_its_text_as_the_run_did(tmp_path: Path) -> None:
    run = old_run(tmp_path)
    at_the_end = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["val_loss"]
    done = minimoe(tmp_path, "eval", str(run), "--json", "--data", "marked.txt")
    assert done.returncode == 0
    done = minimoe(tmp_path, "eval", str(run), "--json")
    assert abs(json.loads(done.stdout)["loss"] - at_the_end) < 1e-6, done.stderr


def test_a_file_named_like_a_built_in_source_resumes_from_any_folder(tmp_path: Path) -> None:
    """A relative path that begins like a built-in source becomes absolute, as any other: the run resumes from any folder."""
    write_text(tmp_path).rename(tmp_path / "python-notes.txt")
    minimoe(tmp_path, "train", *TINY, *sets("data.source=python-notes.txt"), "--steps", "2", "--out", "run", "--quiet", check=True)
    (tmp_path / "below").mkdir()
    assert minimoe(tmp_path / "below", "resume", "../run", "--steps", "4", "--quiet").returncode == 0
