"""Meets every system call that touches a run's folder with a kill, a torn write or an error, and then asks for what an unbroken run gives.

    PYTHONPATH=tests python -m faults.injector                              # every trial: some minutes
    PYTHONPATH=tests python -m faults.injector --sample 40 --seed 7         # 40 of them
    PYTHONPATH=tests python -m faults.injector --phase upcycle --only 17    # one call

After each trial the same command, or `minimoe resume`, runs without faults. Right is: all files equal those of an unbroken run; where
nothing was begun, a refusal in one line, and the first command works again. A command that meets an error ends with one line and exit
code 2, or goes on as if nothing were, and the run's status does not claim what is not so. The exit code is 1 if anything else was seen.
"""

import argparse
import errno
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from faults.forked import KILLED, Ended, Fault, calls, preloaded, run
from tiny_runs import TIMINGS, write_text

MARK = "marked-folder"  # the folder that a command writes
PIPE = 63  # the descriptor that bash gives the first <(command)
KEYS = (
    "model.d_model=16", "model.n_layers=1", "model.n_heads=2", "model.n_kv_heads=1", "model.head_dim=8", "model.d_hidden=16",
    "model.max_seq_len=16", "model.dropout=0.1", "moe.n_experts=4", "moe.jitter=0.01", "train.batch_size=2", "train.seq_len=16",
    "train.steps=5", "train.checkpoint_every=2", "train.eval_every=2", "train.eval_batches=1", "train.keep=1", "train.log_every=1",
    "train.warmup_steps=2", "train.lr=1e-2", "train.sample_every=4", "train.patience=9",
)  # fmt: skip
TINY = [part for key in KEYS for part in ("--set", key)]
TRAIN = ["train", "tiny-moe", *TINY, "--data", "text.txt", "--quiet", "--out"]
UPCYCLE = ["convert", "dense", MARK, "--upcycle", "4"]
ERRORS = (("EIO", "once", 1), ("ENOSPC", "from here on", 1), ("EINTR", "once", 4), ("EROFS", "from here on", 6))
"""What calls fail with, and at which: every one, every fourth, every sixth."""
UNTIMED = {"created", "pid", "process", *TIMINGS}  # fields that differ between any two runs


# ---- what must be equal ----------------------------------------------------------------------------------------------------------


