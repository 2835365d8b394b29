"""Kernels of PyTorch beside minimoe's: fused attention, and the product with rows grouped by expert. Random inputs on its device."""

from collections.abc import Callable
from typing import Any

from benchmarks.gpu.clocks import Call
from benchmarks.gpu.data import host_offsets


def attention(b: int, t: int, heads: int, groups: int, c: int, dtype: str, backwards: bool, device: str) -> Call:
    """scaled_dot_product_attention, causal; PyTorch chooses the kernel (on a card in bfloat16 a flash one)."""
    import torch
    from torch.nn import functional

    kind = getattr(torch, dtype)
    shapes = [(b, t, n, c) for n in (heads, groups, groups)]
    q, k, v = (torch.randn(shape, device=device, dtype=kind).transpose(1, 2).requires_grad_(backwards) for shape in shapes)

    def forward() -> Any:
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != groups)

    if not backwards:
        return forward
    y, dy = forward(), torch.randn(b, t, heads, c, device=device, dtype=kind).transpose(1, 2)
    return lambda: torch.autograd.grad(y, (q, k, v), dy, retain_graph=True)


def grouped_mm() -> Callable[..., Any]:
    """The grouped product. Raises AttributeError if this PyTorch has none."""
    import torch
    from torch.nn import functional

    found: Callable[..., Any] = functional.grouped_mm if hasattr(functional, "grouped_mm") else torch._grouped_mm
    return found


def grouped_forward(r: int, i: int, o: int, e: int, load: str, device: str) -> Call:
    """y = x W_e'"""
    x, weight, ends = bf16(device, r, i), bf16(device, e, o, i), ends_of(device, r, e, load)
    return lambda: grouped_mm()(x, weight.transpose(-2, -1), offs=ends)


def grouped_dx(r: int, i: int, o: int, e: int, load: str, device: str) -> Call:
    """dx = dy W_e"""
    dy, weight, ends = bf16(device, r, o), bf16(device, e, o, i), ends_of(device, r, e, load)
    return lambda: grouped_mm()(dy, weight, offs=ends)


def grouped_dw(r: int, i: int, o: int, e: int, load: str, device: str) -> Call:
    """dW_e = dy' x"""
    dy, x, ends = bf16(device, r, o), bf16(device, r, i), ends_of(device, r, e, load)
    return lambda: grouped_mm()(dy.transpose(0, 1), x, offs=ends)


def bf16(device: str, *shape: int) -> Any:
    import torch

    return torch.randn(*shape, device=device, dtype=torch.bfloat16)


def ends_of(device: str, rows: int, experts: int, load: str) -> Any:
    """Return the end of each expert's rows, as in minimoe's inputs."""
    import torch

    return torch.from_numpy(host_offsets(rows, experts, load)[1:]).to(device)


def copy(elements: int, device: str) -> Call:
    """A copy of `n` float32 numbers."""
    import torch

    source = torch.randn(elements, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def product(n: int, dtype: str, device: str) -> Call:
    """A matrix product of n x n x n, never in TF32."""
    import torch

    torch.set_float32_matmul_precision("highest")
    a, b = (torch.randn(n, n, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    return lambda: torch.matmul(a, b.T)
