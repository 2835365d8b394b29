"""`python -m minimoe` is `minimoe`."""

from minimoe.cli import main

if __name__ == "__main__":
    main()
