"""Says what a file really is by its first bytes: a git-lfs pointer, a web page, an archive, a download that did not end."""

import re

START = 512  # bytes that `what_it_is` looks at
LFS = b"version https://git-lfs.github.com/spec/"
FETCH = "fetch it again: hf download ORG/NAME --local-dir FOLDER"

# A pattern of a file's first bytes, and the end of a sentence that begins with its name. The first match counts.
SIGNS: tuple[tuple[re.Pattern[bytes], str], ...] = tuple(
    (re.compile(pattern, re.IGNORECASE | re.DOTALL), meaning)
    for pattern, meaning in (
        (rb"\Z", f"is empty: its download did not begin; {FETCH}"),
        (rb"\x00{%d}\Z" % START, f"begins with nothing but zeros: its download did not end; {FETCH}"),
        (
            re.escape(LFS),
            "is a git-lfs pointer, since the file itself was not fetched: run `git lfs install && git lfs pull` in its folder",
        ),
        (
            rb"(?:\xef\xbb\xbf)?\s*(?:<!doctype html|<html|<head|<\?xml)",
            f"is a web page, perhaps one to log in, that was downloaded in place of the file; {FETCH}",
        ),
        (
            rb"\s*(?:Entry not found|Repository not found|Invalid (?:username|credentials)|Access to (?:this )?model|Unauthorized|Not Found"
            rb"|AccessDenied|\{\"error\")",
            f"is a server's error message in place of the file: log in (hf auth login), accept the model's terms, and {FETCH}",
        ),
        (rb"GGUF", "is GGUF, the format of llama.cpp: minimoe reads the folder that it was made of, with *.safetensors"),
        (rb"\x89HDF\r\n", "is HDF5, TensorFlow's format: minimoe reads folders with *.safetensors"),
        (
            rb"PK\x03\x04|\x1f\x8b|BZh|\xfd7zXZ\x00|\x28\xb5\x2f\xfd|7z\xbc\xaf|Rar!|.{257}ustar",
            "is an archive: unpack it, and name the folder in it",
        ),
    )
)


def what_it_is(start: bytes) -> str:
    """Return what a file is by its first `START` bytes, and what to do, as the end of a sentence; "" if no signature matches."""
    start = start[:START]
    return next((meaning for sign, meaning in SIGNS if sign.match(start)), "")
