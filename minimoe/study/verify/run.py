"""Verifies a run's folder: each of its files by itself, and what they say of each other."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from msgspec import Struct

from minimoe.errors import CheckpointError, UserError
from minimoe.files import HIDDEN, reason
from minimoe.model.transformer import Transformer
from minimoe.reference.extensions import UnknownName
from minimoe.runs import metrics_lines, samples_file
from minimoe.runs.base import BASE, read_base
from minimoe.runs.checkpoint import checkpoints, read_best, step_name, step_of
from minimoe.runs.lock import LOCK, is_taken, read_owner
from minimoe.runs.records import Environment, Status, checked, read_regular
from minimoe.runs.run import Run
from minimoe.study.verify.checkpoint import Verified, misfits, not_finite
from minimoe.study.verify.checks import Check, Tell, named, ok, problem, skipped
from minimoe.training.differences import configuration_differences
from minimoe.untrusted import Malformed, parse_json_object

STATES = ("running", "killed", "finished", "interrupted", "diverged", "failed")
CUT_SHORT = ("running", "killed", "failed")
MISSING = "is missing"


def checks_of_run(run: Run, tell: Tell) -> Iterator[Check]:
    """Check everything in a run's folder. Checkpoints are listed before the metrics are read, since a run that trains adds to both."""
    running = is_taken(run.path) or run.status()["state"] == "running"
    found = [Verified(folder, f"checkpoints/{folder.name}") for folder in checkpoints(run.checkpoint_folder)]
    yield from _status(run, running)
    yield from _environment(run)
    for checkpoint in found:
        tell(checkpoint.what)
        made = list(checkpoint.checks())
        yield from made if checkpoint.folder.is_dir() else []  # a run that trains removes old ones
    newest = next((checkpoint for checkpoint in reversed(found) if checkpoint.config is not None), None)
    yield from _base(run, newest)
    yield from _configuration(run, newest)
    yield from _metrics(run, found, running)
    yield from _samples(run)
    yield from _best(run, newest)
    if not running:
        yield from _leftovers(run)


# ---- files of JSON -------------------------------------------------------------------------------------------------------------


def _object(path: Path, kind: type[Struct]) -> tuple[dict[str, Any], str]:
    """Return the object in a file, and what is wrong with it."""
    try:
        return checked(parse_json_object(read_regular(path)), kind), ""
    except FileNotFoundError:
        return {}, MISSING
    except OSError as error:
        return {}, f"cannot be read: {reason(error)}"
    except Malformed as error:
        return {}, f"is damaged: {error}"


def _status(run: Run, running: bool) -> Iterator[Check]:
    """Check what status.json says, also of the checkpoints."""
    what, (_, wrong) = "status.json", _object(run.path / "status.json", Status)
    status = run.status()
    state, step = status["state"], status.get("step")
    steps = [step_of(folder) for folder in checkpoints(run.checkpoint_folder)]
    if wrong == MISSING and not steps and not run.has_begun():
        yield ok(what, "none yet: the run has not begun, resume starts it")
        return
    if wrong or state not in STATES:
        yield problem(what, wrong or f"the state {state!r} is not known")
        return
    if running:
        owner = read_owner(run.path / LOCK)
        yield ok(what, f"{owner.named() if owner else 'a process'} trains it now")
        return
    if not steps and run.has_begun():
        yield problem(what, f"{state}, and no checkpoint is left: the weights are lost")
        return
    if state in ("finished", "interrupted") and step not in steps:
        newest = "none" if not steps else step_name(steps[-1] or 0)
        yield problem(what, f"{state} at step {step}, and the newest checkpoint is {newest}")
        return
    if state in ("killed", "failed"):
        why = f"{state}: {status['error']};" if status.get("error") else f"{state}:"
        yield ok(what, f"{why} resume {'continues from a checkpoint' if steps else 'starts anew'}")
        return
    yield ok(what, f"{state} at step {step}")


def _environment(run: Run) -> Iterator[Check]:
    fields, wrong = _object(run.path / "env.json", Environment)
    if wrong:
        yield problem("env.json", wrong)
        return
    versions = [f"{name} {fields[name]}" for name in ("minimoe", "numpy") if isinstance(fields.get(name), str)]
    yield ok("env.json", ", ".join([(fields.get("created") or "time unknown")[:10], *versions]))


# ---- the base of adapters ----------------------------------------------------------------------------------------------------


def _base(run: Run, newest: Verified | None) -> Iterator[Check]:
    """Check the frozen weights of a run with adapters: their digest, and names and shapes by the configuration."""
    if newest is None or newest.config is None or newest.state is None or newest.config.lora is None:
        return
    try:
        base = read_base(run.path, newest.state.base_sha256)
        shapes = {name: p.shape for name, p in Transformer(newest.config.model, seed=None).named_state()}
    except CheckpointError as error:
        yield problem(BASE, str(error).removeprefix(f"{run.path.name}/{BASE}: "))
        return
    sentences = [*misfits(base, shapes), *not_finite(base)]
    yield from (problem(BASE, sentence) for sentence in sentences)
    if not sentences:
        yield ok(BASE, f"SHA-256 is that of {newest.folder.name}; {sum(array.size for array in base.values()):,} weights, all finite")


