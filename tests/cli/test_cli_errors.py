"""Whatever a user gets wrong, and whatever the machine does to a run, is one clear line and an exit code; nothing is lost."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import TINY, call, contents, environment, minimoe, one_line, sets
from tiny_runs import weights_of, write_text

TRAIN = ["train", *TINY, "--data", "text.txt", "--steps", "4"]

FILES: dict[str, str | bytes] = {
    "broken.toml": "[model\nd_model = 16\n",
    "binary.toml": bytes(range(256)),
    "circle.toml": 'extends = "circle.toml"\n',
    "orphan.toml": 'extends = "tiny-mo"\n',
    "heads.toml": "[model]\nd_model = 16\nn_heads = 3\n",
    "empty.txt": "",
    "binary.txt": b"text\0text" * 100,
    "latin.txt": b"caf\xe9 " * 100,
    "short.txt": "too short",
    "none/.hidden": "text",
    "none/data.bin": b"\0" * 10,
    "full/file": "something",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 4 steps, one of a char tokenizer, a text, and files that are wrong."""
    folder = tmp_path_factory.mktemp("user")
    write_text(folder)
    for name, data in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    assert minimoe(folder, *TRAIN, "--quiet").returncode == 0
    assert minimoe(folder, *TRAIN, "--quiet", "--out", "chars", *sets("data.tokenizer=char")).returncode == 0
    shutil.copytree(folder / "runs/tiny-moe-001", folder / "other")
    toml = folder / "other/config.toml"
    toml.write_text(toml.read_text().replace("d_hidden = 16", "d_hidden = 24"))
    return folder


def refused(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of a command that ends with 2, prints nothing else and leaves every file as it was."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("minimoe.runs.environment.machine_memory", lambda: 16 * 2**30)
    before = contents(folder)
    code, out, err = call(capsys, *arguments)
    assert (code, out) == (2, ""), (code, out, err)
    assert contents(folder) == before
    return one_line(err)


# ---- configurations ------------------------------------------------------------------------------------------------------------

KEYS = {
    "model.d_modle=3": "model.d_modle: unknown key (did you mean 'd_model'?)",
    "modle.d_model=3": "modle: unknown table or key (did you mean 'model'?)",
    "moe=3": "moe: expected a table, got 3",
    "moe.top_k=two": "moe.top_k: expected int",
    "train.steps=1.5": "train.steps: expected int, got float",
    "model.causal=1": "model.causal: expected bool, got int",
    "moe.top_k=5": "moe.top_k (5) must not exceed moe.n_experts (4)",
    "moe.top_k=1": "gives the router no gradient (its only weight is always 1): set moe.norm_topk_prob = false",
    "moe.router=swich": "(did you mean 'switch'?)",
    "moe.layers=[7]": "moe.layers: 7 is not a layer of this model",
    "model.n_kv_heads=3": "model.n_heads (2) must be a multiple of model.n_kv_heads (3)",
    "model.d_model=-4": "model.d_model (-4) must not be negative",
    "model.d_model=0": "model.d_model must be above 0",
    "model.head=mlm": "model.head = 'mlm' fills in blanks from both sides: set model.causal = false",
    "model.head=none": "there is no task for model.head = 'none'",
    "model.causal=false": "model.head = 'lm' learns to predict the next token: set model.causal = true",
    "model.vocab_size=10": "model.vocab_size (10) is smaller than the tokenizer's vocabulary (256)",
    "model.d_model=99999999999": "GiB",
    "train.lr=nan": "train.lr (nan) must be a finite number",
    "train.lr=-1": "train.lr (-1.0) must not be negative",
    "train.lr": "--set train.lr: expected KEY=VALUE",
    "=3": "expected KEY=VALUE",
    "train.optimizer=adam": "(did you mean 'adamw'?)",
    "train.seq_len=400": "train.seq_len (400) must not exceed model.max_seq_len (16)",
    "train.dtype=bfloat16": "bfloat16",
    "train.dtype=float8": "(did you mean 'float64'?)",
    "train.backend=nmpy": "no backend 'nmpy' (did you mean 'numpy'?)",
    "data.val_fraction=2": "data.val_fraction (2.0) must lie between 0 and 1",
    "data.tokenizer=chr": "(did you mean 'char'?)",
    "data.tokenizer=nowhere.json": "no such file",
    "data.tokenizer=text.txt": "not a tokenizer.json",
    "data.source=": "data.source is empty",
    "data.tokenizer=": "data.tokenizer is empty",
}


@pytest.mark.parametrize(("key", "says"), KEYS.items(), ids=KEYS)
def test_an_impossible_key_is_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], key: str, says: str
) -> None:
    command = ["train", *TINY, *([] if key == "data.source=" else ["--data", "text.txt"]), "--set", key]
    assert says in refused(folder, monkeypatch, capsys, *command)


