"""Refuses paths that people give in place of a model's folder: a name on the Hugging Face hub, a folder of its cache, a single file.

The message says what the path is, and what to give instead. A folder whose weights minimoe does not read is refused in the same way.
"""

import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path

from minimoe.errors import CheckpointError
from minimoe.pretrained.header import PICKLE, PICKLES, shown
from minimoe.signatures import START, what_it_is

ADDRESS = re.compile(r"(?:https?:/{1,2}(?:www\.)?(?:huggingface\.co|hf\.co)|hf:/?)/([\w.-]+/[\w.-]+)(?:/.*)?")
NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
REVISION = re.compile(r"[\w.-]{1,100}")
UNFINISHED = (".incomplete", ".part", ".partial", ".crdownload", ".aria2")
OTHER_FORMATS = {
    ".gguf": "GGUF, the format of llama.cpp",
    ".ggml": "GGML, a format of llama.cpp",
    ".h5": "HDF5, TensorFlow's format",
    ".msgpack": "Flax's format",
    ".onnx": "ONNX",
    ".npz": "NumPy's archive",
}
OTHER_KINDS = {
    "adapter_config.json": "is an adapter (LoRA), not a whole model: merge it into its base model with "
    "PeftModel.from_pretrained(...).merge_and_unload().save_pretrained(folder)",
    "model_index.json": "is a pipeline of diffusers, which minimoe does not compute",
}


def refuse_wrong_path(path: "str | os.PathLike[str]") -> None:
    """Raise `CheckpointError` for a path that is not a model's folder, if minimoe recognises it and knows what to give instead."""
    text, path = os.fspath(path), Path(path)
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):  # absent; a NUL in it
        _refuse_hub_name(text)
        return
    if stat.S_ISREG(mode):
        _refuse_file(path)
    elif stat.S_ISDIR(mode):
        _refuse_cache(path)


# ---- the hub -----------------------------------------------------------------------------------------------------------------


def _refuse_hub_name(text: str) -> None:
    """Refuse org/name, or its address, which is not a path here."""
    address = ADDRESS.fullmatch(text)
    is_name = NAME.fullmatch(text) is not None and not text.startswith("runs/") and not text.endswith((".toml", ".json", ".txt"))
    if address is None and (not is_name or os.path.isdir(text.split("/")[0])):
        return
    name = text if address is None else address[1]
    local = _snapshot(_cache() / f"models--{name.replace('/', '--')}")
    if local is not None:
        raise CheckpointError(f"{text}: no such folder or run; the hub's cache on this machine has {name}: give its folder, {local}")
    raise CheckpointError(
        f"{text}: no such folder or run; if it is a model on the Hugging Face hub, download it first, since minimoe reads folders: "
        f"hf download {name} --local-dir {name.split('/')[1]}"
    )


def _cache() -> Path:
    """Return the folder of the hub's cache (https://huggingface.co/docs/huggingface_hub/guides/manage-cache)."""
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(os.path.expanduser(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")))


def _refuse_cache(path: Path) -> None:
    """Refuse a folder of the hub's cache above the snapshots, with the snapshot to give."""
    if (path / "config.json").exists() or (path / "config.toml").exists():
        return
    top = path.resolve().parent if path.resolve().name == "snapshots" else path
    if top.resolve().name.startswith(("datasets--", "spaces--")):
        raise CheckpointError(f"{shown(path)}: is a data set or space in the hub's cache, not a model")
    if top.resolve().name.startswith("models--"):
        found = _snapshot(top)
        if found is None:
            raise CheckpointError(f"{shown(path)}: is a model's folder in the hub's cache, and has no snapshot: its download did not end")
        raise CheckpointError(f"{shown(path)}: is a model's folder in the hub's cache: give the snapshot in it, {shown(found)}")
    models = sorted(entry.name for entry in path.iterdir() if entry.name.startswith("models--"))
    snapshots = [found for found in (_snapshot(path / name) for name in models) if found is not None]
    if snapshots:
        raise CheckpointError(f"{shown(path)}: is the hub's cache: give the snapshot of a model in it, such as {shown(snapshots[0])}")


def _snapshot(top: Path) -> Path | None:
    """Return the snapshot of a model's folder in the cache: that of its main branch, or the newest."""
    try:
        with open(top / "refs" / "main", encoding="utf-8") as file:
            main = file.read(200).strip()
        if REVISION.fullmatch(main) and (top / "snapshots" / main).is_dir():
            return top / "snapshots" / main
    except (OSError, ValueError):
        pass
    try:
        snapshots = [entry for entry in (top / "snapshots").iterdir() if entry.is_dir()]
        return max(snapshots, key=lambda entry: entry.stat().st_mtime, default=None)
    except OSError:
        return None


# ---- files and folders of other kinds ------------------------------------------------------------------------------------------


def _refuse_file(path: Path) -> None:
    """Refuse a file of weights or of a model's settings. Files that name a run (`runs/last`) are left alone."""
    with open(path, "rb") as file:
        start = file.read(START)
    odd = what_it_is(start)
    if path.suffix.lower() in PICKLES:
        raise CheckpointError(f"{path}: {PICKLE}")
    if path.suffix.lower() in UNFINISHED:
        raise CheckpointError(f"{path}: is an unfinished download: let it end, or fetch it again")
    if odd and start:
        raise CheckpointError(f"{path}: {odd}")
    if path.suffix.lower() == ".safetensors":
        raise CheckpointError(f"{path}: weights alone are not a model: name the folder that has them and a config.json")
    if path.suffix.lower() in OTHER_FORMATS:
        raise CheckpointError(f"{path}: is {OTHER_FORMATS[path.suffix.lower()]}: minimoe reads folders with config.json and *.safetensors")
    if path.name in ("config.json", "tokenizer.json") or path.name.endswith(".index.json"):
        raise CheckpointError(f"{path}: is one file of a model: name its folder")


def instead_of_weights(names: Iterable[str], blobs: Iterable[str] = ()) -> str:
    """Return what a folder has in place of weights or of config.json, as the end of a sentence; "" if nothing is known of it.

    blobs: the names of the files that a snapshot of the hub's cache links to.
    """
    names = sorted(names)
    for name in (*names, *blobs):
        if name.lower().endswith(UNFINISHED):
            return f"has {shown(name)}, an unfinished download: let it end, or fetch the model again (hf download ORG/NAME)"
    for name in names:
        if name in OTHER_KINDS:
            return OTHER_KINDS[name]
    for name in names:
        ending = os.path.splitext(name)[1].lower()
        if ending in OTHER_FORMATS:
            return f"has {shown(name)}, which is {OTHER_FORMATS[ending]}: minimoe reads the folder that it was made of, with *.safetensors"
    return ""
