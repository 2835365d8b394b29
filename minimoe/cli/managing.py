"""`minimoe runs`: lists runs, and tags, renames, removes and prunes them.

A filter only chooses what is listed. What changes a run takes it by name, so that nobody removes what he meant to list.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from minimoe.cli.options import json_option, option, print_json
from minimoe.cli.plotting import csv_option, write_lines
from minimoe.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

SORTS = ("name", "created", "step", "loss", "validation", "parameters", "size")
STATES = ("running", "killed", "finished", "interrupted", "diverged", "failed", "unknown", "damaged")


@click.command()
@click.argument("names", nargs=-1, metavar="[RUN]...")
@option(
    "--sort", "by", type=click.Choice(SORTS), default="created", metavar="FIELD",
    help=f"{', '.join(SORTS)}: A to Z, oldest, lowest or smallest first (default: created)",
)  # fmt: skip
@option("--reverse", is_flag=True, help="the other way round")
@option(
    "--state", "states", multiple=True, type=click.Choice(STATES), metavar="STATE",
    help=f"only runs in this state ({', '.join(STATES)}); may be repeated",
)  # fmt: skip
@option("--tagged", multiple=True, metavar="TAG", help="only runs with this tag; may be repeated")
@option("--match", "pattern", metavar="GLOB", help="only runs whose name matches, as in --match 'tiny-*'")
@csv_option("write the list as CSV")
@json_option
@option("--tag", "add", multiple=True, metavar="TAG", help="put a tag on the runs that are named; may be repeated")
@option("--untag", "drop", multiple=True, metavar="TAG", help="take a tag from them; may be repeated")
@option("--rename", nargs=2, metavar="OLD NEW", help="give a run another name")
@option("--rm", "removes", is_flag=True, help="remove the runs that are named, with everything in their folders")
@option("--prune", "prunes", is_flag=True, help="remove the optimizer state of finished runs, or of those that are named")
@option("--dry-run", "dry", is_flag=True, help="with --rm or --prune: show what would be removed, and change nothing")
@option("--yes", is_flag=True, help="with --rm: do not ask")
def runs(
    names: tuple[str, ...], by: str, reverse: bool, states: tuple[str, ...], tagged: tuple[str, ...], pattern: str | None, csv: str | None,
    as_json: bool, add: tuple[str, ...], drop: tuple[str, ...], rename: tuple[str, str] | None, removes: bool, prunes: bool, dry: bool,
    yes: bool,
) -> None:  # fmt: skip
    """List the runs here, or tag, rename, remove or prune runs.

    Without an action, list them, or those that are named. Filters (--state, --tagged, --match) are for the list alone: an action takes
    runs by name. Pruned runs can be used as before, but not resumed.
    """
    actions = {"--tag": bool(add), "--untag": bool(drop), "--rename": rename is not None, "--rm": removes, "--prune": prunes}
    chosen = [name for name, given in actions.items() if given]
    filters = {"--state": bool(states), "--tagged": bool(tagged), "--match": pattern is not None, "--csv": csv is not None}
    _check(chosen, [name for name, given in filters.items() if given], names, dry, yes)
    if add or drop:
        _tag(names, add, drop, as_json)
    elif rename is not None:
        _rename(*rename, as_json)
    elif removes:
        _remove(names, dry, yes, as_json)
    elif prunes:
        _prune(names, dry, as_json)
    else:
        _list(names, {"states": states, "tags": tagged, "pattern": pattern}, by, reverse, csv, as_json)


def _check(actions: Sequence[str], filters: Sequence[str], names: Sequence[str], dry: bool, yes: bool) -> None:
    """Refuse options that do not go together."""
    if actions and filters:
        raise UserError(f"{actions[0]} takes runs by name, and {filters[0]} is for the list alone: list first, then name the runs")
    if len(actions) > 1 and set(actions) != {"--tag", "--untag"}:
        raise UserError(f"{actions[0]} and {actions[1]} do not go together: give one after the other")
    if "--tag" in actions and not names:
        raise UserError("--tag puts a tag on runs: name them, as in minimoe runs RUN --tag TAG (--tagged TAG lists those that have it)")
    if ("--untag" in actions or "--rm" in actions) and not names:
        raise UserError(f"{actions[0]} needs the runs by name, as in minimoe runs {actions[0]} RUN (minimoe runs lists them)")
    if "--rename" in actions and names:
        raise UserError(f"--rename takes two names, OLD and NEW, and nothing else: {names[0]!r} is too much")
    if dry and not set(actions) & {"--rm", "--prune"}:
        raise UserError("--dry-run goes with --rm or --prune")
    if yes and "--rm" not in actions:
        raise UserError("--yes goes with --rm")


def _folders(names: Sequence[str]) -> list[Path]:
    """Return the folders of runs, each once. Raises `CheckpointError` for what is no run."""
    from minimoe.runs.finding import find_folder
    from minimoe.runs.run import RUNS

    found = {folder.absolute(): folder for folder in (find_folder(name, RUNS) for name in names)}
    return list(found.values())


# ---- the list ------------------------------------------------------------------------------------------------------------------


def _list(names: Sequence[str], chosen: dict[str, Any], by: str, reverse: bool, csv: str | None, as_json: bool) -> None:
    from minimoe.runs.listing import describe, list_runs, select_runs, sort_runs
    from minimoe.runs.run import Run
    from minimoe.runs.tabular import runs_csv

    known = [describe(Run(folder)) for folder in _folders(names)] if names else list_runs()
    rows = sort_runs(select_runs(known, **chosen), by, reverse)
    if csv is not None:
        write_lines(csv, runs_csv(rows))
    if as_json:
        print_json(rows)
    if as_json or csv is not None:
        return
    if not rows:
        click.echo(f"none of {len(known)} runs matches" if known else "no runs here yet: minimoe train starts one")
        return
    from minimoe.figures import file_size
    from minimoe.study.tables import runs_table, show

    show(runs_table(rows))
    if len(rows) > 1:
        click.echo(f"{len(rows)} runs, {file_size(sum(row['bytes'] for row in rows))}")


# ---- what changes runs -----------------------------------------------------------------------------------------------------------


def _tag(names: Sequence[str], add: Sequence[str], drop: Sequence[str], as_json: bool) -> None:
    from minimoe.runs.tags import change_tags, check_tag

    for tag in (*add, *drop):
        check_tag(tag)
    tags = {folder: change_tags(folder, add, drop) for folder in _folders(names)}
    if as_json:
        print_json([{"name": folder.name, "tags": now} for folder, now in tags.items()])
        return
    for folder, now in tags.items():
        click.echo(f"{folder}: {' '.join(now) or 'no tags'}")


def _rename(old: str, new: str, as_json: bool) -> None:
    from minimoe.runs.managing import rename
    from minimoe.runs.references import references
    from minimoe.runs.run import RUNS

    (folder,) = _folders([old])
    named = references(folder, RUNS)
    now = rename(folder, new, RUNS)
    if as_json:
        print_json({"old": folder.name, "name": now.name, "named_by": named})
        return
    click.echo(f"{folder} is now {now}")
    for where in named:
        click.echo(f"{where} still names {folder.name}")


def _remove(names: Sequence[str], dry: bool, yes: bool, as_json: bool) -> None:
    from minimoe.figures import file_size
    from minimoe.runs.managing import check_removable, remove
    from minimoe.runs.references import references
    from minimoe.runs.run import RUNS
    from minimoe.runs.sizes import folder_bytes

    sizes = {}
    for folder in _folders(names):  # all are checked before the first is removed
        check_removable(folder)
        sizes[folder] = folder_bytes(folder)
    total = sum(sizes.values())
    gone = {folder.name for folder in sizes}
    found = [(folder, where) for folder in sizes for where in references(folder, RUNS)]
    named = [f"{where} names {folder.name}" for folder, where in found if Path(where).parent.name not in gone]
    if not (dry or as_json):
        for line in named:
            click.echo(line, err=True)
    if not (dry or yes):
        what = ", ".join(f"{folder} ({file_size(count)})" for folder, count in sizes.items())
        if not sys.stdin.isatty():
            raise UserError(f"--rm asks before it removes {what}, and there is no terminal to ask on: give --yes")
        if not click.confirm(f"remove {what}?", err=True):
            raise UserError("nothing was removed")
    for folder, count in sizes.items():
        if not dry:
            remove(folder, RUNS)
        if not as_json:
            click.echo(f"{'would remove' if dry else 'removed'} {folder} ({file_size(count)})")
    if as_json:
        rows = [{"name": folder.name, "bytes": count} for folder, count in sizes.items()]
        print_json({"removed": [] if dry else rows, "would_remove": rows if dry else [], "bytes": total, "named_by": named})


def _prune(names: Sequence[str], dry: bool, as_json: bool) -> None:
    from minimoe.figures import file_size
    from minimoe.runs.finding import run_names
    from minimoe.runs.managing import check_prunable, prune
    from minimoe.runs.run import RUNS, Run
    from minimoe.runs.sizes import optimizer_bytes

    if names:
        folders = _folders(names)
        for folder in folders:
            check_prunable(folder)
    else:
        folders = [RUNS / name for name in run_names(RUNS) if Run(RUNS / name).status()["state"] == "finished"]
    sizes = {folder: count for folder in folders if (count := optimizer_bytes(folder))}
    freed = {folder: count if dry else prune(folder) for folder, count in sizes.items()}
    left = {} if dry else {folder.name: count for folder in sizes if (count := optimizer_bytes(folder))}
    total = sum(freed.values())
    if as_json:
        rows = [{"name": folder.name, "bytes": count} for folder, count in freed.items()]
        print_json({"pruned": [] if dry else rows, "would_prune": rows if dry else [], "bytes": total})
        return
    for folder, count in freed.items():
        click.echo(f"{folder}: {file_size(count)} of optimizer state{'' if dry else ' removed'}")
    for name, count in left.items():
        click.echo(f"{name}: {file_size(count)} stay, in checkpoints that are damaged (minimoe verify {name})", err=True)
    if not freed:
        click.echo("nothing to prune: no finished run has optimizer state")
    else:
        click.echo(f"{file_size(total)} {'would be' if dry else 'are'} free; pruned runs can be used as before, but not resumed")