@pytest.mark.parametrize("key", ["train.batch_size", "train.accumulate"])
@pytest.mark.parametrize("dry", [False, True], ids=["train", "dry run"])
def test_a_step_of_a_billion_sequences_is_refused_within_a_second(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], key: str, dry: bool
) -> None:
    began = time.process_time()
    command = ["train", *TINY, "--data", "text.txt", "--set", f"{key}=1000000000", *(["--dry-run"] if dry else [])]
    message = refused(folder, monkeypatch, capsys, *command)
    assert "GiB for its tokens, this machine has 16.0 GiB: use a smaller train.batch_size (" in message
    assert time.process_time() - began < 1


def test_the_plan_of_a_billion_steps_is_shown_within_a_second(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    began = time.process_time()
    code, out, _ = call(capsys, "train", *TINY, "--data", "text.txt", "--steps", "1000000000", "--dry-run")
    assert code == 0 and "64,000,000,000 tokens to train on" in out
    assert time.process_time() - began < 1


SOURCES = {
    "nowhere.toml": "no configuration file nowhere.toml",
    "broken.toml": "broken.toml: not valid TOML: Expected ']'",
    "binary.toml": "binary.toml: not UTF-8 text (byte 0x80 at 128)",
    "circle.toml": "extends forms a circle",
    "orphan.toml": "(did you mean 'tiny-moe'?)",
    "heads.toml": "model.d_model (16) must be a multiple of model.n_heads (3), or set model.head_dim",
    "tiny-mo": "no preset and no file 'tiny-mo' (did you mean 'tiny-moe'?)",
    "full": "no preset and no file 'full'",
    "text.txt": "not valid TOML",
    "vit-b16": "data.source = 'python-docs' is not images, 'vit-b16' classifies images: give digits (--data digits)",
    "shakespeare-dense": "data.source = 'tinyshakespeare.txt': no such file or folder (put the text there, or name another with --data)",
    "mixtral-8x7b": "training this model needs 695.9 GiB for weights, gradients and optimizer, this machine has 16.0 GiB",
}


@pytest.mark.parametrize(("source", "says"), SOURCES.items(), ids=SOURCES)
@pytest.mark.parametrize("dry", [False, True], ids=["train", "dry run"])
def test_a_source_that_cannot_be_trained_is_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], source: str, says: str, dry: bool
) -> None:
    assert says in refused(folder, monkeypatch, capsys, "train", source, *(["--dry-run"] if dry else []))


DATA = {
    "empty.txt": "empty.txt: empty: data.source needs text",
    "binary.txt": "a binary file (it has NUL bytes)",
    "latin.txt": "not UTF-8 (byte 0xe9 at 3)",
    "short.txt": "too short: the training split has 8 tokens, windows of train.seq_len = 16 need 18",
    "none": "no text in this folder",
    "nowhere.txt": "no such file or folder (put the text there, or name another with --data)",
    "python-doc": "(did you mean 'python-docs'?)",
    "digits": "data.source = 'digits' is images, 'tiny-moe' reads text: give python-docs,",
    "": "data.source is empty",
}


