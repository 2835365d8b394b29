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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from mutants.operators import Mutant

import minimoe.testing.training as curves
from minimoe.backend import Backend, check_overrides, load
from minimoe.testing import LEVELS, Case, cases

PACKAGE = "toy_backend"
FOLDER = Path(__file__).parents[1] / PACKAGE
FILES = sorted(path for path in FOLDER.glob("*.py") if path.name != "__init__.py")
SURVIVED = "SURVIVED"
TIME_FACTOR, TIME_MORE = 4.0, 20.0
"""A trial may take this many times what the unmutated backend takes, and as many seconds more."""


@dataclass(frozen=True)
class Outcome:
    """What caught a mutant: a case, `load`, `crash` or `hang`; or `SURVIVED`."""

    mutant: Mutant
    caught_by: str
    text: str
    seconds: float

    @property
    def survived(self) -> bool:
        return self.caught_by == SURVIVED


class Replaced(importlib.abc.MetaPathFinder, importlib.machinery.SourceFileLoader):
    """Finds one module of the package, with other code than its file has."""

    def __init__(self, file: str, code: Any) -> None:
        path = FOLDER / file
        super().__init__(f"{PACKAGE}.{path.stem}", str(path))
        self.code = code

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        return importlib.util.spec_from_loader(fullname, self) if fullname == self.name else None

    def get_code(self, fullname: str) -> Any:
        return self.code

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["called_functions"] = CALLED
        super().exec_module(module)


CALLED: set[str] = set()
"""The functions of the package, as `file:function`, that were called since this was cleared. A profiler would take three times as long."""


def noting(path: Path) -> Any:
    """Return the code of a file, in which each function notes that it was called."""
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            node.body[:0] = ast.parse(f"called_functions.add({f'{path.name}:{node.name}'!r})").body
    return compile(tree, str(path), "exec")


def toy(mutant: Mutant | None) -> Backend:
    """Import the toy backend anew, and return one: with a mutant, or with functions that note their calls."""
    for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
        del sys.modules[name]
    if mutant is not None:
        source = (FOLDER / mutant.file).read_text(encoding="utf-8")
        sys.meta_path.insert(0, Replaced(mutant.file, compile(mutant.applied(source), str(FOLDER / mutant.file), "exec")))
    else:
        sys.meta_path[:0] = [Replaced(path.name, noting(path)) for path in FILES]
    from toy_backend import ToyBackend

    backend = ToyBackend()
    check_overrides(backend)
    return backend


class Trials:
    """The suite, and what each of its cases does on the unmutated backend: the seconds that it takes, and the functions that it calls."""

    def __init__(self, large: bool = True, levels: Sequence[str] = LEVELS) -> None:
        """`large`: also the cases of large sizes. `levels`: those of the suite that are run."""
        self.large, self.levels = large, levels
        load("numpy")
        curves.expected_curve()  # once, before processes are forked
        self.times: dict[str, float] = {}
        self.calls: dict[str, set[str]] = {}
        began = time.monotonic()
        ended = self.in_child(None, 900.0)
        if ended["caught_by"] != SURVIVED:
            raise RuntimeError(f"the toy backend does not conform: {ended['caught_by']}: {ended['text']}")
        self.times = ended["times"]
        self.calls = {case: set(called) for case, called in ended["calls"].items()}
        self.limit = TIME_FACTOR * (time.monotonic() - began) + TIME_MORE

    def run(self, mutant: Mutant) -> Outcome:
        """Run the suite on a mutant."""
        began = time.monotonic()
        ended = self.in_child(mutant, self.limit)
        return Outcome(mutant, ended["caught_by"], ended["text"], time.monotonic() - began)

    def ordered(self, found: list[Case], mutant: Mutant | None) -> list[Case]:
        """Return the cases that call the mutated function, cheap ones first: no other can see the mutant.

        All are returned if no case calls it, since it then runs when the backend is made.
        """
        name = "" if mutant is None else f"{mutant.file}:{mutant.function}"
        calling = [case for case in found if name in self.calls.get(str(case), ())]
        return sorted(calling or found, key=lambda case: self.times.get(str(case), 0.0))

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

    def outcome(self, mutant: Mutant | None, say: Callable[[str], None]) -> dict[str, Any]:
        """Run the cases until one fails."""
        try:
            found = [case for case in cases(toy(mutant)) if case.level in self.levels and (self.large or ", large" not in case.name)]
        except Exception as error:
            return {"caught_by": "load", "text": f"{type(error).__name__}: {error}"}
        times, calls = {}, {}
        for case in self.ordered(found, mutant):
            say(str(case))
            began = time.process_time()
            CALLED.clear()
            try:
                case.run()
            except Exception as error:
                return {"caught_by": str(case), "text": f"{type(error).__name__}: {error}"}
            times[str(case)], calls[str(case)] = time.process_time() - began, sorted(CALLED)
        return {"caught_by": SURVIVED, "text": "", **({"times": times, "calls": calls} if mutant is None else {})}
