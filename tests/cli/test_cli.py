"""The command line does what it says: every verb, its JSON, its progress, and what it does not import."""

import json
import os
import platform
import pty
import re
import resource
import subprocess
import sys
import tomllib
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from command_line import ROOT, TINY, call, contents, environment, minimoe, one_line, sets
from rich.console import Console
from tiny_runs import write_text

from minimoe.cli.commands import cli
from minimoe.config import load_config, preset_names
from minimoe.study.tables import runs_table

TRAIN = ["train", *TINY, "--data", "text.txt", "--steps", "6"]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> "tuple[Path, subprocess.CompletedProcess[str]]":
    """A folder with a text and a run, and what the command that trained it said."""
    folder = tmp_path_factory.mktemp("user")
    write_text(folder)
    return folder, minimoe(folder, *TRAIN)


@pytest.fixture
def here(first: "tuple[Path, subprocess.CompletedProcess[str]]", monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: the text and the run tiny-moe-001 of 6 steps, for tests that only look."""
    monkeypatch.chdir(first[0])
    return first[0]


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: a text alone."""
    write_text(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---- training ----------------------------------------------------------------------------------------------------------------


def test_training_shows_plain_lines_then_a_sample_and_the_folder(first: "tuple[Path, subprocess.CompletedProcess[str]]") -> None:
    folder, done = first
    assert done.returncode == 0
    head, *lines = done.stderr.splitlines()
    assert head.startswith("tiny-moe: 0.01 M parameters") and "6 steps of 64 tokens on numpy" in head
    assert [line.split()[1] for line in lines] == ["2/6", "4/6", "6/6"] and "\x1b" not in done.stderr
    assert all(" loss " in line and " tokens/s" in line and " expert load " in line for line in lines)
    assert [" left " in line for line in lines] == [True, True, False]
    assert " val " in lines[-1]
    assert done.stdout.startswith("\nA sample:\n") and "run: runs/tiny-moe-001   validation loss " in done.stdout
    assert (folder / "runs" / "last").read_text() == "tiny-moe-001\n"


def test_a_run_leaves_the_files_of_the_contract(here: Path) -> None:
    run = here / "runs" / "tiny-moe-001"
    assert {path.name for path in run.iterdir()} == {"config.toml", "env.json", "metrics.jsonl", "status.json", "checkpoints"}
    assert {path.name for path in (run / "checkpoints" / "step-000006").iterdir()} == {
        "model.safetensors", "optimizer.safetensors", "state.json", "config.json", "tokenizer.json", "MANIFEST.sha256",
    }  # fmt: skip
    assert (run / "checkpoints" / "best").read_text() == "step-000006\n"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    keys = {
        "step", "loss", "aux_loss", "z_loss", "router_loss", "lr", "grad_norm", "step_ms", "tokens_per_s", "elapsed_s", "expert_load",
        "dropped", "router_entropy", "skipped",
    }  # fmt: skip
    assert all(keys <= set(row) for row in rows) and "val_loss" in rows[-1] and "val_loss" not in rows[0]
    assert [len(layer) for layer in rows[0]["expert_load"]] == [4] and sum(rows[0]["expert_load"][0]) == pytest.approx(1)
    assert json.loads((run / "env.json").read_text())["data"]["sha256"]


def test_quiet_prints_the_folder_alone_and_equal_seeds_give_equal_bytes(tmp_path: Path) -> None:
    write_text(tmp_path)
    for out in ("a", "b"):
        done = minimoe(tmp_path, *TRAIN, "--quiet", "--out", out, "--seed", "3", "--threads", "1", "--backend", "numpy")
        assert (done.returncode, done.stdout, done.stderr) == (0, f"{out}\n", "")
    weights = [(tmp_path / out / "checkpoints/step-000006/model.safetensors").read_bytes() for out in ("a", "b")]
    assert weights[0] == weights[1] and not (tmp_path / "runs").exists()
    assert load_config(tmp_path / "a" / "config.toml").train.seed == 3


def test_runs_count_up_and_resume_goes_on_with_the_newest(tmp_path: Path) -> None:
    write_text(tmp_path)
    for number in (1, 2):
        assert minimoe(tmp_path, *TRAIN, "--quiet").stdout == f"runs/tiny-moe-00{number}\n"
    done = minimoe(tmp_path, "resume", "--steps", "8")
    assert done.returncode == 0 and "continuing at step 6" in done.stderr and "run: runs/tiny-moe-002" in done.stdout
    assert len((tmp_path / "runs/tiny-moe-002/metrics.jsonl").read_text().splitlines()) == 8
    assert len((tmp_path / "runs/tiny-moe-001/metrics.jsonl").read_text().splitlines()) == 6


def test_a_configuration_of_ones_own_trains_under_its_name(fresh: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tables = ["[model]", "d_model = 16", "n_layers = 1", "n_heads = 2", "n_kv_heads = 2", "head_dim = 8", "max_seq_len = 16"]
    tables += ["[train]", "seq_len = 16", "batch_size = 2", "steps = 2", 'backend = "numpy"', "[data]", 'source = "text.txt"']
    (fresh / "mine.toml").write_text("\n".join(['extends = "tiny-dense"', *tables]))
    assert call(capsys, "train", "mine.toml", "--quiet") == (0, "runs/mine-001\n", "")
    routed = ["--set", "moe.n_experts=2", "--set", "moe.router=switch"]
    assert call(capsys, "train", "mine.toml", "--quiet", *routed)[:2] == (0, "runs/mine-002\n")
    moe = load_config("runs/mine-002/config.toml").model.moe
    assert moe is not None and (moe.n_experts, moe.router, moe.k) == (2, "switch", 1)


def test_a_dry_run_shows_the_plan_and_writes_nothing(fresh: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(fresh)
    code, out, err = call(capsys, *TRAIN, "--dry-run", "--out", "there")
    assert (code, err) == (0, "") and contents(fresh) == before
    toml, _, rest = out.partition("\ntiny-moe: ")
    assert tomllib.loads(toml)["model"]["d_model"] == 16 and tomllib.loads(toml)["train"]["steps"] == 6
    assert "experts" in rest and "384 tokens to train on" in rest


def test_a_model_trained_into_nan_ends_as_diverged_and_names_what_is_kept(fresh: Path, capsys: pytest.CaptureFixture[str]) -> None:
    into_nan = sets("train.lr=1e30", "train.warmup_steps=0")
    code, out, err = call(capsys, "train", *TINY, "--data", "text.txt", "--steps", "3", *into_nan, "--quiet")
    assert (code, out) == (3, "")
    assert "not finite" in one_line(err) and "runs/tiny-moe-001/checkpoints/step-000000" in err
    assert call(capsys, "verify", "runs/tiny-moe-001")[0] == 0


# ---- the terminal ------------------------------------------------------------------------------------------------------------


def on_a_terminal(folder: Path, *arguments: str) -> tuple[int, str]:
    """The exit code and everything that a terminal of 100 columns was sent."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "minimoe", *arguments]
    plain = {key: value for key, value in environment(TERM="xterm", COLUMNS="100", LINES="40").items() if key not in ("NO_COLOR", "CI")}
    with subprocess.Popen(command, cwd=folder, env=plain, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                piece = os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
            if not piece:
                break
            shown += piece
    os.close(ours)
    return process.returncode, shown.decode()


def test_a_terminal_gets_a_live_picture_and_its_cursor_back(tmp_path: Path) -> None:
    write_text(tmp_path)
    code, shown = on_a_terminal(tmp_path, *TRAIN)
    assert code == 0 and "step 6/6" in shown and "expert load" in shown and "balance loss" in shown and "A sample:" in shown
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")
    sample = shown.partition("A sample:")[2]
    assert not any(ord(char) < 32 and char not in "\r\n\t" for char in sample)


def test_a_run_that_diverges_gives_the_cursor_back_too(tmp_path: Path) -> None:
    write_text(tmp_path)
    code, shown = on_a_terminal(tmp_path, "train", *TINY, "--data", "text.txt", *sets("train.lr=1e30", "train.warmup_steps=0"))
    assert code == 3 and "skipped" in shown and "minimoe: diverged" in shown
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")


# ---- using a run -------------------------------------------------------------------------------------------------------------


def test_the_same_seed_writes_the_same_text_after_the_prompt(here: Path) -> None:
    texts = {seed: minimoe(here, "generate", "--prompt", "a token", "--tokens", "20", "--seed", seed).stdout for seed in ("1", "2")}
    assert all(text.startswith("a token") and text.endswith("\n") for text in texts.values()) and texts["1"] != texts["2"]
    again = minimoe(here, "generate", "tiny-moe-001", "--prompt", "a token", "--tokens", "20", "--seed", "1")
    assert (again.returncode, again.stdout, again.stderr) == (0, texts["1"], "")


def test_temperature_zero_takes_no_chance(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    how = ["--prompt", "x", "--tokens", "8", "--temperature", "0", "--top-k", "3", "--top-p", "0.5"]
    one, other = (call(capsys, "generate", *how, "--seed", seed) for seed in ("1", "2"))
    assert one == other and one[0] == 0


def test_a_run_may_be_named_by_its_folder_a_checkpoint_or_the_best(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ways = ("runs/tiny-moe-001", "tiny-moe-001", "runs/tiny-moe-001/checkpoints/step-000006", "runs/tiny-moe-001/checkpoints/best")
    texts = {call(capsys, "generate", name, "--tokens", "5")[1] for name in (*ways, "runs/last")}
    assert len(texts) == 1


def test_eval_measures_the_validation_split_or_another_text(here: Path) -> None:
    done = minimoe(here, "eval", "--json")
    result = json.loads(done.stdout)
    rows = [json.loads(line) for line in (here / "runs/tiny-moe-001/metrics.jsonl").read_text().splitlines()]
    assert done.returncode == 0 and result["loss"] == pytest.approx(rows[-1]["val_loss"], rel=1e-6) and result["step"] == 6
    assert {"loss", "perplexity", "tokens", "source", "split", "model", "expert_load"} <= set(result)
    (here / "other.txt").write_text("something else, in lines\n" * 20)
    other = json.loads(minimoe(here, "eval", "--data", "other.txt", "--json").stdout)
    assert other["split"] == "all of it" and other["tokens"] == 499 and other["loss"] != result["loss"]
    assert "nats per token, perplexity" in minimoe(here, "eval").stdout


def test_eval_on_python_mix_tells_domains_apart(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--data", "python-mix", "--steps", "1", "--out", "mix", "--quiet", *sets("data.val_fraction=0.01")]
    assert call(capsys, "train", *TINY, *options) == (0, "mix\n", "")
    result = json.loads(call(capsys, "eval", "mix", "--json")[1])
    assert set(result["expert_load_by_domain"]) == {"docs", "code"}
    assert [len(layer) for layer in result["expert_load_by_domain"]["docs"]] == [4]
    assert "layer 0 code" in call(capsys, "eval", "mix")[1]


@pytest.mark.parametrize("what", ["tiny-moe-001", "runs/last", "tiny-moe", "mixtral-8x7b", "bert-base", "vit-b16"])
def test_inspect_counts_parameters_flops_and_bytes(here: Path, capsys: pytest.CaptureFixture[str], what: str) -> None:
    code, out, err = call(capsys, "inspect", what, "--json")
    report = json.loads(out)
    assert (code, err) == (0, "")
    assert {"name", "parameters", "seq_len", "flops_per_token", "training_flops_per_token", "bytes", "parts"} <= set(report)
    assert sum(part["parameters"] for part in report["parts"]) == report["parameters"]["total"] >= report["parameters"]["active"]
    assert ("run" in report) == ("001" in what or "last" in what)
    code, out, _ = call(capsys, "inspect", what)
    assert code == 0 and f"{report['parameters']['total']:,} parameters" in out and max(map(len, out.splitlines())) <= 120


def test_inspect_of_a_run_shows_its_experts_load(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = call(capsys, "inspect", "runs/last")
    assert "finished at step 6" in out and "layer 0" in out and "balance loss" in out
    run = json.loads(call(capsys, "inspect", "runs/last", "--json")[1])["run"]
    assert run["state"] == "finished" and len(run["expert_load"][0]) == 4 and run["skipped"] == 0


@pytest.mark.parametrize(("experts", "expected"), [(8, "█ 50%"), (40, "0 to 39")])
def test_the_load_of_few_experts_has_figures_that_of_many_bars_alone(
    capsys: pytest.CaptureFixture[str], experts: int, expected: str
) -> None:
    from minimoe.study.load import LoadTable
    from minimoe.study.tables import show

    show(LoadTable([[0.5, 0.5] + [0.0] * (experts - 2)] * 2, 2.0))
    out = capsys.readouterr().out
    assert expected in out and "layer 1" in out and max(map(len, out.splitlines())) <= 100


def test_inspect_takes_overrides_and_reads_a_char_vocabulary_from_the_text(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vocabulary = len(set((here / "text.txt").read_text()))
    keys = sets("data.source=text.txt", "model.tie_embeddings=true", "model.d_model=32")
    parts = json.loads(call(capsys, "inspect", "shakespeare-dense", "--json", *keys)[1])["parts"]
    assert next(part for part in parts if part["name"] == "embedding")["parameters"] == vocabulary * 32


def test_runs_lists_every_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = next(row for row in json.loads(minimoe(here, "runs", "--json").stdout) if row["name"] == "tiny-moe-001")
    assert {"name", "state", "step", "steps", "loss", "val_loss", "best_val_loss", "parameters"} <= set(row)
    assert (row["state"], row["step"], row["steps"]) == ("finished", 6, 6)
    assert "tiny-moe-001" in call(capsys, "runs")[1]


@pytest.mark.parametrize("name", ["tiny-moe-001", "shakespeare-dense-of-many-layers-001"])
def test_the_list_of_runs_divides_nothing_in_a_terminal_of_80_columns(name: str) -> None:
    row = {"name": name, "state": "interrupted", "step": 215, "steps": 300, "loss": 1.6463, "val_loss": 1.7254, "best_val_loss": 1.7251}
    text = StringIO()
    terminal = Console(width=80, file=text)
    terminal.print(runs_table([{**row, "val_accuracy": None, "parameters": 3_413_120, "bytes": 82_000_000, "tags": []}]))
    printed = text.getvalue()
    words = printed.split()
    assert all(word in words for word in (name, "interrupted", "215/300", "1.6463", "1.7254", "1.7251", "3,413,120"))


def test_no_run_yet_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(capsys, "runs")[:2] == (0, "no runs here yet: minimoe train starts one\n")
    assert call(capsys, "runs", "--json")[1] == "[]\n"


def test_finished_runs_are_compared_and_the_comparison_is_kept(tmp_path: Path) -> None:
    write_text(tmp_path)
    for steps in ("2", "3"):
        assert minimoe(tmp_path, "train", *TINY, "--data", "text.txt", "--steps", steps, "--quiet").returncode == 0
    done = minimoe(tmp_path, "compare", "tiny-moe-001", "runs/tiny-moe-002")
    assert done.returncode == 0 and "validation loss" in done.stdout and "saved: runs/compare-001.md" in done.stdout
    assert [row["steps"] for row in json.loads((tmp_path / "runs/compare-001.json").read_text())["rows"]] == [2, 3]


def test_configurations_are_trained_and_compared(fresh: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = sets("model.d_model=16", "model.n_layers=1", "model.max_seq_len=16", "train.seq_len=16", "train.batch_size=2")
    options = ["--steps", "2", "--seeds", "2", "--data", "text.txt", "--backend", "numpy", "--budget", "tokens", "--quiet"]
    code, out, err = call(capsys, "compare", "tiny-moe", "tiny-dense", *shape, *options)
    assert (code, err) == (0, "") and "tiny-dense" in out and "lowest to highest seed" in out
    assert len(json.loads(call(capsys, "runs", "--json")[1])) == 4


# ---- configurations, backends, timings -----------------------------------------------------------------------------------------


def test_config_prints_presets_that_read_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = call(capsys, "config")[1].splitlines()
    assert [line.split()[0] for line in lines] == preset_names() and max(map(len, lines)) < 80
    assert all(len(line.split()) > 3 and not line.endswith(".") for line in lines)
    rows = json.loads(call(capsys, "config", "--json")[1])
    assert [(row["name"], row["about"]) for row in rows] == [tuple(line.split(maxsplit=1)) for line in lines]
    assert json.loads(call(capsys, "config", "tiny-dense", "--json")[1])["model"]["d_hidden"] == 512
    for name in preset_names():
        code, out, _ = call(capsys, "config", name)
        (tmp_path / f"{name}.toml").write_text(out)
        assert code == 0 and out.startswith("#") and load_config(tmp_path / f"{name}.toml") == load_config(name)


def test_backends_names_every_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    report = json.loads(call(capsys, "backends", "--json")[1])
    assert report["numpy"]["available"] and report["numpy"]["dtypes"] == ["float32", "float64"]
    assert set(report["numpy"]["kernels"].values()) <= {"hand-written", "library", "reference"} and "gate" in report["numpy"]["kernels"]
    assert report["numpy"]["helpers"] == {"sigmoid": "hand-written"}
    code, out, _ = call(capsys, "backends")
    assert code == 0 and "numpy" in out and "contract 1" in out and "auto selects" in out
    assert "numpy, helpers of references, hand-written: sigmoid\n" in out


def test_backends_tells_of_one_without_its_device(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import minimoe.backend

    monkeypatch.setitem(minimoe.backend.BUILT_IN, "absent", "absent_backend")
    absent = json.loads(call(capsys, "backends", "--json")[1])["absent"]
    assert (absent["available"], absent["why_not"]) == (False, "backend absent: no such device")
    assert (absent["kernels"]["relu"], absent["kernels"]["linear"], absent["kernels"]["gate"]) == ("hand-written", "library", "reference")
    code, out, _ = call(capsys, "backends")
    assert code == 0 and "absent: no such device; it has 2 hand-written kernels, 1 of them unproven" in out
    assert "absent, hand-written, proven on a card, 2026-11-24: relu\n" in out
    assert "absent, hand-written, unproven: relu_backward\n" in out
    code, out, err = call(capsys, "backends", "check", "absent", *HERE)
    assert (code, out) == (2, "") and one_line(err) == "backend absent: no such device"


def test_a_conforming_backend_passes_its_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = minimoe(tmp_path, "backends", "check", "numpy", "--kernel", "rms_norm")
    assert done.returncode == 0 and re.fullmatch(r"numpy: \d+ passed, 0 failed in 0:\d\d: it conforms in rms_norm\n", done.stdout)
    code, out, err = call(capsys, "backends", "check", "numpy", "--kernel", "gate", "--json")
    assert (code, err) == (0, "") and json.loads(out)["failed"] == {} and json.loads(out)["cases"] > 0


HERE = ("--timeout", "0", "--quick")  # in this process, which alone knows the backends of these tests


@pytest.fixture
def wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend "wrong": one kernel sums absolute values, another raises, and scatter_add, of the array layer, forgets equal indices."""
    import minimoe.backend
    from minimoe_numpy import NumpyBackend

    class Wrong(NumpyBackend):
        def sum_of_squares(self, x: Any) -> Any:
            return self.xp.sum(self.xp.abs(x))

        def swiglu(self, gate_up: Any, limit: float = 0.0, out: Any = None) -> Any:
            raise RuntimeError("not\nwritten yet")

        def scatter_add(self, inout_target: Any, index: Any, values: Any) -> None:
            inout_target[index] += values

    plain = minimoe.backend.load
    monkeypatch.setattr(minimoe.backend, "load", lambda name="auto": Wrong() if name == "wrong" else plain(name))


def test_a_check_that_fails_says_what_and_ends_with_1(wrong: None, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "backends", "check", "wrong", *HERE, "--kernel", "sum_of_squares")
    assert code == 1 and "FAILED sum_of_squares [float32], level kernels\n  sum_of_squares at " in out and "optimizer.py" in out
    assert re.search(r"wrong: 1 passed, \d failed in \d:\d\d$", out)
    assert json.loads(call(capsys, "backends", "check", "wrong", *HERE, "--kernel", "sum_of_squares", "--json")[1])["failed"]


def test_a_check_shows_the_lowest_level_that_fails_and_names_the_others(wrong: None, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "backends", "check", "wrong", *HERE)
    assert code == 1 and out.startswith("FAILED scatter_add, level array layer\n")
    assert out.count("FAILED") == 1
    rest = " ".join(out.split("Failed too, and may pass when this does: ")[1].split("\n\n")[0].split()).split("; ")
    assert [level.split(": ")[0] for level in rest] == ["kernels", "gradients", "host reads", "curve", "repeatability"]
    assert "swiglu, " in rest[0] and "sum_of_squares" in rest[0] and rest[2:4] == ["host reads: training", "curve: training"]
    assert "Fix scatter_add first, then check again:\n  minimoe backends check wrong --kernel scatter_add\n" in out
    code, out, _ = call(capsys, "backends", "check", "wrong", *HERE, "--kernel", "scatter_add")
    assert code == 1 and "FAILED scatter_add" in out
    failed = json.loads(call(capsys, "backends", "check", "wrong", *HERE, "--kernel", "swiglu", "--json")[1])["failed"]
    assert {"kernels: swiglu [float32]", "gradients: swiglu [float32]"} <= set(failed)


def test_a_check_shows_the_backends_own_kernels_and_names_those_that_call_them(
    wrong: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from minimoe.backend import load

    monkeypatch.setattr(type(load("wrong")), "scatter_add", type(load("numpy")).scatter_add)
    monkeypatch.setenv("MINIMOE_DEBUG", "1")
    _, out, err = call(capsys, "backends", "check", "wrong", *HERE)
    failed = {line.split()[1].strip(",") for line in out.splitlines() if line.startswith("FAILED")}
    assert failed == {"swiglu", "sum_of_squares"}
    assert "may pass when these do: kernels: ffn, ffn_backward, expert_ffn," in out and "Fix swiglu first" in out
    assert "it raised RuntimeError: not written yet" in " ".join(out.split())
    assert "in swiglu\n" in err and "RuntimeError: not\nwritten yet" in err


@pytest.mark.parametrize("what", ["step", "kernels"])
def test_bench_times_a_training_step(tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str) -> None:
    options = ["tiny-moe", *TINY, "--backend", "numpy"]
    found = json.loads(minimoe(tmp_path, "bench", what, *options, "--json").stdout)
    assert found and "rms_norm" in json.dumps(found)
    code, out, err = call(capsys, "bench", what, *options)
    assert (code, err) == (0, "") and "rms_norm" in out and max(map(len, out.splitlines())) <= 120


# ---- help, imports, ways to start ----------------------------------------------------------------------------------------------


BELOW = ["backends check", "backends new", "bench step", "bench kernels"]


@pytest.mark.parametrize("verb", [*([verb] for verb in cli.commands), *(verb.split() for verb in BELOW)])
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_every_verb_has_its_help(capsys: pytest.CaptureFixture[str], verb: list[str], flag: str) -> None:
    code, out, err = call(capsys, *verb, flag)
    assert (code, err) == (0, "") and out.startswith(f"Usage: minimoe {' '.join(verb)} ")


def test_help_names_every_verb_in_order_and_no_verb_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    out = call(capsys, "--help")[1]
    verbs = ["train", "resume", "generate", "fill", "classify", "eval", "inspect", "convert", "compare", "runs", "diff", "plot", "data",
        "verify", "config", "backends", "bench", "cache", "help", "version"]
    assert [line.split()[0] for line in out.partition("Commands:\n")[2].splitlines() if not line.startswith("   ")] == verbs
    assert call(capsys)[1].strip() == out.strip()


@pytest.mark.parametrize("names", [[], ["train"], ["help"], ["backends"], ["backends", "check"], ["bench", "step"]])
def test_help_is_also_a_verb(capsys: pytest.CaptureFixture[str], names: list[str]) -> None:
    assert call(capsys, "help", *names) == call(capsys, *names, "--help")


def test_help_on_what_is_no_verb_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert one_line(call(capsys, "help", "trian")[2]) == "no command 'trian' (did you mean 'train'?)"
    assert one_line(call(capsys, "help", "backends", "chek")[2]) == "no command 'chek' of 'backends' (did you mean 'check'?)"
    assert one_line(call(capsys, "help", "train", "it")[2]) == "no command 'it' of 'train'"


def test_version_names_the_libraries_and_the_backends_that_run_here(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "version")
    rows = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert (code, err) == (0, "") and list(rows) == ["minimoe", "python", "numpy", "numba", "platform", "backends"]
    assert rows["python"] == platform.python_version() and "numpy" in rows["backends"].split(", ")
    found = json.loads(call(capsys, "version", "--json")[1])
    assert {**found, "backends": ", ".join(found["backends"])} == rows


def test_short_forms_set_their_keys(fresh: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = ["--lr", "2e-3", "--batch-size", "1e1", "--seq-len", "64", "--steps", "1e3"]
    out = call(capsys, "train", "--data", "text.txt", "--dry-run", *short)[1]
    train = tomllib.loads(out.partition("\ntiny-moe: ")[0])["train"]
    assert (train["lr"], train["batch_size"], train["seq_len"], train["steps"]) == (2e-3, 10, 64, 1000)


@pytest.mark.parametrize("option", ["--lr", "--batch-size", "--seq-len"])
def test_a_short_form_beside_its_key_is_refused(fresh: Path, capsys: pytest.CaptureFixture[str], option: str) -> None:
    key = f"train.{option[2:].replace('-', '_')}"
    code, _, err = call(capsys, "train", "--data", "text.txt", option, "4", "--set", f"{key} = 4")
    assert (code, one_line(err)) == (2, f"{option} and --set {key} both set this key: keep one")


def modules_after(code: str) -> set[str]:
    script = f"import sys\ntry:\n    {code}\nexcept SystemExit:\n    pass\nprint('\\n'.join(sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], env=environment(), capture_output=True, text=True, check=True)
    return set(done.stderr.split())


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["--version"], ["help", "train"]])
def test_help_imports_no_numpy(arguments: list[str]) -> None:
    loaded = modules_after(f"from minimoe.cli import main; main({arguments})")
    assert "minimoe.cli" in loaded and not loaded & {"numpy", "rich", "msgspec", "safetensors"}


def test_help_takes_less_than_0_3_seconds_of_the_processor() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "minimoe", "--help"], env=environment(), capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.3


def test_import_minimoe_imports_no_framework_and_no_device_library() -> None:
    names = "import minimoe as mm; mm.train, mm.MoE, mm.load, mm.ops; mm.set_backend('numpy')"
    assert not modules_after(names) & {"cupy", "numba", "torch", "jax", "tensorflow", "matplotlib", "tokenizers"}
    assert not modules_after("import minimoe") & {"cupy", "numba", "torch", "numpy"}


def test_a_clone_runs_without_installation(tmp_path: Path) -> None:
    bare = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    for argument, expected in (("--help", "Usage: minimoe"), ("--version", "minimoe 0.1.0"), ("config", "tiny-moe")):
        done = subprocess.run([sys.executable, ROOT / "cli.py", argument], cwd=tmp_path, env=bare, capture_output=True, text=True)
        assert done.returncode == 0 and expected in done.stdout


def test_a_reader_that_goes_away_ends_it_in_silence(here: Path) -> None:
    for verb in (["inspect", "tiny-moe", "--json"], ["generate", "--tokens", "400"]):
        command = [sys.executable, "-m", "minimoe", *verb]
        quiet = {**environment(), "MINIMOE_BACKEND": "numpy"}  # numba would say that it compiles, where nothing has before
        with subprocess.Popen(command, cwd=here, env=quiet, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stderr is not None
            process.stdout.close()
            assert process.stderr.read() == b""
        assert process.returncode == 1
