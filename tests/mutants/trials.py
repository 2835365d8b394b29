"""Runs the conformance suite on a mutated toy backend, in a forked child, until the first case that fails."""

import ast
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from mutants.operators import Mutant

import minimoe.testing.training as curves
from minimoe.backend import Backend, check_overrides, load
from minimoe.testing import Case, cases

PACKAGE = "toy_backend"
FOLDER = Path(__file__).parents[1] / PACKAGE
FILES = sorted(path for path in FOLDER.glob("*.py") if path.name != "__init__.py")
SURVIVED = "SURVIVED"
TIME_FACTOR, TIME_MORE = 4.0, 20.0
"""A trial may take this many times what the unmutated backend takes, and as many seconds more."""


@dataclass(frozen=True)
class Outcome:
    """Who caught a mutant: a case, or `load`, `crash` or `hang`; or nobody: `SURVIVED`."""

    mutant: Mutant
    caught_by: str
    text: str
    seconds: float

    @property
    def survived(self) -> bool:
        return self.caught_by == SURVIVED


class Mutated(importlib.abc.MetaPathFinder, importlib.machinery.SourceFileLoader):
    """Finds one module of the package, with a mutated source."""

    def __init__(self, mutant: Mutant) -> None:
        path = FOLDER / mutant.file
        super().__init__(f"{PACKAGE}.{path.stem}", str(path))
        self.code = compile(mutant.applied(path.read_text(encoding="utf-8")), str(path), "exec")

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        return importlib.util.spec_from_loader(fullname, self) if fullname == self.name else None

    def get_code(self, fullname: str) -> Any:
        return self.code


def toy(mutant: Mutant | None) -> Backend:
    """Import the toy backend anew, and return one."""
    for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
        del sys.modules[name]
    if mutant is not None:
        sys.meta_path.insert(0, Mutated(mutant))
    from toy_backend import ToyBackend

    backend = ToyBackend()
    check_overrides(backend)
    return backend


# ---- which cases first -----------------------------------------------------------------------------------------------------------


def callers() -> dict[str, set[str]]:
    """Return for each function of the package the names of those that use it, directly or not, itself included."""
    uses: dict[str, set[str]] = {}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                names = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
                uses.setdefault(node.name, set()).update(names, {part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute)})
    found = {}
    for function in uses:
        reached = {function}
        while grown := {name for name, used in uses.items() if used & reached} - reached:
            reached |= grown
        found[function] = reached
    return found


class Trials:
    """The suite with the time that each of its cases takes on the unmutated backend."""

    def __init__(self, quick: bool = False) -> None:
        self.quick = quick
        load("numpy")
        curves.expected_curve()  # once, before processes are forked
        self.callers = callers()
        self.times: dict[str, float] = {}
        began = time.monotonic()
        ended = self.in_child(None, 600.0)
        if ended["caught_by"] != SURVIVED:
            raise RuntimeError(f"the toy backend does not conform: {ended['caught_by']}: {ended['text']}")
        self.times = ended["times"]
        self.limit = TIME_FACTOR * (time.monotonic() - began) + TIME_MORE

    def run(self, mutant: Mutant) -> Outcome:
        """Run the suite on a mutant."""
        began = time.monotonic()
        ended = self.in_child(mutant, self.limit)
        return Outcome(mutant, ended["caught_by"], ended["text"], time.monotonic() - began)

    def ordered(self, found: list[Case], mutant: Mutant | None) -> list[Case]:
        """Return the cases of the kernels that run the mutated line, cheap ones first, then all others, cheap ones first."""
        near = set() if mutant is None else self.callers.get(mutant.function, set())
        return sorted(found, key=lambda case: (case.kernel not in near, self.times.get(str(case), 0.0)))

    def in_child(self, mutant: Mutant | None, limit: float) -> dict[str, Any]:
        """Fork, run the cases there, and return what the child says; kill it after `limit` seconds."""
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            os.close(reading)
            self.be_the_child(mutant, writing)
        os.close(writing)
        said, deadline = b"", time.monotonic() + limit
        with os.fdopen(reading, "rb", buffering=0) as pipe:
            while True:
                ready, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
                if not ready:
                    os.kill(child, signal.SIGKILL)
                    break
                piece = pipe.read(65536)
                if not piece:
                    break
                said += piece
        _, status = os.waitpid(child, 0)
        lines = said.decode(errors="replace").splitlines()
        if lines and lines[-1].startswith("{"):
            return json.loads(lines[-1])
        under_way = lines[-1] if lines else "load"
        if not ready:
            return {"caught_by": "hang", "text": f"{limit:.0f} s passed in: {under_way}"}
        return {"caught_by": "crash", "text": f"status {os.waitstatus_to_exitcode(status)} in: {under_way}"}

    def be_the_child(self, mutant: Mutant | None, writing: int) -> None:
        """Run the cases, write the name of each and at last the outcome, and end."""

        def say(line: str) -> None:
            os.write(writing, (line + "\n").encode())

        try:
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)
            os.dup2(quiet, 2)
            say(json.dumps(self.outcome(mutant, say)))
        except BaseException:
            say(json.dumps({"caught_by": "load", "text": traceback.format_exc()[-300:]}))
        finally:
            os._exit(0)

    def outcome(self, mutant: Mutant | None, say: Any) -> dict[str, Any]:
        """Run the cases until one fails."""
        try:
            found = self.ordered(cases(toy(mutant), quick=self.quick), mutant)
        except Exception as error:
            return {"caught_by": "load", "text": f"{type(error).__name__}: {error}"}
        times = {}
        for case in found:
            say(str(case))
            began = time.process_time()
            try:
                case.run()
            except Exception as error:
                return {"caught_by": str(case), "text": f"{type(error).__name__}: {error}"}
            times[str(case)] = time.process_time() - began
        return {"caught_by": SURVIVED, "text": "", "times": times}
