"""A run's folder: configuration, environment, metrics, status and checkpoints. docs/runs.md describes every file and field.

config.toml     the resolved configuration        metrics.jsonl   a line for every step
env.json        machine, libraries, data          status.json     running, finished, failed ...; step
samples.jsonl   what the model did at some steps  ../last         a text file next to the runs that names the newest
checkpoints/    see minimoe/runs/checkpoint.py
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from minimoe import files
from minimoe.config import Config, load_config, to_tables, to_toml
from minimoe.config.files import saved_names
from minimoe.errors import CheckpointError, ConfigError, UserError, printable
from minimoe.runs import checkpoint
from minimoe.runs.checkpoint import TOKENIZER
from minimoe.runs.environment import environment, is_alive, process_identity
from minimoe.runs.finding import find
from minimoe.runs.folders import check_free, clear, has_begun, next_folder, tidy_beside
from minimoe.runs.lock import LOCK, Lock, is_taken
from minimoe.runs.metrics_file import MetricsFile
from minimoe.runs.records import read_environment, read_status, status_to_change, valid_json, writing
from minimoe.runs.samples_file import SamplesFile

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from minimoe.runs.checkpoint import Arrays, Checkpoint

RUNS = Path("runs")
MOST_REASON = 1000  # characters of an error that status.json keeps
DATA = "data.txt"  # in a run's folder: the text that came through a pipe
KEPT = {DATA: "source", TOKENIZER: "tokenizer"}  # files of a run that keys of [data] name without a path, so that the folder may be moved


class Run:
    """The folder of one run. `checkpoint` is the one that was named when the run was opened, or None."""

    def __init__(self, path: Path, chosen: Path | None = None) -> None:
        self.path = path
        self.checkpoint = chosen
        self.lock = Lock(path)
        self.metrics_file = MetricsFile(path)
        self.samples_file = SamplesFile(path)

    def __fspath__(self) -> str:
        """A run serves wherever its folder's path does."""
        return str(self.checkpoint or self.path)

    def __repr__(self) -> str:
        status = self.status()
        return f"<run {printable(str(self.path))}: {status['state']}, step {status.get('step') or 0} of {status.get('steps') or '?'}>"

    # ---- making and finding ------------------------------------------------------------------------------------------------

    @classmethod
    def create(
        cls, config: Config, out: Path | None = None, root: Path = RUNS, extra: Mapping[str, Any] | None = None,
        kept: bytes | None = None, say: Callable[[str], None] = lambda _: None, keeps: Mapping[str, bytes] | None = None,
    ) -> "Run":  # fmt: skip
        """Create a run in `out`, which must be empty or absent; by default in `root/NAME-001`, counting up.

        extra: more fields for env.json (backend, SHA-256 of the data). kept: a text that cannot be read again; it becomes `data.txt`, and
        the run's source. keeps: other files that the run needs from its start on, by name. say: called if `out` held what a start that was
        killed left there.
        This process holds the run's lock from now on. Raises `ConfigError` if the folder holds anything else or cannot be written,
        `CheckpointError` if another process is training there.
        """
        run = cls.prepare(config, out, root, extra, kept, say, keeps)
        run.publish(root)
        return run

    @classmethod
    def prepare(
        cls, config: Config, out: Path | None, root: Path = RUNS, extra: Mapping[str, Any] | None = None,
        kept: bytes | None = None, say: Callable[[str], None] = lambda _: None, keeps: Mapping[str, bytes] | None = None,
    ) -> "Run":  # fmt: skip
        """Make a folder that becomes a run when it is published; what the run needs can be written before. See `create`."""
        fields = {**environment(), "weights": "seed", **(extra or {})}
        try:
            if out is None:
                path = next_folder(config.name, root)
            else:
                check_free(out)
                out.mkdir(parents=True, exist_ok=True)
                path = out
            run = cls(path)
            run.claim()
            try:
                run._clear(say)
                files.write_atomically(path / "env.json", files.to_json(fields))
                keeps = dict(keeps or {})
                if kept is not None:
                    keeps[DATA] = kept
                for name, data in keeps.items():
                    files.write_synced(path / name, data)
                paths = {key: str(path.absolute() / name) for name, key in KEPT.items() if name in keeps}
                config = replace(config, data=replace(config.data, **paths))
            except BaseException:
                run.release()
                raise
        except OSError as error:
            raise ConfigError(f"{out or root}: cannot be written: {files.reason(error)}") from error
        run.__dict__["config"] = config
        return run

    def _clear(self, say: Callable[[str], None]) -> None:
        """Empty the folder, now that no other process writes to it."""
        check_free(self.path)  # again: another process may have trained here before the lock was taken
        if clear(self.path):
            say(f"{self.path}: held only what a start that was killed left there: it is replaced")

    def publish(self, root: Path = RUNS) -> None:
        """Write config.toml, which makes the folder a run, and name it as the newest if it lies under `root`."""
        path, root = self.path.resolve(), root.resolve()
        self._write_config(self.config)
        del self.__dict__["config"]  # from now on it is what a reader of the file gets
        if path.is_relative_to(root):
            try:
                files.write_atomically(root / "last", f"{path.relative_to(root).as_posix()}\n")
            except OSError as error:
                raise ConfigError(f"{root / 'last'}: cannot be written: {files.reason(error)}") from error

    @classmethod
    def open(cls, path: "str | os.PathLike[str] | None" = None, root: Path = RUNS) -> "Run":
        """Open a run by its folder, its name under `root`, a checkpoint in it, or a file that names one (`last`, `best`); None: the newest.

        Raises `CheckpointError` with the nearest name if it does not exist.
        """
        return cls(*find(path, root))

    @property
    def name(self) -> str:
        """The folder's name: tiny-moe-001."""
        return self.path.resolve().name

    @cached_property
    def config(self) -> Config:
        """The configuration, read back from config.toml; a text or a tokenizer that the run keeps has its whole path."""
        with saved_names(self.path):
            return self.with_kept_text(load_config(self.path / "config.toml", say=lambda text: None))

    def replace_config(self, config: Config) -> None:
        """Write another configuration, as for a run that is resumed for more steps."""
        self._write_config(config)
        self.__dict__["config"] = config

    def _write_config(self, config: Config) -> None:
        with writing(self.path / "config.toml"):
            files.write_atomically(self.path / "config.toml", to_toml(self._movable(config)))

    # ---- a text that came through a pipe, a tokenizer that came with weights -------------------------------------------------

    def with_kept_text(self, config: Config) -> Config:
        """Return a saved configuration with the paths of `data.txt` and `tokenizer.json`, if the run keeps its text or tokenizer there."""
        paths = {}
        for name, key in KEPT.items():
            given, kept = getattr(config.data, key), self.path.absolute() / name
            if (given == name or Path(given).absolute() == kept) and kept.is_file():
                paths[key] = str(kept)
        return replace(config, data=replace(config.data, **paths)) if paths else config

    def short(self, path: str) -> str:
        """Return a path as files of the run name it: `data.txt` without its folder, so that this may be moved."""
        return next((name for name in KEPT if path == str(self.path.absolute() / name)), path)

    def _movable(self, config: Config) -> Config:
        return replace(config, data=replace(config.data, **{key: self.short(getattr(config.data, key)) for key in KEPT.values()}))

    def data_sha256(self) -> str | None:
        """Return the digest of the data that the run began with; None if env.json does not say."""
        data = read_environment(self.path).get("data")
        found = data.get("sha256") if isinstance(data, dict) else None
        return found if isinstance(found, str) else None

    def origin(self) -> dict[str, Any] | None:
        """Return what env.json says of the weights that the run started from: path, step, sha256. None if its seed drew them."""
        weights = read_environment(self.path).get("weights") or "seed"
        found: dict[str, Any] = {"path": weights} if isinstance(weights, str) else weights  # an earlier version wrote the path alone
        return None if weights == "seed" else found

    # ---- checkpoints -------------------------------------------------------------------------------------------------------

    @property
    def checkpoint_folder(self) -> Path:
        """Return the folder that holds the run's checkpoints."""
        return self.path / "checkpoints"

    def save(
        self,
        step: int,
        *,
        model: "Arrays",
        optimizer: "Arrays",
        state: Mapping[str, Any],
        tokenizer_json: str | None = None,
        best: bool = False,
        prune: bool = True,
    ) -> Path:
        """Write the checkpoint of a step, name it as the best if it is, and keep only the newest `train.keep` and the best if `prune`."""
        folder = self.checkpoint_folder / checkpoint.step_name(step)
        checkpoint.save_checkpoint(
            folder,
            model=model,
            optimizer=optimizer,
            state={**state, "step": step},
            config=to_tables(self._movable(self.config)),
            tokenizer_json=tokenizer_json,
        )
        if not read_status(self.path).get("begun"):
            self._note_begun()
        if best:
            self.note_best(step)
        if prune:
            self.prune()
        return folder

    def has_begun(self) -> bool:
        """Return True if the run has had a checkpoint: without one, its weights are lost."""
        return has_begun(self.path)

    def replace_state(self, step: int, state: Mapping[str, Any], best: bool) -> None:
        """Write another state into the checkpoint of a step, and name it as the best if it is."""
        checkpoint.replace_state(self.checkpoint_folder / checkpoint.step_name(step), {**state, "step": step})
        if best:
            self.note_best(step)

    def prune(self) -> None:
        """Keep only the newest `train.keep` checkpoints and the best."""
        checkpoint.prune(self.checkpoint_folder, self.config.train.keep, checkpoint.read_best(self.checkpoint_folder))

    def drop_bad(self, before: int) -> Path | None:
        """Remove the checkpoints after the newest good one of a step below `before`, and return that.

        It returns None, and removes nothing, if none is good.
        """
        folder = self.checkpoint_folder
        best = checkpoint.read_best(folder)
        for found in reversed(checkpoint.checkpoints(folder)):
            step = checkpoint.step_of(found) or 0
            if step < before and checkpoint.is_good(found, step == best):
                checkpoint.cut(folder, step)
                return found
        return None

    def note_best(self, step: int) -> None:
        """Name a checkpoint as the best, if it still exists."""
        if (self.checkpoint_folder / checkpoint.step_name(step)).is_dir():
            with writing(self.checkpoint_folder / "best"):
                checkpoint.write_best(self.checkpoint_folder, step)

    def newest_checkpoint(self) -> Path | None:
        """Return the folder of the newest checkpoint, damaged or not; None before the first."""
        found = checkpoint.checkpoints(self.checkpoint_folder)
        return found[-1] if found else None

    def load(self, optimizer: bool = True) -> "tuple[Checkpoint, list[str]]":
        """Load the checkpoint that was named when the run was opened, or the newest whole one; and say what is wrong with newer ones."""
        if self.checkpoint is not None:
            return checkpoint.load_checkpoint(self.checkpoint, optimizer=optimizer), []
        return checkpoint.newest_whole(self.checkpoint_folder, optimizer=optimizer)

    def go_back(self, step: int, best: int | None, metrics_sha256: str | None = None) -> list[str]:
        """Restore the folder to what it was right after the checkpoint of a step, when `best` was the best step so far.

        metrics_sha256: of the metrics up to that step, as its checkpoint says.   -> a line about each damaged line of metrics or samples
        Later checkpoints are removed before later metrics, so that a kill in between leaves no gap in the metrics. If a kill came after
        a checkpoint was written, but before it was named the best, that is done now.
        """
        folder = self.checkpoint_folder
        if folder.is_dir():
            with writing(folder):
                checkpoint.tidy(folder)
            checkpoint.cut(folder, step)
            if best is not None:
                self.note_best(best)
        return self.metrics_file.cut(step, metrics_sha256) + self.samples_file.cut(step)

    def metrics(self) -> list[dict[str, Any]]:
        """Return a dict for every step. An incomplete last line is left out; raises `CheckpointError` for any other damaged line."""
        return self.metrics_file.rows()

    def samples(self) -> list[dict[str, Any]]:
        """Return a dict for every sample of `train.sample_every`: its step and its text. Raises `CheckpointError` for a damaged line."""
        return self.samples_file.rows()

    def plot(self, load: bool = False) -> "Figure":
        """Return a picture of the losses and, with `load`, of the load of each expert; in a notebook it shows itself (extra `plot`).

        Raises `UserError` if matplotlib is missing, or if there is no step yet.
        """
        from minimoe.runs.plots import draw

        return draw({self.name: self.metrics()}, load=load)

    # ---- status ------------------------------------------------------------------------------------------------------------

    def claim(self) -> None:
        """Take the lock of the folder, which comes before any reading or writing by training. Raises `CheckpointError`."""
        with writing(self.path / LOCK):
            self.lock.take()
        status = read_status(self.path)
        if is_trained_by_an_earlier_version(status) and status["pid"] != os.getpid():
            self.release()
            raise CheckpointError(f"{self.path}: process {status['pid']} is still training this run: wait for it or stop it, then resume")

    def release(self) -> None:
        """Let other processes train here."""
        self.lock.release()

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Hold the lock; no other process trains here meanwhile. Raises `CheckpointError` if one does."""
        self.claim()
        try:
            yield
        finally:
            self.release()

    def start(self, **fields: Any) -> None:
        """Set the state to running, before anything else is written. Raises `CheckpointError` if another process trains this run."""
        self.claim()
        with writing(self.path):
            self._tidy()
        self.write_status("running", begun=self.newest_checkpoint() is not None, **fields)

    @contextmanager
    def training(self, step: Callable[[], int]) -> Iterator[None]:
        """Hold the lock while this process trains. An error that ends it becomes the state `failed`, at the `step` that it has come to.

        If not even that can be written, the state is `killed`, since the file says `running` and no process holds the lock.
        """
        with self.claimed():
            try:
                yield
            except Exception as error:
                with suppress(CheckpointError):
                    if self.status()["state"] == "running":
                        reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
                        self.write_status("failed", step=step(), error=" ".join(reason.split())[:MOST_REASON])
                raise
            finally:
                with suppress(OSError):
                    self._tidy()

    def _tidy(self) -> None:
        """Remove what writers that were killed left in the folder, and beside it."""
        for folder in (self.path, self.checkpoint_folder):
            if folder.is_dir():
                checkpoint.tidy(folder)
        tidy_beside(self.path)

    def write_status(self, state: str, **fields: Any) -> None:
        """Set the state (running, finished, interrupted, diverged, failed); fields that are not given keep their values."""
        owner = {"pid": os.getpid(), "process": process_identity(os.getpid())}
        passing = ("error", "reason")  # they say how one state came about
        self._change_status(lambda old: {**{key: old[key] for key in old if key not in passing}, **fields, "state": state, **owner})

    def _note_begun(self) -> None:
        """Note that from now on the weights are in checkpoints alone."""
        self._change_status(lambda before: {"state": "unknown", **before, "begun": True})

    def _change_status(self, changed: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        with writing(self.path / "status.json"):
            files.write_atomically(self.path / "status.json", valid_json(changed(status_to_change(self.path))) + "\n")

    def status(self) -> dict[str, Any]:
        """Return the state and its fields: `killed` if the file says running but no process trains, `unknown` if it cannot be read."""
        status = {"state": "unknown", "pid": None, **read_status(self.path)}
        if status["state"] == "running":
            taken = is_taken(self.path) if "begun" in status else None  # minimoe 0.1 took no lock
            if not (is_alive(status["pid"], status.get("process")) if taken is None else taken):
                status["state"] = "killed"
        return status


def is_trained_by_an_earlier_version(status: Mapping[str, Any]) -> bool:
    """Return True if the process of minimoe 0.1, which took no lock, that wrote a status.json is alive."""
    return status.get("state") == "running" and "begun" not in status and is_alive(status.get("pid"), status.get("process"))