# ---- the configuration ---------------------------------------------------------------------------------------------------------


def _configuration(run: Run, newest: Verified | None) -> Iterator[Check]:
    """Compare config.toml, which has no checksum, with the configuration in the newest checkpoint, which has."""
    what = "config.toml"
    try:
        config = run.config
    except UserError as error:
        missing_package = isinstance(error.__cause__, UnknownName)
        yield skipped(what, error) if missing_package else problem(what, error)
        return
    if newest is None or newest.config is None:
        yield ok(what, "can be read; no checkpoint exists to compare it with")
        return
    lines = list(configuration_differences(run.with_kept_text(newest.config), config).values())
    yield from (problem(what, f"since {newest.folder.name}: {line}") for line in lines)
    if not lines:
        yield ok(what, f"is the configuration of {newest.folder.name}")


# ---- the metrics ---------------------------------------------------------------------------------------------------------------


def _metrics(run: Run, found: list[Verified], running: bool) -> Iterator[Check]:
    """Check every line, and the digest of those up to each checkpoint."""
    what = metrics_lines.NAME
    try:
        data = run.metrics_file.path.read_bytes() if run.metrics_file.path.is_file() else b""
    except OSError as error:
        yield problem(what, f"cannot be read: {reason(error)}")
        return
    *lines, torn = data.split(b"\n")
    examined = metrics_lines.examine(lines)
    problems = [text.removeprefix(f"{what}: ") for text in examined.problems]
    known = [(checkpoint.folder.name, checkpoint.step, checkpoint.state.metrics_sha256) for checkpoint in found if checkpoint.state]
    if not problems:
        problems = [sentence for checkpoint in known for sentence in _unlike(examined, *checkpoint)]
    yield from (problem(what, text) for text in problems)
    if not problems:
        compared = sum(sha256 is not None for _, _, sha256 in known)
        ending = "; the last is incomplete after a kill: resume removes it" if torn and not running else ""
        yield ok(what, f"{len(lines):,} lines; {compared} of {len(known)} checkpoints confirm them{ending}")


def _unlike(examined: metrics_lines.Lines, name: str, last: int, sha256: str | None) -> Iterator[str]:
    """Yield what is wrong with the lines up to a checkpoint's step, `last`."""
    upto = [line for line, step in zip(examined.kept, examined.steps, strict=True) if step <= last]
    if len(upto) < last:
        yield f"ends at step {len(upto)}, before {name}"
    elif sha256 is not None and not metrics_lines.agree(upto, sha256):
        yield f"the lines of steps 1 to {last} are not those that {name} was written with (SHA-256)"


def _samples(run: Run) -> Iterator[Check]:
    """Check every line of the samples, if the run has any."""
    if not run.samples_file.path.exists():
        return
    try:
        rows = run.samples()
    except UserError as error:
        yield problem(samples_file.NAME, str(error).removeprefix(f"{run.samples_file.path}: "))
        return
    yield ok(samples_file.NAME, f"{len(rows):,} lines")


# ---- names and leftovers -------------------------------------------------------------------------------------------------------


def _best(run: Run, newest: Verified | None) -> Iterator[Check]:
    """Check that the file `best` names a checkpoint, the one that the newest checkpoint calls the best.

    A kill may come between a checkpoint and this name: resuming writes it again.
    """
    what = "checkpoints/best"
    there, step = (run.checkpoint_folder / "best").exists(), read_best(run.checkpoint_folder)
    expected = newest.state.best_step if newest is not None and newest.state is not None else None
    if there and step is None:
        yield problem(what, "names no checkpoint that is here")
    elif expected is not None and step != expected:
        found = f"names {step_name(step)}" if step is not None else MISSING
        text = f"{found}: the best is {step_name(expected)} (resume names it again)"
        yield ok(what, text) if run.status()["state"] in CUT_SHORT else problem(what, text)
    elif step is not None:
        yield ok(what, f"names {step_name(step)}")


def is_leftover(name: str) -> bool:
    """Return True for a name that is used while something is written, or while a process trains."""
    return HIDDEN.fullmatch(name) is not None or name.startswith(LOCK)


def _leftovers(run: Run) -> Iterator[Check]:
    """Name what killed writers left. It does no harm: the next that trains here removes it."""
    folders = [folder for folder in (run.path, run.checkpoint_folder) if folder.is_dir()]
    names = [entry.name for folder in folders for entry in sorted(folder.iterdir()) if is_leftover(entry.name)]
    if LOCK in names and not stat.S_ISREG((run.path / LOCK).lstat().st_mode):
        names.remove(LOCK)
        yield problem(LOCK, "is not a file that minimoe wrote: remove it, else no process can train here")
    if names:
        yield ok("leftovers", f"{named(names)}: after a kill; resume removes them")
