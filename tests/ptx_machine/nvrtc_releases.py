"""The releases of NVRTC with which the CUDA C kernels are offered, and the library of each, from an installed wheel or fetched by pip.

The tests' requirements hold the oldest release and the newest; those between are fetched for the long tests, and kept in the user's cache.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from zipfile import ZipFile

from minimoe.caches import private_folder
from ptx_machine.nvrtc import installed_release, libraries_of

CUDA_12, CUDA_13 = "nvidia-cuda-nvrtc-cu12", "nvidia-cuda-nvrtc"
OFFERED = {  # the last wheel of each release
    "12.8": (CUDA_12, "12.8.93"), "12.9": (CUDA_12, "12.9.86"),
    "13.0": (CUDA_13, "13.0.88"), "13.1": (CUDA_13, "13.1.115"), "13.2": (CUDA_13, "13.2.86"),
    "13.3": (CUDA_13, "13.3.33"), "13.4": (CUDA_13, "13.4.92"), "13.5": (CUDA_13, "13.5.37"),
}  # fmt: skip
OLDEST = next(iter(OFFERED))
LIBRARIES = re.compile(r"libnvrtc(-builtins)?\.so\.[\d.]+")


def library_of(release: str) -> Path:
    """The compiler's library of a release (`12.8`): that of an installed wheel, or else of one that pip fetches, once for this user.

    Raises RuntimeError with pip's message if it cannot be had.
    """
    wheel, version = OFFERED[release]
    if installed_release(wheel) == release:
        return libraries_of(wheel)[0]
    kept = private_folder("nvrtc")
    if kept is None:
        raise RuntimeError(f"NVRTC {release} is not installed, and no cache folder is available to download it to: set MINIMOE_CACHE_DIR")
    folder = kept / f"{wheel}-{version}"
    if not folder.exists():
        fetch(f"{wheel}=={version}", folder)
    return next(folder.glob("libnvrtc.so.*"))


def fetch(wheel: str, folder: Path) -> None:
    """Puts the libraries of a wheel into a folder, which is whole or absent. Raises RuntimeError with pip's message."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", f"--dest={work}", wheel]
        result = subprocess.run(command, text=True, capture_output=True, check=False)
        if result.returncode:
            raise RuntimeError(f"{wheel} is not installed, and pip cannot fetch it:\n{result.stderr}")
        (file,) = Path(work).glob("*.whl")
        unpacked = Path(work) / "libraries"
        unpacked.mkdir(0o700)
        with ZipFile(file) as archive:
            for member in archive.namelist():
                name = Path(member).name
                if LIBRARIES.fullmatch(name):
                    (unpacked / name).write_bytes(archive.read(member))
        try:
            unpacked.rename(folder)
        except OSError:
            if not folder.exists():  # else another process was first
                raise
