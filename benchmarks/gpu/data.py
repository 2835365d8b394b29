"""Random inputs on a device. Normal numbers are drawn once on the host and repeated, each array from another place on."""

from typing import Any

import numpy as np

from minimoe.backend import Array, Backend, load
from minimoe.reference.routing import Plan

POOL = 4_200_011  # numbers; odd, so that rows of a matrix differ
TOKENS = 4096  # whose experts are drawn; more tokens repeat them
SKEW = 1.0  # the r-th expert's share goes with r^-SKEW: with 64 experts the first takes a fifth of all slots


class Data:
    """Arrays of one backend."""

    def __init__(self, backend: Backend, seed: int = 0, pool: int = POOL) -> None:
        self.backend, self.host = backend, np.random.default_rng(seed)
        self.pools = {"float32": backend.from_host(self.host.standard_normal(pool, dtype=np.float32))}
        self.place = 0

    def normal(self, *shape: int, dtype: str = "float32", scale: float = 1.0) -> Array:
        """Standard normal numbers, times `scale`."""
        backend, pool = self.backend, self._pool(dtype)
        flat = backend.xp.empty(int(np.prod(shape)), dtype=backend.dtype(dtype))
        done = 0
        while done < flat.shape[0]:
            n = min(flat.shape[0] - done, pool.shape[0] - self.place)
            flat[done : done + n] = pool[self.place : self.place + n]
            done, self.place = done + n, (self.place + n) % pool.shape[0]
        if scale != 1.0:
            flat *= scale
        return backend.xp.reshape(flat, shape)

    def _pool(self, dtype: str) -> Array:
        if dtype not in self.pools:
            self.pools[dtype] = self.backend.xp.astype(self.pools["float32"], self.backend.dtype(dtype))
        return self.pools[dtype]

    def integers(self, limit: int, *shape: int) -> Array:
        """Uniform in 0 .. limit - 1, int32."""
        return self.backend.from_host(self.host.integers(0, limit, shape).astype(np.int32))

    def numbers(self, value: Any, dtype: type = np.float32) -> Array:
        """A given array or number, on the device; integers as int32."""
        return self.backend.from_host(np.asarray(value, dtype=np.int32 if dtype is int else dtype))

    def host_ids(self, n: int, e: int, k: int, load: str) -> Any:
        """The experts of each token, all different.   -> int32 [n,k], NumPy's"""
        drawn = min(n, TOKENS)
        score = self.host.gumbel(size=(drawn, e))
        if load == "skewed":
            score -= SKEW * np.log1p(np.arange(e))
        ids = np.argpartition(-score, k - 1, axis=1)[:, :k] if k < e else np.argsort(-score, axis=1)
        return np.resize(ids.astype(np.int32), (n, k))

    def ids(self, n: int, e: int, k: int, load: str) -> Array:
        """`host_ids` on the device."""
        return self.backend.from_host(self.host_ids(n, e, k, load))

    def plan(self, n: int, e: int, k: int, load: str) -> Plan:
        """A dropless plan by NumPy's reference, on the device: the kernels that use it do not depend on the backend's own."""
        plan = reference_plan(self.host_ids(n, e, k, load), e)
        return Plan(*(self.backend.from_host(np.ascontiguousarray(part)) for part in plan))

    def offsets(self, rows: int, e: int, load: str) -> Array:
        """The bounds of each expert's rows.   -> int32 [e+1]"""
        counts = np.bincount(self.host_ids(min(rows, TOKENS), e, 1, load).ravel(), minlength=e) / min(rows, TOKENS)
        ends = np.floor(np.concatenate([[0.0], np.cumsum(counts)]) * rows + 0.5).astype(np.int32)
        return self.backend.from_host(ends)


def reference_plan(ids: Any, e: int) -> Plan:
    """NumPy's plan of ids [n,k]."""
    weights = np.zeros(ids.shape, dtype=np.float32)
    plan: Plan = load("numpy").route(ids, weights, None, n_experts=e, rows=ids.size)
    return plan
