"""Where the machine's own CUDA C lies, and the headers of the backend `cupy`."""

from pathlib import Path

from minimoe_cupy.loader import KERNELS

HERE = Path(__file__).parent
HEADERS = KERNELS
