"""The command line: verbs and options; what they do stands elsewhere. Imports are inside the commands, so that --help answers at once.

Every error that a user can cause is one line on stderr and exit code 2; a diverged run ends with 3, an interrupted one with 130 or 143.
MINIMOE_DEBUG=1 shows the traceback.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from minimoe import __version__
from minimoe.errors import Interrupted, UserError, nearest

if TYPE_CHECKING:
    from minimoe.pretrained.loading import Loaded
    from minimoe.training.listener import Listener
    from minimoe.training.trained_run import TrainedRun

CONTROL = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
VERBS = ("train", "resume", "generate", "eval", "inspect", "convert", "compare", "runs", "config", "backends", "bench")


class Verbs(click.Group):
    """The commands in the order in which one meets them, and the nearest for one that does not exist."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:  # click would print an empty line first
            raise click.Abort from None

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and self.get_command(ctx, args[0]) is None:
            raise click.UsageError(f"no command {args[0]!r}{nearest(args[0], VERBS)}")
        return super().resolve_command(ctx, args)


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, message="minimoe %(version)s")
def cli() -> None:
    """Transformers and Mixtures of Experts from scratch: train, compare, sample and inspect toy models.

    `minimoe train` trains a Mixture-of-Experts language model on Python's own documentation.
    """


# ---- options that several commands share ----------------------------------------------------------------------------------------------

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def option(*names: str, **settings: Any) -> Decorator:
    return click.option(*names, **settings)


backend_option = option("--backend", metavar="NAME", help="numpy, numba, cupy, ... (default: the first that runs here)")
seed_option = option("--seed", type=click.IntRange(0), metavar="N", help="of weights, data, noise and dropout")
threads_option = option("--threads", type=click.IntRange(0), metavar="N", help="processor threads; 0: all")
set_option = option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="set a key, as in --set moe.top_k=1; may be repeated")
data_option = option("--data", metavar="SRC", help="python-docs, python-code, python-mix, a text file, a folder of them; digits: images")
json_option = option("--json", "as_json", is_flag=True, help="print JSON")
quiet_option = option("--quiet", is_flag=True, help="no progress; print the run's folder alone")


# ---- training -------------------------------------------------------------------------------------------------------------------------


@cli.command()
@click.argument("config", default="tiny-moe", metavar="[CONFIG|PRESET]")
@data_option
@option("--steps", type=click.IntRange(1), metavar="N", help="optimizer steps")
@option("--out", type=click.Path(path_type=Path), metavar="DIR", help="the run's folder (default: runs/NAME-001, counting up)")
@backend_option
@seed_option
@threads_option
@set_option
@option("--dry-run", is_flag=True, help="check everything, show the plan, and stop before the first step")
@quiet_option
def train(
    config: str, data: str | None, steps: int | None, out: Path | None, backend: str | None, seed: int | None, threads: int | None,
    overrides: tuple[str, ...], dry_run: bool, quiet: bool,
) -> None:  # fmt: skip
    """Train a preset or a TOML file.

    Without an argument: tiny-moe, a routed decoder, on Python's own documentation. The model's head says what is learnt: the next
    token (lm), hidden tokens (mlm: bert-tiny) or the class of an image (classifier: vit-tiny).
    """
    from minimoe.config import load_config

    resolved = load_config(config, overrides)
    if dry_run:
        from minimoe.study.dry_run import show_plan

        show_plan(resolved, data=data, steps=steps, out=out, backend=backend, seed=seed, threads=threads)
        return
    from minimoe.training.trainer import train as start

    options: dict[str, Any] = {"data": data, "steps": steps, "out": out, "backend": backend, "seed": seed, "threads": threads}
    _finish(start(resolved, **options, listener=_listener(quiet)), quiet)


@cli.command()
@click.argument("run", required=False)
@option("--steps", type=click.IntRange(1), metavar="N", help="go on up to this many steps in all")
@quiet_option
def resume(run: str | None, steps: int | None, quiet: bool) -> None:
    """Go on with a run that was stopped.

    Default: the newest. It ends with the very bytes of a run that never stopped.
    """
    from minimoe.training.trainer import resume as go_on

    _finish(go_on(run, steps=steps, listener=_listener(quiet)), quiet)


