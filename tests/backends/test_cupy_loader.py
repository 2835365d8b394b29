"""Machine code of CUDA C kernels is compiled once and kept: by a stand-in for CuPy over NVIDIA's own compiler, without a card."""

import re
import sys
from pathlib import Path

import pytest
from cuda.bindings import nvrtc
from two_devices import Cupy

from minimoe_cupy import cubins
from minimoe_cupy.cubins import folder, kept_cubin
from minimoe_cupy.device import wgmma_wanted
from minimoe_cupy.dispatch import COMBINE
from minimoe_cupy.loader import KERNELS, CupyLoader

ROOT = Path(__file__).parents[2]
NAMES = ["combine<float, 2, 1>", "combine<bf16, 2, 8>"]


def answer(result):
    """Return the result of a call of the bindings, without its status."""
    status, *values = result
    if int(status):
        raise RuntimeError(str(status))
    return values[0] if values else None


def text(size_of, read, program):
    found = b" " * answer(size_of(program))
    answer(read(program, found))
    return found


class Nvrtc:
    """`cupy.cuda.nvrtc`, by the bindings that need no CuPy; counts what it compiles."""

    def __init__(self):
        self.compiled = 0

    def getVersion(self):
        _, major, minor = nvrtc.nvrtcVersion()
        return major, minor

    def createProgram(self, source, name, headers, include_names):
        return answer(nvrtc.nvrtcCreateProgram(source.encode(), name.encode(), 0, [], []))

    def addNameExpression(self, program, name):
        answer(nvrtc.nvrtcAddNameExpression(program, name.encode()))

    def compileProgram(self, program, options):
        self.compiled += 1
        answer(nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options]))

    def getProgramLog(self, program):
        return text(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program).decode()

    def getCUBIN(self, program):
        return text(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)

    def getLoweredName(self, program, name):
        return answer(nvrtc.nvrtcGetLoweredName(program, name.encode())).decode()

    def destroyProgram(self, program):
        answer(nvrtc.nvrtcDestroyProgram(program))


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIMOE_CACHE_DIR", str(tmp_path / "cache"))
    return Nvrtc()


def test_kernels_are_compiled_once_for_each_architecture(compiler):
    told = []
    first = kept_cubin(compiler, COMBINE.path, NAMES, "sm_80", lambda: told.append(1))
    again = kept_cubin(compiler, COMBINE.path, NAMES, "sm_80", lambda: told.append(1))
    assert first == again and compiler.compiled == len(told) == 1
    assert first.path.read_bytes()[:4] == b"\x7fELF" and list(first.lowered) == NAMES
    assert all(lowered.encode() in first.path.read_bytes() for lowered in first.lowered.values())
    other = kept_cubin(compiler, COMBINE.path, NAMES, "sm_90", lambda: None)
    assert other.path != first.path and compiler.compiled == 2


def test_a_change_of_a_header_compiles_anew(compiler, tmp_path):
    (tmp_path / "one.cuh").write_text("constexpr float ONE = 1.0f;")
    (tmp_path / "one.cu").write_text('#include "one.cuh"\n__global__ void one(float* y) { *y = ONE; }')
    kept_cubin(compiler, tmp_path / "one.cu", ["one"], "sm_80", lambda: None)
    (tmp_path / "one.cuh").write_text("constexpr float ONE = 2.0f;")
    kept_cubin(compiler, tmp_path / "one.cu", ["one"], "sm_80", lambda: None)
    assert compiler.compiled == 2


def test_what_the_compiler_refuses_is_shown_and_nothing_is_kept(compiler, tmp_path):
    (tmp_path / "wrong.cu").write_text("__global__ void wrong(float* y) { *y = nothing; }")
    with pytest.raises(RuntimeError, match=r'wrong.cu for sm_80: (.|\n)*identifier "nothing" is undefined'):
        kept_cubin(compiler, tmp_path / "wrong.cu", ["wrong"], "sm_80", lambda: None)
    assert list(folder().iterdir()) == []