@pytest.mark.parametrize(("data", "says"), DATA.items(), ids=[name or "no name" for name in DATA])
def test_a_text_that_cannot_be_read_is_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], data: str, says: str
) -> None:
    assert says in refused(folder, monkeypatch, capsys, *TRAIN, "--data", data)
    assert says in refused(folder, monkeypatch, capsys, *TRAIN, "--data", data, "--dry-run")
    if data not in ("short.txt", "empty.txt"):  # nothing to train on, but enough to say so of
        assert says in refused(folder, monkeypatch, capsys, "eval", "--data", data)


OUT = {
    "full": "full: is not empty: a run needs a new or empty folder",
    "runs/tiny-moe-001": "is not empty: a run needs a new or empty folder (minimoe resume runs/tiny-moe-001 continues the run in it)",
    "text.txt": "text.txt: is a file",
    "text.txt/below": "text.txt/below: cannot be written",
    "x" * 300: "File name too long",
}


@pytest.mark.parametrize(("out", "says"), OUT.items(), ids=[name[:20] for name in OUT])
@pytest.mark.parametrize("dry", [False, True], ids=["train", "dry run"])
def test_a_folder_that_cannot_take_the_run_is_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], out: str, says: str, dry: bool
) -> None:
    assert says in refused(folder, monkeypatch, capsys, *TRAIN, "--out", out, *(["--dry-run"] if dry else []))


def test_runs_that_is_a_file_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    write_text(tmp_path)
    (tmp_path / "runs").write_text("not a folder")
    assert "runs: cannot be written" in refused(tmp_path, monkeypatch, capsys, *TRAIN)


# ---- verbs, options and names ---------------------------------------------------------------------------------------------------

COMMANDS = {
    "trian": "no command 'trian' (did you mean 'train'?)",
    "xyzzy": "no command 'xyzzy' (minimoe help lists them)",
    "--hlep": "No such option '--hlep'",
    "train --stpes 3": "'--steps'",
    "train --steps": "'--steps' requires an argument",
    "train --steps x": "Invalid value for '--steps'",
    "train --steps 1.5e0": "Invalid value for '--steps'",
    "train --lr fast": "Invalid value for '--lr'",
    "train --lr 0": "train.lr must be above 0",
    "train --steps 0": "Invalid value for '--steps'",
    "train a b": "unexpected extra argument (b)",
    "train --seed 99999999999999999999": "train.seed must be below 2**64",
    "train --backend nmpy": "no backend 'nmpy' (did you mean 'numpy'?)",
    "compare tiny-moe": "needs two sources",
    "compare tiny-moe tiny-dens": "(did you mean 'tiny-dense'?)",
    "compare tiny-moe tiny-dense --budget step": "'steps', 'tokens', 'flops', 'seconds'",
    "compare tiny-moe vit-b16": "data.source = 'python-docs' is not images",
    "compare tiny-moe-001 tiny-moe-001": "is given twice",
    "compare tiny-moe-001 chars --steps 3": "all are finished runs",
    "config tiny-mo": "no preset 'tiny-mo' (did you mean 'tiny-moe'?)",
    "backends chek numpy": "Did you mean 'check'?",
    "backends check": "Missing argument 'NAME'",
    "backends check nmpy": "no backend 'nmpy' (did you mean 'numpy'?)",
    "backends check numpy --kernel rmsnorm": "no conformance case for 'rmsnorm' (did you mean 'rms_norm'?)",
    "bench stp": "Did you mean 'step'?",
    "bench step tiny-mo": "(did you mean 'tiny-moe'?)",
    "bench kernels vit-b16 --set model.head=none": "there is no task for model.head = 'none'",
    "bench step mixtral-8x7b": "GiB",
    "inspect nowhere": "nowhere: no run of that name here, and no preset and no file 'nowhere'",
    "inspect runs/nowhere": "no run of that name here",
    "inspect broken.toml": "not valid TOML",
    "inspect full": "is not a run's folder: it has no config.toml",
    "inspect tiny-moe-001 --set moe.top_k=1": "is a run: --set is for a preset or a TOML file",
    "inspect shakespeare-dense": "--set model.vocab_size=65",
    "resume nowhere": "nowhere: no such run (known: tiny-moe-001)",
    "resume tiny-mo-001": "no such run (did you mean 'tiny-moe-001'?)",
    "resume tiny-moe-001": "4 steps are done: give --steps with a larger number to go further",
    "resume tiny-moe-001 --steps 3": "give --steps with a larger number",
    "resume other": "belongs to another configuration: its model differs from other/config.toml",
    "generate nowhere": "no such run",
    "generate --tokens 0": "Invalid value for '--tokens'",
    "generate --temperature nan": "temperature (nan) must be a number from 0 up",
    "generate --top-k -1": "top_k (-1) must not be negative",
    "generate --top-p 0": "top_p (0.0) must lie between 0 and 1",
    "generate tiny-moe-001/checkpoints/step-9": "no such run",
    "generate chars --prompt QX?": "prompt: the characters '?', 'Q', 'X' are not in the char tokenizer's vocabulary",
    "eval nowhere": "no such run",
    "eval --data empty.txt": "empty.txt: empty: data.source needs text",
    "eval chars --data FILE": "not in the char tokenizer's vocabulary",
    "runs extra": "extra: no such run",
}


