"""PyTorch's tensors as a minimoe backend: the array layer, and one library kernel. This is the example of backends/README.md.

`TorchBackend("cuda")` names the device, or MINIMOE_TORCH_DEVICE does: cpu, cuda (AMD's ROCm too), mps (Apple) or xpu (Intel).
PyTorch's autograd and modules are not used, since minimoe has its own.
"""

import os
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from minimoe.backend import Array, Backend, BackendUnavailable, load


class Namespace:
    """The namespace `torch`, with new arrays on one device, and with functions that follow the Array API standard where torch's differ.

    Where torch has `dim` and `keepdim`, it also accepts the standard's `axis` and `keepdims`.
    """

    def __init__(self, device: torch.device) -> None:
        for name in ("arange", "empty", "full", "ones", "zeros"):
            setattr(self, name, partial(getattr(torch, name), device=device))
        self.asarray = partial(torch.asarray, device=device, requires_grad=False)  # a tensor in torch's autograd leaves its graph

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    permute_dims = staticmethod(torch.permute)
    result_type = staticmethod(torch.promote_types)

    @staticmethod
    def argsort(x: Array, *, axis: int = -1, stable: bool = True) -> Array:
        return torch.argsort(x, dim=axis, stable=stable)

    @staticmethod
    def astype(x: Array, dtype: torch.dtype, *, copy: bool = True) -> Array:
        return x.to(dtype, copy=copy)

    @staticmethod
    def cumulative_sum(x: Array) -> Array:
        return torch.cumsum(x, 0)

    @staticmethod
    def isdtype(dtype: torch.dtype, kind: str) -> bool:
        return dtype.is_floating_point if kind == "real floating" else kind == "integral" and dtype in (torch.int32, torch.int64)

    @staticmethod
    def matrix_transpose(x: Array) -> Array:
        return x.mT

    @staticmethod
    def max(x: Array, *, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Array:
        return torch.amax(x, dim=() if axis is None else axis, keepdim=keepdims)

    @staticmethod
    def take(x: Array, indices: Array, *, axis: int = 0) -> Array:
        return torch.index_select(x, axis, indices)

    @staticmethod
    def take_along_axis(x: Array, indices: Array, *, axis: int = -1) -> Array:
        return torch.take_along_dim(x, indices, dim=axis)


def _has_float64(device: torch.device) -> bool:
    """True if the device computes float64. Apple's GPUs and some of Intel's do not: they refuse the array, or the first product."""
    try:
        return bool((torch.ones(1, dtype=torch.float64, device=device) * 2.0).item())
    except (TypeError, RuntimeError):
        return False


class TorchBackend(Backend):
    """PyTorch on one device. Raises `BackendUnavailable` if this machine, or this PyTorch, has no such device."""

    name = "torch"
    library = frozenset({"swiglu"})

    def __init__(self, device: str = "cpu") -> None:
        self.device, self._threads = torch.device(device), torch.get_num_threads()
        self._module = torch.get_device_module(self.device)  # torch.cpu, torch.cuda, ...
        if not self._module.is_available():
            raise BackendUnavailable(f"backend torch: no {self.device.type} here for PyTorch {torch.__version__}")
        self.xp = Namespace(self.device)
        self.dtypes = ("float32", "float64") if _has_float64(self.device) else ("float32",)

    # ---- the array layer ---------------------------------------------------------------------------------------------------------

    def from_host(self, array: np.ndarray[Any, Any]) -> Array:
        return torch.from_numpy(np.array(array, order="C", copy=True)).to(self.device)

    def to_host(self, array: Array) -> np.ndarray[Any, Any]:
        return array.cpu().numpy()

    def scatter_add(self, inout_target: Array, index: Array, values: Array) -> None:
        if self.device.type == "cpu":
            index = torch.where(index < 0, index + len(inout_target), index)  # which index_add_ refuses
            inout_target.index_add_(0, index, values)  # adds in the order of the index; on a GPU it uses atomics, in any order
        else:
            inout_target.index_put_((index.long(),), values, accumulate=True)  # CUDA sorts the index first; a CPU adds in any order

    def top_k(self, x: Array, k: int) -> tuple[Array, Array]:
        ids = torch.argsort(0.0 - x, dim=-1, stable=True)[..., :k]  # torch.topk has no fixed order of ties; 0 - x makes -0.0 tie with 0.0
        return torch.take_along_dim(x, ids, dim=-1), ids.to(torch.int32)

    def bincount(self, ids: Array, minlength: int) -> Array:
        ones = torch.ones_like(ids)  # torch.bincount reads the largest id on the host
        return torch.zeros(minlength, dtype=torch.int32, device=self.device).index_add_(0, ids, ones)

    def erf(self, x: Array) -> Array:
        return torch.erf(x)

    def contiguous(self, x: Array) -> Array:
        return x.contiguous()

    def synchronize(self) -> None:
        self._module.synchronize()

    def memory(self) -> dict[str, int]:
        if self.device.type == "cpu":
            return load("numpy").memory()  # of the process
        if self.device.type == "mps":  # it does not record the peak
            return dict.fromkeys(("used", "peak"), self._module.current_allocated_memory())
        return {"used": self._module.memory_allocated(self.device), "peak": self._module.max_memory_allocated(self.device)}

    def use_threads(self, count: int) -> None:
        torch.set_num_threads(count or self._threads)

    # ---- a kernel of its own ------------------------------------------------------------------------------------------------------

    def swiglu(self, gate_up: Array, limit: float = 0.0, out: Array | None = None) -> Array:
        if limit:  # gpt-oss's clipped form: PyTorch has no function for it, the reference has
            return super().swiglu(gate_up, limit, out)
        gate, up = gate_up.chunk(2, dim=-1)
        return self.store(F.silu(gate) * up, out)


def backend_class() -> type[Backend]:
    """Return the class, which needs no device: `minimoe backends` lists it if `backend` fails."""
    return TorchBackend


def backend() -> Backend:
    """Return the backend on the device that MINIMOE_TORCH_DEVICE names, by default the CPU."""
    return TorchBackend(os.environ.get("MINIMOE_TORCH_DEVICE") or "cpu")
