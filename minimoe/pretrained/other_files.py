"""Decides which other files of a model's folder are copied when the model is written elsewhere.

Files that belong to the model are copied, whatever their names: tokenizers, chat templates, settings of generation and of image processors,
model cards, licences. Weights in any format and their indices, code, links, hidden files and folders are left out, and so is what would be
wrong beside the new weights.
"""

import os
import re
import stat
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from minimoe.errors import CheckpointError
from minimoe.files import reason as reason_of
from minimoe.pretrained.folder import CONFIG, INDEX, real_file
from minimoe.pretrained.header import PICKLE_MAGIC, PICKLES, shown
from minimoe.signatures import LFS, START

MOST_NAMES = 10  # that are listed for each reason

# Why a file is left out, and the pattern of its name in lower case. The first match counts.
LEFT: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (reason, re.compile(pattern))
    for reason, pattern in (
        ("hidden", r"\."),
        ("unfinished downloads", r".*\.(incomplete|part|partial|crdownload|aria2)$"),
        ("indices of weights", r".*\.index\.json$"),
        (
            "weights",
            rf".*({'|'.join(re.escape(ending) for ending in sorted(PICKLES))}|\.onnx\.data|\.ckpt[.-][^/]*)$"
            r"|.*\.(safetensors|gguf|ggml|h5|hdf5|keras|msgpack|onnx|onnx_data|npz|npy|joblib|ot|pb|tflite|mlmodel|engine|pte|nemo|distcp)$"
            r"|.*openvino.*\.xml$|checkpoint$",
        ),
        ("archives", r".*\.(tar|tgz|zip|gz|xz|zst|bz2|7z|rar)$"),
        ("code", r".*\.(py|pyc|pyi|pyd|ipynb|so|dll|dylib|exe|sh|bat|cmd|ps1|js|jar|whl)$"),
        ("of quantised weights", r"(quant|quantize|quantization|hf_quant)_config\.json$|recipe\.yaml$"),
        ("of an adapter", r"adapter_config\.json$"),
        ("checksums and signatures", r".*\.(sha256|sha512|sha1|md5|sig|asc)$|((sha256|sha512|sha1|md5)sums?|checksums?)(\.txt)?$"),
    )
)


class OtherFiles(NamedTuple):
    """The other files of a model folder: those that are copied, by name, and those that are not, with the reason."""

    copied: dict[str, Path]
    left: dict[str, str]

    def what_is_left(self) -> str:
        """Return one line that lists what is left out, by reason; "" if nothing is."""
        names: dict[str, list[str]] = {}
        for name, reason in sorted(self.left.items()):
            names.setdefault(reason, []).append(name if name.isprintable() and name.isascii() else shown(name))
        for some in names.values():
            if len(some) > MOST_NAMES:
                some[MOST_NAMES:] = [f"and {len(some) - MOST_NAMES} more"]
        return "; ".join(f"{reason}: {', '.join(some)}" for reason, some in names.items())


def other_files(folder: Path, read: Collection[str]) -> OtherFiles:
    """Judge every entry of a model folder except config.json, the index of its shards, and the weight files that were `read`.

    Raises `CheckpointError` if one of them cannot be read.
    """
    found = OtherFiles({}, {})
    for entry in sorted(os.listdir(folder)):
        if entry in (CONFIG, INDEX) or entry in read:
            continue
        path = real_file(folder, entry)
        try:
            reason = _by_name(entry) or ("links" if path is None else _by_content(path))
        except OSError as error:
            raise CheckpointError(f"{shown(folder / entry)}: cannot be read: {reason_of(error)}") from error
        if reason or path is None:
            found.left[entry] = reason
        else:
            found.copied[entry] = path
    return found


def _by_name(name: str) -> str:
    """Return why a file of this name is left out, or ""."""
    if name.casefold() == CONFIG or any(mark in name for mark in '/\\:*?"<>|') or not name.isprintable():
        return "names that not every system can have beside the others"
    return next((reason for reason, pattern in LEFT if pattern.match(name.lower())), "")


def _by_content(path: Path) -> str:
    """Return why a file whose name says nothing against it is left out, or ""."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        return "folders" if stat.S_ISDIR(mode) else "neither files nor folders"
    with open(path, "rb") as file:
        start = file.read(START)
    if start.startswith(LFS):
        return "git-lfs pointers, which `git lfs pull` turns into files"
    if PICKLE_MAGIC.match(start) or start.startswith((b"GGUF", b"\x89HDF\r\n")):
        return "weights"
    return "code" if start.startswith((b"#!", b"\x7fELF", b"MZ\x90\x00")) else ""
