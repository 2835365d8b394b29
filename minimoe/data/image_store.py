"""Images of a large folder in the user's cache, beside the tokens of large texts (store.py): decoded once, and mapped by every run.

A folder there is named by a digest of the files' paths, devices, inodes, sizes and modification times, and of how they are decoded. An
image that changed gives another name, so that nothing that is out of date is read.
"""

import hashlib
import os
import shutil
import time
from pathlib import Path

import msgspec
import numpy as np

from minimoe.data.alone import alone, remove_folder, remove_unfinished
from minimoe.data.image_folder import Decoding, Images, Listing, in_memory, within
from minimoe.data.progress import say
from minimoe.data.store import NAME, byteorder, store_folder
from minimoe.data.text import SETTLED
from minimoe.data.token_files import HEADER, ColumnFile, Damaged, Header, OfImages, map_column, read_header
from minimoe.errors import UserError, notice
from minimoe.figures import file_size
from minimoe.files import hidden_sibling, reason, sync_folder, to_json, write_synced

FORMAT = "minimoe images 1"
MOST_IN_MEMORY = 8_000_000  # bytes of files, or of pixels, that are decoded at each start


def load_images(root: Path, name: str, side: int, channels: int) -> Images:
    """Return the images of a folder, from the cache or decoded now. Raises `UserError` as decoding does, or if they change meanwhile."""
    listing = Listing.of(root)
    if max(listing.size, listing.count * side * side * channels) <= MOST_IN_MEMORY:
        return in_memory(Decoding(listing, name, side, channels))
    folder = store_folder()
    if folder is None:
        notice(f"{name}: no folder for the cache can be written: its images are kept in memory (MINIMOE_CACHE_DIR names a folder)")
        return in_memory(Decoding(listing, name, side, channels))
    if any(len(state) > 5 for state in listing.states):  # changed just now: another change may not show
        time.sleep(SETTLED / 1e9)
        listing = Listing.of(root)
    identity, shape = listing.identity(side, channels), f"{side} x {side} x {channels}"
    place = folder / f"{identity[: NAME[0]]}-{hashlib.sha256(shape.encode()).hexdigest()[: NAME[1]]}"
    if (found := _usable(place, identity)) is None:
        remove_unfinished(folder)
        with alone(place, name):
            found = _usable(place, identity, say_why=True)  # another process may have made it meanwhile
            found = found or _prepare(place, listing, name, identity, Decoding(listing, name, side, channels))
    return _mapped(place, found, (-1, channels, side, side))


def _usable(place: Path, identity: str, say_why: bool = False) -> Header | None:
    """Return the header of a folder of these images; None if there is none, or none that can be used."""
    try:
        header = read_header(place)
        if header.format != FORMAT or header.layout != identity or header.byteorder != byteorder() or header.images is None:
            raise Damaged("its header is that of something else")
        return header
    except FileNotFoundError:
        return None
    except Damaged as error:
        if say_why:
            notice(f"{place}: {error}: its images are decoded again")
        return None


def _mapped(place: Path, header: Header, shape: tuple[int, ...]) -> Images:
    assert header.images is not None
    pixels, classes, names = (map_column(place / name, header.columns[name]) for name in ("pixels", "classes", "names"))
    return Images(pixels.reshape(shape), classes, header.images.classes, names.tobytes(), header.sha256, header.images.notes)


def _prepare(place: Path, listing: Listing, name: str, identity: str, decoding: Decoding) -> Header:
    """Decode a folder into a folder of the cache."""
    began, temporary = time.monotonic(), hidden_sibling(place, "tmp")
    try:
        temporary.mkdir(mode=0o700)
        files = {column: ColumnFile(temporary / column, dtype) for column, dtype in (("pixels", "u1"), ("classes", "i4"), ("names", "u1"))}
        try:
            for number, path, pixels in decoding:
                files["pixels"].add(pixels.reshape(-1))
                files["classes"].add(np.array([number]))
                files["names"].add(np.frombuffer(within(path, decoding), np.uint8))
            columns = {column: file.finish() for column, file in files.items()}
        finally:
            for file in files.values():
                file.close()
        if Listing.of(listing.root).identity(decoding.side, decoding.channels) != identity:
            raise UserError(f"{name}: changed while it was read: start again when nothing writes to it")
        shape = f"{decoding.side} x {decoding.side} x {decoding.channels}"
        header = Header(
            FORMAT, byteorder(), name, decoding.sha256, identity, listing.size, shape, hashlib.sha256(shape.encode()).hexdigest(),
            columns, {}, OfImages(tuple(decoding.names), decoding.notes()),
        )  # fmt: skip
        write_synced(temporary / HEADER, to_json(msgspec.to_builtins(header)).encode())
        sync_folder(temporary)
        if place.exists() and _usable(place, identity) is None:
            remove_folder(place)
        if not place.exists():
            os.rename(temporary, place)
        sync_folder(place.parent)
    except OSError as error:
        free = shutil.disk_usage(place.parent).free
        raise UserError(
            f"{name}: its images cannot be written to {place.parent}: {reason(error)} ({file_size(free)} are free): "
            "minimoe data rm frees some, MINIMOE_CACHE_DIR names another place"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    seconds = time.monotonic() - began
    say(f"{name}: {header.count:,} images decoded in {seconds:.0f} s, kept in {place} ({file_size(header.size)})")
    return header
