"""One image file as pixels of a model's size: its middle square, resized, in grey or in colour.

It needs Pillow, the extra `images`, which is imported only here. Only formats that Pillow reads itself are tried, and none whose image is
larger than `MOST_PIXELS`, so that a small file cannot fill the memory.
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from minimoe.errors import ConfigError, UserError
from minimoe.hints import install

Pixels = npt.NDArray[np.uint8]

FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM")  # not EPS and others, for which Pillow starts programs
MOST_PIXELS = 50_000_000  # of an image, unpacked: 200 MB
MODES = {1: "L", 3: "RGB"}  # channels: Pillow's word
PAPER = "white"  # what shows through where an image is transparent


class NotAnImage(UserError):
    """A file without an image that can be used; the message says why, and does not name the file."""


class Picture(NamedTuple):
    """An image as a model reads it."""

    pixels: Pixels  # [channels,side,side]
    animated: bool  # it has more frames than the one that was taken, the first


def check_channels(channels: int) -> None:
    """Refuse a number of channels that no image is converted to. Raises `ConfigError`."""
    if channels not in MODES:
        raise ConfigError(f"model.n_channels = {channels}: images are read in grey (1) or in colour (3)")


def pillow() -> Any:
    """Return the module `PIL.Image`. Raises `UserError` if Pillow is missing."""
    try:
        from PIL import Image, ImageOps  # noqa: F401 - both are used below
    except ImportError:
        raise UserError(f"images are read with Pillow, which is not installed: {install('images')}") from None
    return Image


def pillow_version() -> str:
    """Return Pillow's version: another one may unpack a JPEG to other pixels. Raises `UserError` if it is missing."""
    pillow()
    import PIL

    return PIL.__version__


def read_picture(source: Path | bytes, side: int, channels: int) -> Picture:
    """Read a file, or its bytes: [channels,side,side] of the middle square, turned as its camera was held. Raises `NotAnImage`."""
    image_module = pillow()
    if isinstance(source, Path) and source.exists() and not (source.is_file() or source.is_dir()):
        raise NotAnImage("not a regular file")  # a pipe may never end
    with _explained(image_module), open(source, "rb") if isinstance(source, Path) else io.BytesIO(source) as file:
        image_module.init()
        with image_module.open(file, formats=[name for name in FORMATS if name in image_module.OPEN]) as image:
            if image.width * image.height > MOST_PIXELS:
                raise NotAnImage(_too_large(image.width * image.height))
            animated = getattr(image, "n_frames", 1) > 1
            return Picture(_pixels(image, side, channels), animated)


def _pixels(image: Any, side: int, channels: int) -> Pixels:
    from PIL import Image, ImageOps

    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # Pillow would clip what is above 255
        image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise NotAnImage("its pixels have 32 bits, for which no value is white")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, PAPER), image)
    image = ImageOps.fit(image.convert(MODES[channels]), (side, side), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(image, np.uint8).reshape(side, side, channels).transpose(2, 0, 1))


def _too_large(count: int) -> str:
    return f"larger than {MOST_PIXELS // 10**6} million pixels ({count / 1e6:,.0f})"


@contextmanager
def _explained(image_module: Any) -> Iterator[None]:
    """Turn what Pillow raises for a file into `NotAnImage`: for a damaged one that may be nearly anything."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its warnings about large and odd files: too large ones are refused, others are read
        try:
            yield
        except (UserError, MemoryError):
            raise
        except image_module.UnidentifiedImageError:
            raise NotAnImage(f"not an image that can be read ({', '.join(FORMATS)})") from None
        except image_module.DecompressionBombError:
            raise NotAnImage(f"larger than {MOST_PIXELS // 10**6} million pixels") from None
        except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
            raise NotAnImage(f"cannot be read: {error.strerror}") from None
        except Exception as error:
            raise NotAnImage(f"a damaged image: {error}") from None
