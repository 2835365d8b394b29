"""The command line."""

from minimoe.cli.commands import main as main
