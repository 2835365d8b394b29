"""Routing: the plan, a counting sort of (token, slot) pairs by expert, and the load of noisy routing. dispatch.py moves the rows.

The kernels are kernels/route.cu, kernels/route_select.cu and kernels/noisy_load.cu. With priority by position the plan takes three
launches, by probability four; the capacity is read on the device, so a recorded step follows it.
"""

from typing import Any

import numpy as np

from minimoe.backend import Array
from minimoe.reference.routing import Plan
from minimoe_cupy.constants import constant
from minimoe_cupy.dispatch import CudaDispatch
from minimoe_cupy.launch import ceil_div, check_shape, instance, wide
from minimoe_cupy.loader import Source
from minimoe_cupy.selection import BLOCK, MOST_COLUMNS, CudaSelection, blocks_for, by_layout, layout

PAIRS, ROUTE_BLOCK, ROUTE_WARPS = (constant("route.cu", name) for name in ("PAIRS", "THREADS", "WARPS"))
SELECT_BLOCK = constant("route_select.cu", "THREADS")
MOST_EXPERTS = 2048  # whose counts per warp fit into the shared memory of any card from Ampere on
NO_LIMIT = 2**31 - 1  # rows, and pairs: a plan is int32
ROUTE = Source("route.cu", ("route_count", "route_scan", "route_place"))
SELECT = Source("route_select.cu", ("route_select",))
NOISY = Source("noisy_load.cu", (*by_layout("noisy_load"), *by_layout("noisy_load_backward")))


class CudaRouting(CudaDispatch, CudaSelection):
    def route(
        self, ids: Array, weights: Array, valid: Array | None, *, n_experts: int, rows: int, capacity: int | Array | None = None,
        priority: str = "position",
    ) -> Plan:  # fmt: skip
        n, width = ids.shape
        pairs = n * width
        by_weight = capacity is not None and priority == "probability"
        if not 0 < pairs <= NO_LIMIT or not 0 < n_experts <= MOST_EXPERTS or (by_weight and not wide(weights)):
            return super().route(ids, weights, valid, n_experts=n_experts, rows=rows, capacity=capacity, priority=priority)
        check_shape("route", (n,), valid=valid)
        ids, valid = self._contiguous(ids, valid)
        limit = self._limit(capacity)
        if not by_weight:
            return self._plan_of(ids, valid, n_experts, rows, limit)
        check_shape("route", (n, width), weights=weights)
        (weights,) = self._contiguous(weights)
        every, inverse, starts = self._plan_of(ids, valid, n_experts, pairs, (None, NO_LIMIT))
        order, offsets = (self.xp.empty(size, dtype=self.xp.int32) for size in (rows, n_experts + 1))
        args = weights, every, starts, *limit, order, inverse, offsets, n_experts, rows
        self._launch(SELECT, "route_select", n_experts, SELECT_BLOCK, *args)
        return Plan(order, inverse, offsets)

    def _plan_of(self, ids: Array, valid: Array | None, n_experts: int, rows: int, limit: tuple[Array | None, int]) -> Plan:
        """Returns the plan in which each expert has the first `limit` of its pairs."""
        xp, (n, width) = self.xp, ids.shape
        pairs = n * width
        blocks = ceil_div(pairs, PAIRS)
        counts, totals = xp.empty((n_experts, blocks), dtype=xp.int32), xp.empty(n_experts, dtype=xp.int32)
        order, inverse, offsets = (xp.empty(shape, dtype=xp.int32) for shape in (rows, (n, width), n_experts + 1))
        self._launch(ROUTE, "route_count", blocks, ROUTE_BLOCK, ids, valid, counts, pairs, width, n_experts, shared=4 * n_experts)
        self._launch(ROUTE, "route_scan", n_experts, ROUTE_BLOCK, counts, totals, blocks)
        args = ids, valid, counts, totals, *limit, order, inverse, offsets, pairs, width, n_experts, rows
        self._launch(ROUTE, "route_place", blocks, ROUTE_BLOCK, *args, shared=4 * ((ROUTE_WARPS + 1) * n_experts + 1))
        return Plan(order, inverse, offsets)

    def _limit(self, capacity: int | Array | None) -> tuple[Array | None, int]:
        """Returns a capacity as kernels take it: int64 on the device, or a number. Raises TypeError if it is not an integer."""
        if capacity is None:
            return None, NO_LIMIT
        if isinstance(capacity, int):
            return None, max(0, min(capacity, NO_LIMIT))
        if not hasattr(capacity, "dtype") or not np.issubdtype(capacity.dtype, np.integer):
            shown = getattr(capacity, "dtype", type(capacity).__name__)
            raise TypeError(f"route: capacity must be an integer, or one on the device, not {shown}")
        check_shape("route", (), capacity=capacity)
        return capacity.astype(np.int64), NO_LIMIT

    def noisy_load(self, clean: Array, noisy: Array, sigma: Array, valid: Array | None, *, k: int) -> tuple[Array, Array]:
        n, e = noisy.shape
        if not wide(clean, noisy, sigma) or e > MOST_COLUMNS:
            return super().noisy_load(clean, noisy, sigma, valid, k=k)
        clean, noisy, sigma, valid = self._noisy("noisy_load", clean, noisy, sigma, valid, k)
        xp, blocks = self.xp, blocks_for(n)
        ids, parts = xp.empty((n, k + 1), dtype=xp.int32), xp.empty((blocks, e), dtype=xp.float32)
        name = instance("noisy_load", *layout(e, clean, noisy, sigma))
        self._launch(NOISY, name, blocks, BLOCK, clean, noisy, sigma, valid, ids, parts, n, e, k, shared=4 * e)
        return self._add_partials(parts)[0], ids

    def noisy_load_backward(
        self, dload: Array, clean: Array, noisy: Array, sigma: Array, ids: Array, valid: Array | None, *, k: int
    ) -> tuple[Array, Array, Array]:
        n, e = noisy.shape
        if not wide(dload, clean, noisy, sigma) or e > MOST_COLUMNS:
            return super().noisy_load_backward(dload, clean, noisy, sigma, ids, valid, k=k)
        clean, noisy, sigma, valid = self._noisy("noisy_load_backward", clean, noisy, sigma, valid, k)
        check_shape("noisy_load_backward", (e,), dload=dload)
        check_shape("noisy_load_backward", (n, k + 1), ids=ids)
        dload, ids = self._contiguous(dload, ids)
        dclean, dnoisy, dsigma = (self.xp.empty((n, e), dtype=self.xp.float32) for _ in range(3))
        name = instance("noisy_load_backward", *layout(e, dload, clean, noisy, sigma, dclean, dnoisy, dsigma))
        args = dload, clean, noisy, sigma, ids, valid, dclean, dnoisy, dsigma, n, e, k
        self._launch(NOISY, name, blocks_for(n), BLOCK, *args)
        return dclean, dnoisy, dsigma

    def _noisy(self, kernel: str, clean: Array, noisy: Array, sigma: Array, valid: Array | None, k: int) -> tuple[Any, ...]:
        """Returns the arrays contiguous. Raises ValueError if they do not fit one another and k."""
        n, e = noisy.shape
        if not 1 <= k < e:
            raise ValueError(f"{kernel}: k ({k}) must be 1 to {e - 1}, less than the number of experts")
        check_shape(kernel, (n, e), clean=clean, sigma=sigma)
        check_shape(kernel, (n,), valid=valid)
        return self._contiguous(clean, noisy, sigma, valid)
