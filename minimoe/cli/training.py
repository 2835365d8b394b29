"""`minimoe train` and `minimoe resume`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from minimoe.cli.completion import completing, configurations, runs
from minimoe.cli.options import (
    Count,
    backend_option,
    data_option,
    listener_for,
    option,
    quiet_option,
    seed_option,
    set_options,
    threads_option,
)  # fmt: skip
from minimoe.cli.streams import write, write_all
from minimoe.errors import UserError
from minimoe.hints import command

if TYPE_CHECKING:
    from minimoe.training.trained_run import TrainedRun


class WithNames(click.Command):
    """A command whose help lists the routers and optimizers, those of installed packages included."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from minimoe.reference import optimizers, routers

        with formatter.section("Names"):
            formatter.write_dl([("moe.router", ", ".join(routers.names())), ("train.optimizer", ", ".join(optimizers.names()))])


@click.command(cls=WithNames)
@click.argument("config", required=False, metavar="[CONFIG|PRESET]", shell_complete=completing(configurations))
@option(
    "--init", metavar="RUN|FOLDER", shell_complete=completing(runs),
    help="start from the weights of a run, a checkpoint or a model folder; without CONFIG, also as it is configured",
)  # fmt: skip
@option("--freeze", multiple=True, metavar="PATTERN", help="keep parameters as they are, as in --freeze 'embed*'; may be repeated")
@data_option
@option("--steps", type=Count(1), metavar="N", help="optimizer steps")
@option("--out", type=click.Path(path_type=Path), metavar="DIR", help="the run's folder (default: runs/NAME-001, counting up)")
@backend_option
@seed_option
@threads_option
@set_options
@option("--dry-run", is_flag=True, help="check everything, show the plan, and stop before the first step")
@option("--find-lr", is_flag=True, help="instead, test rates from 1e-6 to 10 in 200 steps (or --steps), and suggest a train.lr")
@quiet_option
def train(
    config: str | None, init: str | None, freeze: tuple[str, ...], data: tuple[str, ...] | None, steps: int | None, out: Path | None,
    backend: str | None, seed: int | None, threads: int | None, overrides: tuple[str, ...], dry_run: bool, find_lr: bool, quiet: bool,
) -> None:  # fmt: skip
    """Train a preset or a TOML file.

    The default is tiny-moe, a routed decoder, on Python's own documentation. The model's head decides what is learned: the next
    token (lm), hidden tokens (mlm: bert-tiny) or the class of an image (classifier: vit-tiny, vit-folder). With --init the run
    starts from weights that were trained before.
    """
    options: dict[str, Any] = {"data": data, "backend": backend, "seed": seed, "threads": threads, "freeze": freeze}
    if find_lr:
        if dry_run or out is not None:
            raise UserError(f"--find-lr leaves no run behind: leave out {'--dry-run' if dry_run else '--out'}")
        show_range_test(config, init, steps, options, overrides, quiet)
        return
    options |= {"steps": steps, "out": out}
    if dry_run:
        from minimoe.study.dry_run import show_plan
        from minimoe.training.starting import configured

        resolved, weights = configured(config, init, overrides)
        show_plan(resolved, weights=weights, **options)
        return
    from minimoe.training.starting import train as start

    show_result(start(config, init=init, overrides=overrides, **options, listener=listener_for(quiet)), quiet)


@click.command()
@click.argument("run", required=False, shell_complete=completing(runs))
@option("--steps", type=Count(1), metavar="N", help="continue up to this many steps in all")
@option("--patience", type=Count(0), metavar="N", help="evaluations without a better loss that end the run; 0: any number")
@quiet_option
def resume(run: str | None, steps: int | None, patience: int | None, quiet: bool) -> None:
    """Continue a run that was stopped.

    The newest run is the default. A resumed run ends with the same bytes as one that never stopped.
    """
    from minimoe.training.starting import resume as resume_run

    show_result(resume_run(run, steps=steps, patience=patience, listener=listener_for(quiet)), quiet)


def show_range_test(
    source: str | None, init: str | None, steps: int | None, options: dict[str, Any], overrides: tuple[str, ...], quiet: bool
) -> None:
    """Test learning rates, and show the loss over the rate, the rate to take, and the command that takes it; if `quiet`, only the rate."""
    from minimoe.study.find_lr import STEPS, find_lr
    from minimoe.training.starting import configured, with_options

    resolved, weights = configured(source, init, overrides)
    config = with_options(resolved, **options)
    found = find_lr(config, STEPS if steps is None else steps, listener_for(quiet), weights)
    rate = found.suggested
    if quiet:
        click.echo(rate)
        return
    click.echo(f"\n{found.chart(config.train.lr)}\n")
    end = f"it diverged at {found.rates[-1]:.1e}" if found.diverged else f"it had not diverged at {found.rates[-1]:.1e}"
    click.echo(f"95% of the fall was reached at a rate of {found.rates[found.reached]:.1e}; {end}.")
    click.echo(f"suggested: train.lr = {rate}, a third of that (now {config.train.lr}); no run was left behind")
    sets = [*overrides, f"train.lr={rate}"] + ([f"train.min_lr={rate / 10:.1e}"] if config.train.min_lr >= rate else [])
    words = [] if source is None else [source]
    for key, value in {"init": init, **options}.items():
        for one in value if isinstance(value, tuple) else () if value is None else (value,):  # --data and --freeze may be repeated
            words += [f"--{key}", str(one)]
    words += [word for text in sets for word in ("--set", text)]
    click.echo(f"next: {command('train', *words)}")


def show_result(trained: TrainedRun, quiet: bool) -> None:
    """Show what the model has learned, where the run's folder is, and which command comes next."""
    if quiet:
        click.echo(trained.path)
        return
    from minimoe.study.tables import show

    task = trained.task
    click.echo()
    try:
        write_all(task.show(trained.model))
    except UserError as error:  # the run is done and saved, whatever it has learned
        write(f"none: {error}")
    accuracy = "" if task.chance is None else f"   {task.accuracy(trained.val_accuracy)}"
    capped = trained.metrics[-1].get("val_batches")
    over = "" if capped is None else f" over {capped[0]:,} of {capped[1]:,} batches"
    bits = "" if trained.val_bits_per_byte is None else f"   {trained.val_bits_per_byte:.4f} bits per byte"
    click.echo("\n")
    show(f"run: {trained.path}   validation loss {trained.val_loss:.4f}{over}{bits}{accuracy}")
    for line in remarks(trained):
        show(line)
    click.echo(f"next: {task.next_command(trained.path)}\n      {command('inspect', trained.path)}")


def remarks(trained: TrainedRun) -> Iterator[str]:
    """Say why a run ended early, which checkpoint is the best if it is not the last, and what to do about experts that died."""
    from minimoe.figures import number
    from minimoe.study.collapse import remedies_text

    last, status = trained.metrics[-1], trained.run.status()
    if status.get("reason"):
        yield f"ended early at step {last['step']} of {status['steps']}: {status['reason']}"
    if trained.best is not None and trained.best[0] != last["step"]:
        step, loss = trained.best
        of_last = last.get("val_loss_sampled", last["val_loss"])
        yield f"best: step {step}, validation loss {loss:.4f} (the last, over the same batches: {number(of_last)})"
        yield f"      {trained.task.next_command(trained.path / 'checkpoints' / 'best')}"
    yield from remedies_text(trained.config, trained.metrics)