def picture(folder: Path) -> dict[str, Any]:
    """All of a folder that must not depend on faults; hidden files are part of it: none may be left over."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir():
            found[name] = "folder"
        elif path.suffix in (".json", ".jsonl"):
            found[name] = [without_times(json.loads(line)) for line in documents(path)]
        elif path.name != "MANIFEST.sha256" and path.suffix != ".lock":  # the first has the digests of times, locks name a process or none
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def documents(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8")
    return text.splitlines() if path.suffix == ".jsonl" else [text]


def without_times(value: dict[str, Any]) -> dict[str, Any]:
    return {key: item for key, item in value.items() if key not in UNTIMED}


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> str | None:
    """Name what differs, if anything does."""
    names = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
    if not names:
        return None
    if all(is_hidden(name) for name in names):
        return f"left over: {', '.join(names[:6])}"
    return f"WRONG RESULT: {', '.join(names[:6])} differ{'' if len(names) > 1 else 's'}"


def is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def steps_saved() -> int:
    """The newest step of which the marked run has a whole checkpoint with its name."""
    names = [path.parent.name for path in Path(MARK, "checkpoints").glob("step-*/MANIFEST.sha256")]
    return max((int(name.removeprefix("step-")) for name in names), default=0)


def state() -> str | None:
    try:
        found: str = json.loads(Path(MARK, "status.json").read_text())["state"]
    except (OSError, ValueError, KeyError):
        return None
    return found


# ---- what is tried ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Phase:
    """A command that writes into the marked folder, and how its work is taken up after a fault."""

    name: str
    command: Callable[[], list[str]]
    wanted: dict[str, Any]  # the picture in the end
    start: Path | None = None  # what the folder holds before; None: there is none
    finish: tuple[str, ...] = ("resume", MARK, "--quiet")  # takes up what was begun; none: the command itself
    steps: int = 5  # of the run in the end

    def reset(self) -> None:
        """Make the folder what it is before the command."""
        for left in (*Path().glob(f"*{MARK}*"), *Path().glob(f".*{MARK}*")):
            shutil.rmtree(left)
        if self.start is not None:
            shutil.copytree(self.start, MARK)

    def taken_up(self) -> str | None:
        """Take up the work without faults.   -> what is wrong with the result, if anything"""
        if not self.finish:
            return self._done_again()
        ended = run(list(self.finish))
        problem = ended.problem()
        if problem is not None:
            return f"resume: {problem}"
        if ended.code == 0 or "steps are done" in ended.message():
            return differences(picture(Path(MARK)), self.wanted)
        if steps_saved() > 0:
            return f"resume refuses, though step {steps_saved()} is saved: {ended.message()}"
        again = run(self.command())
        if again.code != 0:
            return f"neither resumes ({ended.message()}) nor starts again: {again.message()}"
        if self.finish[-2] == "--steps":
            again = run(list(self.finish))
        return again.problem() or differences(picture(Path(MARK)), self.wanted)

    def _done_again(self) -> str | None:
        """Of a conversion: the folder is whole or absent, and the same command makes it where it is absent."""
        if Path(MARK).exists() and any(Path(MARK).iterdir()):
            return differences(picture(Path(MARK)), self.wanted)
        ended = run(self.command())
        if ended.code != 0:
            return f"does not work again: {ended.message()}"
        left = [path.name for path in Path().glob(f".*{MARK}*")]
        return f"left over: {', '.join(left)}" if left else differences(picture(Path(MARK)), self.wanted)


@dataclass(frozen=True)
class Trial:
    """One fault at one call of a phase."""

    phase: Phase
    fault: Fault
    call: str  # its name and path
    error: str = ""

    def __str__(self) -> str:
        what = f"{self.error} {self.fault.mode}" if self.error else self.fault.mode
        return f"{self.phase.name}: {what} at call {self.fault.at} ({self.call})"

    def outcome(self) -> str | None:
        """Try it.   -> what is wrong, if anything"""
        self.phase.reset()
        ended = run(self.phase.command(), self.fault)
        if not self.error:
            return self.phase.taken_up() if ended.code == KILLED else f"was not killed: exit {ended.code} {ended.message()}"
        problem = ended.problem() or self._claims(ended) or self.phase.taken_up()
        removes = self.call.startswith(("unlink", "rmdir", "open", "close", "read"))  # a failed removal leaves what the next start removes
        return None if problem is not None and problem.startswith("left over") and ended.code == 0 and removes else problem

    def _claims(self, ended: Ended) -> str | None:
        """Say what the status claims wrongly after an error that ended the command; one that stays keeps it from being written."""
        claimed = state()
        before = None if self.phase.start is None else (self.phase.start / "status.json").read_text()
        if ended.code != 2 or claimed is None or Path(MARK, "status.json").read_text() == before:  # as a kill before had left it
            return None
        wrong = (claimed == "finished" and steps_saved() < self.phase.steps) or (claimed == "running" and self.fault.mode == "once")
        return f"ended with an error, but its status says {claimed!r}: {ended.message()}" if wrong else None


def trials(phase: Phase, with_errors: bool) -> list[Trial]:
    """Every fault of a phase: a kill before each call and after the last, each write torn, and each error at each call."""
    phase.reset()
    found = calls(phase.command(), MARK)
    kills = [(at, "kill before") for at in range(1, len(found) + 1)] + [(len(found), "kill after")]
    kills += [(at, "torn write") for at, call in enumerate(found, start=1) if call.startswith("write")]
    listed = [Trial(phase, Fault(MARK, at, mode), found[at - 1]) for at, mode in kills]
    if not with_errors:
        return listed
    phase.reset()
    found = calls(phase.command(), MARK, reads=True)
    for name, mode, every in ERRORS:
        number: int = getattr(errno, name)
        numbers = range(1, len(found) + 1, every)
        listed += [Trial(phase, Fault(MARK, at, mode, number, reads=True), found[at - 1], name) for at in numbers]
    return listed


# ---- the phases ------------------------------------------------------------------------------------------------------------------


def checked(arguments: list[str]) -> None:
    ended = run(arguments)
    if ended.code != 0:
        raise RuntimeError(f"{' '.join(arguments[:3])}: {ended.errors}")


def make_phases(names: list[str]) -> list[Phase]:
    """Train what the phases start from and end with, in the working folder."""
    write_text(Path(), lines=60)
    checked([*TRAIN, "whole"])
    return [PHASES[name]() for name in names]


def training() -> Phase:
    return Phase("train", lambda: [*TRAIN, MARK], picture(Path("whole")))


def from_a_pipe() -> Phase:
    """Training on text from a pipe, which is kept in the run's folder."""

    def command() -> list[str]:
        out, into = os.pipe()
        os.write(into, Path("text.txt").read_bytes())  # 2 kB: a pipe holds more
        os.close(into)
        os.dup2(out, PIPE)  # the same name each time
        os.close(out)
        return [f"/dev/fd/{PIPE}" if word == "text.txt" else word for word in [*TRAIN, MARK]]

    checked(command())
    Path(MARK).rename("piped")
    return Phase("pipe", command, picture(Path("piped")))


