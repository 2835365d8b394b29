"""What every worked port is tested for. A port is examples/backend_NAME, a package of one file; it conforms, trains and stays short.

    PORT = Port("jax")


    class TestJax(PortTests):
        port = PORT

The fixture `installed` (conftest.py) gives minimoe the entry points of the module's PORT, as `pip install examples/backend_NAME` does.
"""

import importlib.util
import tomllib
from functools import cached_property
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from command_line import TINY, call
from tiny_runs import write_text

import minimoe as mm
from minimoe.backend import Backend, check_overrides, load
from minimoe.runs.run import Run
from minimoe.testing import LEVELS, cases

EXAMPLES = Path(__file__).parents[2] / "examples"


class Port:
    """The port of that name, loaded from its source; its package need not be installed, only the library."""

    def __init__(self, name: str) -> None:
        self.name, self.folder = name, EXAMPLES / f"backend_{name}"
        self.source = self.folder / f"minimoe_{name}" / "__init__.py"

    @cached_property
    def module(self) -> ModuleType:
        """The package."""
        spec = importlib.util.spec_from_file_location(f"minimoe_{self.name}", self.source)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    @cached_property
    def backend(self) -> Backend:
        """The backend as its package makes it."""
        made: Backend = self.module.backend()
        return made

    def entry_points(self) -> list[EntryPoint]:
        """Return what the package's pyproject.toml declares."""
        project = tomllib.loads((self.folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        return [EntryPoint(name, value, "minimoe.backends") for name, value in project["entry-points"]["minimoe.backends"].items()]


class PortTests:
    """The tests of a port; a subclass names it."""

    port: Port
    one_in = 1  # a library that compiles each shape runs one case of `--quick` in this many, unless pytest is given --all

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Each case is a test: some of `--quick` each time, those of the `whole` suite if they are asked for (tests/long.toml)."""
        if "case" in metafunc.fixturenames:
            quick, whole = cases(self.port.backend, quick=True)[:: self.one_in], cases(self.port.backend)
            names = [f"quick, {case}" for case in quick] + [f"whole, {case}" for case in whole]
            metafunc.parametrize("case", [*quick, *whole], ids=names)

    def test_it_conforms(self, case: Any) -> None:
        case.run()

    def test_its_cases_are_of_every_level_and_its_overrides_have_the_contracts_signatures(self) -> None:
        records = type(self.port.backend).record is not Backend.record
        assert {case.level for case in cases(self.port.backend)} == {level for level in LEVELS if records or level != "recording"}
        check_overrides(self.port.backend)

    def test_it_is_one_file_of_less_than_150_lines(self) -> None:
        assert list(self.port.folder.rglob("*.py")) == [self.port.source]
        assert len(self.port.source.read_text(encoding="utf-8").splitlines()) < 150

    def test_it_trains_resumes_and_writes_text(
        self, installed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """20 recorded steps, 2 more after a resume; NumPy has the same losses, and reads the same checkpoint."""
        name = self.port.name
        monkeypatch.chdir(tmp_path)
        write_text(tmp_path)
        losses = {}
        for backend in (name, "numpy"):
            options = ("--backend", backend, "--data", "text.txt", "--steps", "20", "--out", backend)
            code, out, err = call(capsys, "train", "tiny-moe", *TINY, *options)
            assert code == 0 and "not repeated" not in out + err, err
            code, _, err = call(capsys, "resume", backend, "--steps", "22")
            assert code == 0, err
            losses[backend] = [row["loss"] for row in Run.open(backend).metrics()]
        assert len(losses[name]) == 22 and np.allclose(losses[name], losses["numpy"], rtol=1e-4)
        tokens = np.arange(12, dtype=np.int32)[None]
        logits = {}
        for backend in (name, "numpy"):  # the same checkpoint, read by both
            with mm.use_backend(backend) as used:
                result = mm.load(name)(mm.tensor(tokens).data).data
                assert type(result) is type(used.xp.zeros((1,)))
                logits[backend] = used.to_host(result)
        assert type(result) is np.ndarray and np.abs(logits[name] - logits["numpy"]).max() < 1e-4
        monkeypatch.setenv("MINIMOE_BACKEND", name)
        code, out, err = call(capsys, "generate", name, "--tokens", "5", "--prompt", "a")
        assert code == 0 and out.startswith("a"), err
        assert load(name).name == name