def _listener(quiet: bool) -> Listener:
    from minimoe.cli.display import listener

    return listener(quiet)


def _finish(trained: TrainedRun, quiet: bool) -> None:
    """The last words of a training run: what it has learnt, to look at, and where everything is."""
    if quiet:
        click.echo(trained.path)
        return
    task = trained.task
    click.echo()
    try:
        for piece in task.show(trained.model):
            _write(piece)
    except UserError as error:  # the run is done and saved, whatever it has learnt
        _write(f"none: {error}")
    accuracy = "" if task.chance is None else f"   {task.accuracy(trained.val_accuracy)}"
    click.echo(f"\n\nrun: {trained.path}   validation loss {trained.val_loss:.4f}{accuracy}")
    click.echo(f"next: {task.next_command(str(trained.path))}   |   minimoe inspect {trained.path}")


# ---- using what was trained ------------------------------------------------------------------------------------------------------------


class Size(click.ParamType):  # type: ignore[type-arg]
    """500MB, 8GB, or plain bytes, as an integer."""

    name = "size"
    units = {"kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12}

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        text = str(value).strip().lower()
        number, unit = (text[:-2], self.units[text[-2:]]) if text[-2:] in self.units else (text, 1)
        try:
            size = int(float(number) * unit)
        except (ValueError, OverflowError):
            size = 0
        if size <= 0:
            self.fail(f"{value!r} is no size: give one as 8GB, 500MB, or bytes", param, ctx)
        return size


@cli.command()
@click.argument("run", required=False, metavar="[RUN|FOLDER]")
@option("--prompt", "prompts", multiple=True, metavar="TEXT", help="what to go on from (default: a new line); several are one batch")
@option("--tokens", type=click.IntRange(1), default=300, metavar="N", show_default=True)
@option("--temperature", type=float, default=0.8, metavar="T", show_default=True, help="0: always the likeliest")
@option("--top-k", type=int, default=0, metavar="K", help="draw among the K likeliest; 0: all")
@option("--top-p", type=float, default=1.0, metavar="P", help="draw among the fewest that hold this probability")
@option("--repetition-penalty", type=float, default=1.0, metavar="R", help="above 1: what was there already becomes less likely")
@option("--stop", multiple=True, metavar="TEXT", help="end before this text; may be repeated")
@option("--seed", type=click.IntRange(0), default=0, metavar="N")
@option("--max-memory", type=Size(), metavar="SIZE", help="that a folder's weights may take, as 8GB: experts are let go and read again")
def generate(
    run: str | None, prompts: tuple[str, ...], tokens: int, temperature: float, top_k: int, top_p: float, repetition_penalty: float,
    stop: tuple[str, ...], seed: int, max_memory: int | None,
) -> None:  # fmt: skip
    """Write text with a trained model, or one of a folder.

    Default: the newest run. The text comes as it is drawn; of several prompts, each when it is complete.
    """
    from minimoe.generation.generation import Sampling, default_prompt, generate_texts
    from minimoe.generation.generation import generate as write

    how = Sampling(temperature, top_k, top_p, seed, repetition_penalty, stop)
    loaded = _open(run, max_memory)
    head = loaded.model.config.head
    if head != "lm":  # it may have no tokenizer either
        raise UserError(f"{loaded.folder}: generation needs a causal language model: this one has head = {head!r}; eval measures it")
    tokenizer = loaded.text
    for prompt in prompts:
        tokenizer.encode_prompt(prompt)  # refuses unknown characters before anything is shown
    try:
        if len(prompts) > 1:
            for row, text in generate_texts(loaded.model, tokenizer, prompts, tokens, how):
                _write(f"== prompt {row + 1} of {len(prompts)}\n{prompts[row]}{text}\n\n")
            return
        _write("".join(prompts))
        for piece in write(loaded.model, tokenizer, prompts[0] if prompts else default_prompt(tokenizer), tokens, how):
            _write(piece)
        click.echo()
    finally:
        _note_touched(loaded)


@cli.command(name="eval")
@click.argument("run", required=False)
@data_option
@json_option
def evaluate(run: str | None, data: str | None, as_json: bool) -> None:
    """Measure a trained model on held-out data.

    On the whole validation split of its own text or images, or on all of another text.
    """
    from minimoe.study.evaluate import evaluate_run

    result = evaluate_run(_open(run), data)
    summary = result.pop("summary")
    if as_json:
        _print_json(result)
        return
    click.echo(summary)
    if any(result["expert_load_by_domain"].values()):
        from minimoe.study.tables import domains_table, show

        show(domains_table(result["expert_load_by_domain"]))


@cli.command()
@click.argument("what", metavar="RUN|FOLDER|CONFIG|PRESET")
@set_option
@json_option
def inspect(what: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Count parameters, FLOPs and memory.

    Total and active, part by part, nothing allocated; of a run also the load of its experts, of a model folder which were touched.
    """
    from minimoe.study.inspect import inspect as look

    report = look(what, overrides)
    if as_json:
        _print_json(report.to_dict())
    else:
        report.show()


@cli.command()
@click.argument("source", metavar="RUN|FOLDER")
@click.argument("target", metavar="DST", type=click.Path(path_type=Path))
@option("--dtype", metavar="TYPE", help="of the file: float32, bfloat16, float16, float64 (default: as the weights are)")
@option("--upcycle", type=click.IntRange(2), metavar="N", help="make a run of a dense model, each layer N copies of its dense one")
@set_option
def convert(source: str, target: Path, dtype: str | None, upcycle: int | None, overrides: tuple[str, ...]) -> None:
    """Write a model as a folder that transformers opens.

    With --upcycle: a dense model as a routed run, which resume trains; --set then says how.
    """
    from minimoe.study import convert as conversion

    if upcycle is None:
        if overrides:
            raise UserError("--set goes with --upcycle: a model that is only converted stays what it is")
        click.echo(conversion.convert(source, target, dtype))
        return
    if dtype is not None:
        raise UserError("--dtype goes with a model folder: a run keeps float32 weights (--set train.dtype)")
    click.echo(conversion.upcycle(source, target, upcycle, overrides))


@cli.command()
@click.argument("sources", nargs=-1, required=True, metavar="A B ...")
@option("--budget", type=click.Choice(["steps", "tokens", "flops", "seconds"]), default="steps", show_default=True, help="what is equal")
@option("--seeds", type=click.IntRange(1), default=1, metavar="N", show_default=True, help="train each with seeds 0 to N-1")
@option("--steps", type=click.IntRange(1), metavar="N", help="steps of the first")
@data_option
@backend_option
@set_option
@quiet_option
def compare(
    sources: tuple[str, ...], budget: str, seeds: int, steps: int | None, data: str | None, backend: str | None, overrides: tuple[str, ...],
    quiet: bool,
) -> None:  # fmt: skip
    """Set configurations or runs side by side.

    Configurations are trained at equal cost; finished runs are read.
    """
    from minimoe.study.compare import compare as run_all

    def listener_for(name: str) -> Listener:
        if not quiet:
            click.echo(f"\n== {name}", err=True)
        return _listener(quiet)

    comparison = run_all(
        list(sources), budget=budget, seeds=seeds, overrides=overrides, data=data, steps=steps, backend=backend, listener_for=listener_for
    )
    from minimoe.study.tables import console

    console().print(comparison.table())
    click.echo(f"saved: {comparison.save(Path('runs'))}")


@cli.command()
@json_option
def runs(as_json: bool) -> None:
    """List the runs here."""
    from minimoe.runs.run import list_runs

    rows = list_runs()
    if as_json:
        _print_json(rows)
        return
    if not rows:
        click.echo("no runs here yet: minimoe train starts one")
        return
    from minimoe.study.tables import runs_table, show

    show(runs_table(rows))


@cli.command()
@click.argument("preset", required=False)
def config(preset: str | None) -> None:
    """Print a preset as commented TOML.

    Something to start from; without a name, the list of presets.
    """
    from minimoe.config import preset_names, preset_text

    click.echo("\n".join(preset_names()) if preset is None else preset_text(preset), nl=preset is None)


# ---- backends and timings ---------------------------------------------------------------------------------------------------------------


@cli.group(invoke_without_command=True)
@json_option
@click.pass_context
def backends(ctx: click.Context, as_json: bool) -> None:
    """Show the backends here, and check them."""
    if ctx.invoked_subcommand is not None:
        return
    from minimoe.study.backends import backends_report, show_backends

    if as_json:
        _print_json(backends_report())
    else:
        show_backends()


@backends.command(name="check")
@click.argument("name")
@option("--kernel", metavar="K", help="the cases of one kernel alone, or of one part of the array layer")
@json_option
def check_backend(name: str, kernel: str | None, as_json: bool) -> None:
    """Run the conformance suite on a backend, and print what to do about what fails."""
    from minimoe.testing.report import check_backend as check

    sys.exit(check(name, kernel, as_json))


@cli.group()
def bench() -> None:
    """Timings on this machine."""


@bench.command(name="step")
@click.argument("config", default="tiny-moe", metavar="[CONFIG|PRESET]")
@backend_option
@set_option
@json_option
def bench_step(config: str, backend: str | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """Where the time of a training step goes, kernel by kernel."""
    from minimoe.config import load_config
    from minimoe.study.bench import profile_step
    from minimoe.study.tables import show

    profile = profile_step(load_config(config, overrides), backend or "auto")
    if as_json:
        _print_json(profile.to_dict())
    else:
        show(profile.table())


@bench.command(name="kernels")
@click.argument("config", default="tiny-moe", metavar="[CONFIG|PRESET]")
@backend_option
@set_option
@json_option
def bench_kernels(config: str, backend: str | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """Each kernel against its reference, on the shapes of a training step."""
    from minimoe.config import load_config
    from minimoe.study.bench import bench_kernels as run_kernels
    from minimoe.study.bench import kernels_table
    from minimoe.study.tables import show

    timings = run_kernels(load_config(config, overrides), backend or "auto")
    if as_json:
        _print_json([timing.to_dict() for timing in timings])
    else:
        show(kernels_table(timings))


# ---- parts -------------------------------------------------------------------------------------------------------------------------------


def _open(run: str | None, max_memory: int | None = None) -> Loaded:
    """A trained model and its tokenizer; damaged checkpoints that were passed over are named."""
    from minimoe.pretrained.loading import open_model

    loaded = open_model(run, max_memory=max_memory)
    for problem in loaded.problems:
        click.echo(f"damaged: {problem}; using step {loaded.step}", err=True)
    return loaded


def _note_touched(loaded: Loaded) -> None:
    """Keep for `inspect` which experts of a model folder were used."""
    from minimoe.pretrained.expert_usage import note

    note(loaded.folder, [loaded.model.backend.to_host(rows) for rows in loaded.model.expert_rows])


def _print_json(value: Any) -> None:
    """One line of JSON; what is not finite becomes null, which JSON has."""
    import msgspec

    click.echo(msgspec.json.encode(value).decode())


def _write(text: str) -> None:
    """Text at once, whatever the output can show; a terminal gets no control characters, which a young model writes too."""
    if sys.stdout.isatty():
        text = text.translate(CONTROL)
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, errors="replace").decode(encoding))
    sys.stdout.flush()


def _fail(message: str, code: int) -> NoReturn:
    if os.environ.get("MINIMOE_DEBUG") == "1":
        traceback.print_exc()
    click.echo(f"minimoe: {' '.join(message.split())}", err=True)
    sys.exit(code)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; ends the process with its exit code."""
    try:
        sys.exit(cli.main(args=arguments, prog_name="minimoe", standalone_mode=False) or 0)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help() if error.ctx else "")
        sys.exit(2)
    except click.ClickException as error:
        _fail(error.format_message(), 2)
    except UserError as error:
        _fail(str(error), error.exit_code)
    except Interrupted as error:
        _fail(str(error), error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        _fail("interrupted", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader of a pipe went away: nothing more to say
        sys.exit(1)
    except MemoryError as error:
        _fail(f"out of memory: {error}: take a smaller train.batch_size, train.seq_len or model", 2)
    except OSError as error:
        _fail(f"{error.filename or 'input or output'}: {error.strerror or error}", 2)
