"""From a clone, `python cli.py train` is `minimoe train`."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "backends")]

from minimoe.cli import main  # noqa: E402

if __name__ == "__main__":
    main()
