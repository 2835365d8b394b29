"""Feeds damaged files to minimoe: each is opened, or refused with a `UserError`, soon and in little memory. Anything else is a fault.

    PYTHONPATH=tests python -m faults.fuzz --mutations 50000 --seed 0            # all kinds of file; a minute for every few thousand
    PYTHONPATH=tests python -m faults.fuzz --kind tokenizer --mutations 1000 --save /tmp/found

Every kind first replays its corpus (tests/faults/corpus), inputs that once were faults. A mutation depends on the seed, the kind and its
number alone. The exit code is 1 if there was a fault; --save keeps the input of each.
"""

import argparse
import contextlib
import io
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random

from faults.kinds import Kind, make_kinds

from minimoe.backend import use_backend
from minimoe.errors import UserError

MOST_SECONDS = 2.0  # of processor time; other processes may share the machine
MOST_WAITING = 20.0  # seconds of the clock: a reader that waits takes no processor time
MOST_MEMORY = 500 * 2**20  # bytes above the idle process
MOST_ADDRESSES = 4 * 2**30  # bytes that may be asked for above the idle process, so that a fault does not take the machine's memory
MOST_MESSAGE = 2000  # characters
CORPUS = Path(__file__).parent / "corpus"


class Hang(BaseException):
    """Too long a wait; no `Exception`, so that nobody catches it."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `Hang` in this thread after a time."""

    def ring(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def peak_memory() -> int:
    """Return the most bytes that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Judge:
    """Uses damaged files, and says of each: "opened", "refused", or what is wrong."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.memory = peak_memory()

    def verdict(self, kind: Kind, data: bytes) -> str:
        """Put a damaged file in its place and use it."""
        kind.place(self.folder, data)
        began, found = time.process_time(), "opened"
        try:
            with time_limit(MOST_WAITING), contextlib.redirect_stdout(io.StringIO()):
                kind.use(self.folder)
        except UserError as error:
            found = self._message(str(error))
        except Hang:
            found = f"waits for more than {MOST_WAITING:.0f} s"
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            found = described(error)
        took, peak = time.process_time() - began, peak_memory()
        if peak > self.memory + MOST_MEMORY:
            found, self.memory = f"takes {(peak - self.memory) / 2**20:.0f} MiB ({found})", peak
        return found if took <= MOST_SECONDS else f"takes {took:.1f} s ({found})"

    def _message(self, text: str) -> str:
        if not text.strip() or len(text) > MOST_MESSAGE or not " ".join(text.split()).isprintable():
            return f"refused in {len(text)} characters that are not a line: {text[:80]!r}"
        return "refused"


def described(error: BaseException) -> str:
    """Return an exception's name and the last place in minimoe that it came from."""
    places = traceback.extract_tb(error.__traceback__)
    inside = [place for place in places if f"{os.sep}minimoe{os.sep}" in place.filename] or places
    at = f"{inside[-1].filename.rpartition(f'{os.sep}minimoe{os.sep}')[2]}:{inside[-1].lineno}"
    return f"{type(error).__name__} at {at}: {' '.join(str(error).split())[:100]}"


def corpus(kind: Kind) -> list[tuple[str, bytes]]:
    """Return the kept inputs of a kind, by name."""
    return [(path.name, path.read_bytes()) for path in sorted((CORPUS / kind.name).glob("*"))]


def inputs(kind: Kind, seed: int, mutations: int) -> Iterator[tuple[str, bytes]]:
    """Yield names and contents: the samples as they are, the corpus, then this many mutations of the two."""
    kept = corpus(kind)
    yield from ((f"sample {number}", sample) for number, sample in enumerate(kind.samples))
    yield from kept
    for number in range(mutations):
        draw = Random(f"{seed} {kind.name} {number}")
        start = draw.choice(kept)[1] if kept and draw.random() < 0.05 else draw.choice(kind.samples)
        yield f"mutation {number}", kind.mutate(draw, start)


def fuzz(kind: Kind, judge: Judge, seed: int, mutations: int, save: Path | None) -> Counter[str]:
    """Judge the inputs of a kind.   -> how many were opened, refused, faults"""
    counts: Counter[str] = Counter()
    said: set[str] = set()
    began = time.perf_counter()
    for name, data in inputs(kind, seed, mutations):
        found = judge.verdict(kind, data)
        if name.startswith("sample") and found != "opened":
            raise SystemExit(f"{kind.name}: {name} is whole, and is not opened: {found}")
        counts[found if found in ("opened", "refused") else "fault"] += 1
        if found in ("opened", "refused"):
            continue
        if save is not None:
            (save / kind.name).mkdir(parents=True, exist_ok=True)
            (save / kind.name / name.replace(" ", "-")).write_bytes(data)
        if found.partition(": ")[0] not in said:
            said.add(found.partition(": ")[0])
            print(f"FAULT {kind.name}, seed {seed}, {name}: {found}: {data[:120]!r}", flush=True)
    kind.restore(judge.folder)
    figures = ", ".join(f"{counts[word]} {word}" for word in ("opened", "refused", "fault"))
    print(f"{kind.name}: {figures} in {time.perf_counter() - began:.1f} s, peak {peak_memory() / 2**20:.0f} MiB", flush=True)
    return counts


def shares(kinds: list[Kind], mutations: int) -> dict[str, int]:
    """Divide a number of mutations between kinds by their weights; each has at least one."""
    total = sum(kind.weight for kind in kinds)
    return {kind.name: max(1, round(mutations * kind.weight / total)) for kind in kinds}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", action="append", help="a kind of file, or the beginning of several (default: all)")
    parser.add_argument("--save", type=Path, help="a folder for the inputs of faults")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    print(f"seed {options.seed}", flush=True)
    total: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="minimoe-fuzz-") as name, use_backend("numpy"), contextlib.chdir(name):
        os.environ["MINIMOE_CACHE_DIR"] = str(Path(name) / "cache")
        folder = Path(name)
        kinds = make_kinds(folder)
        with contextlib.redirect_stdout(io.StringIO()):
            for kind in kinds:  # what they import and compile belongs to the idle process
                kind.use(folder)
        kinds = [kind for kind in kinds if any(kind.name.startswith(start) for start in options.kind or [""])]
        _, most = resource.getrlimit(resource.RLIMIT_AS)
        addresses = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (addresses + MOST_ADDRESSES, most))
        judge = Judge(folder)
        for kind in kinds:
            total += fuzz(kind, judge, options.seed, shares(kinds, options.mutations)[kind.name], options.save)
    print(", ".join(f"{total[word]} {word}" for word in ("opened", "refused", "fault")))
    return 1 if total["fault"] else 0


if __name__ == "__main__":
    sys.exit(main())