@pytest.mark.parametrize(("command", "says"), COMMANDS.items(), ids=COMMANDS)
def test_a_wrong_command_is_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, says: str
) -> None:
    arguments = ["heads.toml" if part == "FILE" else part for part in command.split()]
    assert says in refused(folder, monkeypatch, capsys, *arguments)


def test_an_empty_prompt_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert "the prompt is empty" in refused(folder, monkeypatch, capsys, "generate", "--prompt", "")


@pytest.mark.parametrize("verb", ["resume", "generate", "eval", "resume runs/last"])
def test_no_run_at_all_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], verb: str) -> None:
    assert "`minimoe train` starts one" in refused(tmp_path, monkeypatch, capsys, *verb.split())


@pytest.mark.parametrize("command", [["train", "--stpes", "3"], ["resume", "nowhere"], ["train", *TINY, "--data", "short.txt"]])
def test_a_process_of_its_own_says_the_same(folder: Path, command: list[str]) -> None:
    done = minimoe(folder, *command)
    assert done.returncode == 2 and done.stdout == "" and one_line(done.stderr)


def test_debug_shows_the_traceback_and_keeps_the_exit_code(folder: Path) -> None:
    command = [sys.executable, "-m", "minimoe", "resume", "nowhere"]
    done = subprocess.run(command, cwd=folder, env=environment(MINIMOE_DEBUG="1"), capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" in done.stderr and "CheckpointError" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("minimoe: nowhere: no such run")


# ---- damage --------------------------------------------------------------------------------------------------------------------


def test_a_damaged_checkpoint_is_passed_over_and_named(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "runs/tiny-moe-001", tmp_path / "run")
    model = tmp_path / "run/checkpoints/step-000004/model.safetensors"
    model.write_bytes(model.read_bytes()[:-1])
    done = minimoe(tmp_path, "generate", "run", "--tokens", "3")
    assert done.returncode == 0 and done.stderr.startswith("damaged: step-000004/model.safetensors") and "using step 0" in done.stderr
    for checkpoint in (tmp_path / "run/checkpoints").glob("step-*"):
        (checkpoint / "MANIFEST.sha256").unlink()
    for verb in ("generate", "eval", "resume"):
        done = minimoe(tmp_path, verb, "run")
        assert done.returncode == 2 and "no checkpoint is whole" in one_line(done.stderr)


WRECKS = {
    "config.toml": ("inspect", "resume", "compare"),
    "metrics.jsonl": ("inspect", "compare"),
    "status.json": ("compare",),
}


@pytest.mark.parametrize("file", WRECKS)
def test_a_damaged_file_of_a_run_is_one_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], file: str
) -> None:
    for name in ("run", "two"):
        shutil.copytree(folder / "runs/tiny-moe-001", tmp_path / "runs" / name)
    (tmp_path / "runs/run" / file).write_bytes(b"\xff{[\n")
    for verb in WRECKS[file]:
        line = refused(tmp_path, monkeypatch, capsys, verb, "run", *(["two"] if verb == "compare" else []))
        assert file in line
    state = next(row["state"] for row in json.loads(call(capsys, "runs", "--json")[1]) if row["name"] == "run")
    assert state == ("unknown" if file == "status.json" else "damaged" if file == "config.toml" else "finished")


