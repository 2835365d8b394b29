"""safetensors files: views of the map, exact numbers, the bytes that the format's own library writes, false claims refused in a line."""

import errno
import io
import json
import os
import random
import struct
import sys
import time
import tracemalloc
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from minimoe.errors import CheckpointError
from minimoe.pretrained.file import TensorFile, fill, pack, write_tensor_file
from minimoe.pretrained.header import STORED, read_header, shown

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
ALL_16_BITS = np.arange(1 << 16, dtype=np.uint16)
GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def file_of(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def sample() -> dict[str, Any]:
    generator = np.random.default_rng(0)
    return {
        "embed": generator.normal(size=(5, 3)).astype(np.float32),
        "norm": generator.normal(size=7),
        "half": generator.normal(size=(2, 2, 2)).astype(np.float16),
        "brain": generator.normal(size=(3, 5)).astype(BFLOAT16),
        "ids": np.arange(4, dtype=np.int64),
        "mask": np.array([True, False, True]),
        "bytes": np.arange(5, dtype=np.uint8),
        "scalar": np.array(2.5, np.float32),
        "nothing": np.zeros((0, 4), np.float32),
        "eight": np.arange(6, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn),
    }


def opened(tmp_path: Path, content: bytes, name: str = "a.safetensors") -> TensorFile:
    (tmp_path / name).write_bytes(content)
    return TensorFile(tmp_path / name)


def refusal(tmp_path: Path, content: bytes, name: str = "a.safetensors") -> str:
    with pytest.raises(CheckpointError) as caught:
        opened(tmp_path, content, name)
    message = str(caught.value)
    assert message.isprintable() and name in message
    return message


# ---- reading -----------------------------------------------------------------------------------------------------------------


def test_what_the_safetensors_library_wrote_is_read_to_the_bit(tmp_path: Path) -> None:
    arrays = sample()
    with opened(tmp_path, safetensors.numpy.save(arrays, {"format": "pt"})) as file:
        assert file.metadata == {"format": "pt"} and file.entries.keys() == arrays.keys()
        for name, array in arrays.items():
            raw = file.raw(name)
            assert (raw.shape, raw.tobytes()) == (array.shape, array.tobytes())
            assert raw.flags.c_contiguous and raw.nbytes == file.entry(name).stop - file.entry(name).start


def test_dtypes_that_numpy_lacks_come_as_their_bits(tmp_path: Path) -> None:
    with opened(tmp_path, safetensors.numpy.save(sample())) as file:
        words = {name: (file.entry(name).dtype, file.raw(name).dtype.name) for name in ("embed", "brain", "eight", "mask")}
    assert words == {
        "embed": ("F32", "float32"),
        "brain": ("BF16", "uint16"),
        "eight": ("F8_E4M3", "uint8"),
        "mask": ("BOOL", "bool"),
    }


def test_tensors_are_views_of_one_map_that_cannot_be_written(tmp_path: Path) -> None:
    file = opened(tmp_path, safetensors.numpy.save(sample()))
    first, again = file.raw("embed"), file.raw("embed")
    assert np.shares_memory(first, again)
    with pytest.raises(ValueError, match="read-only"):
        first[0, 0] = 1
    with pytest.raises(ValueError):
        first.flags.writeable = True


def test_a_view_stays_readable_after_its_file_is_closed(tmp_path: Path) -> None:
    with opened(tmp_path, safetensors.numpy.save(sample())) as file:
        view = file.raw("embed")
    assert np.array_equal(view, sample()["embed"])
    with pytest.raises(ValueError, match="closed"):
        file.raw("embed")


def test_a_tensor_at_an_odd_byte_is_read(tmp_path: Path) -> None:
    header = {"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}, "b": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]}}
    file = opened(tmp_path, file_of(header, b"\x01" + np.array([1.5, -2], "<f4").tobytes()))
    out = np.empty(2, np.float32)
    fill(out, file.raw("b"), "F32")
    assert out.tolist() == [1.5, -2]


def test_a_file_without_tensors_is_read(tmp_path: Path) -> None:
    assert opened(tmp_path, file_of({})).entries == {}


def test_a_name_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"a\.safetensors: has no tensor 'a\\x1bb'"):
        opened(tmp_path, file_of({"a": GOOD}, bytes(8))).raw("a\x1bb")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_opening_a_large_file_costs_no_memory_and_released_pages_go(tmp_path: Path) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    size = 1 << 36
    with open(tmp_path / "a.safetensors", "wb") as sparse:
        sparse.write(file_of({"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}))
        sparse.truncate(sparse.tell() + size)
    before = resident()
    file = TensorFile(tmp_path / "a.safetensors")
    assert resident() - before < 1 << 22
    assert not file.raw("a")[: 1 << 26].any() and resident() - before > 1 << 25
    file.release("a")
    assert resident() - before < 1 << 23


# ---- refusals ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content, expected",
    [
        (b"", "is empty: its download did not begin"),
        (b"1234567", "has 7 bytes: too short"),
        (struct.pack("<Q", 100_000_001) + b"{}", "a header of 100000001 bytes"),
        (b"\xff" * 64, "a header of 18446744073709551615 bytes"),
        (struct.pack("<Q", 3) + b"{}", "claims a header of 3 bytes and has 2"),
        (struct.pack("<Q", 0) + b"{}", "claims a header of 0 bytes and has 2"),
        (struct.pack("<Q", 1) + b"{}", "claims a header of 1 bytes and has 2"),
        (file_of(b'{"a\xff": 1}'), "not UTF-8"),
        (file_of(b'{"a": '), "is not the JSON"),
        (file_of(b"[1, 2]  "), "does not begin with {"),
        (file_of(b' {"a": 1}'), "does not begin with {"),
        (file_of(b"{} x"), "is not the JSON"),
        (file_of(b"{,}"), "is not the JSON"),
        (file_of(b'{"a": 1,}'), "tensor 'a': expected an object"),
        (file_of(b"{1: 2}"), "is not the JSON"),
        (file_of(b'{"\\ud800": 1}'), "is not the JSON"),
        (file_of(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "is not the JSON"),
        (file_of(b'{"a":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001), "is not the JSON"),
        (file_of(b'{"a": 1' + b"0" * 100_000 + b"}"), "tensor 'a': expected an object|is not the JSON"),
    ],
)
def test_a_header_that_is_not_one_is_refused(tmp_path: Path, content: bytes, expected: str) -> None:
    message = refusal(tmp_path, content)
    assert any(part in message for part in expected.split("|"))


@pytest.mark.parametrize("header", ['{"a": A, "a": A}', '{"__metadata__": {}, "a": A, "__metadata__": {}}'])
def test_a_name_that_occurs_twice_is_refused(tmp_path: Path, header: str) -> None:
    assert " twice" in refusal(tmp_path, file_of(header.replace("A", json.dumps(GOOD)).encode(), bytes(8)))


@pytest.mark.parametrize("entry", ['{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}', '{"a": NaN}', '{"a": 1.0}'])
def test_an_entry_with_a_repeated_member_or_a_fraction_is_refused(tmp_path: Path, entry: str) -> None:
    assert "is not the JSON" in refusal(tmp_path, file_of(b'{"a": ' + entry.encode() + b"}", bytes(8)))


@pytest.mark.parametrize("member", ["dtype", "shape", "data_offsets"])
def test_an_entry_without_one_of_its_members_is_refused(tmp_path: Path, member: str) -> None:
    entry = {key: value for key, value in GOOD.items() if key != member}
    assert "expected an object with dtype, shape and data_offsets" in refusal(tmp_path, file_of({"a": entry}, bytes(8)))


def test_an_entry_with_another_member_is_refused(tmp_path: Path) -> None:
    assert "expected an object" in refusal(tmp_path, file_of({"a": {**GOOD, "stride": [1]}}, bytes(8)))


@pytest.mark.parametrize("dtype", ["F4", "F33", "f32", "", 1, None, ["F32"], {"F32": 1}, True])
def test_a_dtype_that_is_not_known_is_named(tmp_path: Path, dtype: Any) -> None:
    message = refusal(tmp_path, file_of({"a": {**GOOD, "dtype": dtype}}, bytes(8)))
    assert f"dtype {dtype!r} is not known (known: U64, I64, F64" in message


@pytest.mark.parametrize("shape", [None, 2, "2", {"0": 2}, [True], [-2], [-(2**80)], ["2"], [[2]], [None], [2**63], [10**30], [1] * 65])
def test_a_shape_that_is_not_a_list_of_sizes_is_refused(tmp_path: Path, shape: Any) -> None:
    assert "tensor 'a': its shape must be a list" in refusal(tmp_path, file_of({"a": {**GOOD, "shape": shape}}, bytes(8)))


@pytest.mark.parametrize("shape", [[2**62, 2**62, 4], [2**63 - 1], [0, 2**62], [2**32] * 64])
def test_a_shape_whose_product_overflows_is_refused(tmp_path: Path, shape: list[int]) -> None:
    assert "its shape is too large" in refusal(tmp_path, file_of({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}))


@pytest.mark.parametrize("offsets", [None, 8, "0,8", [8], [0, 8, 8], [False, 8], [0, None], [-8, 0], [0, 2**64], {"0": 8}])
def test_offsets_that_are_not_two_whole_numbers_are_refused(tmp_path: Path, offsets: Any) -> None:
    message = refusal(tmp_path, file_of({"a": {**GOOD, "data_offsets": offsets}}, bytes(8)))
    assert "its data_offsets must be two whole numbers" in message


def test_reversed_offsets_are_refused(tmp_path: Path) -> None:
    assert "are reversed: 8 to 0" in refusal(tmp_path, file_of({"a": {**GOOD, "data_offsets": [8, 0]}}, bytes(8)))


@pytest.mark.parametrize("dtype, shape, needed", [("F32", [3], 12), ("F64", [2], 16), ("U8", [2, 2], 4), ("F32", [], 4), ("F32", [0], 0)])
def test_offsets_that_do_not_fit_dtype_and_shape_are_refused(tmp_path: Path, dtype: str, shape: list[int], needed: int) -> None:
    message = refusal(tmp_path, file_of({"a": {"dtype": dtype, "shape": shape, "data_offsets": [0, 8]}}, bytes(8)))
    assert f"{dtype} {shape} takes {needed} bytes, its data_offsets give 8" in message


@pytest.mark.parametrize(
    "places, size, expected",
    [
        ([(0, 8)], 7, "tensor 't0' would end at byte"),
        ([(0, 8), (8, 16)], 8, "tensor 't1' would end at byte"),
        ([(0, 8)], 9, "1 bytes at the end of the file belong to no tensor"),
        ([], 1, "1 bytes at the end"),
        ([(0, 8), (0, 8)], 8, "tensor 't1' overlaps tensor 't0'"),
        ([(4, 12), (0, 8)], 12, "tensor 't0' overlaps tensor 't1'"),
        ([(0, 8), (4, 4)], 8, "tensor 't1' overlaps tensor 't0'"),
        ([(0, 8), (12, 20)], 20, "4 bytes before tensor 't1' belong to no tensor"),
        ([(1, 9)], 9, "1 bytes before tensor 't0'"),
        ([(2**62, 2**62 + 8)], 8, "would end at byte"),
    ],
)
def test_tensors_that_do_not_tile_the_file_are_refused(tmp_path: Path, places: list[tuple[int, int]], size: int, expected: str) -> None:
    header = {f"t{i}": {"dtype": "U8", "shape": [stop - start], "data_offsets": [start, stop]} for i, (start, stop) in enumerate(places)}
    assert expected in refusal(tmp_path, file_of(header, bytes(size)))


def test_more_tensors_than_bytes_could_fill_are_refused_within_a_second(tmp_path: Path) -> None:
    empty = b'"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    many = file_of(b"{" + b",".join(b'"%d":{%b' % (i, empty) for i in range(1_700_000)) + b"}")
    began = time.process_time()
    assert "its header names more than 10000 tensors, and the file has 0 bytes for all of them" in refusal(tmp_path, many)
    assert time.process_time() - began < 1


def test_thousands_of_empty_tensors_and_any_number_with_bytes_are_opened(tmp_path: Path) -> None:
    empty = {str(i): {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(10_000)}
    assert len(opened(tmp_path, file_of(empty)).entries) == 10_000
    filled = {str(i): {"dtype": "F32", "shape": [8], "data_offsets": [32 * i, 32 * i + 32]} for i in range(10_050)}
    assert len(opened(tmp_path, file_of(filled, bytes(32 * 10_050))).entries) == 10_050


@pytest.mark.parametrize("header", [
    {"a": {"dtype": "U8", "shape": [0], "data_offsets": ["-0", 0]}}, {"__metadata__": {"a": "\ud800"}}, {"__metadata__": {"\udfff": "a"}},
])  # fmt: skip
def test_what_the_formats_own_library_cannot_read_is_refused(tmp_path: Path, header: dict[str, Any]) -> None:
    content = file_of(json.dumps(header).replace('"-0"', "-0").encode())
    with pytest.raises(safetensors.SafetensorError):
        safetensors.deserialize(content)
    assert refusal(tmp_path, content)


@pytest.mark.parametrize("metadata", [None, [], "pt", {"a": 1}, {"a": None}, {"a": {"b": "c"}}, {"a": ["b"]}])
def test_metadata_that_is_not_text_is_refused(tmp_path: Path, metadata: Any) -> None:
    assert "__metadata__ must map names to text" in refusal(tmp_path, file_of({"__metadata__": metadata}))


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[31mb", "\u202eb", "x" * 1000 + "\n", "\x00" * 300])
def test_a_message_shows_names_escaped_and_short(tmp_path: Path, name: str) -> None:
    message = refusal(tmp_path, file_of({name: {**GOOD, "dtype": name}}, bytes(8)))
    assert len(message) < 600 and name not in message


def test_paths_are_shown_as_they_are_unless_they_hold_control_characters() -> None:
    assert shown(Path("a b/é.safetensors")) == str(Path("a b/é.safetensors"))
    assert shown(Path("a\nb")) == "'a\\nb'"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "a.pt", "a.pth", "A.CKPT", "a.pickle"])
def test_a_pickle_is_refused_by_its_name_with_the_way_to_convert_it(tmp_path: Path, name: str) -> None:
    message = refusal(tmp_path, file_of({}), name)
    assert "is a pickle, which runs whatever code is in it" in message and "save_pretrained(other)" in message


@pytest.mark.parametrize("start", [b"PK\x03\x04\x00\x00\x08\x08\x00\x00", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", b"\x80\x05\x95 "])
def test_a_pickle_is_refused_by_its_first_bytes(tmp_path: Path, start: bytes) -> None:
    assert "is a pickle" in refusal(tmp_path, start + bytes(100))


def test_a_header_whose_length_looks_like_a_pickle_is_read(tmp_path: Path) -> None:
    text = json.dumps({"a": GOOD}).encode().ljust(0x280)
    content = struct.pack("<Q", len(text)) + text + bytes(8)
    assert content[:2] == b"\x80\x02" and opened(tmp_path, content).entries.keys() == {"a"}


def test_a_path_that_is_not_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=r"folder\.safetensors: is not a file"):
        TensorFile(tmp_path / "folder.safetensors")
    with pytest.raises(CheckpointError, match=r"none\.safetensors: cannot be read: No such file"):
        TensorFile(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match="cannot be read"):
        TensorFile("a\0.safetensors")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with a name are POSIX's")
def test_a_pipe_is_refused_instead_of_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="is not a file"):
        TensorFile(tmp_path / "a.safetensors")


@pytest.mark.parametrize("value", [b"[[],[],", b'{"dtype":[[],[],', b'{"":[],"a":[],', b"\\u0000"], ids=str)
def test_a_large_header_of_nonsense_takes_no_more_memory_than_its_text(tmp_path: Path, value: bytes) -> None:
    content = file_of((b'{"' if value.startswith(b"\\") else b'{"a":') + value * 2_000_000)
    (tmp_path / "a.safetensors").write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match="is not the JSON"):
            TensorFile(tmp_path / "a.safetensors")
        assert tracemalloc.get_traced_memory()[1] < 4 * len(content)
    finally:
        tracemalloc.stop()


# ---- mutations ---------------------------------------------------------------------------------------------------------------

NUMBERS = [0, 1, 3, 8, 255, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 2**64 - 8, -1, -8, 10**40]
PIECES = [b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b"null", b"true", b"1e9", b"1.0", b"-0", b"NaN", b'"a":', b"\xff", b"\x00", b" "]


def flip_bits(draw: random.Random, content: bytearray) -> None:
    for _ in range(draw.randint(1, 4)):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)


def truncate(draw: random.Random, content: bytearray) -> None:
    del content[draw.randrange(len(content)) :]


def splice(draw: random.Random, content: bytearray) -> None:
    start, at = draw.randrange(len(content)), draw.randrange(len(content))
    content[at:at] = content[start : start + draw.randint(1, 80)]


def cut(draw: random.Random, content: bytearray) -> None:
    at = draw.randrange(len(content))
    del content[at : at + draw.randint(1, 40)]


def insert(draw: random.Random, content: bytearray) -> None:
    at = draw.randint(8, len(content))
    content[at:at] = draw.choice(PIECES) * draw.choice([1, 1, 1, 2, 3000])


def edit_length(draw: random.Random, content: bytearray) -> None:
    length = int.from_bytes(content[:8], "little") + draw.choice([-8, -1, 1, 8])
    content[:8] = struct.pack("<Q", draw.choice([*NUMBERS[:12], length]) % 2**64)


def edit_number(draw: random.Random, content: bytearray) -> None:
    """Change a number in the header, and adapt the header's length, so that checks after the JSON are reached too."""
    header, data = header_of(content)
    places = [i for i, byte in enumerate(header) if 48 <= byte < 58]
    at = draw.choice(places)
    value = draw.choice([*NUMBERS, int(header[at : at + 1]) + 1, 4 * draw.randrange(9)])
    content[:] = file_of(header[:at] + str(value).encode() + header[at + 1 :], data)


def edit_entry(draw: random.Random, content: bytearray) -> None:
    """Change or remove a member of an entry, and write the header as JSON again."""
    header, data = header_of(content)
    members = json.loads(header)
    entry = members[draw.choice([name for name in members if name != "__metadata__"])]
    values = [None, True, [], {}, "F64", "BF16", "F4", 0.5, [2, 3], [0, 8], [8, 8], draw.choice(NUMBERS), [draw.choice(NUMBERS)] * 2]
    entry[draw.choice(["dtype", "shape", "data_offsets", "other"])] = draw.choice(values)
    content[:] = file_of(members, data)


def duplicate(draw: random.Random, content: bytearray) -> None:
    header, data = header_of(content)
    members = [f"{json.dumps(name)}:{json.dumps(value)}" for name, value in json.loads(header).items()]
    members.insert(draw.randint(0, len(members)), draw.choice(members))
    content[:] = file_of(f"{{{','.join(members)}}}".encode(), data)


def header_of(content: bytearray) -> tuple[bytes, bytes]:
    length = int.from_bytes(content[:8], "little")
    return bytes(content[8 : 8 + length]), bytes(content[8 + length :])


def stay_true(draw: random.Random, content: bytearray) -> None:
    """Another dtype of the same width, a reversed shape, another order of members: the file stays valid."""
    header, data = header_of(content)
    members = list(json.loads(header).items())
    for name, entry in members:
        if name != "__metadata__":
            width = STORED[entry["dtype"]].itemsize
            entry["dtype"] = draw.choice([word for word, dtype in STORED.items() if dtype.itemsize == width])
            entry["shape"] = draw.choice([entry["shape"][::-1], [1, *entry["shape"]]])
    draw.shuffle(members)
    content[:] = file_of(dict(members), data)


ANY = [flip_bits, truncate, splice, cut, insert, edit_length]
OF_A_WHOLE_FILE = [edit_number, edit_entry, duplicate, stay_true]


def test_ten_thousand_damaged_files_are_read_within_bounds_or_refused_in_one_line(tmp_path: Path) -> None:
    draw = random.Random(20)
    whole = [safetensors.numpy.save(sample(), {"format": "pt"}), safetensors.numpy.save({"a": np.zeros(2, np.float32)})]
    path = tmp_path / "a.safetensors"
    accepted = 0
    for _ in range(10_000):
        content = bytearray(draw.choice(whole))
        draw.choice(OF_A_WHOLE_FILE if draw.random() < 0.5 else ANY)(draw, content)
        while len(content) > 8 and draw.random() < 0.3:
            draw.choice(ANY)(draw, content)
        try:
            read_header(io.BytesIO(content), len(content))
        except CheckpointError as error:
            assert str(error).isprintable() and len(str(error)) < 800
        else:
            accepted += 1
            path.write_bytes(content)
            check_bounds(path, len(content))
    assert 500 < accepted < 5000


def check_bounds(path: Path, size: int) -> None:
    """Every tensor can be read completely, and together they tile the rest of the file."""
    with TensorFile(path) as file:
        places = sorted((entry.start, entry.stop) for entry in file.entries.values())
        assert all(before[1] == after[0] for before, after in zip(places, places[1:], strict=False))
        assert not places or places[-1][1] == size
        for name, entry in file.entries.items():
            raw = file.raw(name)
            assert (raw.shape, raw.dtype, raw.nbytes) == (entry.shape, STORED[entry.dtype], entry.stop - entry.start)
            assert len(raw.tobytes()) == raw.nbytes


# ---- numbers -----------------------------------------------------------------------------------------------------------------


def assert_same(out: Any, expected: Any) -> None:
    """Equal numbers and signs, and NaN where NaN is expected."""
    with np.errstate(invalid="ignore"):
        expected = expected.astype(out.dtype)
    assert np.array_equal(out, expected, equal_nan=True)
    assert ((np.signbit(out) == np.signbit(expected)) | np.isnan(out)).all()


@pytest.mark.parametrize("to", [np.float32, np.float64])
def test_every_bfloat16_becomes_its_number(to: type) -> None:
    out = np.empty(1 << 16, to)
    fill(out, ALL_16_BITS, "BF16")
    assert_same(out, ALL_16_BITS.view(BFLOAT16))


@pytest.mark.parametrize("to", [np.float32, np.float64])
def test_every_float16_becomes_its_number(to: type) -> None:
    out = np.empty(1 << 16, to)
    fill(out, ALL_16_BITS.view(np.float16), "F16")
    assert_same(out, np.array([struct.unpack("<e", struct.pack("<H", code))[0] for code in range(1 << 16)]))


@pytest.mark.parametrize("to", [np.float32, np.float64])
@pytest.mark.parametrize("dtype, peer", [("F8_E4M3", "float8_e4m3fn"), ("F8_E5M2", "float8_e5m2")])
def test_every_float8_becomes_its_number(to: type, dtype: str, peer: str) -> None:
    raw, out = np.arange(256, dtype=np.uint8), np.empty(256, to)
    fill(out, raw, dtype)
    assert_same(out, raw.view(peer))


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16", "F8_E4M3"])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0), (7, 5), (300, 700), (3, 2, 70_000)])
def test_fill_writes_any_shape_and_any_strides(dtype: str, shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).integers(-8, 8, size=shape).astype(np.float32)
    raw = values.astype(ml_dtypes.float8_e4m3fn).view(np.uint8) if dtype == "F8_E4M3" else pack(values, dtype)
    whole = np.full((*shape, 2), 99, np.float32)
    for out in (
        np.empty(shape, np.float32),
        np.empty(shape[::-1], np.float32).T,
        np.empty(shape),
        whole[..., 1],
        np.empty(shape)[::-1] if shape else whole[..., 1],
    ):
        fill(out, raw, dtype)
        assert np.array_equal(out, values)
    assert (whole[..., 0] == 99).all()


@pytest.mark.parametrize("dtype", ["F64", "BF16", "F16", "F8_E5M2"])
def test_fill_takes_little_memory_besides_its_output(dtype: str) -> None:
    raw, out = np.zeros((3000, 1000), STORED[dtype]), np.empty((1000, 3000), np.float32).T
    tracemalloc.start()
    try:
        fill(out, raw, dtype)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


def test_what_float32_cannot_hold_becomes_inf_and_nan_stays() -> None:
    out = np.empty(4, np.float32)
    fill(out, np.array([1e300, -1e300, np.nan, 1e-300]), "F64")
    assert np.array_equal(out, np.array([np.inf, -np.inf, np.nan, 0], np.float32), equal_nan=True)


@pytest.mark.parametrize("dtype", ["I32", "BOOL", "F8_E4M3FNUZ", "F4"])
def test_fill_refuses_dtypes_that_weights_cannot_have(dtype: str) -> None:
    with pytest.raises(CheckpointError, match=f"dtype {dtype} cannot be the dtype of a weight"):
        fill(np.empty(2, np.float32), np.zeros(2, np.uint8), dtype)


def test_fill_refuses_another_shape_even_where_numpy_would_broadcast() -> None:
    with pytest.raises(CheckpointError, match=r"a tensor of shape \[3\] where \[2, 3\] is expected"):
        fill(np.empty((2, 3), np.float32), np.zeros(3, np.uint16), "BF16")


FLOATS32 = st.integers(0, 2**32 - 1).map(lambda bits: np.array(bits, np.uint32).view(np.float32)[()])


@settings(max_examples=300)
@given(st.lists(FLOATS32, min_size=1))
def test_float32_packs_to_bfloat16_as_ml_dtypes_rounds_it(numbers: list[np.float32]) -> None:
    values = np.array(numbers, np.float32)
    with np.errstate(all="ignore"):
        expected = values.astype(BFLOAT16)
    packed = pack(values, "BF16")
    nan = np.isnan(values)
    assert np.array_equal(packed[~nan], expected.view(np.uint16)[~nan])
    assert np.isnan(packed.view(BFLOAT16)[nan].astype(np.float32)).all()


def test_bfloat16_and_its_halves_pack_to_the_nearest_with_ties_to_even() -> None:
    numbers = ALL_16_BITS[np.isfinite(ALL_16_BITS.view(BFLOAT16).astype(np.float32))]
    lower = numbers.astype(np.uint32) << 16
    for step, goes_up in ((0, None), (0x7FFF, False), (0x8001, True), (0x8000, "if odd")):
        packed = pack((lower + step).view(np.float32), "BF16")
        up = numbers & 1 if goes_up == "if odd" else int(goes_up or False)
        assert np.array_equal(packed, numbers + up)


@settings(max_examples=300)
@given(st.integers(0, 0x7F7F - 1), st.integers(-3, 3), st.sampled_from([2.0**-60, 2.0**-20, 0.0]), st.booleans())
def test_float64_packs_to_bfloat16_in_one_rounding(code: int, side: int, far: float, negative: bool) -> None:
    low, high = (float(np.array(c, np.uint16).view(BFLOAT16)) for c in (code, code + 1))
    value = (low + high) / 2
    value += side * far * (high - low)
    if side * far:
        value = np.nextafter(value, np.inf if side > 0 else 0.0)
    below, above = Fraction(value) - Fraction(low), Fraction(high) - Fraction(value)
    expected = code if below < above or (below == above and code % 2 == 0) else code + 1
    packed = pack(np.array([-value if negative else value]), "BF16")
    assert packed[0] == expected | (0x8000 if negative else 0)


def test_numbers_at_the_edges_pack_to_bfloat16() -> None:
    values = np.array([np.inf, -np.inf, 3.4e38, -3.4e38, 1e300, -1e300, 1e-300, -1e-300, -0.0])
    assert pack(values, "BF16").tolist() == [0x7F80, 0xFF80, 0x7F80, 0xFF80, 0x7F80, 0xFF80, 0, 0x8000, 0x8000]
    signalling = np.array([0x7F800001, 0xFF800001, 0x7FFFFFFF], np.uint32).view(np.float32)
    assert np.isnan(pack(signalling, "BF16").view(BFLOAT16).astype(np.float32)).all()


@pytest.mark.parametrize("dtype, to", [("F64", np.float64), ("F32", np.float32), ("F16", np.float16)])
@pytest.mark.parametrize("of", [np.float32, np.float64])
def test_ieee_numbers_pack_as_numpy_rounds_them(dtype: str, to: type, of: type) -> None:
    values = np.array([[0.0, -0.0, 1 / 3, 6e4, 7e4, 1e-7], [5e-8, 1e39 if of is np.float64 else 1e38, np.inf, -np.inf, np.nan, 2049]], of)
    with np.errstate(all="ignore"):
        expected = values.T.astype(to)
    packed = pack(values.T, dtype)
    assert packed.dtype == to and packed.flags.c_contiguous and np.array_equal(packed, expected, equal_nan=True)


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
@pytest.mark.parametrize("shape", [(), (0,), (4, 5), (3, 70_001)])
def test_packed_numbers_are_read_back(dtype: str, shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).integers(-99, 99, size=shape).astype(np.float32)
    out = np.empty(shape, np.float32)
    fill(out, pack(values, dtype), dtype)
    assert np.array_equal(out, values)


def test_pack_refuses_a_dtype_that_it_does_not_round_to() -> None:
    with pytest.raises(ValueError, match="not F8_E4M3"):
        pack(np.zeros(1), "F8_E4M3")


# ---- writing -----------------------------------------------------------------------------------------------------------------


def raw_of(array: Any) -> Any:
    return array.view(f"u{array.itemsize}") if array.dtype.kind == "V" else array


def plan_of(arrays: dict[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    words = {"bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "bool": "BOOL"}
    return {
        name: (words.get(array.dtype.name) or f"{array.dtype.kind.upper()}{array.itemsize * 8}", array.shape)
        for name, array in arrays.items()
    }


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
@pytest.mark.parametrize("names", [list(sample()), list(sample())[::-1], ["nothing"], ["scalar"]])
def test_a_written_file_has_the_bytes_that_the_safetensors_library_writes(
    tmp_path: Path, names: list[str], metadata: dict[str, str] | None
) -> None:
    arrays = {f'{name} é"\\\n': sample()[name] for name in names}
    write_tensor_file(tmp_path / "a.safetensors", plan_of(arrays), lambda name: raw_of(arrays[name]), metadata)
    assert (tmp_path / "a.safetensors").read_bytes() == safetensors.numpy.save(arrays, metadata)


def test_a_written_file_is_read_by_the_safetensors_library(tmp_path: Path) -> None:
    arrays = {name: array for name, array in sample().items() if array.dtype.kind != "V"}
    write_tensor_file(tmp_path / "a.safetensors", plan_of(arrays), lambda name: arrays[name])
    back = safetensors.numpy.load_file(tmp_path / "a.safetensors")
    assert back.keys() == arrays.keys()
    assert all(np.array_equal(back[name], arrays[name]) and back[name].dtype == arrays[name].dtype for name in arrays)


def test_tensors_are_produced_one_at_a_time_and_not_kept(tmp_path: Path) -> None:
    plan = {f"t{i}": ("F32", (500, 500)) for i in range(20)}
    tracemalloc.start()
    try:
        write_tensor_file(tmp_path / "a.safetensors", plan, lambda name: np.full((500, 500), int(name[1:]), np.float32))
        assert tracemalloc.get_traced_memory()[1] < 3_000_000
    finally:
        tracemalloc.stop()
    file = TensorFile(tmp_path / "a.safetensors")
    assert all((file.raw(f"t{i}") == i).all() for i in range(20))


@pytest.mark.parametrize(
    "view", [lambda a: a.T, lambda a: a[:, ::-1], lambda a: a.astype(">f4")], ids=["transposed", "reversed", "big-endian"]
)
def test_arrays_of_other_strides_are_written_with_their_own_values(tmp_path: Path, view: Callable[[Any], Any]) -> None:
    array = view(np.arange(16, dtype=np.float32).reshape(4, 4))
    write_tensor_file(tmp_path / "a.safetensors", {"a": ("F32", (4, 4))}, lambda name: array)
    assert np.array_equal(TensorFile(tmp_path / "a.safetensors").raw("a"), array)


@pytest.mark.parametrize("array", [np.zeros(3, np.float32), np.zeros((1, 2), np.float32), np.zeros(2), np.zeros(2, np.int32)])
def test_a_tensor_that_differs_from_its_spec_is_refused_and_the_old_file_stays(tmp_path: Path, array: Any) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"before")
    with pytest.raises(ValueError, match=r"a: planned F32 \(float32\) \[2\], produced"):
        write_tensor_file(tmp_path / "a.safetensors", {"a": ("F32", (2,))}, lambda name: array)
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == {"a.safetensors": b"before"}


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"a\.safetensors: cannot be written: No space left on device"):
        write_tensor_file(tmp_path / "a.safetensors", {"a": ("F32", (2,))}, lambda name: np.zeros(2, np.float32))
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be written: No such file or directory"):
        write_tensor_file(tmp_path / "none" / "a.safetensors", {}, lambda name: np.zeros(2))


def test_a_header_past_the_formats_limit_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="the header would take"):
        write_tensor_file(tmp_path / "a.safetensors", {}, lambda name: np.zeros(2), {"a": "x" * 100_000_000})
    assert not list(tmp_path.iterdir())
