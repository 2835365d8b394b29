"""A process that compiles kernels into the cache: `python -m minimoe_numba.helper` reads a name per line and answers with it when done.

`ahead.py` starts it. It ends when its input does, so also when the process that started it is gone.
"""

import gc
import signal
import sys

from minimoe_numba.ahead import compilable


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one, which finishes its step
    gc.disable()  # compiling makes millions of small objects, and this process is short
    for line in sys.stdin:
        name = line.strip()
        compilable(name).compile()
        print(name, flush=True)


if __name__ == "__main__":
    main()
