"""float8, float8 in blocks and MXFP4: every code is the number that its format defines, and pieces join at odd sizes."""

import math
import tracemalloc
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from minimoe.errors import CheckpointError
from minimoe.pretrained.quantised import FLOAT4, FLOAT8, PIECE, fill_fp8_blocks, fill_mxfp4, pieces

BYTES = np.arange(256, dtype=np.uint8)


def codes(*shape: int, most: int = 256) -> Any:
    return np.random.default_rng(0).integers(0, most, size=shape, dtype=np.uint8)


def assert_equal(got: Any, expected: Any) -> None:
    assert np.array_equal(got, expected, equal_nan=True)
    assert ((np.signbit(got) == np.signbit(expected)) | np.isnan(got)).all()


# ---- codes -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, peer", [("F8_E4M3", "float8_e4m3fn"), ("F8_E5M2", "float8_e5m2"), ("F8_E8M0", "float8_e8m0fnu")])
def test_a_float8_table_holds_the_number_of_every_byte(dtype: str, peer: str) -> None:
    assert FLOAT8[dtype].dtype == np.float32
    assert_equal(FLOAT8[dtype], BYTES.view(peer).astype(np.float32))


@pytest.mark.parametrize(
    "dtype, code, number",
    [
        ("F8_E4M3", 0x01, 2.0**-9), ("F8_E4M3", 0x08, 2.0**-6), ("F8_E4M3", 0x38, 1.0), ("F8_E4M3", 0x7E, 448.0),
        ("F8_E4M3", 0xFF, math.nan), ("F8_E5M2", 0x01, 2.0**-16), ("F8_E5M2", 0x04, 2.0**-14), ("F8_E5M2", 0x3C, 1.0),
        ("F8_E5M2", 0x7B, 57344.0), ("F8_E5M2", 0xFC, -math.inf), ("F8_E8M0", 0, 2.0**-127), ("F8_E8M0", 127, 1.0),
        ("F8_E8M0", 254, 2.0**127), ("F8_E8M0", 255, math.nan),
    ],
)  # fmt: skip
def test_the_numbers_that_the_formats_papers_name_are_there(dtype: str, code: int, number: float) -> None:
    assert np.array_equal(FLOAT8[dtype][code], number, equal_nan=True)


def test_float4_holds_the_sixteen_numbers_of_e2m1() -> None:
    assert_equal(FLOAT4, np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32))


# ---- pieces ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (1,), (100,), (0,), (3, 0, 2), (7, 9), (1, 40), (40, 1), (3, 5, 7), (2, 1, 1, 33)])
@pytest.mark.parametrize("most", [1, 7, 32, 1000])
def test_pieces_cover_every_number_once_and_none_is_larger_than_asked(shape: tuple[int, ...], most: int) -> None:
    seen = np.zeros(shape, int)
    for at in pieces(shape, most):
        assert seen[at].size <= most
        seen[at] += 1
    assert (seen == 1).all()