def resuming() -> Phase:
    """Resuming a run that was killed while it saved step 4."""
    found = calls([*TRAIN, MARK], MARK)
    at = next(number for number, call in enumerate(found, start=1) if call.startswith("rename") and "step-000004" in call)
    shutil.rmtree(MARK)
    run([*TRAIN, MARK], Fault(MARK, at, "kill before"))
    Path(MARK).rename("broken")
    return Phase("resume", lambda: ["resume", MARK, "--quiet"], picture(Path("whole")), start=Path("broken"))


def converting() -> Phase:
    checked(["convert", "whole", "converted"])
    return Phase("convert", lambda: ["convert", "whole", MARK], picture(Path("converted")), finish=())


def upcycling() -> Phase:
    checked([*TRAIN[:2], *TINY, "--set", "moe=none", *TRAIN[2 + len(TINY) :], "dense"])
    checked(UPCYCLE)
    finish = ("resume", MARK, "--quiet", "--steps", "6")
    checked(list(finish))
    Path(MARK).rename("routed")
    return Phase("upcycle", lambda: UPCYCLE, picture(Path("routed")), finish=finish, steps=6)


def preparing() -> Phase:
    """Making the tokens of a text that is large, as far as this process knows, in a cache that is the marked folder."""
    from minimoe.data import corpus

    corpus.MOST_IN_MEMORY = 10_000
    os.environ["MINIMOE_CACHE_DIR"] = str(Path(MARK).absolute())
    tempfile.tempdir = str(Path(f"{MARK}-of-a-user-without-a-home").absolute())
    text = Path("large.txt")
    text.write_text(Path("text.txt").read_text() * 12)
    os.utime(text, (1_700_000_000, 1_700_000_000))  # what was just written is not noted
    command = ["data", "prepare", "large.txt"]
    checked(command)
    Path(MARK).rename("prepared")
    return Phase("prepare", lambda: command, picture(Path("prepared")), finish=tuple(command))


PHASES: dict[str, Callable[[], Phase]] = {
    "train": training, "pipe": from_a_pipe, "resume": resuming, "convert": converting, "upcycle": upcycling,
    "prepare": preparing,
}  # fmt: skip


# ---- faults that are planted, to show that they are found ------------------------------------------------------------------------


def forget_the_optimizer() -> None:
    from minimoe.training.optim import Optimizer

    Optimizer.load_state_dict = lambda self, state: None  # type: ignore[method-assign]


def write_in_place() -> None:
    from minimoe import files

    files.write_atomically = lambda path, text: files.write_synced(path, text.encode())


PLANTS = {"forget the optimizer": forget_the_optimizer, "write in place": write_in_place}


# ---- the command -----------------------------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--phase", action="append", choices=PHASES, help="default: all")
    parser.add_argument("--sample", type=int, help="this many trials, drawn by --seed; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of a call")
    parser.add_argument("--call", default="", help="calls with this text in their name and path, as in 'write marked-folder/metrics.jsonl'")
    parser.add_argument("--kills", action="store_true", help="kills and torn writes, no errors")
    parser.add_argument("--plant", choices=PLANTS, help="a fault of minimoe's own, which must be found")
    given = parser.parse_args()
    preloaded("faults.injector")
    warm_up()
    if given.plant:
        PLANTS[given.plant]()
    folder = Path(tempfile.mkdtemp(prefix="minimoe-injector-"))
    os.environ["MINIMOE_CACHE_DIR"] = str(folder / "cache")
    os.chdir(folder)
    try:
        listed = [trial for phase in make_phases(given.phase or list(PHASES)) for trial in trials(phase, not given.kills)]
        listed = [trial for trial in listed if given.only in (None, trial.fault.at) and given.call in trial.call]
        chosen = listed if given.sample is None else Random(given.seed).sample(listed, min(given.sample, len(listed)))
        print(f"{len(chosen)} of {len(listed)} trials (--seed {given.seed})", flush=True)
        return report(chosen)
    finally:
        os.chdir("/")
        shutil.rmtree(folder)


def warm_up() -> None:
    """Import what the commands need, so that the children need not; their samples are shorter than usual."""
    import minimoe.pretrained.saving
    import minimoe.study.convert
    import minimoe.training.trainer  # noqa: F401
    from minimoe.backend import load
    from minimoe.training.tasks import language

    language.SHORT = 5

    os.environ["MINIMOE_BACKEND"] = "numpy"
    load("numpy")


def report(chosen: list[Trial]) -> int:
    """Try them, print what is wrong and a summary.   -> the exit code"""
    tried, wrong = Counter[str](), Counter[str]()
    results = 0
    for trial in chosen:
        problem = trial.outcome()
        tried[trial.phase.name] += 1
        if problem is not None:
            wrong[trial.phase.name] += 1
            results += "WRONG RESULT" in problem
            print(f"{trial}: {problem}", flush=True)
    for name, count in tried.items():
        print(f"{name}: {count - wrong[name]} of {count} trials held")
    print(f"{sum(wrong.values())} faults, of them {results} wrong results")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
