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
    from minimoe.trainer import Listener, TrainedRun

CONTROL = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
VERBS = ("train", "resume", "generate", "eval", "inspect", "compare", "runs", "config", "backends", "bench")


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
data_option = option("--data", metavar="SRC", help="python-docs, python-code, python-mix, a text file, or a folder of them")
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

    Without an argument: tiny-moe, a routed decoder, on Python's own documentation.
    """
    from minimoe.config import load_config

    resolved = load_config(config, overrides)
    if dry_run:
        from minimoe.inspection import show_plan

        show_plan(resolved, data=data, steps=steps, out=out, backend=backend, seed=seed, threads=threads)
        return
    from minimoe.trainer import train as start

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
    from minimoe.trainer import resume as go_on

    _finish(go_on(run, steps=steps, listener=_listener(quiet)), quiet)


def _listener(quiet: bool) -> Listener:
    from minimoe.progress import listener

    return listener(quiet)


def _finish(trained: TrainedRun, quiet: bool) -> None:
    """The last words of a training run: a sample of text, and where everything is."""
    if quiet:
        click.echo(trained.path)
        return
    from minimoe.generation import Sampling, default_prompt, generate

    click.echo("\nA sample:")
    try:
        for piece in generate(trained.model, trained.corpus.tokenizer, default_prompt(trained.corpus.tokenizer), 300, Sampling(top_k=40)):
            _write(piece)
    except UserError as error:  # the run is done and saved, whatever it has learnt
        _write(f"none: {error}")
    click.echo(f"\n\nrun: {trained.path}   validation loss {trained.val_loss:.4f}")
    click.echo(f"next: minimoe generate {trained.path} --prompt 'The '   |   minimoe inspect {trained.path}")


# ---- using what was trained ------------------------------------------------------------------------------------------------------------


@cli.command()
@click.argument("run", required=False)
@option("--prompt", metavar="TEXT", help="what to go on from (default: a new line)")
@option("--tokens", type=click.IntRange(1), default=300, metavar="N", show_default=True)
@option("--temperature", type=float, default=0.8, metavar="T", show_default=True, help="0: always the likeliest")
@option("--top-k", type=int, default=0, metavar="K", help="draw among the K likeliest; 0: all")
@option("--top-p", type=float, default=1.0, metavar="P", help="draw among the fewest that hold this probability")
@option("--seed", type=click.IntRange(0), default=0, metavar="N")
def generate(run: str | None, prompt: str | None, tokens: int, temperature: float, top_k: int, top_p: float, seed: int) -> None:
    """Write text with a trained model.

    Default: the newest run. The text comes as it is drawn.
    """
    from minimoe.generation import Sampling, default_prompt
    from minimoe.generation import generate as write

    how = Sampling(temperature, top_k, top_p, seed)
    loaded = _open(run)
    if prompt is None:
        prompt = default_prompt(loaded.tokenizer)
    else:
        loaded.tokenizer.encode(prompt, "prompt")  # refuses unknown characters before anything is shown
        _write(prompt)
    for piece in write(loaded.model, loaded.tokenizer, prompt, tokens, how):
        _write(piece)
    click.echo()


@cli.command(name="eval")
@click.argument("run", required=False)
@data_option
@json_option
def evaluate(run: str | None, data: str | None, as_json: bool) -> None:
    """Measure a trained model on held-out text.

    On the whole validation split of its own text, or on all of another.
    """
    from minimoe.inspection import evaluate_run

    result = evaluate_run(_open(run), data)
    if as_json:
        _print_json(result)
        return
    click.echo(f"{result['model']}: loss {result['loss']:.4f} nats a token, perplexity {result['perplexity']:.2f}", nl=False)
    click.echo(f", {result['tokens']:,} tokens of {result['source']} ({result['split']})")
    if any(result["expert_load_by_domain"].values()):
        from minimoe.progress import domains_table, show

        show(domains_table(result["expert_load_by_domain"]))


@cli.command()
@click.argument("what", metavar="RUN|CONFIG|PRESET")
@set_option
@json_option
def inspect(what: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Count parameters, FLOPs and memory.

    Total and active, part by part, nothing allocated; of a run also the load of its experts.
    """
    from minimoe.inspection import inspect as look

    report = look(what, overrides)
    if as_json:
        _print_json(report.to_dict())
    else:
        report.show()


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
    from minimoe.compare import compare as run_all

    def listener_for(name: str) -> Listener:
        if not quiet:
            click.echo(f"\n== {name}", err=True)
        return _listener(quiet)

    comparison = run_all(
        list(sources), budget=budget, seeds=seeds, overrides=overrides, data=data, steps=steps, backend=backend, listener_for=listener_for
    )
    from minimoe.progress import console

    console().print(comparison.table())
    click.echo(f"saved: {comparison.save(Path('runs'))}")


@cli.command()
@json_option
def runs(as_json: bool) -> None:
    """List the runs here."""
    from minimoe.run import list_runs

    rows = list_runs()
    if as_json:
        _print_json(rows)
        return
    if not rows:
        click.echo("no runs here yet: minimoe train starts one")
        return
    from minimoe.progress import runs_table, show

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
    from minimoe.inspection import backends_report, show_backends

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
    from minimoe.bench import profile_step
    from minimoe.config import load_config
    from minimoe.progress import show

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
    from minimoe.bench import bench_kernels as run_kernels
    from minimoe.bench import kernels_table
    from minimoe.config import load_config
    from minimoe.progress import show

    timings = run_kernels(load_config(config, overrides), backend or "auto")
    if as_json:
        _print_json([timing.to_dict() for timing in timings])
    else:
        show(kernels_table(timings))


# ---- parts -------------------------------------------------------------------------------------------------------------------------------


def _open(run: str | None) -> Any:
    """A trained model and its tokenizer; damaged checkpoints that were passed over are named."""
    from minimoe.loading import open_model

    loaded = open_model(run)
    for problem in loaded.problems:
        click.echo(f"damaged: {problem}; using step {loaded.step}", err=True)
    return loaded


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
