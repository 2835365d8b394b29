"""The command line. `commands.py` lists the commands, a file for each group of them has what they take and do."""

from minimoe.cli.exit_codes import main as main
