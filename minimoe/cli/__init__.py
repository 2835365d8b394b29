"""The command line. `commands.py` lists the commands; each group of them has a file with their options and what they do."""

from minimoe.cli.exit_codes import main as main
