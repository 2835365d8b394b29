"""`minimoe backends new`: what it writes is installed, conforms and trains as it is; a wrong name or place is refused in a line."""

import importlib.util
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from command_line import TINY, call, contents, environment, one_line
from tiny_runs import write_text

from minimoe.cli.backends import backends
from minimoe.runs.run import Run
from minimoe.study.new_backend import KINDS

NAME = "my-library"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def new(capsys, kind, name=NAME):
    """Write a backend as a porter does.   -> its folder"""
    code, out, err = call(capsys, "backends", "new", name, "--kind", kind)
    assert (code, err) == (0, "") and out.startswith(f"minimoe-{name}: {KINDS[kind]}\n")
    return Path(f"minimoe-{name}").resolve()


def install(port):
    """Do what `pip install -e` does, without a network: the folder is put on the path, with the entry points beside the package."""
    project = tomllib.loads((port / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    about = port / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    (group,) = project["entry-points"]
    (about / "entry_points.txt").write_text(f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in project["entry-points"][group].items()))


def minimoe(port, *arguments):
    """Return the output of `minimoe ARGUMENTS` in a process of its own, in an environment where the backend is installed."""
    command = [sys.executable, "-m", "minimoe", *arguments]
    paths = os.pathsep.join([str(port), environment()["PYTHONPATH"]])
    env = environment(PYTHONPATH=paths, PYTEST_ADDOPTS="")  # --all, which may be there, is an option of our tests alone
    done = subprocess.run(command, cwd=port.parent, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# ---- the path of a porter ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_backend_is_found_conforms_and_trains_on_numpys_curve(kind, folder, capsys):
    port = new(capsys, kind)
    install(port)
    listed = json.loads(minimoe(port, "backends", "--json"))[NAME]
    assert listed["available"] and listed["dtypes"] == ["float32", "float64"]
    own = {kernel for kernel, how in listed["kernels"].items() if how == "hand-written"}
    assert own == ({"swiglu"} if kind in ("kernels", "device") else set())
    cases = ["--kernel", "swiglu"] if own else ["--quick"]  # the other kernels are references over NumPy's arrays
    assert "it conforms" in minimoe(port, "backends", "check", NAME, *cases)
    write_text(folder)
    losses = {}
    for backend in (NAME, "numpy"):
        minimoe(port, "train", "tiny-moe", *TINY, "--backend", backend, "--data", "text.txt", "--steps", "20", "--out", backend)
        losses[backend] = [row["loss"] for row in Run.open(backend).metrics()]
    assert len(losses[NAME]) == 20 and losses[NAME][-1] < losses[NAME][0]
    assert np.allclose(losses[NAME], losses["numpy"], rtol=1e-4)


def test_what_is_written_has_the_name_everywhere_and_a_way_to_be_published(folder, capsys):
    for kind in KINDS:
        files = contents(new(capsys, kind, f"my-{kind}"))
        assert {".github/workflows/test.yml", "PUBLISHING.md", "README.md", "pyproject.toml", "tests/test_conformance.py"} < set(files)
        assert (
            f"minimoe_my_{kind}/__init__.py" in files
            and f"My{kind.capitalize()}Backend".encode() in files[f"minimoe_my_{kind}/__init__.py"]
        )
        assert not [path for path, text in files.items() if b"placeholder" in path.encode().lower() + text.lower()]


def test_its_own_tests_run_every_case_of_the_suite(folder, capsys):
    port = new(capsys, "kernels")
    install(port)
    paths = os.pathsep.join([str(port), environment()["PYTHONPATH"]])
    env = environment(PYTHONPATH=paths, PYTEST_ADDOPTS="")  # --all, which may be there, is an option of our tests alone
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "swiglu", "tests"]
    done = subprocess.run(command, cwd=port, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr


# ---- what is refused ------------------------------------------------------------------------------------------------------------------

WRONG = {
    "My-Library": "at most 40 lower-case letters and digits",
    "my_library": "at most 40 lower-case letters and digits",
    "../escape": "at most 40 lower-case letters and digits",
    "2d": "at most 40 lower-case letters and digits",
    "my--library": "at most 40 lower-case letters and digits",
    "é": "at most 40 lower-case letters and digits",
    "m" * 41: "at most 40 lower-case letters and digits",
    "class": "the word has a meaning of its own",
    "auto": "the word has a meaning of its own",
    "placeholder": "the word has a meaning of its own",
    "my-placeholder": "the word has a meaning of its own",
    "numba-cuda": "'numba-cuda' is taken: the backend or its package, minimoe_numba_cuda, is installed here",
}


@pytest.mark.parametrize("name", WRONG)
def test_a_name_that_cannot_be_a_backends_is_refused_and_nothing_is_written(name, folder, capsys):
    code, out, err = call(capsys, "backends", "new", name, "--kind", "mutable")
    assert (code, out) == (2, "") and WRONG[name] in one_line(err)
    assert not list(folder.iterdir())


def test_an_existing_folder_is_left_alone(folder, capsys):
    port = new(capsys, "mutable")
    before = contents(port)
    code, _, err = call(capsys, "backends", "new", NAME, "--kind", "device")
    assert code == 2 and one_line(err) == "minimoe-my-library exists: name a folder that does not, with --out"
    assert contents(port) == before
    code, _, _ = call(capsys, "backends", "new", NAME, "--kind", "device", "--out", "elsewhere/deep")
    assert code == 0 and (folder / "elsewhere" / "deep" / "minimoe_my_library" / "device.py").is_file()


def test_the_command_offers_the_kinds_that_there_are(capsys):
    (kind,) = [parameter for parameter in backends.commands["new"].params if parameter.name == "kind"]
    assert kind.type.choices == (*KINDS,)
    code, _, err = call(capsys, "backends", "new", NAME, "--kind", "mutabel")
    assert code == 2 and "'mutabel' is not one of" in one_line(err)


# ---- what stands in ----------------------------------------------------------------------------------------------------------------------


def part(port, name):
    """Return a module of the new package."""
    path = port / "minimoe_my_library" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_device_refuses_what_its_kernels_do_not_take_and_says_what_memory_was_short(folder, capsys):
    port = new(capsys, "device")
    device, source = part(port, "device"), part(port, "kernels").SWIGLU
    x, y = np.ones((3, 8), np.float32), np.empty((3, 4), np.float32)
    device.launch(source, "swiglu", 3, x, y)
    assert np.allclose(y, 1.0 / (1.0 + np.exp(-1.0)))
    with pytest.raises(device.DeviceError, match=r"swiglu: argument 0, of shape \[8, 3\], is not contiguous"):
        device.launch(source, "swiglu", 3, x.T, y)
    with pytest.raises(device.DeviceError, match="swiglu does not compile: SyntaxError"):
        device.compiled("def swiglu(", "swiglu")
    with pytest.raises(MemoryError) as short:
        np.empty((1 << 40, 1 << 16), np.float32)
    assert device.shortage(short.value) == (1 << 58, 0) and device.shortage(ValueError()) is None


def test_the_array_that_stands_in_for_immutable_ones_cannot_be_written(folder, capsys):
    standin = part(new(capsys, "immutable"), "standin")
    x = standin.arange(4.0)
    with pytest.raises(TypeError):
        x[0] = 1.0
    with pytest.raises(TypeError):
        x += 1.0
    y = standin.with_part(x, slice(1, 3), x[2:] + 1.0)
    assert np.asarray(y).tolist() == [0.0, 3.0, 4.0, 3.0] and np.asarray(x).tolist() == [0.0, 1.0, 2.0, 3.0]
