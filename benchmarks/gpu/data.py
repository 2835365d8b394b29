"""Random inputs on a device. Normal numbers are drawn once on the host and repeated, each array from another offset on."""

from functools import cache
from typing import Any

import numpy as np

from minimoe.backend import Array, Backend, load
from minimoe.reference.routing import Plan

POOL = 4_200_011  # numbers; odd, so that rows of a matrix differ
TOKENS = 4096  # tokens whose experts are drawn; further tokens repeat them
SKEW = 1.0  # the r-th expert's share goes with r^-SKEW: with 64 experts the first takes a fifth of all slots


class Data:
    """Arrays of one backend."""

    def __init__(self, backend: Backend) -> None:
        self.backend, self.host = backend, np.random.default_rng(0)
        self.offset = 0  # in the pool
        self.bytes = 0  # of all arrays given out

    def normal(self, *shape: int, dtype: str = "float32", scale: float = 1.0) -> Array:
        """Standard normal numbers, times `scale`."""
        pool = normal_pool(self.backend, dtype)
        flat = self.backend.xp.empty(int(np.prod(shape)), dtype=pool.dtype)
        done = 0
        while done < flat.shape[0]:
            n = min(flat.shape[0] - done, POOL - self.offset)
            flat[done : done + n] = pool[self.offset : self.offset + n]
            done, self.offset = done + n, (self.offset + n) % POOL
        if scale != 1.0:
            flat *= scale
        self.bytes += int(flat.nbytes)
        return self.backend.xp.reshape(flat, shape)

    def integers(self, limit: int, *shape: int) -> Array:
        """Uniform in 0 .. limit - 1, int32."""
        return self._given(self.host.integers(0, limit, shape).astype(np.int32))

    def numbers(self, value: Any, dtype: type = np.float32) -> Array:
        """A given array or number, on the device; integers as int32."""
        return self._given(np.asarray(value, dtype=np.int32 if dtype is int else dtype))

    def ids(self, n: int, e: int, k: int, load: str) -> Array:
        """The experts of each token, all different.   -> int32 [n,k]"""
        return self._given(host_ids(self.host, n, e, k, load))

    def plan(self, n: int, e: int, k: int, load: str) -> Plan:
        """A dropless plan by NumPy's reference, on the device, so that kernels that use it do not depend on the backend's own."""
        plan = reference_plan(host_ids(self.host, n, e, k, load), e)
        return Plan(*(self._given(np.ascontiguousarray(part)) for part in plan))

    def offsets(self, rows: int, e: int, load: str) -> Array:
        """The bounds of each expert's rows.   -> int32 [e+1]"""
        return self._given(host_offsets(rows, e, load))

    def _given(self, array: Any) -> Array:
        """An array of the host, on the device."""
        self.bytes += array.nbytes
        return self.backend.from_host(array)


@cache
def normal_pool(backend: Backend, dtype: str) -> Array:
    """Standard normal numbers, made once for each backend of a process."""
    if dtype != "float32":
        return backend.xp.astype(normal_pool(backend, "float32"), backend.dtype(dtype))
    return backend.from_host(np.random.default_rng(0).standard_normal(POOL, dtype=np.float32))


def host_ids(host: np.random.Generator, n: int, e: int, k: int, load: str) -> Any:
    """The experts of each token, all different.   -> int32 [n,k], NumPy's"""
    score = host.gumbel(size=(min(n, TOKENS), e))
    if load == "skewed":
        score -= SKEW * np.log1p(np.arange(e))
    ids = np.argpartition(-score, k - 1, axis=1)[:, :k] if k < e else np.argsort(-score, axis=1)
    return np.resize(ids.astype(np.int32), (n, k))


@cache
def host_offsets(rows: int, e: int, load: str) -> Any:
    """The bounds of each expert's rows, always the same: a peer multiplies the rows that minimoe does.   -> int32 [e+1], NumPy's"""
    drawn = min(rows, TOKENS)
    counts = np.bincount(host_ids(np.random.default_rng(0), drawn, e, 1, load).ravel(), minlength=e) / drawn
    return np.floor(np.concatenate([[0.0], np.cumsum(counts)]) * rows + 0.5).astype(np.int32)


def reference_plan(ids: Any, e: int) -> Plan:
    """NumPy's plan of ids [n,k]."""
    weights = np.zeros(ids.shape, dtype=np.float32)
    plan: Plan = load("numpy").route(ids, weights, None, n_experts=e, rows=ids.size)
    return plan
