"""How the command line ends: every error that a user can cause is one line on standard error, and an exit code.

0 success, 1 a backend that fails its check, a folder that is not whole, runs that differ (`diff`), or a reader that left a pipe, 2 a
mistake that the user
can fix, 3 a run that diverged, 70 a fault of minimoe itself, 129, 130 or 143 a run or command that a signal stopped.
MINIMOE_DEBUG=1 shows the traceback.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import click

from minimoe.cli.commands import UnexpectedEnd, cli
from minimoe.cli.streams import drop_unwritten, prepare_streams, written_to_the_end
from minimoe.errors import Interrupted, Notice, UserError, printable

FAULT = 70  # EX_SOFTWARE of sysexits.h


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; ends the process with its exit code."""
    prepare_streams()
    try:
        with written_to_the_end(), notices_as_lines():
            sys.exit(cli.main(args=arguments, prog_name="minimoe", standalone_mode=False) or 0)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help() if error.ctx else "")
        sys.exit(2)
    except click.ClickException as error:
        fail(error.format_message(), 2)
    except (UserError, Interrupted) as error:
        fail(str(error), error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        fail("interrupted", 130)
    except BrokenPipeError:
        drop_unwritten()  # the pipe's reader went away: end without a message
        sys.exit(1)
    except MemoryError as error:
        fail(f"out of memory: {error}: use a smaller train.batch_size, train.seq_len or model", 2)
    except OSError as error:
        drop_unwritten()
        fail(f"{error.filename or 'input or output'}: {error.strerror or error}", 2)
    except SystemExit:
        raise
    except BaseException as error:  # a library written in Rust may raise what is not an Exception
        if isinstance(error, UnexpectedEnd):
            error = error.__cause__ or error
        fail(
            f"a fault in minimoe, not in what you gave it: {type(error).__name__}: {error}: please report it with your command and what "
            "the same command prints after `export MINIMOE_DEBUG=1` (CONTRIBUTING.md says how)",
            FAULT,
        )


@contextmanager
def notices_as_lines() -> Iterator[None]:
    """Print each `Notice` within as one line on standard error; other warnings as usual."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", Notice)
        usual = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if issubclass(category, Notice):
                click.echo(f"minimoe: {printable(' '.join(str(message).split()))}", err=True)
            else:
                usual(message, category, *where, **more)

        warnings.showwarning = show
        yield


def fail(message: str, code: int) -> NoReturn:
    """Print one line on standard error and end the process."""
    if os.environ.get("MINIMOE_DEBUG") == "1":
        traceback.print_exc()
    with suppress(OSError):  # where nobody can read it, the exit code remains
        click.echo(f"minimoe: {printable(' '.join(message.split()))}", err=True)
    drop_unwritten()
    sys.exit(code)
