"""`minimoe plot` and `--csv` write whole files, and leave an earlier one as it was if they cannot."""

import os
import threading
from pathlib import Path

import pytest
from command_line import call
from tiny_runs import tiny, train, write_text

import minimoe.files


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    train(tiny(write_text(tmp_path), steps=2), tmp_path / "runs", out=tmp_path / "runs" / "a")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("words", [("runs", "--csv"), ("plot", "a", "--csv"), ("plot", "a", "--out")])
def test_a_full_disk_leaves_the_earlier_file(
    root: Path, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = root / "made.png"
    file.write_text("earlier")

    def full(path: Path, data: bytes) -> None:
        path.write_bytes(data[:3])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(minimoe.files, "write_synced", full)
    code, _, err = call(capsys, *words, "made.png")
    assert code == 2 and "made.png: cannot be written: No space left on device" in err
    assert file.read_text() == "earlier" and sorted(entry.name for entry in root.glob("*made*")) + list(root.glob(".made*")) == ["made.png"]


@pytest.mark.parametrize("words", [("runs", "--csv"), ("plot", "a", "--csv"), ("plot", "a", "--out")])
def test_a_file_that_cannot_be_is_named(root: Path, words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, *words, "nowhere/x.png")
    assert code == 2 and "nowhere/x.png: cannot be written: No such file or directory" in err


def test_what_a_link_leads_to_is_written(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "link.csv").symlink_to("table.csv")
    call(capsys, "plot", "a", "--csv", "link.csv")
    assert (root / "link.csv").is_symlink() and (root / "table.csv").read_text().startswith("run,step,loss")


def test_a_named_pipe_is_written_to(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(root / "pipe")
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append((root / "pipe").read_text()), daemon=True)
    reader.start()
    assert call(capsys, "runs", "--csv", "pipe")[0] == 0
    reader.join(5)
    assert read and read[0].startswith("name,state,step") and len(read[0].splitlines()) == 2