# ---- float8 with a scale a block ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", [np.float32, np.float64])
@pytest.mark.parametrize("rows, columns", [(128, 128), (1, 1), (127, 129), (256, 384), (300, 1), (1, 300), (0, 5), (5, 0), (130, 70_000)])
def test_a_float8_weight_is_each_number_times_its_blocks_scale(to: type, rows: int, columns: int) -> None:
    raw = codes(rows, columns)
    scale = np.random.default_rng(1).normal(size=(-(-rows // 128), -(-columns // 128))).astype(np.float32)
    out = np.empty((rows, columns), to)
    fill_fp8_blocks(out, raw, scale)
    scales = np.repeat(np.repeat(scale, 128, axis=0)[:rows], 128, axis=1)[:, :columns]
    assert_equal(out, raw.view(ml_dtypes.float8_e4m3fn).astype(to) * scales.astype(to))


def test_the_block_may_have_another_size_and_out_other_strides() -> None:
    raw, scale = codes(7, 10), np.array([[1, 2, 4], [8, 16, 32]], np.float32)
    out = np.empty((10, 7), np.float32).T
    fill_fp8_blocks(out, raw, scale, block=(5, 4))
    expected = [[FLOAT8["F8_E4M3"][raw[o, i]] * scale[o // 5, i // 4] for i in range(10)] for o in range(7)]
    assert_equal(out, np.array(expected))


@pytest.mark.parametrize("scale", [(1, 2), (2, 1), (3, 2), (2,), (2, 2, 1), ()])
def test_scales_of_another_shape_are_refused_with_the_one_that_fits(scale: tuple[int, ...]) -> None:
    with pytest.raises(CheckpointError, match=r"weight of shape \[130, 200\].* scales of shape \[2, 2\] .*128 x 128.*, got \["):
        fill_fp8_blocks(np.empty((130, 200), np.float32), codes(130, 200), np.ones(scale, np.float32))


@pytest.mark.parametrize("shape", [(4,), (1, 4, 4)])
def test_a_float8_weight_that_is_not_a_matrix_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(CheckpointError, match="expected two dimensions"):
        fill_fp8_blocks(np.empty(shape, np.float32), codes(*shape), np.ones((1, 1), np.float32))


def test_scales_that_overflow_give_inf_and_nan_without_a_warning() -> None:
    out = np.empty((1, 3), np.float32)
    fill_fp8_blocks(out, np.array([[0x7E, 0x00, 0x38]], np.uint8), np.array([[3e38]], np.float32))
    assert out[0, 0] == np.inf and out[0, 1] == 0 and out[0, 2] == np.float32(3e38)
    fill_fp8_blocks(out, np.array([[0x7E, 0x00, 0x38]], np.uint8), np.array([[np.inf]], np.float32))
    assert np.isnan(out[0, 1])


# ---- MXFP4 -------------------------------------------------------------------------------------------------------------------


def mxfp4(blocks: Any, scales: Any) -> Any:
    """The definition, one number at a time."""
    out = np.empty((*scales.shape[:-1], scales.shape[-1] * 32))
    for *lead, group in np.ndindex(*scales.shape):
        for j in range(32):
            byte = int(blocks[(*lead, group, j // 2)])
            scale = 2.0 ** (int(scales[(*lead, group)]) - 127) if scales[(*lead, group)] != 255 else math.nan
            out[(*lead, group * 32 + j)] = float(FLOAT4[byte >> 4 if j % 2 else byte & 15]) * scale
    return out


@pytest.mark.parametrize("to", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(1,), (3,), (0,), (2, 3), (2, 5, 3), (1, 0, 4)])
def test_an_mxfp4_weight_is_each_number_times_its_blocks_power_of_two(to: type, shape: tuple[int, ...]) -> None:
    blocks, scales = codes(*shape, 16), codes(*shape, most=250)
    out = np.empty((*shape[:-1], shape[-1] * 32), to)
    fill_mxfp4(out, blocks, scales)
    assert_equal(out, mxfp4(blocks, scales).astype(to))


def test_the_low_four_bits_of_a_byte_come_first() -> None:
    blocks, out = np.zeros((1, 16), np.uint8), np.empty(32, np.float32)
    blocks[0, 0], blocks[0, 15] = 0x72, 0xF1
    fill_mxfp4(out, blocks, np.array([128], np.uint8))
    assert (out[0], out[1], out[30], out[31]) == (2.0, 12.0, 1.0, -12.0) and not out[2:30].any()


def test_the_scales_at_the_ends_of_their_range_are_as_defined() -> None:
    blocks, out = np.full((3, 16), 0x71, np.uint8), np.empty(96, np.float32)
    fill_mxfp4(out, blocks, np.array([0, 254, 255], np.uint8))
    assert (out[0], out[1], out[32], out[33]) == (2.0**-128, 6 * 2.0**-127, 2.0**126, np.inf) and np.isnan(out[64:]).all()


@pytest.mark.parametrize(
    "view", [lambda a: a.transpose(0, 2, 1), lambda a: a[:, ::-1, ::-1].transpose(0, 2, 1)], ids=["transposed", "turned round"]
)
def test_mxfp4_is_written_into_any_strides(view: Callable[[Any], Any]) -> None:
    blocks, scales = codes(2, 5, 3, 16), codes(2, 5, 3, most=250)
    whole = np.full((2, 96, 5), np.nan, np.float32)
    fill_mxfp4(view(whole), blocks, scales)
    assert_equal(view(whole), mxfp4(blocks, scales).astype(np.float32))


@pytest.mark.parametrize("blocks, scales", [((2, 3, 15), (2, 3)), ((2, 3, 16), (2, 4)), ((3, 16), (2, 3)), ((16,), ()), ((2, 3), (2, 3))])
def test_blocks_that_do_not_fit_their_scales_are_refused(blocks: tuple[int, ...], scales: tuple[int, ...]) -> None:
    with pytest.raises(CheckpointError, match="MXFP4 weight: blocks of shape"):
        fill_mxfp4(np.empty((2, 96), np.float32), codes(*blocks), codes(*scales))


def test_an_out_of_another_shape_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"a weight of shape \[2, 96\] where \[96, 2\] is expected"):
        fill_mxfp4(np.empty((96, 2), np.float32), codes(2, 3, 16), codes(2, 3))
    with pytest.raises(CheckpointError, match=r"a weight of shape \[2, 3\] where \[3, 2\] is expected"):
        fill_fp8_blocks(np.empty((3, 2), np.float32), codes(2, 3), np.ones((1, 1), np.float32))


@pytest.mark.parametrize("to", [np.float32, np.float64])
def test_writing_takes_little_memory_besides_one_tensor(to: type) -> None:
    out, raw, scale = np.empty((1024, 2048), to), codes(1024, 2048), np.ones((8, 16), np.float32)
    blocks, scales = codes(1024, 64, 16), codes(1024, 64)
    tracemalloc.start()
    try:
        fill_fp8_blocks(out, raw, scale)
        fill_mxfp4(out, blocks, scales)
        assert tracemalloc.get_traced_memory()[1] < PIECE * 24
    finally:
        tracemalloc.stop()