def test_where_nothing_can_be_written_a_folder_of_the_process_serves(compiler, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MINIMOE_CACHE_DIR", str(tmp_path / "file" / "cache"))
    kept = kept_cubin(compiler, COMBINE.path, NAMES[:1], "sm_80", lambda: None)
    assert kept.path.exists() and kept_cubin(compiler, COMBINE.path, NAMES[:1], "sm_80", lambda: None) == kept
    assert compiler.compiled == 1


DAMAGE = {"empty": lambda data: b"", "cut": lambda data: data[:-9], "a bit": lambda data: data[:99] + bytes([data[99] ^ 1]) + data[100:],
          "other JSON": lambda data: b"[]", "too deep": lambda data: b"[" * 100_000}  # fmt: skip


@pytest.mark.parametrize("suffix", [".cubin", ".json"])
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_compiled_again(compiler, suffix, damage):
    first = kept_cubin(compiler, COMBINE.path, NAMES[:1], "sm_80", lambda: None)
    machine_code, file = first.path.read_bytes(), first.path.with_suffix(suffix)
    file.write_bytes(damage(file.read_bytes()))
    assert kept_cubin(compiler, COMBINE.path, NAMES[:1], "sm_80", lambda: None) == first and compiler.compiled == 2
    assert first.path.read_bytes() == machine_code
    assert kept_cubin(compiler, COMBINE.path, NAMES[:1], "sm_80", lambda: None) == first and compiler.compiled == 2


def test_a_folder_that_others_can_write_is_not_read(compiler):
    first = kept_cubin(compiler, COMBINE.path, NAMES[:1], "sm_80", lambda: None)
    first.path.parent.chmod(0o777)
    assert kept_cubin(compiler, COMBINE.path, NAMES[:1], "sm_80", lambda: None).path.parent != first.path.parent


def test_a_full_disk_leaves_a_folder_of_the_process(compiler, monkeypatch):
    def full(path, data, write=cubins.write):
        if path.parent == folder():
            raise OSError(28, "No space left on device")
        write(path, data)

    monkeypatch.setattr(cubins, "write", full)
    kept = kept_cubin(compiler, COMBINE.path, NAMES[:1], "sm_80", lambda: None)
    assert kept.path.read_bytes()[:4] == b"\x7fELF" and kept.path.parent != folder()


@pytest.fixture
def cards(compiler, monkeypatch):
    """A stand-in for CuPy with two cards, of architectures 80 and 90; it writes down launches and what shared memory a function may use."""
    cupy = Cupy(compiler, lambda device, path, name: Kernel(cupy, device, path, name))
    cupy.launches = []
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    return cupy


class Kernel:
    """A function of one card, which another cannot launch."""

    def __init__(self, cupy, device, path, name):
        self.cupy, self.device, self.path, self.name, self.max_dynamic_shared_size_bytes = cupy, device, path, name, 48_000

    def __call__(self, grid, block, args, shared_mem):
        assert self.cupy.current == self.device and shared_mem <= self.max_dynamic_shared_size_bytes
        self.cupy.launches.append((self.device, self.name, grid, block, args, shared_mem, self.max_dynamic_shared_size_bytes))


def test_the_loader_hands_the_file_to_cupy_and_says_once_that_it_compiles(compiler, cards):
    said, loader = [], CupyLoader()
    loader.listener = said.append
    launch = loader(COMBINE.path, NAMES)(NAMES[1])
    loader(COMBINE.path, NAMES[:1])
    launch((2,), (256,), [1, 2])
    launch((1,), (32,), [], shared_mem=100_000)
    lowered = kept_cubin(compiler, COMBINE.path, NAMES, "sm_80", lambda: None).lowered[NAMES[1]]
    assert said == ["compiling kernels for this card: once, for a minute or so"] and compiler.compiled == 2
    assert cards.launches == [(0, lowered, (2,), (256,), (1, 2), 0, 48_000), (0, lowered, (1,), (32,), (), 100_000, 100_000)]


def test_each_card_has_machine_code_functions_and_shared_memory_of_its_own(compiler, cards):
    said, loader = [], CupyLoader()
    loader.listener = said.append
    launch = loader(COMBINE.path, NAMES)(NAMES[1])
    for device in (0, 1, 0, 1):
        with cards.cuda.Device(device):
            launch((1,), (32,), [], shared_mem=100_000)
    assert [launched[0] for launched in cards.launches] == [0, 1, 0, 1] and {launched[-1] for launched in cards.launches} == {100_000}
    assert compiler.compiled == 2 and len(said) == 2
    kept = sorted(path.name.split("-")[1] for path in folder().glob("*.cubin"))
    assert kept == ["sm_80", "sm_90"]


def test_a_card_that_is_too_old_is_refused_when_it_is_first_used(cards, monkeypatch):
    monkeypatch.setattr("two_devices.CAPABILITIES", ((8, 0), (7, 5)))
    launch = CupyLoader()(COMBINE.path, NAMES)(NAMES[1])
    with cards.cuda.Device(1), pytest.raises(RuntimeError, match=r"device 1 has compute capability 7\.5: the kernels need 8\.0 or newer"):
        launch((1,), (32,), [])
    launch((1,), (32,), [])


def test_wgmma_is_asked_of_the_card_that_computes(cards, monkeypatch):
    monkeypatch.setenv("MINIMOE_WGMMA", "1")
    wanted = []
    for device in (0, 1, 0, 1):
        with cards.cuda.Device(device):
            wanted.append(wgmma_wanted())
    assert wanted == [False, True, False, True] and cards.asked == [0, 1]


# ---- the kernels' files ---------------------------------------------------------------------------------------------------------------

FILES = sorted(KERNELS.glob("*.cu"))


@pytest.mark.parametrize("path", [pytest.param(path, id=path.name) for path in FILES])
def test_a_kernel_file_opens_with_its_contract(path):
    head = re.match(r"(//[^\n]*\n)+", path.read_text())[0]
    for part in (r"\[\w", r"[Bb]ytes", r"[Gg]rid|[Bb]lock", r"sum|integers", r"Reference: ", r"Unproven"):
        assert re.search(part, head), f"the head of {path.name} has no {part}"
    for reference in re.findall(r"minimoe/reference/\w+\.py", head):
        assert (ROOT / reference).is_file(), reference