# ---- a full disk ---------------------------------------------------------------------------------------------------------------


def minimoe_with_little_room(folder: Path, limit: int, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """No file may grow beyond `limit` bytes: writing more fails, as on a full disk."""

    def small() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return minimoe(folder, *arguments, preexec_fn=small)


@pytest.mark.parametrize(("limit", "file"), [(30_000, "step-000006"), (2_500, "metrics.jsonl"), (100, "status.json")])
def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(folder: Path, tmp_path: Path, limit: int, file: str) -> None:
    """30,000 bytes hold the metrics, but no weights; 2,500 hold the status, but not the metrics."""
    shutil.copy(folder / "text.txt", tmp_path)
    for name in ("run", "whole"):
        shutil.copytree(folder / "runs/tiny-moe-001", tmp_path / name)
    assert minimoe(tmp_path, "resume", "whole", "--steps", "6", "--quiet").returncode == 0
    kept = contents(tmp_path / "run/checkpoints")
    done = minimoe_with_little_room(tmp_path, limit, "resume", "run", "--steps", "6", "--quiet")
    assert done.returncode == 2 and done.stdout == ""
    assert file in one_line(done.stderr) and "File too large" in done.stderr
    assert {name: data for name, data in contents(tmp_path / "run/checkpoints").items() if name in kept} == kept
    assert not list((tmp_path / "run").rglob(".*tmp*"))
    assert minimoe(tmp_path, "generate", "run", "--tokens", "3").returncode == 0
    again = minimoe(tmp_path, "resume", "run", "--steps", "6", "--quiet")
    assert again.returncode == 0 and weights_of(tmp_path / "run", 6) == weights_of(tmp_path / "whole", 6)


@pytest.mark.parametrize("limit", [0, 30_000])
def test_a_disk_that_is_full_from_the_start_is_one_line(folder: Path, tmp_path: Path, limit: int) -> None:
    shutil.copy(folder / "text.txt", tmp_path)
    done = minimoe_with_little_room(tmp_path, limit, *TRAIN, "--quiet")
    assert done.returncode == 2 and "File too large" in one_line(done.stderr)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
@pytest.mark.parametrize("verb", [["config", "tiny-moe"], ["inspect", "tiny-moe"], ["generate", "--tokens", "3"]])
def test_output_that_cannot_be_written_is_one_line(folder: Path, verb: list[str]) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "minimoe", *verb]
        done = subprocess.run(command, cwd=folder, env=environment(), stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and "No space left on device" in one_line(done.stderr)


def test_memory_that_runs_out_is_one_line(folder: Path) -> None:
    """Two million sequences of 16 tokens take more than the two gigabytes that the process may ask for."""

    def small() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (2 * 2**30, 2 * 2**30))

    out = ["--quiet", "--out", "huge"]
    done = minimoe(folder, *TRAIN, *out, *sets("train.batch_size=2000000"), preexec_fn=small)
    shutil.rmtree(folder / "huge")
    assert done.returncode == 2 and "out of memory" in one_line(done.stderr)


