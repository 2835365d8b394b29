"""The user's cache: where it is, also for a user without a home, and that nothing needs one."""

import json
import os
import stat
import tempfile
from pathlib import Path

import pytest
from command_line import TINY, call
from tiny_runs import write_text

from minimoe.caches import private_folder, user_caches


@pytest.fixture
def homeless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Be a user whom the system does not know, without HOME; the folder for temporary files is returned."""
    for name in ("HOME", "XDG_CACHE_HOME", "MINIMOE_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)

    def unknown(number: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.setattr("pwd.getpwuid", unknown)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "temporary"


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    for name in ("XDG_CACHE_HOME", "MINIMOE_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    assert next(user_caches()) == Path("/home/ada/.cache/minimoe")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert next(user_caches()) == Path("/caches/minimoe")
    monkeypatch.setenv("MINIMOE_CACHE_DIR", "/named")
    assert next(user_caches()) == Path("/named")


def test_without_a_home_a_folder_of_ones_own_among_the_temporary_files_serves(homeless: Path) -> None:
    found = private_folder("kernels")
    assert found == homeless / f"minimoe-{os.getuid()}" / "kernels"
    assert [stat.S_IMODE(folder.stat().st_mode) for folder in (found, found.parent)] == [0o700, 0o700]


def test_a_home_that_cannot_be_written_is_as_none(homeless: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (homeless / "file").write_text("")
    monkeypatch.setenv("HOME", str(homeless / "file"))
    assert private_folder("kernels") == homeless / f"minimoe-{os.getuid()}" / "kernels"


@pytest.mark.parametrize("trap", ["open to all", "a link"])
def test_a_folder_that_another_user_may_have_made_is_not_taken(homeless: Path, trap: str) -> None:
    own = homeless / f"minimoe-{os.getuid()}"
    if trap == "a link":
        (homeless / "elsewhere").mkdir()
        own.symlink_to(homeless / "elsewhere")
    else:
        own.mkdir()
        own.chmod(0o777)
    assert list(user_caches()) == [] and private_folder("kernels") is None


def test_without_any_folder_for_temporary_files_there_is_no_cache(homeless: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    assert list(user_caches()) == []


def test_every_verb_works_without_a_home(homeless: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MINIMOE_BACKEND", "numpy")
    write_text(homeless.parent)
    before = set(homeless.parent.iterdir())
    for verb in (
        ["train", *TINY, "--data", "text.txt", "--steps", "2"], ["resume", "--steps", "3"], ["generate", "--tokens", "2"], ["eval"],
        ["convert", "runs/tiny-moe-001", "exported"], ["generate", "exported", "--tokens", "2"], ["inspect", "exported"], ["runs"],
    ):  # fmt: skip
        code, out, err = call(capsys, *verb)
        assert code == 0 and out, err
    (noted,) = homeless.rglob("touched/*.json")  # which experts `exported` has used
    assert sum(map(sum, json.loads(noted.read_text()))) > 0
    assert {path.name for path in set(homeless.parent.iterdir()) - before} == {"runs", "exported"}


@pytest.mark.parametrize("place", ["~/text.txt", "~nobody-here/text.txt"])
def test_a_path_in_a_home_that_is_unknown_is_one_line(
    place: str, homeless: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = call(capsys, "train", *TINY, "--data", place, "--dry-run")
    assert code == 2 and f"{place!r}: no such file or folder" in err
    write_text(homeless.parent)
    code, _, err = call(capsys, "train", *TINY, "--data", "text.txt", "--set", f"data.tokenizer={place}", "--dry-run")
    assert code == 2 and place in err and err.count("\n") == 1
