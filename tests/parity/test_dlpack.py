"""Arrays in from PyTorch and out to it."""

import numpy as np
import pytest

from minimoe.backend import load
from minimoe.engine.creation import tensor
from minimoe.engine.tensor import Tensor

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.parity
NUMPY = load("numpy")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int32, torch.int64])
def test_a_torch_tensor_becomes_a_tensor_as_a_copy(dtype):
    source = torch.arange(6).reshape(2, 3).to(dtype)
    ours = tensor(source, backend=NUMPY)
    assert np.array_equal(ours.numpy(), source.numpy())
    assert str(ours.dtype) == str(dtype).removeprefix("torch.")
    source[0, 0] = 9
    assert ours.numpy()[0, 0] == 0


def test_a_torch_tensor_that_requires_a_gradient_or_is_a_view_comes_in():
    assert tensor(torch.ones(2, requires_grad=True), backend=NUMPY).numpy().tolist() == [1.0, 1.0]
    view = torch.arange(12.0).reshape(3, 4).T[::2]
    assert np.array_equal(tensor(view, backend=NUMPY).numpy(), view.numpy())


def test_torch_reads_a_tensor_without_a_copy():
    ours = Tensor(np.arange(6.0).reshape(2, 3), NUMPY)
    theirs = torch.from_dlpack(ours)
    assert theirs.shape == (2, 3)
    theirs[0, 0] = 5.0
    assert ours.data[0, 0] == 5.0
    assert torch.tensor(np.asarray(ours)).tolist() == theirs.tolist()
