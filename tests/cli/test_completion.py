"""Completion: what each place offers, and what bash makes of it."""

import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete
from command_line import environment

from minimoe.cli.commands import cli
from minimoe.cli.completion import Bash, Zsh
from minimoe.config import preset_names
from minimoe.config.keys import full_keys, table_below


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working folder: two runs, one of them with a space in its name, and a configuration."""
    for name in ("tiny-moe-001", "my run"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.toml").touch()
    (tmp_path / "mine.toml").touch()
    monkeypatch.chdir(tmp_path)
    yield tmp_path


def offered(*words: str) -> list[str]:
    """Return what is offered for the last of the words that follow `minimoe`."""
    return [item.value for item in ShellComplete(cli, {}, "minimoe", "_MINIMOE_COMPLETE").get_completions(list(words[:-1]), words[-1])]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("tr", ["train"]), ("co", ["convert", "compare", "config"]), ("backends c", ["check"]), ("help ba", ["backends"]),
        ("classify t", ["tiny-moe-001"]), ("cl", ["classify"]),
        ("help backends ", ["check", "new"]), ("config zz", []),
        ("config bert-", ["bert-base", "bert-tiny", "bert-tiny-moe", "bert-tiny-post"]),
        ("train ti", ["tiny-dense", "tiny-moe"]), ("train mi", ["mixtral-8x7b", "mine.toml"]), ("train runs/", ["runs/"]),
        ("resume ", ["my run", "tiny-moe-001"]), ("inspect tiny-m", ["tiny-moe", "tiny-moe-001"]), ("generate t", ["tiny-moe-001"]),
        ("compare tiny-dense tiny-moe", ["tiny-moe", "tiny-moe-001"]), ("train --ba", ["--backend", "--batch-size"]),
        ("train --backend n", ["numba-cuda", "numba", "numpy"]), ("backends check nump", ["numpy"]), ("train --backend zz", []),
        ("train --data python-", ["python-docs", "python-code", "python-mix"]), ("train --data my.txt", ["my.txt"]),
        ("train --set train.sch", ["train.schedule="]), ("train --set moe.top_", ["moe.top_k=", "moe.top_groups="]),
        ("train --set train.schedule=", ["train.schedule=cosine", "train.schedule=linear", "train.schedule=constant"]),
        ("train --set=moe.router=s", ["moe.router=softmax_topk", "moe.router=switch", "moe.router=sigmoid_bias"]),
        ("train --set moe.layers=", ["moe.layers=none"]), ("train --set train.lr=", []), ("train --set zzz=", []),
    ],
)  # fmt: skip
def test_each_place_offers_what_may_stand_there(here: Path, line: str, expected: list[str]) -> None:
    assert offered(*line.split(" ")) == expected


def test_all_presets_and_keys_are_offered(here: Path) -> None:
    assert offered("config", "") == preset_names()
    assert offered("train", "--set", "") == [f"{key}=" for key, field in full_keys().items() if table_below(field) is None]


def test_the_scripts_have_their_changes() -> None:
    assert "compopt -o nospace" in Bash.source_template and "-S ''" in Zsh.source_template


IN_BASH = [
    (["tr"], ["train"]), (["resume", ""], ["'my run'", "tiny-moe-001"]), (["train", "--set", "train.sch"], ["train.schedule="]),
    (["train", "--set", "train.schedule", "="], ["cosine", "linear", "constant"]),
    (["train", "--set", "train.schedule", "=", "co"], ["cosine", "constant"]),
    (["train", "--set", "=", "train.schedule", "=", "l"], ["linear"]), (["train", "--set", "=", "train.sch"], ["train.schedule="]),
    (["train", "--set", "train.schedule=l"], ["train.schedule=linear"]),  # where "=" breaks no words
]  # fmt: skip


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_bash_completes_words_as_it_breaks_them(here: Path) -> None:
    program = here / "bin" / "minimoe"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m minimoe "$@"\n')
    program.chmod(0o755)
    script = [f"PATH={shlex.quote(str(program.parent))}:$PATH"]
    script += ['eval "$(_MINIMOE_COMPLETE=bash_source minimoe)"', "compopt() { :; }"]
    for words, _ in IN_BASH:
        script.append(f"COMP_WORDS=(minimoe {shlex.join(words)}); COMP_CWORD={len(words)}; COMPREPLY=(); _minimoe_completion minimoe")
        script.append("(IFS='|'; echo \"${COMPREPLY[*]}\")")
    done = subprocess.run(["bash", "-c", "\n".join(script)], cwd=here, env=environment(), capture_output=True, text=True, check=True)
    assert done.stderr == "" and [line.split("|") for line in done.stdout.splitlines()] == [expected for _, expected in IN_BASH]


@pytest.mark.parametrize("words", ["minimoe train --set tr", "minimoe train --backend n", "minimoe resume x", "minimoe config t"])
def test_an_answer_imports_nothing_that_takes_long(words: str) -> None:
    asked = environment(COMP_WORDS=words, COMP_CWORD=str(len(words.split()) - 1), _MINIMOE_COMPLETE="bash_complete")
    script = "import sys\nfrom minimoe.cli import main\ntry:\n    main()\nfinally:\n    print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], env=asked, capture_output=True, text=True)
    assert done.stdout.strip() and not {"numpy", "rich", "safetensors", "numba"} & set(done.stderr.split())