# ---- stopped, diverged ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "name", "code"), [(signal.SIGINT, "Ctrl-C", 130), (signal.SIGTERM, "SIGTERM", 143), (signal.SIGHUP, "SIGHUP", 129)]
)
def test_a_signal_saves_says_so_and_resume_goes_on(folder: Path, tmp_path: Path, number: signal.Signals, name: str, code: int) -> None:
    shutil.copy(folder / "text.txt", tmp_path)
    command = [sys.executable, "-m", "minimoe", *TRAIN, "--steps", "1000000", "--quiet", "--out", "run"]
    metrics = tmp_path / "run/metrics.jsonl"
    with subprocess.Popen(command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not metrics.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (code, "") and f"stopped by {name}; the state was saved" in one_line(err)
    steps = len(metrics.read_text().splitlines())
    assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "interrupted"
    assert (tmp_path / f"run/checkpoints/step-{steps:06d}").is_dir()
    done = minimoe(tmp_path, "resume", "run", "--steps", str(steps + 2), "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "run\n", "")
    assert len(metrics.read_text().splitlines()) == steps + 2


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert condition()


def test_an_interrupt_that_was_ignored_from_the_start_stays_ignored_and_sigterm_saves(folder: Path, tmp_path: Path) -> None:
    """A job in the background of a script."""
    shutil.copy(folder / "text.txt", tmp_path)
    command = [sys.executable, "-m", "minimoe", *TRAIN, "--steps", "1000000", "--quiet", "--out", "run"]
    metrics = tmp_path / "run/metrics.jsonl"
    options: dict[str, Any] = {"cwd": tmp_path, "env": environment(), "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN), **options) as process:
        until(metrics.exists)
        process.send_signal(signal.SIGINT)
        before = len(metrics.read_text().splitlines())
        until(lambda: len(metrics.read_text().splitlines()) > before + 10)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 143 and "the state was saved" in one_line(err)
    assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "interrupted"


def test_a_terminal_that_is_closed_loses_no_step(folder: Path, tmp_path: Path) -> None:
    """The live display writes to the terminal, which then fails; SIGHUP comes from the system itself."""
    import pty

    shutil.copy(folder / "text.txt", tmp_path)
    run = tmp_path / "run"
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(tmp_path)
        os.execve(sys.executable, [sys.executable, "-m", "minimoe", *TRAIN, "--steps", "1000000", "--out", "run"], environment())
    until((run / "metrics.jsonl").exists)
    os.read(terminal, 1000)
    os.close(terminal)
    _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) == 129
    steps = len((run / "metrics.jsonl").read_text().splitlines())
    state = json.loads((run / "status.json").read_text())
    assert (state["state"], state["step"]) == ("interrupted", steps) and (run / f"checkpoints/step-{steps:06d}").is_dir()


def test_a_long_last_validation_shows_how_far_it_is_and_obeys_an_interrupt(tmp_path: Path) -> None:
    """A validation of minutes: the steps are saved before it, and resuming does it alone, as far as it is capped."""
    write_text(tmp_path, lines=40_000)
    keys = sets("data.val_fraction=0.9", "train.batch_size=1", "train.eval_batches=2")
    command = [sys.executable, "-m", "minimoe", *TRAIN, *keys, "--out", "run"]
    log = tmp_path / "log"
    with log.open("w") as errors:
        process = subprocess.Popen(command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=errors)
        until(lambda: "validating: " in log.read_text())
        process.send_signal(signal.SIGINT)
        until(lambda: "stopping: the state of step 4 is saved; Ctrl-C again stops at once\n" in log.read_text())
        out, _ = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, b"") and "stopped by Ctrl-C; the state was saved" in log.read_text()
    state = json.loads((tmp_path / "run/status.json").read_text())
    assert (state["state"], state["step"]) == ("interrupted", 4) and (tmp_path / "run/checkpoints/step-000004").is_dir()
    toml = tmp_path / "run/config.toml"
    toml.write_text(toml.read_text().replace("final_eval_batches = 0", "final_eval_batches = 3"))
    done = minimoe(tmp_path, "resume", "run")
    last = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert done.returncode == 0 and last["step"] == 4 and last["val_batches"][0] == 3
    assert f"validation loss {last['val_loss']:.4f} over 3 of {last['val_batches'][1]:,} batches" in done.stdout


def test_an_interrupt_outside_training_is_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr("minimoe.study.evaluate.evaluate_run", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    assert call(capsys, "eval") == (130, "", "minimoe: interrupted\n")


def test_a_run_that_diverges_ends_with_3_and_keeps_the_last_good_state(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "text.txt", tmp_path)
    options = ["--steps", "40", "--quiet", *sets("train.lr=1e30", "train.warmup_steps=0")]
    done = minimoe(tmp_path, *TRAIN, *options)
    assert done.returncode == 3 and done.stdout == ""
    line = one_line(done.stderr)
    assert line.startswith("diverged: 10 steps in a row") and "runs/tiny-moe-001/checkpoints/step-000000" in line and "train.lr" in line
    rows = [json.loads(text) for text in (tmp_path / "runs/tiny-moe-001/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] is None and [row["skipped"] for row in rows[-10:]] == [True] * 10
    looked = minimoe(tmp_path, "inspect", "runs/last")
    assert looked.returncode == 0 and "diverged at step" in looked.stdout and "loss -" in looked.stdout
    assert json.loads(minimoe(tmp_path, "inspect", "runs/last", "--json").stdout)["run"]["state"] == "diverged"
    assert minimoe(tmp_path, "generate", "--tokens", "3").returncode == 0
    assert "not finished (diverged" in one_line(minimoe(tmp_path, "compare", "runs/last", "tiny-dense").stderr)


# ---- faults of minimoe itself ----------------------------------------------------------------------------------------------------------


class Panic(BaseException):
    """What a library written in Rust raises when it panics."""


@pytest.mark.parametrize("error", [ZeroDivisionError("division by zero"), Panic("index out of range"), KeyError("x")])
def test_a_fault_of_minimoe_is_one_line_that_says_how_to_report_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException
) -> None:
    def broken() -> list[dict[str, object]]:
        raise error

    monkeypatch.setattr("minimoe.runs.listing.list_runs", broken)
    code, out, err = call(capsys, "runs")
    assert (code, out) == (70, "")
    line = one_line(err)
    assert type(error).__name__ in line and "fault in minimoe" in line and "MINIMOE_DEBUG=1" in line and "report" in line
    monkeypatch.setenv("MINIMOE_DEBUG", "1")
    code, _, err = call(capsys, "runs")
    assert code == 70 and "Traceback" in err


def test_a_configurations_name_and_its_datas_cannot_command_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path).rename("t\x1b[31mext.txt")
    Path("evil.toml").write_text('extends = "tiny-moe"\nname = "\\u001b[31mred\\nline"\n')
    told = ""
    for arguments in (["train", "evil.toml", *TINY, "--data", "t\x1b[31mext.txt", "--steps", "2", "--out", "run"],
                      ["inspect", "evil.toml", *TINY], ["eval", "run"], ["compare", "evil.toml", "run", *TINY, "--steps", "2",
                       "--set", "data.source=t\x1b[31mext.txt"]):  # fmt: skip
        code, out, err = call(capsys, *arguments)
        shown = out.partition("A sample:")[0] + err
        assert code == 0 and "\x1b" not in shown
        told += shown
    assert r"\x1b[31mred\nline: 0.0" in told and r"t\x1b[31mext.txt: " in told


@pytest.mark.parametrize("more", [[], ["--quiet"], ["--dry-run"]], ids=["plain", "quiet", "dry run"])
def test_a_files_name_in_a_warning_cannot_command_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], more: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("texts").mkdir()
    write_text(Path("texts"))
    Path("texts/\x1b[31mlatin.txt").write_bytes(b"caf\xe9")
    code, _, err = call(capsys, "train", *TINY, "--data", "texts", "--steps", "2", *more)
    assert code == 0 and "\x1b" not in err and r"since it is not UTF-8: \x1b[31mlatin.txt" in err
