"""One image file as pixels: every kind of image that people have, and every file that is none."""

import io
import os
import re
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from minimoe.data import pictures
from minimoe.data.pictures import NotAnImage, check_channels, read_picture
from minimoe.errors import ConfigError, UserError
from minimoe.hints import install


def saved(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def grey(values: list[list[int]]) -> Image.Image:
    return Image.fromarray(np.array(values, np.uint8))


def test_an_image_of_the_right_size_keeps_its_pixels() -> None:
    values = np.random.default_rng(0).integers(0, 256, (6, 6, 3)).astype(np.uint8)
    found = read_picture(saved(Image.fromarray(values)), 6, 3)
    assert np.array_equal(found.pixels, values.transpose(2, 0, 1)) and not found.animated


def test_of_a_wide_image_the_middle_square_is_taken() -> None:
    wide = Image.new("RGB", (30, 10), "red")
    wide.paste("blue", (10, 0, 20, 10))
    assert (read_picture(saved(wide), 10, 3).pixels == np.array([0, 0, 255])[:, None, None]).all()


def test_an_image_is_turned_as_its_camera_was_held() -> None:
    upright = Image.new("L", (8, 8), 0)
    upright.paste(255, (0, 0, 8, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    assert np.array_equal(read_picture(saved(turned, exif=exif), 8, 1).pixels[0], np.asarray(upright))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "I;16"])
def test_every_kind_of_pixel_is_converted(mode: str, channels: int) -> None:
    white = Image.new("L", (9, 9), 255)
    image = Image.fromarray(np.full((9, 9), 65535, np.uint16)) if mode == "I;16" else white.convert("RGB").convert(mode)
    assert image.mode == mode
    found = read_picture(saved(image, "TIFF" if mode == "CMYK" else "PNG"), 3, channels).pixels
    assert found.shape == (channels, 3, 3) and (found == 255).all()


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    image = Image.fromarray(np.array([[0, 0x4000], [0x8000, 0xFFFF]], np.uint16))
    assert read_picture(saved(image), 2, 1).pixels.tolist() == [[[0, 0x40], [0x80, 0xFF]]]


def test_what_is_transparent_is_white() -> None:
    assert (read_picture(saved(Image.new("RGBA", (4, 4), (0, 0, 0, 0))), 4, 3).pixels == 255).all()
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([0, 0, 0] * 256)
    assert (read_picture(saved(palette, transparency=0), 4, 1).pixels == 255).all()


def test_of_an_animation_the_first_frame_is_taken() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    found = read_picture(saved(frames[0], "GIF", save_all=True, append_images=frames[1:]), 4, 3)
    assert found.animated and (found.pixels[0] > 250).all() and (found.pixels[2] < 5).all()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims a size."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


NONE = {
    "text": (b"a text", "not an image that can be read (PNG, JPEG,"),
    "empty": (b"", "not an image that can be read"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image that can be read"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n", "not an image that can be read"),
    "cut": (saved(Image.effect_noise((64, 64), 50))[:900], "a damaged image: "),
    "cut jpeg": (saved(Image.effect_noise((64, 64), 50), "JPEG")[:700], "a damaged image: "),
    "large": (bomb(10_000, 6_000), "larger than 50 million pixels (60)"),
    "huge": (bomb(2**20, 2**20), "larger than 50 million pixels"),
    "32 bits": (saved(Image.new("F", (4, 4), 0.5), "TIFF"), "its pixels have 32 bits, for which no value is white"),
}


@pytest.mark.parametrize("what", NONE)
def test_what_is_no_image_is_refused_in_one_line(what: str) -> None:
    data, words = NONE[what]
    with pytest.raises(NotAnImage, match=re.escape(words)) as caught:
        read_picture(data, 8, 3)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path, words in ((tmp_path / "none.png", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(NotAnImage, match=words):
            read_picture(path, 8, 3)
    with pytest.raises(NotAnImage, match="not a regular file"):
        read_picture(Path(os.devnull), 8, 3)


def test_damage_anywhere_in_a_file_gives_an_image_or_one_line() -> None:
    draw = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"):
        whole = np.frombuffer(saved(Image.effect_noise((16, 16), 50).convert("RGB"), kind), np.uint8)
        for _ in range(30):
            data = whole.copy()
            data[draw.integers(0, len(data), 3)] = draw.integers(0, 256, 3)
            try:
                assert read_picture(data.tobytes(), 8, 3).pixels.shape == (3, 8, 8)
            except NotAnImage as error:
                assert "\n" not in str(error)


def test_without_pillow_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(UserError, match=re.escape(install("images"))):
        read_picture(b"", 8, 3)


def test_two_channels_are_no_colours() -> None:
    with pytest.raises(ConfigError, match=r"model\.n_channels = 2: images are read in grey \(1\) or in colour \(3\)"):
        check_channels(2)
    assert pictures.MODES.keys() == {1, 3}
