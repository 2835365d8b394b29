"""Options that several commands share, and what they print."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

import click

from minimoe.cli.completion import backends, complete_setting, completing, sources

if TYPE_CHECKING:
    from minimoe.pretrained.loading import Loaded
    from minimoe.training.listener import Listener

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def option(*names: str, **settings: Any) -> Decorator:
    return click.option(*names, **settings)


backend_option = option(
    "--backend",
    metavar="NAME",
    help="numpy, numba, cupy, ... (default: the first that runs here)",
    shell_complete=completing(backends, files=False),
)
seed_option = option("--seed", type=click.IntRange(0), metavar="N", help="seed of weights, data, noise and dropout")
threads_option = option("--threads", type=click.IntRange(0), metavar="N", help="processor threads; 0: as many as this process may use")
set_option = option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="set a key, as in --set moe.top_k=1; may be repeated",
    shell_complete=complete_setting,
)
data_option = option(
    "--data", multiple=True, callback=lambda ctx, param, value: value or None, metavar="SRC", shell_complete=completing(sources),
    help="python-docs, python-code, python-mix, a text file or pipe, a folder, a pattern in quotes, a .jsonl, .json, .csv or .tsv "
    "(SRC:COLUMN); may be repeated, each with =WEIGHT; for a classifier: digits, or a folder of images",
)  # fmt: skip
json_option = option("--json", "as_json", is_flag=True, help="print JSON")
quiet_option = option("--quiet", is_flag=True, help="show no progress, only warnings; print the run's folder")


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
            self.fail(f"{value!r} is not a size: give 8GB, 500MB, or a number of bytes", param, ctx)
        return size


class Count(click.IntRange):
    """A whole number, which may have an exponent: 1000 or 1e3."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        exponent = isinstance(value, str) and re.fullmatch(r"\s*\d+(\.\d+)?[eE]\+?\d{1,3}\s*", value)
        number = float(value) if exponent else 0.5
        whole: Any = int(number) if number.is_integer() else value
        return super().convert(whole, param, ctx)


SHORT = {"--lr": "train.lr", "--batch-size": "train.batch_size", "--seq-len": "train.seq_len"}


def set_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --set and its short forms, --lr and others; the command gets all of them as `overrides`. Both for one key are refused."""

    @option("--lr", type=float, metavar="RATE", help="learning rate: short for --set train.lr=RATE")
    @option("--batch-size", type=Count(1), metavar="N", help="sequences in a batch: short for --set train.batch_size=N")
    @option("--seq-len", type=Count(1), metavar="N", help="tokens in a sequence: short for --set train.seq_len=N")
    @set_option
    @wraps(function)
    def with_overrides(*arguments: Any, overrides: tuple[str, ...], **others: Any) -> Any:
        given = {name: others.pop(name.removeprefix("--").replace("-", "_")) for name in SHORT}
        also_set = {override.partition("=")[0].strip() for override in overrides}
        for name, value in given.items():
            if value is not None and SHORT[name] in also_set:
                raise click.UsageError(f"{name} and --set {SHORT[name]} both set this key: keep one")
        short = tuple(f"{SHORT[name]}={value}" for name, value in given.items() if value is not None)
        return function(*arguments, overrides=overrides + short, **others)

    return with_overrides


# ---- what commands have in common ----------------------------------------------------------------------------------------------------


def listener_for(quiet: bool) -> Listener:
    """Return the listener that shows progress in the way that suits where the output goes; `quiet` silences the reading of texts too."""
    from minimoe.cli.display import listener
    from minimoe.data.progress import unsaid

    if quiet:
        click.get_current_context().with_resource(unsaid())
    return listener(quiet)


def open_loaded(run: str | None, max_memory: int | None = None) -> Loaded:
    """Open a trained model with its tokenizer, and name damaged checkpoints that were passed over."""
    from minimoe.pretrained.loading import open_model

    loaded = open_model(run, max_memory=max_memory)
    for problem in loaded.problems:
        click.echo(f"damaged: {problem}; using step {loaded.step}", err=True)
    return loaded


def print_json(value: Any) -> None:
    """Print one line of JSON; a number that is not finite becomes null."""
    import msgspec

    click.echo(msgspec.json.encode(value).decode())
