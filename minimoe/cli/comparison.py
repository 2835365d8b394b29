"""`minimoe compare` and `minimoe bench`: models side by side, and where the time of a training step goes."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from minimoe.cli.completion import completing, configurations, runs
from minimoe.cli.options import Count, backend_option, data_option, json_option, listener_for, option, print_json, quiet_option, set_option
from minimoe.errors import UserError

if TYPE_CHECKING:
    from minimoe.study.compare import Comparison
    from minimoe.training.listener import Listener


@click.command()
@click.argument("sources", nargs=-1, required=True, metavar="A B ...", shell_complete=completing(configurations, runs))
@option("--budget", type=click.Choice(["steps", "tokens", "flops", "seconds"]), default="steps", show_default=True, help="equal cost in")
@option("--seeds", type=click.IntRange(1), default=1, metavar="N", show_default=True, help="train each with seeds 0 to N-1")
@option("--steps", type=Count(1), metavar="N", help="steps of the first model")
@option("--init", metavar="RUN|FOLDER", help="with --vary: start each from these weights, as train --init does")
@option("--vary", multiple=True, metavar="KEY=A,B,...", help="train one configuration with each value; repeated: with each combination")
@data_option
@backend_option
@set_option
@json_option
@quiet_option
def compare(
    sources: tuple[str, ...], budget: str, seeds: int, steps: int | None, init: str | None, vary: tuple[str, ...],
    data: tuple[str, ...] | None, backend: str | None, overrides: tuple[str, ...], as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Compare configurations or runs side by side.

    Configurations are trained at equal cost; finished runs are read. With --vary one configuration is trained with every combination of the
    values given; the same command goes on where it was stopped, and does not train again what is finished.
    """
    from minimoe.study.compare import compare as compare_all
    from minimoe.study.compare import sweep

    def named_listener(name: str) -> Listener:
        if not quiet:
            click.echo(f"\n== {name}", err=True)
        return listener_for(quiet)

    options: dict[str, Any] = {
        "budget": budget, "seeds": seeds, "overrides": overrides, "data": data, "steps": steps, "backend": backend,
        "listener_for": named_listener,
    }  # fmt: skip
    if vary:
        source, *others = sources
        if others:
            raise UserError(f"compare: --vary is for one configuration, got {len(sources)}: compare the runs of two sweeps by their names")
        say = (lambda text: None) if quiet else partial(click.echo, err=True)
        comparison: Comparison = sweep(source, vary, **options, init=init, say=say)
    elif init is not None:
        raise UserError("compare: --init goes with --vary, which trains one configuration several times: runs are compared by their names")
    else:
        comparison = compare_all(list(sources), **options)
    from minimoe.study.tables import show

    saved = comparison.save(Path("runs"))
    if as_json:
        print_json({**comparison.to_dict(), "saved": str(saved)})
        return
    show(comparison.table())
    if comparison.best_text:
        click.echo(comparison.best_text)
    click.echo(f"saved: {saved}")


@click.group()
def bench() -> None:
    """Measure times on this machine."""


@bench.command(name="step")
@click.argument("config", default="tiny-moe", metavar="[CONFIG|PRESET]", shell_complete=completing(configurations))
@backend_option
@set_option
@json_option
def bench_step(config: str, backend: str | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """Show where the time of a training step goes, kernel by kernel."""
    from minimoe.config import load_config
    from minimoe.study.bench import profile_step
    from minimoe.study.tables import show

    profile = profile_step(load_config(config, overrides), backend or "auto")
    if as_json:
        print_json(profile.to_dict())
    else:
        show(profile.table())


@bench.command(name="kernels")
@click.argument("config", default="tiny-moe", metavar="[CONFIG|PRESET]", shell_complete=completing(configurations))
@backend_option
@set_option
@json_option
def bench_kernels(config: str, backend: str | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """Time each kernel against its reference, on the shapes of a training step."""
    from minimoe.config import load_config
    from minimoe.study.bench import bench_kernels as time_kernels
    from minimoe.study.bench import kernels_table
    from minimoe.study.tables import show

    timings = time_kernels(load_config(config, overrides), backend or "auto")
    if as_json:
        print_json([timing.to_dict() for timing in timings])
    else:
        show(kernels_table(timings))
