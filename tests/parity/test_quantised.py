"""float8 and MXFP4 against PyTorch's own float8 types, and the shifts and powers of its arithmetic."""

import numpy as np
import pytest
import torch

from minimoe.pretrained.file import fill, pack
from minimoe.pretrained.quantised import FLOAT8, fill_fp8_blocks, fill_mxfp4

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("dtype, peer", [("F8_E4M3", torch.float8_e4m3fn), ("F8_E5M2", torch.float8_e5m2)])
def test_every_float8_is_the_number_that_torch_reads(dtype: str, peer: torch.dtype) -> None:
    expected = torch.arange(256, dtype=torch.uint8).view(peer).float().numpy()
    assert np.array_equal(FLOAT8[dtype], expected, equal_nan=True)


def test_float8_blocks_are_what_torch_makes_of_them() -> None:
    weight = torch.randn(300, 200, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    scale = torch.rand(3, 2, generator=torch.Generator().manual_seed(1))
    expected = weight.float() * scale.repeat_interleave(128, 0)[:300].repeat_interleave(128, 1)[:, :200]
    out = np.empty((300, 200), np.float32)
    fill_fp8_blocks(out, weight.view(torch.uint8).numpy(), scale.numpy())
    assert np.array_equal(out, expected.numpy())


def test_mxfp4_is_what_torch_makes_of_it() -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (2, 5, 3, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(100, 150, (2, 5, 3), dtype=torch.uint8, generator=generator)
    numbers = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    both = torch.stack([numbers[(blocks & 15).long()], numbers[(blocks >> 4).long()]], dim=-1)
    expected = torch.ldexp(both, scales.int()[..., None, None] - 127).reshape(2, 5, 96)
    out = np.empty((2, 5, 96), np.float32)
    fill_mxfp4(out, blocks.numpy(), scales.numpy())
    assert np.array_equal(out, expected.numpy())


def test_bfloat16_is_packed_and_filled_as_torch_does() -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(-50, 50).repeat(10)
    packed = pack(values.numpy(), "BF16")
    assert np.array_equal(packed, values.bfloat16().view(torch.uint16).numpy())
    out = np.empty(1000, np.float32)
    fill(out, packed, "BF16")
    assert np.array_equal(out, values.bfloat16().float().numpy())
