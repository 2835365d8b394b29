"""Makes `python -m minimoe` the same as `minimoe`."""

from minimoe.cli import main

if __name__ == "__main__":
    main()
