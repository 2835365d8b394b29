"""NVRTC by its library: PTX and where it is kept, messages, and releases that pip fetches."""

import re
from zipfile import ZipFile

import pytest

from ptx_machine import nvrtc
from ptx_machine.nvrtc import Program, compile_ptx, loaded, newest
from ptx_machine.nvrtc_releases import fetch

KERNEL = """#include "value.cuh"
template <class T>
__global__ void fill(T* to) {
    to[threadIdx.x] = VALUE;
}
"""


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A kernel of two files, and an empty cache."""
    (tmp_path / "kept").mkdir()
    monkeypatch.setattr(nvrtc, "ptx_folder", lambda: tmp_path / "kept")
    (tmp_path / "value.cuh").write_text("#define VALUE 7\n")
    path = tmp_path / "fill.cu"
    path.write_text(KERNEL)
    return path


def kept(source):
    return sorted(file.name for file in (source.parent / "kept").iterdir())


@pytest.mark.parametrize("architecture", ["sm_90a", "compute_90a"])
def test_ptx_has_the_kernel_under_the_name_that_is_returned(source, architecture):
    ptx, lowered = compile_ptx(source, ["fill<int>", "fill<float>"], architecture)
    assert ".target sm_90a" in ptx and list(lowered) == ["fill<int>", "fill<float>"]
    assert all(f".entry {name}(" in ptx for name in lowered.values())


def test_lines_are_named_by_file_without_a_folder(source):
    ptx, _ = compile_ptx(source, ["fill<int>"], "sm_80")
    assert re.findall(r'\.file\s+\d+ "(.*)"', ptx) == ["fill.cu"] and re.search(r"\.loc\s+1 4 ", ptx)
    assert ".loc" not in compile_ptx(source, ["fill<int>"], "sm_80", lineinfo=False)[0]


def test_ptx_is_compiled_again_when_a_source_a_name_or_an_option_changes_and_not_before(source, monkeypatch):
    first = compile_ptx(source, ["fill<int>"], "sm_80")
    with monkeypatch.context() as without:
        without.setattr(nvrtc.Nvrtc, "compile", lambda *_: pytest.fail("it was compiled again"))
        assert compile_ptx(source, ["fill<int>"], "sm_80") == first
    (source.parent / "value.cuh").write_text("#define VALUE 9\n")
    assert ", 9;" in compile_ptx(source, ["fill<int>"], "sm_80")[0]
    compile_ptx(source, ["fill<float>"], "sm_80")
    compile_ptx(source, ["fill<int>"], "sm_80", lineinfo=False)
    compile_ptx(source, ["fill<int>"], "sm_90a")
    assert len(kept(source)) == 5


def test_a_source_that_is_rejected_gives_the_compilers_message_and_is_not_kept(source):
    source.write_text(KERNEL.replace("VALUE", "nothing"))
    with pytest.raises(
        RuntimeError, match=r'NVRTC \d+\.\d+: fill.cu with .*\n(.|\n)*fill.cu\(4\): error: identifier "nothing" is undefined'
    ):
        compile_ptx(source, ["fill<int>"], "sm_80")
    assert kept(source) == []


def test_a_virtual_architecture_is_not_assembled_and_a_real_one_is(source):
    program = Program.of(source, ["fill<int>"])
    assert loaded(newest()).compile(program, ["--gpu-architecture=compute_80"]).cubin == b""
    assert loaded(newest()).compile(program, ["--gpu-architecture=sm_80"]).cubin[:4] == b"\x7fELF"


# ---- releases that pip fetches -----------------------------------------------------------------------------------------------------------

FILES = (
    "nvidia/cu9/lib/libnvrtc.so.9",
    "nvidia/cu9/lib/libnvrtc-builtins.so.9.1",
    "nvidia/cu9/lib/libnvrtc.alt.so.9",
    "nvidia/cu9/include/nvrtc.h",
)


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """A folder with one wheel, the only place where pip looks."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with ZipFile(tmp_path / "made_nvrtc-9.1.0-py3-none-any.whl", "w") as wheel:
        for file in FILES:
            wheel.writestr(file, file)
        wheel.writestr("made_nvrtc-9.1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("made_nvrtc-9.1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: made-nvrtc\nVersion: 9.1.0\n")
    return tmp_path


def test_the_libraries_of_a_wheel_are_unpacked_and_nothing_else(wheels):
    fetch("made-nvrtc==9.1.0", wheels / "here")
    assert {file.name: file.read_text() for file in (wheels / "here").iterdir()} == {path.rpartition("/")[2]: path for path in FILES[:2]}


def test_a_wheel_that_cannot_be_had_is_an_error_with_pips_words_and_leaves_nothing(wheels):
    before = sorted(wheels.iterdir())
    with pytest.raises(
        RuntimeError, match=r"made-nvrtc==9.2.0 is not installed, and pip cannot fetch it:\n(.|\n)*No matching distribution"
    ):
        fetch("made-nvrtc==9.2.0", wheels / "here")
    assert sorted(wheels.iterdir()) == before
